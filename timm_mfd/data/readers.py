"""One function per data set: official layouts in, `ImageData` out."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from .facescrub import SIDE
from .hfds import load_hfds
from .images import ArrayImages, FileImages, ImageData, read_image


def load_dataset(name: str, data_dir: str | Path | None = None, image_size: int | None = None) -> ImageData:
    """Open a data set by name.

    Args:
        name: One of `DATASETS`, or `hfds/` and a data set of the Hugging Face Hub.
        data_dir: Where it lies; not needed for `digits`, and for `hfds/` where downloads are kept.
        image_size: For `folder` and `hfds/`: resize every image to this side. Default: all images must have one size.

    Returns:
        Training and held-out images with their classes and preprocessing.

    Raises:
        ValueError: If the name is unknown, the folder is missing or has another layout than expected.

    Example:
        >>> data = load_dataset("tiny_imagenet", "data/tiny-imagenet-200")
    """
    if name.startswith("hfds/"):
        return load_hfds(name.removeprefix("hfds/"), None if data_dir is None else Path(data_dir), image_size)
    if name not in _READERS:
        close = get_close_matches(name, _READERS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(_READERS)}"
        raise ValueError(f"unknown dataset {name!r}; {hint}")
    if image_size is not None and name != "folder":
        raise ValueError(f"image size {image_size} applies to 'folder' and 'hfds/...' only; {name!r} has its own")
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f"dataset 'digits' is built in and does not read {str(data_dir)!r}; choose a --dataset")
        return _digits()
    if data_dir is None:
        raise ValueError(f"dataset {name!r} needs a data directory (--data-dir)")
    root = Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"data directory {str(root)!r} does not exist or is not a folder; choose another --data-dir")
    return _folder(root, image_size) if name == "folder" else _READERS[name](root)


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
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    return ImageData(name, train=pixels, test=pixels, class_names=(name,), test_split="image")


def _digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; a fixed stratified fifth is held out."""
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


_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _cifar(reader: type[CIFAR10], name: str, root: Path, mean: tuple[float, float, float], std: tuple) -> ImageData:
    # The official archive holds this folder; accept its parent (as torchvision does) and the folder itself.
    if root.name == reader.base_folder:
        root = root.parent
    if not (root / reader.base_folder).is_dir():
        raise ValueError(
            f"{name}: expected the folder {reader.base_folder}/ of the official archive in {str(root)!r}, "
            f"found {_listing(root)}"
        )
    try:
        train, test = (reader(str(root), train=train) for train in (True, False))
    except RuntimeError:
        raise ValueError(
            f"{name}: files in {str(root / reader.base_folder)!r} are missing or do not have the official checksums, "
            f"found {_listing(root / reader.base_folder)}"
        ) from None
    return ImageData(
        name=name,
        train=ArrayImages(train.data, train.targets),
        test=ArrayImages(test.data, test.targets),
        class_names=tuple(train.classes),
        mean=mean,
        std=std,
    )


def _cifar10(root: Path) -> ImageData:
    return _cifar(CIFAR10, "cifar10", root, _CIFAR10_MEAN, _CIFAR10_STD)


def _cifar10_jpeg(root: Path) -> ImageData:
    """CIFAR-10 re-encoded as JPEG files: a proxy, because the pixels are not the original ones."""
    root = root / "cifar10-jpeg" if (root / "cifar10-jpeg").is_dir() else root
    if not (root / "train").is_dir():
        raise ValueError(f"cifar10_jpeg: expected cifar10-jpeg/ in {str(root)!r}, or train/ and test/ of it")
    data = _folder(root, name="cifar10_jpeg")
    if data.image_size != (32, 32):
        height, width = data.image_size
        raise ValueError(f"cifar10_jpeg: images are {width}x{height}, expected 32x32; choose --dataset folder")
    return replace(data, mean=_CIFAR10_MEAN, std=_CIFAR10_STD)


def _cifar100(root: Path) -> ImageData:
    return _cifar(CIFAR100, "cifar100", root, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _tiny_imagenet(root: Path) -> ImageData:
    """The official layout; validation labels are in `val_annotations.txt`, not in folders."""
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    expected = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
    if missing := [part for part in expected if not (root / part).exists()]:
        raise ValueError(
            f"tiny_imagenet: {str(root)!r} lacks {', '.join(missing)}; expected the unpacked official archive with "
            f"{', '.join(expected)}, found {_listing(root)}"
        )
    wnids = sorted((root / "wnids.txt").read_text().split())
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
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise ValueError(f"tiny_imagenet: {annotations}:{number} names no class of wnids.txt: {line[:60]!r}")
        test.append((str(root / "val" / "images" / fields[0]), index[fields[1]]))
    words = dict(line.split("\t", 1) for line in _lines_if_any(root / "words.txt") if "\t" in line)
    return ImageData(
        name="tiny_imagenet",
        train=_files(train, (64, 64)),
        test=_files(test, (64, 64)),
        class_names=tuple(words.get(wnid, wnid) for wnid in wnids),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        test_split="val",
    )


def _facescrub(root: Path) -> ImageData:
    """What `facescrub.prepare` writes, or the same layout from elsewhere."""
    root = root / "facescrub" if (root / "facescrub").is_dir() else root
    data = _folder(root, name="facescrub")
    if data.image_size != (SIDE, SIDE):
        height, width = data.image_size
        raise ValueError(
            f"facescrub: images are {width}x{height}, expected {SIDE}x{SIDE}; "
            "train_scripts/prepare_facescrub.py makes them, or choose --dataset folder"
        )
    return replace(data, mean=(0.5,) * 3, std=(0.5,) * 3)  # the custom in face recognition


def _folder(root: Path, image_size: int | None = None, name: str = "folder") -> ImageData:
    """`train/` and `val/` or `test/`, each with one folder per class."""
    test_split = next((split for split in ("val", "test") if (root / split).is_dir()), None)
    if test_split is None or not (root / "train").is_dir():
        raise ValueError(
            f"{name}: expected {str(root)!r} to hold train/ and val/ or test/, each with one folder per class, "
            f"found {_listing(root)}"
        )
    try:
        classes, index = find_classes(str(root / "train"))
        held_out, _ = find_classes(str(root / test_split))
        if missing := sorted(set(classes) - set(held_out)):
            warnings.warn(f"{name}: no class folder {missing[0]!r} in {test_split}/; it is not evaluated", stacklevel=2)
        if unknown := sorted(set(held_out) - set(classes)):
            raise ValueError(f"{name}: class {unknown[0]!r} is in {test_split}/ but not in train/")
        for split in ("train", test_split):
            _refuse_loops(root / split)
        train = make_dataset(str(root / "train"), index, extensions=IMG_EXTENSIONS)
        test = make_dataset(
            str(root / test_split), {label: index[label] for label in held_out}, extensions=IMG_EXTENSIONS
        )
    except FileNotFoundError as error:
        raise ValueError(f"{name}: {error}") from None
    size = (image_size, image_size) if image_size else read_image(train[0][0]).size[::-1]
    return ImageData(
        name=name,
        train=_files(train, size, resize=image_size is not None),
        test=_files(test, size, resize=image_size is not None),
        class_names=tuple(classes),
        test_split=test_split,
    )


_READERS: dict[str, Callable[..., ImageData]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "tiny_imagenet": _tiny_imagenet,
    "facescrub": _facescrub,
    "cifar10_jpeg": _cifar10_jpeg,
    "folder": _folder,
}
DATASETS = tuple(_READERS)


def _files(samples: list[tuple[str, int]], size: tuple[int, int], resize: bool = False) -> FileImages:
    return FileImages([path for path, _ in samples], [label for _, label in samples], size, resize)


def _refuse_loops(root: Path) -> None:
    """Refuse a link to a folder above it, through which every image would be found again and again."""
    for folder, names, _ in os.walk(root, followlinks=True):
        for link in (path for name in names if os.path.islink(path := os.path.join(folder, name))):
            target = Path(link).resolve()
            # The way here may have led through links itself, so every folder on it counts.
            way = [Path(folder), *Path(folder).parents]
            if any(target == above.resolve() for above in way) or target in root.resolve().parents:
                raise ValueError(f"folder: the link {link!r} leads back to a folder above it")


def _lines_if_any(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _listing(folder: Path) -> str:
    """A few names of what is in a folder, for error messages."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    shown = ", ".join(names[:8]) or "nothing"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
