"""CIFAR-10 and CIFAR-100 in whatever form they come: the same images in the same order, told by their digests."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from .folders import is_hidden, listing, load_folder
from .hfds import load_hfds
from .images import ArrayImages, FileImages, ImageData
from .resident import decoded

_SIZE = (32, 32)
_CLASSES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CLASSES_100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Published:
    """One of the two data sets as it was published.

    Attributes:
        archive: torchvision's reader of the official python archive.
        hub_folder: Folder of the parquet files in the Hub's `uoft-cs/NAME`.
        hub_label: Their column of labels, which count by index: some of their names are other than the archive's.
        class_names: The archive's, in the order of the labels.
        mean: Per-channel mean of the training images.
        std: Per-channel standard deviation of the training images.
        per_class: Number of images of each class in each split.
        digests: What `digest` returns for each split in canonical order.
    """

    archive: type[CIFAR10]
    hub_folder: str
    hub_label: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    per_class: dict[str, int]
    digests: dict[str, str]


PUBLISHED = {
    "cifar10": Published(
        archive=CIFAR10,
        hub_folder="plain_text",
        hub_label="label",
        class_names=tuple(_CLASSES_10.split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        per_class={"train": 5_000, "test": 1_000},
        digests={
            "train": "367eab66eeca2982be603e3e2e7b4b744c1fe37a08180a06051132fe9b3f92df",
            "test": "3c7440e4326fdb8defd96b765c26a8b3ded8eee4f3f90cf8ed3282f82250a2d5",
        },
    ),
    "cifar100": Published(
        archive=CIFAR100,
        hub_folder="cifar100",
        hub_label="fine_label",
        class_names=tuple(_CLASSES_100.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        per_class={"train": 500, "test": 100},
        digests={
            "train": "475e20cb26ac8d3b8ee6fef13f4b21e49f63b884c305e2b66bb5a156f13818d7",
            "test": "f5bbeb1f5312b711c6a3811fe2c334a8e247b177aa9d307ebef0750694407735",
        },
    ),
}


def load_cifar(name: str, root: Path, cache_dir: str | Path | None = None, workers: int = 0) -> ImageData:
    """Open CIFAR-10 or CIFAR-100 from the official archive, class folders or a parquet copy of the Hub's.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        root: The data set's own folder or its parent. Where several forms are found, the first of the three is read.
        cache_dir: Where images of files are kept once they are decoded, see `place`.
        workers: Processes that decode them.

    Returns:
        All images, by class and then by the SHA-256 of their pixels: the same from every form.

    Raises:
        ValueError: If no form is there, or what is there is not the published data set. (Of an archive with the
            official checksums that is only reported: its pixels are the published ones by definition.)
        ImageDecodeError: If an image cannot be decoded.

    Example:
        >>> load_cifar("cifar100", Path("data")).source
        'class folders in data/cifar100'
    """
    published = PUBLISHED[name]
    form, folder, read = _find(name, root)
    source = f"{form} in {folder}"

    def refuse(split: str, reason: str) -> NoReturn:
        raise ValueError(
            f"{name}: the {split} split of the {source} is not the published one: {reason}; "
            "--dataset folder takes any images in class folders, hfds/FOLDER any parquet files"
        )

    # What can be told without decoding is told first.
    splits = read(name, folder)
    is_archive = read is _read_archive
    for split, images in splits.items():
        if not is_archive and (reason := _incomplete(images, published, split)):
            refuse(split, reason)
    ordered = {}
    for split, images in splits.items():
        if isinstance(images, FileImages):
            pixels = decoded(images, cache_dir, workers, f"{name} {split}")
            images = ArrayImages(pixels, images.labels, images.paths)
        ordered[split] = in_canonical_order(images)
        if digest(ordered[split]) == published.digests[split]:
            continue
        if not is_archive:
            refuse(split, "images were changed, encoded anew or doubled, or are of another class")
        warnings.warn(
            f"{name}: the {split} split has the official checksums and not the digest known here, which must be wrong; "
            "it is used under its own identity",
            stacklevel=2,
        )
    return ImageData(
        name=name,
        train=ordered["train"],
        test=ordered["test"],
        class_names=published.class_names,
        mean=published.mean,
        std=published.std,
        source=source,
    )


def in_canonical_order(images: ArrayImages) -> ArrayImages:
    """Sort images by class, then by the SHA-256 of their bytes in the order `[H, W, 3]`."""
    labels, pixels = images.labels.tolist(), images.pixels.contiguous()
    hashes = [hashlib.sha256(image.data).digest() for image in pixels.numpy()]
    order = sorted(range(len(labels)), key=lambda index: (labels[index], hashes[index]))
    paths = [images.paths[index] for index in order] if images.paths else ()
    return ArrayImages(pixels[order], images.labels[order], paths)


def digest(images: ArrayImages) -> str:
    """Return the SHA-256 over the pixels uint8 `[N, H, W, 3]`, then the labels as little-endian int64."""
    content = hashlib.sha256(images.pixels.numpy().data)
    content.update(images.labels.numpy().astype("<i8").data)
    return content.hexdigest()


Splits = dict[str, ArrayImages | FileImages]


def _find(name: str, root: Path) -> tuple[str, Path, Callable[[str, Path], Splits]]:
    """Return the form that is there, its folder, and what reads it."""
    published = PUBLISHED[name]
    archive = published.archive
    homes = (root / name, root)
    for folder in (root, *(home / archive.base_folder for home in homes)):
        files = [file for file, _ in archive.train_list + archive.test_list]
        if folder.resolve().name == archive.base_folder and any((folder / file).is_file() for file in files):
            return "official archive", folder, _read_archive
    for folder in homes:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return "class folders", folder, _read_class_folders
    for folder in (home / part for home in homes for part in (".", published.hub_folder, "data")):
        if any(folder.glob("*.parquet")):
            return "parquet files", folder, _read_parquet
    raise ValueError(
        f"{name}: expected in {str(root)!r} the folder {archive.base_folder}/ of the official archive, or train/ and "
        f"test/ with one folder per class, or parquet files of the Hub's uoft-cs/{name}; found {listing(root)}"
    )


def _read_archive(name: str, folder: Path) -> Splits:
    reader = PUBLISHED[name].archive
    try:
        train, test = (reader(str(folder.resolve().parent), train=train) for train in (True, False))
    except RuntimeError:
        raise ValueError(
            f"{name}: files in {str(folder)!r} are missing or do not have the official checksums, "
            f"found {listing(folder)}"
        ) from None
    return {"train": ArrayImages(train.data, train.targets), "test": ArrayImages(test.data, test.targets)}


def _read_class_folders(name: str, folder: Path) -> Splits:
    names = PUBLISHED[name].class_names
    for split in ("train", "test"):
        found = {entry.name for entry in (folder / split).iterdir() if entry.is_dir() and not is_hidden(entry.name)}
        if unknown := sorted(found - set(names)):
            raise ValueError(
                f"{name}: the folder {unknown[0]!r} in {str(folder / split)!r} is named like none of its {len(names)} "
                "classes; --dataset folder takes any images"
            )
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{name}: {str(folder / split)!r} lacks the class folder {missing[0]!r}")
    data = load_folder(folder, name=name, held_out=("test",))
    if empty := sorted(set(names) - set(data.class_names)):
        raise ValueError(f"{name}: the class folder {empty[0]!r} in {str(folder)!r} is empty")
    return {"train": data.train, "test": data.test}


def _read_parquet(name: str, folder: Path) -> Splits:
    published = PUBLISHED[name]
    data = load_hfds(str(folder.absolute()), label=published.hub_label)
    if data.num_classes != len(published.class_names):
        raise ValueError(
            f"{name}: the parquet files in {str(folder)!r} have {data.num_classes} classes, "
            f"not {len(published.class_names)}"
        )
    return {"train": data.train, "test": data.test}


def _incomplete(images: ArrayImages | FileImages, published: Published, split: str) -> str:
    """Return what is wrong with the number or the size of the images; nothing if both are right."""
    if images.size != _SIZE:
        return f"images of {images.size[1]}x{images.size[0]} pixels, not {_SIZE[1]}x{_SIZE[0]}"
    classes, wanted = len(published.class_names), published.per_class[split]
    if len(images) != classes * wanted:
        return f"{len(images):,} images, not {classes * wanted:,}"
    counts: Tensor = torch.bincount(images.labels, minlength=classes)
    label = int((counts != wanted).long().argmax())
    if counts[label] != wanted:
        return f"{counts[label]:,} images of {published.class_names[label]!r}, not {wanted:,}"
    return ""
