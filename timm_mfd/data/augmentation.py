"""The paper's augmentation on whole batches: zero-pad, random crop, horizontal flip (Section IV-A).

Every random choice of an epoch is drawn at its start and belongs to a position in the epoch's order. So the augmented
images do not depend on the number of processes, workers or on where a run was resumed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class EpochPlan(NamedTuple):
    """All random choices of one epoch, a function of (seed, epoch) alone.

    Attributes:
        order: `[N]`, which image stands at each position of the epoch.
        top: `[N]`, first row of the crop in the padded image, for each position.
        left: `[N]`, first column of the crop.
        flip: `[N]`, whether the crop is mirrored.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


def plan_epoch(count: int, *, seed: int, epoch: int, pad: int, flip: bool) -> EpochPlan:
    """Draw the order, crops and flips of one epoch on the CPU.

    Args:
        count: Number of training images.
        seed: The run's seed.
        epoch: Number of the epoch.
        pad: Zero pixels on each side.
        flip: Whether to mirror half of the images.

    Returns:
        The plan; the same arguments give the same plan on every machine.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(count, generator=generator)
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    return EpochPlan(order, top, left, mirrored if flip else torch.zeros_like(mirrored))


def windows(top: Tensor, left: Tensor, flip: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Turn crops and flips, of an epoch at once, into the rows and columns that they show.

    Args:
        top: `[..., B]`, first row of each window.
        left: `[..., B]`, first column.
        flip: `[..., B]`, bool, whether the window is mirrored.
        height: Of a window.
        width: Of a window.

    Returns:
        Rows `[..., B, H]` and columns `[..., B, W]` of the padded image.
    """
    columns = torch.arange(width, device=top.device)
    columns = left[..., None] + torch.where(flip[..., None], width - 1 - columns, columns)
    return top[..., None] + torch.arange(height, device=top.device), columns


def crop_and_flip(pixels: Tensor, rows: Tensor, columns: Tensor, pad: int) -> Tensor:
    """Cut one window out of each zero-padded image, mirrored where its columns run backwards, in a single gather.

    Args:
        pixels: uint8 `[B, H, W, C]`.
        rows: `[B, H]` of the padded image, as `windows` returns them.
        columns: `[B, W]`.
        pad: Zero pixels on each side.

    Returns:
        uint8 `[B, H, W, C]` on the same device.
    """
    padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))
    image = torch.arange(len(pixels), device=pixels.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn stored pixels into network input.

    Args:
        pixels: uint8 `[B, H, W, C]`.
        mean: `[C]`, of pixel values in [0, 1].
        std: `[C]`.

    Returns:
        float32 `[B, C, H, W]` in channels_last memory.
    """
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
