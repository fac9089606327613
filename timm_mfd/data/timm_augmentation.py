"""timm's augmentation of images of any size, each a function of (seed, epoch, image)."""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import first_words, named
from .images import ArrayImages, FileImages, ImageData, ImageDecodeError


class AugmentedImages(Dataset[Tensor]):
    """Training images as `timm.data.create_transform` makes them: random crops, flips and what `aa` names.

    Which random numbers an image gets does not depend on the order, on processes and workers, or on where a run was
    resumed.

    Args:
        data: The data set.
        seed: The run's seed.
        aa: timm's name of an auto-augmentation, such as `"rand-m9-mstd0.5-inc1"`. Default: none, but color jitter.
        random_erasing: Probability of erasing a rectangle.

    Raises:
        ValueError: If timm does not know `aa`.

    Example:
        >>> augmented = AugmentedImages(data, seed=0, aa="rand-m9-mstd0.5-inc1")
        >>> augmented[3, 17]  # image 17 in epoch 3: [3, H, W], normalized
    """

    def __init__(self, data: ImageData, *, seed: int, aa: str | None = None, random_erasing: float = 0.0):
        self.images: ArrayImages | FileImages = data.train
        self.seed, self.aa = seed, aa
        with named(f"--aa {aa} is not of timm (for example rand-m9-mstd0.5-inc1)"):
            self.transform: Callable[[Image.Image], Any] = create_transform(
                (3, *data.image_size), is_training=True, hflip=0.5 if data.flip else 0.0, auto_augment=aa,
                interpolation="bicubic", mean=data.mean, std=data.std, re_prob=random_erasing, re_mode="pixel",
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        """Return an image of an epoch.

        Args:
            place: The number of the epoch and the index of the image.

        Raises:
            ImageDecodeError: If the file cannot be decoded, or timm's operations fail on it.
        """
        epoch, index = place
        image = self._picture(index)
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)
        torch.manual_seed(number >> 1)
        try:
            return self.transform(image)
        except Exception as error:  # such as an operation that this Pillow no longer takes
            name = self.images.paths[index] if self.images.paths else f"image {index}"
            raise ImageDecodeError(
                f"{name}: timm's augmentation failed: {first_words(error)}; choose another --aa than {self.aa}"
            ) from None

    def _picture(self, index: int) -> Image.Image:
        if isinstance(self.images, FileImages):
            return self.images.read(index)
        return Image.fromarray(self.images.pixels[index].cpu().numpy())
