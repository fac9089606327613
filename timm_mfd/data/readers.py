"""One function per data set: official layouts in, `ImageData` out."""

import os
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from ..extras import require
from .cifar import PUBLISHED, load_cifar
from .facescrub import SIDE
from .folders import file_images, listing, load_folder, readable
from .hfds import load_hfds
from .images import ArrayImages, FileImages, ImageData

DATASETS = ("digits", *PUBLISHED, "tiny_imagenet", "facescrub", "folder")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    workers: int = 0,
) -> ImageData:
    """Open a data set by name.

    Args:
        name: One of `DATASETS`, or `hfds/` and a data set of the Hugging Face Hub.
        data_dir: Where it lies; not needed for `digits`, and for `hfds/` where downloads are kept.
        image_size: For `folder` and `hfds/`: resize every image to this side. Default: all images must have one size.
        val_fraction: For `folder`: hold out this part of the images, which come without a held-out split.
        seed: For `val_fraction`: which of them.
        cache_dir: For CIFAR in image files, which is compared with the published pixels, and so decoded, when it is
            opened: where the pixels are kept. Default: as for `place`.
        workers: For the same: decoding processes.

    Returns:
        Training and held-out images with their classes and preprocessing.

    Raises:
        ValueError: If the name is unknown, the folder is missing or has another layout than expected, or CIFAR's images
            are not the published ones.
        ImageDecodeError: If an image that is needed now cannot be decoded.

    Example:
        >>> data = load_dataset("tiny_imagenet", "data/tiny-imagenet-200")
    """
    if val_fraction is not None and name != "folder":
        raise ValueError(f"val_fraction (--val-fraction) {val_fraction:g} is for 'folder'; {name!r} has its own split")
    if name.startswith("hfds/"):
        return load_hfds(name.removeprefix("hfds/"), None if data_dir is None else Path(data_dir), image_size)
    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(DATASETS)}"
        raise ValueError(f"unknown dataset {name!r}; {hint}")
    if image_size is not None and name != "folder":
        raise ValueError(f"image size {image_size} applies to 'folder' and 'hfds/...' only; {name!r} has its own")
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f"dataset 'digits' is built in and does not read {str(data_dir)!r}; choose a --dataset")
        return _digits()
    if data_dir is None:
        raise ValueError(f"dataset {name!r} needs a data directory (--data-dir)")
    root = Path(os.path.expanduser(data_dir))
    if not root.is_dir():
        raise ValueError(f"data directory {str(root)!r} does not exist or is not a folder; choose another --data-dir")
    if name in PUBLISHED:
        return load_cifar(name, root, cache_dir, workers)
    if name == "folder":
        return load_folder(root, image_size, val_fraction=val_fraction, seed=seed)
    return {"tiny_imagenet": _tiny_imagenet, "facescrub": _facescrub}[name](root)


def single_image(path: str | Path, size: tuple[int, int]) -> ImageData:
    """Make a data set of one image.

    Args:
        path: Its file.
        size: `(H, W)`; the shorter side is scaled to it, and the middle taken.

    Returns:
        The image as the only held-out one, under its file's name.

    Raises:
        ImageDecodeError: If it cannot be read.
    """
    images = FileImages([str(path)], [0], size, resize=True)
    pixels = ArrayImages(images[0][None], [0], images.paths)
    name = readable(Path(path).name)
    return ImageData(name, train=pixels, test=pixels, class_names=(name,), test_split="image")


def _digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; a fixed stratified fifth is held out."""
    require("train", "the data set 'digits'")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=3)
    train_x, test_x, train_y, test_y = train_test_split(
        rgb, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return ImageData(
        name="digits",
        train=ArrayImages(train_x, train_y),
        test=ArrayImages(test_x, test_y),
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.305,) * 3,
        std=(0.376,) * 3,
        pad=1,  # half the stroke width; the paper's 4 would push an 8x8 digit out of the picture
        flip=False,  # a mirrored digit is no digit
    )


def _tiny_imagenet(root: Path) -> ImageData:
    """The official layout; validation labels are in `val_annotations.txt`, not in folders."""
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    expected = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
    if missing := [part for part in expected if not (root / part).exists()]:
        raise ValueError(
            f"tiny_imagenet: {str(root)!r} lacks {', '.join(missing)}; expected the unpacked official archive with "
            f"{', '.join(expected)}, found {listing(root)}"
        )
    wnids = sorted(" ".join(_lines(root / "wnids.txt")).split())
    index = {wnid: i for i, wnid in enumerate(wnids)}
    train: list[tuple[str, int]] = []
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        files = sorted(entry.path for entry in os.scandir(folder)) if folder.is_dir() else []
        if not files:
            raise ValueError(f"tiny_imagenet: no training images of class {wnid} in {str(folder)!r}")
        train += [(path, index[wnid]) for path in files]
    test: list[tuple[str, int]] = []
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise ValueError(f"tiny_imagenet: {annotations}:{number} names no class of wnids.txt: {line[:60]!r}")
        test.append((str(root / "val" / "images" / fields[0]), index[fields[1]]))
    named = _lines(root / "words.txt") if (root / "words.txt").is_file() else []
    words = dict(line.split("\t", 1) for line in named if "\t" in line)
    return ImageData(
        name="tiny_imagenet",
        train=file_images(train, (64, 64)),
        test=file_images(test, (64, 64)),
        class_names=tuple(words.get(wnid, wnid) for wnid in wnids),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        test_split="val",
    )


def _facescrub(root: Path) -> ImageData:
    """What `facescrub.prepare` writes, or the same layout from elsewhere."""
    root = root / "facescrub" if (root / "facescrub").is_dir() else root
    data = load_folder(root, name="facescrub")
    if data.image_size != (SIDE, SIDE):
        height, width = data.image_size
        raise ValueError(
            f"facescrub: images are {width}x{height}, expected {SIDE}x{SIDE}; "
            "train_scripts/prepare_facescrub.py makes them, or choose --dataset folder"
        )
    return replace(data, mean=(0.5,) * 3, std=(0.5,) * 3)  # the custom in face recognition


def _lines(path: Path) -> list[str]:
    """Read a text file of UTF-8, whatever the system's encoding; a byte order mark is no text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
