"""Data sets of the Hugging Face Hub, or of a folder that its `datasets` library reads, through timm's own reader."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..errors import first_words
from .images import FileImages, ImageData, ImageDecodeError, read_image

# What held-out images are called, in the order of preference: a test split often has no labels.
_HELD_OUT = ("validation", "valid", "val", "test")


class HubImages(FileImages):
    """Encoded images of one split, decoded when asked for.

    Args:
        reader: timm's reader.
        name: What to call the split in messages.
        size: As for `FileImages`.
        resize: As for `FileImages`.
    """

    def __init__(self, reader: Any, name: str, size: tuple[int, int], resize: bool):
        names = [f"image {index} of {name}" for index in range(len(reader))]
        labels = list(reader.iter_targets())
        if None in labels:
            raise ValueError(f"the label of image {labels.index(None)} of {name} is missing")
        super().__init__(names, labels, size, resize)
        self._reader = reader

    def read(self, index: int) -> Image.Image:
        """Decode one image, of its own size."""
        with _encoded(self._reader, index, self.paths[index]) as file:
            return read_image(file, name=self.paths[index])

    def identity(self) -> str:
        """Return a sha256 that stays when the folder moves: labels, and the bytes of some images."""
        digest = hashlib.sha256(repr((self.size, self.resize, self.labels.tolist())).encode())
        for index in range(0, len(self), max(1, len(self) // 256)):
            with _encoded(self._reader, index, self.paths[index]) as file:
                digest.update(file.read())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a sha256 that changes when the files behind the data set do."""
        digest = hashlib.sha256(self.identity().encode())
        for file in self._reader.dataset.cache_files:
            status = os.stat(file["filename"])
            digest.update(f"{file['filename']}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def load_hfds(
    name: str, cache_dir: Path | None = None, image_size: int | None = None, label: str | None = None
) -> ImageData:
    """Open a data set with the splits `train` and `validation` or `test`, an image column and a column of classes.

    Args:
        name: After `hfds/`: an id of the Hub such as `uoft-cs/cifar100`, or a folder.
        cache_dir: Where the library keeps what it downloads. Default: the library's choice.
        image_size: Resize all images to this side. Default: the images must all have one size.
        label: The column of classes. Default: the first.

    Returns:
        Training and held-out images; the first column of images is read.

    Raises:
        ValueError: If the library is missing, or the data set or what is needed of it.
    """
    title = f"hfds/{name}"
    if not name:
        raise ValueError("dataset 'hfds/' lacks a name: hfds/ORG/NAME on the Hub, or a folder as hfds/./FOLDER")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"dataset {title!r} needs the library 'datasets'; pip install 'timm_mfd[hfds]'") from None
    from timm.data import create_reader

    try:
        splits = datasets.load_dataset(name, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:  # the library runs readers of many formats
        reason = str(error).strip().splitlines() or [type(error).__name__]
        cause = f" ({first_words(error.__cause__)})" if error.__cause__ else ""
        raise ValueError(f"dataset {title!r} cannot be loaded: {reason[0]}{cause}") from error
    held_out = next((split for split in _HELD_OUT if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(f"dataset {title!r} has no train and validation or test splits, but {', '.join(splits)}")
    features = splits["train"].features
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    keys = {what: [key for key, feature in features.items() if isinstance(feature, kinds[what])] for what in kinds}
    for what, found in keys.items():
        if not found:
            columns = ", ".join(f"{key} ({_kind(feature)})" for key, feature in features.items())
            values = [key for key, feature in features.items() if isinstance(feature, datasets.Value)]
            makes = f"; class_encode_column({values[0]!r}) of the library makes them of its values" if values else ""
            hint = makes * (what == "label")
            kind = "class labels" if what == "label" else "images"
            raise ValueError(f"dataset {title!r} has no column of {kind}, but {columns}{hint}")
    if label is not None and label not in keys["label"]:
        raise ValueError(f"dataset {title!r} has no column of labels {label!r}, but {', '.join(features)}")
    read: dict[str, Any] = {"input_key": keys["image"][0], "target_key": label or keys["label"][0]}
    readers = {split: create_reader(title, root=cache_dir, split=split, **read) for split in ("train", held_out)}
    with _encoded(readers["train"], 0, f"image 0 of {title} train") as file:
        first = read_image(file, name=f"image 0 of {title} train")
    size = (image_size, image_size) if image_size else first.size[::-1]
    train, test = (
        HubImages(reader, f"{title} {split}", size, image_size is not None) for split, reader in readers.items()
    )
    return ImageData(
        name=title,
        train=train,
        test=test,
        class_names=tuple(features[read["target_key"]].names),
        test_split=held_out,
    )


def _encoded(reader: Any, index: int, name: str) -> BinaryIO:
    """Return an image as the data set holds it; whatever timm's reader raises names the image."""
    try:
        return reader[index][0]
    except Exception as error:
        picture = reader.dataset[index].get(reader.image_key)
        reason = "the data set has none" if picture is None else first_words(error)
        raise ImageDecodeError(f"cannot read {name}: {reason}") from None


def _kind(feature: Any) -> str:
    """Return what a column holds: the type of its values, or the name of the feature."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
