"""Which values of a feature map are the samples of a correlation."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Center = Literal["channel", "position"]


class Scope(NamedTuple):
    """Which samples make up a correlation.

    Attributes:
        center: The mean in Eq. 6: one number or one map per channel.
        max_samples: Upper bound on the samples of a stage, met by leaving out positions; None takes all.
        synced: Whether the samples of all processes of the default group count together.
    """

    center: Center = "channel"
    max_samples: int | None = None
    synced: bool = False


def samples(x: Tensor, scope: Scope) -> Tensor:
    """View a map `[B, C, H, W]` as `[B, P, C]`: P positions of each image, without a copy for either memory format."""
    view = x.detach().permute(0, 2, 3, 1).flatten(1, 2)
    step = _stride(x.shape, scope.max_samples)
    return view if step == 1 else view[:, ::step]


def _stride(shape: Sequence[int], max_samples: int | None) -> int:
    """Of how many positions of a map `[B, C, H, W]` one is a sample."""
    if max_samples is None:
        return 1
    batch, _, height, width = map(int, shape)
    positions = height * width
    if batch * positions <= max_samples:
        return 1
    step = min(math.ceil(batch * positions / max_samples), positions)
    while math.gcd(step, width) != 1 and step < positions:
        step += 1  # a step that shares a factor with the width would see some columns only
    return step


def positions_of(shape: Sequence[int], scope: Scope) -> int:
    """Count the samples of an image."""
    step = _stride(shape, scope.max_samples)
    return (shape[2] * shape[3] + step - 1) // step


def effective_samples(shape: Sequence[int], scope: Scope, processes: int = 1) -> int:
    """Count the samples that a correlation of a stage rests on: one more than its degrees of freedom.

    So channels that have nothing to do with each other have a mean r^2 of 1 / (n - 1), the noise floor. Neighbouring
    positions of real maps resemble each other, which lifts it further.

    Args:
        shape: Shape `[B, C, H, W]` of the stage in one process.
        scope: Whether it is synced does not matter here.
        processes: Processes whose samples count together.

    Returns:
        n, at least 1: images times positions, less one mean per position for `center="position"`.
    """
    positions = positions_of(shape, scope)
    total = shape[0] * processes * positions
    return total if scope.center == "channel" else max(total - positions + 1, 1)


def has_few_samples(x: Tensor, scope: Scope) -> bool:
    """Whether samples are fewer than channels, all of them in this process."""
    return not scope.synced and x.shape[0] * positions_of(x.shape, scope) < x.shape[1]


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of the gradient of x: its own, or channels_last."""
    return torch.contiguous_format if x.is_contiguous() and not channels_last(x) else torch.channels_last


def empty_gradient(x: Tensor, scope: Scope) -> Tensor:
    """Allocate a gradient that `samples` can view; 0 where there is no sample."""
    whole = _stride(x.shape, scope.max_samples) == 1
    return (torch.empty_like if whole else torch.zeros_like)(x, memory_format=memory_format(x))


def gradient_from_rows(rows: Tensor, x: Tensor, scope: Scope) -> Tensor:
    """Give the gradient of the samples, `[n, C]`, the shape, dtype and memory format of x; a copy only if it must."""
    batch, channels, height, width = x.shape
    if rows.dtype == x.dtype and len(rows) == batch * height * width and channels_last(x):
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
    gradient = empty_gradient(x, scope)
    target = samples(gradient, scope)
    target.copy_(rows.view(target.shape))
    return gradient


def channels_last(x: Tensor) -> bool:
    """Whether the values of a position lie side by side, images one after the other."""
    return x.is_contiguous(memory_format=torch.channels_last)
