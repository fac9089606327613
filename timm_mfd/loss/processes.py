"""Moments over all processes of the default group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def average_maps(views: Sequence[Tensor], means: Sequence[Tensor]) -> None:
    """Make the means over images, `[P, C]`, those over the images of all processes.

    They have to be known before the products: sending every process's map to all others, as `sum_moments` does with
    means that are one number a channel, would cost P times as much.

    Args:
        views: Samples `[B, P, C]` of each stage.
        means: The mean of each in this process, overwritten.
    """
    images = [mean.new_full((1,), len(view), dtype=torch.float64) for view, mean in zip(views, means, strict=True)]
    sums = [(mean * count).flatten() for mean, count in zip(means, images, strict=True)]
    packed = torch.cat([*images, *sums])
    dist.all_reduce(packed)
    counts, *totals = packed.split([len(views), *map(len, sums)])
    for mean, total, count in zip(means, totals, counts, strict=True):
        mean.copy_((total / count).view_as(mean))


def sum_moments(
    counts: Sequence[int], means: Sequence[Tensor], grams: Sequence[Tensor], same_means: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Turn the moments of this process into those of all, in one collective for all stages.

    Gram matrices about the processes' own means add up once each is moved to the mean of all, for which every process
    has to know every mean. So each writes its own into a row of zeros, and one sum brings all rows to all.

    Args:
        counts: Samples of each stage.
        means: `[C]` of each, overwritten, or any if they are the same everywhere.
        grams: `[C, C]` about the means; their upper triangles travel.
        same_means: Whether all processes have the same means.

    Returns:
        Counts `[]` and Gram matrices over all processes.
    """
    known = [] if same_means else means
    # Filled on the device: to copy a number there, a GPU would be waited for.
    own = torch.cat([*(grams[0].new_full((1,), count) for count in counts), *known])
    everyones = own.new_zeros(dist.get_world_size(), len(own))
    everyones[dist.get_rank()] = own
    upper = [torch.triu_indices(len(gram), len(gram), device=gram.device).unbind() for gram in grams]
    triangles = [gram[where] for gram, where in zip(grams, upper, strict=True)]
    packed = torch.cat([everyones.flatten(), *triangles])
    dist.all_reduce(packed)
    rows, *triangles = packed.split([everyones.numel(), *map(len, triangles)])
    per_process, *all_means = rows.view_as(everyones).double().split([len(counts), *map(len, known)], dim=1)
    total = []
    for where, gram, triangle in zip(upper, grams, triangles, strict=True):
        summed = torch.empty_like(gram)
        summed[where] = triangle
        summed.mT[where] = triangle
        total.append(summed)
    for mean, theirs, summed, count in zip(known, all_means, total, per_process.T[..., None], strict=False):
        mean.copy_((theirs * count).sum(0) / count.sum())
        apart = (theirs - mean) * count.sqrt()
        summed += apart.T @ apart
    return list(per_process.sum(0)), total
