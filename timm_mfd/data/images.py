"""Where pixels come from: arrays in memory or image files, always as uint8 `[H, W, 3]`."""

import functools
import hashlib
import math
import os
import stat
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from ..errors import first_words

# What Pillow decodes itself, by format and ending. EPS, PS, PDF and WMF are for other programs, which it would start.
_ENDINGS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "QOI": (".qoi",),
    "SGI": (".rgb", ".rgba", ".sgi"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_ENDINGS = tuple(ending for endings in _ENDINGS.values() for ending in endings)


class ImageDecodeError(ValueError):
    """An image file cannot be read; the message names it."""


class ArrayImages(Dataset[Tensor]):
    """Images that are in memory.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        labels: Class indices `[N]`.
        paths: The files they were decoded from, if any.
    """

    def __init__(
        self,
        pixels: np.ndarray | Tensor,
        labels: Sequence[int] | np.ndarray | Tensor,
        paths: Sequence[str] = (),
    ):
        self.pixels = torch.as_tensor(pixels)
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.paths = list(paths)
        self.size: tuple[int, int] = (self.pixels.shape[1], self.pixels.shape[2])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]

    def identity(self) -> str:
        """Return a sha256 that changes with the pixels and the labels."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for content in (self.pixels, self.labels):
            digest.update(content.cpu().contiguous().numpy().data)
        return digest.hexdigest()


class FileImages(Dataset[Tensor]):
    """Image files, decoded when asked for.

    Args:
        paths: One file per image.
        labels: Class indices `[N]`.
        size: `(H, W)` of every image. An image of another size is an error unless `resize`.
        resize: Scale the shorter side and crop the centre to `size`. None: no, and whoever opens the data set cannot
            choose it.

    Attributes:
        crop_pct: When images are resized, how much of the shorter side the crop keeps.
    """

    crop_pct: float = 1.0

    def __init__(self, paths: Sequence[str], labels: Sequence[int], size: tuple[int, int], resize: bool | None = False):
        self.paths = list(paths)
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.size = size
        self.resize = bool(resize)
        self._remedy = "" if resize is None else "; an image_size (--image-size SIDE) resizes them all"

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> str:
        """Return a sha256 that stays when the folder moves: names, sizes and labels, and the bytes of some files."""
        some = set(range(0, len(self), max(1, len(self) // 256)))
        cropped = () if self.crop_pct == 1 else (self.crop_pct,)
        digest = hashlib.sha256(repr((self.size, self.resize, *cropped)).encode())
        for index, (path, label) in enumerate(zip(self.paths, self.labels.tolist(), strict=True)):
            try:
                size, content = os.path.getsize(path), b""
                if index in some and os.path.isfile(path):
                    content = Path(path).read_bytes()
            except OSError:
                size, content = -1, b""  # decoding will name it
            digest.update(os.fsencode(os.path.basename(path)) + f"\0{size}\0{label}\n".encode() + content)
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Tensor:
        """Decode one image.

        Raises:
            ImageDecodeError: If the file cannot be decoded or has another size.
        """
        path = self.paths[index]
        image = self.read(index)
        if image.size != self.size[::-1] or (self.resize and self.crop_pct < 1):
            if not self.resize:
                raise ImageDecodeError(
                    f"{path} is {image.width}x{image.height}, the other images are {self.size[1]}x{self.size[0]}"
                    f"{self._remedy}"
                )
            if self.crop_pct < 1:  # as timm evaluates
                image = resize(image, [math.floor(min(self.size) / self.crop_pct)], InterpolationMode.BICUBIC)
                image = center_crop(image, list(self.size))
            else:
                image = ImageOps.fit(image, self.size[::-1], method=Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image))

    def read(self, index: int) -> Image.Image:
        """Decode one image, of its own size."""
        return read_image(self.paths[index])

    def fingerprint(self) -> str:
        """Return a sha256 over the paths, sizes and times of the files: whether what was decoded before is still it."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                status = os.stat(path)
                # A copy may keep the modification time of other content; the change time it cannot keep.
                times = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n"
                digest.update(os.fsencode(os.path.abspath(path)) + times.encode())
            except OSError:
                digest.update(os.fsencode(path) + b"\0missing\n")  # decoding will name it
        return digest.hexdigest()


def read_image(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grey, palette and CMYK images are converted; of 16 bits the upper 8 are kept; of an animation the first picture. As
    by torchvision's and timm's readers, an alpha channel is dropped, and the orientation that a camera noted (EXIF) is
    not applied: pixels are read as they lie in the file.

    Args:
        source: A path or an open file.
        name: What to call an open file in an error.

    Raises:
        ImageDecodeError: If the file is missing, unreadable, truncated, no image, or has floating-point pixels.
    """
    try:
        with open_image(source) as image:
            if image.mode == "I" or image.mode.startswith("I;16"):
                return _upper_bits(np.array(image)).convert("RGB")
            if image.mode == "F":
                raise ValueError("floating-point pixels have no defined range")
            if "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Image.UnidentifiedImageError:
        empty = isinstance(source, str | Path) and os.path.getsize(source) == 0
        what = "it is empty" if empty else "or of a kind that Pillow does not read"
        raise ImageDecodeError(f"cannot decode {name or source}: not an image, {what}") from None
    except Exception as error:  # whatever a decoder raises on whatever lies there
        reason = getattr(error, "strerror", None) or first_words(error)
        raise ImageDecodeError(f"cannot decode {name or source}: {reason}") from None


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image in one of the formats that Pillow decodes itself, without decoding it yet."""
    if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("not a file")  # opening a pipe would wait for ever
    return Image.open(source, formats=_formats())


@functools.cache
def _formats() -> list[str]:
    """Return which formats this Pillow has: some are left out when it is built."""
    Image.init()
    return [name for name in _ENDINGS if name in Image.OPEN]


def _upper_bits(pixels: np.ndarray) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f"pixel values from {pixels.min()} to {pixels.max()} do not fit 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training: pixels, classes and the preprocessing that belongs to it.

    Attributes:
        name: Name on the command line.
        train: Training images.
        test: Held-out images.
        class_names: One name per class index.
        mean: Per-channel mean of pixel values in [0, 1].
        std: Per-channel standard deviation of pixel values in [0, 1].
        pad: Zero pixels added on each side before the random crop.
        flip: Whether a mirrored image still is of its class.
        test_split: What `test` is, for tables and cards.
        crop_pct: How much of the shorter side of a resized test image the crop keeps.
        source: Which of several forms it was read from, and where, for the screen.
    """

    name: str
    train: ArrayImages | FileImages
    test: ArrayImages | FileImages
    class_names: tuple[str, ...]
    mean: tuple[float, float, float] = field(default=(0.485, 0.456, 0.406))
    std: tuple[float, float, float] = field(default=(0.229, 0.224, 0.225))
    pad: int = 4
    flip: bool = True
    test_split: str = "test"
    crop_pct: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        for split, images in (("train", self.train), (self.test_split, self.test)):
            if len(images) == 0:
                raise ValueError(f"{self.name}: the {split} split has no images")
            outside = images.labels[(images.labels < 0) | (images.labels >= self.num_classes)]
            if len(outside):
                raise ValueError(
                    f"{self.name}: label {int(outside[0])} in {split} is outside the {self.num_classes} classes"
                )

    def cropped(self, crop_pct: float) -> "ImageData":
        """Return the data set with test images as timm's central crop shows them; only resized ones are cropped."""
        if not (isinstance(self.test, FileImages) and self.test.resize):
            return self
        test = copy(self.test)
        test.crop_pct = crop_pct
        return replace(self, test=test, crop_pct=crop_pct)

    def identity(self) -> str:
        """Return a sha256 that changes when the images or classes do: what a resumed run must find again."""
        parts = (self.name, self.class_names, self.train.identity(), self.test.identity())
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(H, W)` of the images."""
        return self.train.size
