"""Batches on the device of a process: the same images in the same order whatever the number of processes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .augmentation import EpochPlan, crop_and_flip, normalise, plan_epoch, windows
from .decoding import decoded_batches
from .images import ArrayImages, FileImages, ImageData
from .timm_augmentation import AugmentedImages


class TrainLoader:
    """Augmented training batches.

    Position p of an epoch's order goes to global batch p // batch_size, and inside it to process p % processes.
    The last incomplete batch is dropped.

    Args:
        data: The data set.
        batch_size: Images per optimizer step over all processes.
        seed: Fixes order and augmentation.
        device: Where batches go.
        rank: Number of this process.
        processes: Number of processes.
        workers: Decoding processes for image files, and for `augmented`.
        augmented: The images after timm's augmentation. Default: the paper's.

    Raises:
        ValueError: If `batch_size` is not a positive multiple of `processes`, or larger than the data set.

    Example:
        >>> loader = TrainLoader(load_dataset("digits"), 64, seed=0, device=torch.device("cpu"))
        >>> images, labels = next(loader.epoch(0))
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        augmented: AugmentedImages | None = None,
    ):
        if batch_size < 1 or batch_size % processes:
            raise ValueError(f"batch size {batch_size} must be a positive multiple of the {processes} processes")
        if batch_size > len(data.train):
            raise ValueError(
                f"batch size {batch_size} is larger than the {len(data.train)} training images; choose a smaller "
                "--batch-size"
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.rank = rank
        self.processes = processes
        self.workers = workers
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.data.train) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch for this process.

        Args:
            epoch: Number of the epoch.
            start: Steps to leave out, without decoding their images: a run goes on in the middle of an epoch.

        Yields:
            `(images [B, 3, H, W] normalised, labels [B])`.
        """
        data = self.data
        # [steps, images of this process], on the device before the first step: no step waits for a transfer.
        order, *choices = (
            choice[: len(self) * self.batch_size].view(len(self), -1)[start:, self.rank :: self.processes]
            for choice in self._plan(epoch)
        )
        if self.augmented is not None:
            yield from self._by_timm(self.augmented, epoch, order)
            return
        top, left, flip = (choice.to(self.device) for choice in choices)
        shown = windows(top, left, flip, *data.image_size)
        mean, std = _normalisation(data, self.device)
        batches = _fetch(data.train, order, self.device, self.workers)
        for rows, columns, (pixels, labels) in zip(*shown, batches, strict=True):
            yield normalise(crop_and_flip(pixels, rows, columns, data.pad), mean, std), labels

    def _by_timm(self, augmented: AugmentedImages, epoch: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.data.train.labels.to(self.device)[order.to(self.device)]
        places = [[(epoch, index) for index in row] for row in order.tolist()]
        pin = self.device.type == "cuda"
        batches = decoded_batches(augmented, self.workers, batch_sampler=places, pin_memory=pin)
        for row, images in zip(labels, batches, strict=True):
            moved = images.to(self.device, non_blocking=True)
            yield moved.contiguous(memory_format=torch.channels_last), row

    def batch_indices(self, epoch: int, step: int) -> list[int]:
        """Return which training images all processes together see in a step."""
        return self._plan(epoch).order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def _plan(self, epoch: int) -> EpochPlan:
        data = self.data
        return plan_epoch(len(data.train), seed=self.seed, epoch=epoch, pad=data.pad, flip=data.flip)


class EvalLoader:
    """Held-out batches, every image exactly once over all processes, without augmentation.

    Args:
        data: The data set.
        batch_size: Images per batch of one process.
        device: Where batches go.
        rank: Number of this process.
        processes: Number of processes.
        workers: Decoding processes for image files.
        limit: Use only so many images, evenly spaced over the split.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        limit: int | None = None,
    ):
        count = len(data.test)
        wanted = count if limit is None else min(limit, count)
        chosen = (torch.arange(wanted) * count // wanted)[rank::processes]
        self.data = data
        self.batches = chosen.split(batch_size) if len(chosen) else ()
        self.device = device
        self.workers = workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = _normalisation(self.data, self.device)
        for pixels, labels in _fetch(self.data.test, self.batches, self.device, self.workers):
            yield normalise(pixels, mean, std), labels


def _normalisation(data: ImageData, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def _fetch(
    images: ArrayImages | FileImages, batches: Sequence[Tensor] | Tensor, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(pixels uint8 [B, H, W, 3], labels [B])` on the device for each row of indices."""
    labels = images.labels.to(device)
    on_device = batches.to(device) if isinstance(batches, Tensor) else [batch.to(device) for batch in batches]
    if isinstance(images, ArrayImages):
        for index, row in zip(on_device, batches, strict=True):
            resident = images.pixels.device == index.device  # not `device`: cuda is another one than cuda:0
            pixels = images.pixels[index if resident else row]
            yield pixels.to(device, non_blocking=True), labels[index]
        return
    lists = [batch.tolist() for batch in batches]
    decoded = decoded_batches(images, workers, batch_sampler=lists, pin_memory=device.type == "cuda")
    for index, pixels in zip(on_device, decoded, strict=True):
        yield pixels.to(device, non_blocking=True), labels[index]
