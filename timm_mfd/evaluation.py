"""Accuracy on held-out images, exact for every batch size and number of processes."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Accuracy(NamedTuple):
    """What `evaluate` counts.

    Attributes:
        top1: Images whose class has the largest logit, in percent.
        top5: Images whose class is among the five largest logits, in percent.
        images: Number of images.
        answers: `[num_classes]`, how many images each class was the answer to.
    """

    top1: float
    top5: float
    images: int
    answers: list[int]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Accuracy:
    """Measure the accuracy of a classifier; it is put into evaluation mode.

    The counts are integers, summed over all processes of torch.distributed, each of which brings its own images.
    Buffers are taken from process 0: batch norms may have seen each process's own images, and what is measured is to be
    what the main process saves.

    Args:
        model: Returns logits `[B, num_classes]`.
        batches: Images `[B, 3, H, W]` and labels `[B]` of this process, on the model's device.
        num_classes: Number of logits.
        autocast: Makes the context that the model runs in.

    Returns:
        The accuracy, the same in every process.

    Raises:
        ValueError: If there is no image, or the model is no classifier.

    Example:
        >>> evaluate(model, [(images, labels)], model.num_classes).top1
        76.5
    """
    model.eval()
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    device = next(model.parameters()).device
    # Sums stay on the device, and nothing is read back before the last batch: that would stall it.
    hits = torch.zeros(2, dtype=torch.long, device=device)
    answers = torch.zeros(num_classes, dtype=torch.long, device=device)
    classes, images_here = torch.arange(num_classes, device=device), 0
    for images, labels in batches:
        with autocast():
            logits = model(images)
        if logits.ndim != 2:
            raise ValueError(f"the model returns {list(logits.shape)}, not logits [B, K]; it is no classifier")
        best = logits.topk(min(5, logits.shape[1])).indices
        correct = best == labels[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
        answers += (best[:, :1] == classes).sum(0)
        images_here += len(labels)
    counts = torch.cat([hits, hits.new_tensor([images_here]), answers])
    if several:
        dist.all_reduce(counts)
    top1, top5, count, *answered = counts.tolist()
    if count == 0:
        raise ValueError("no images to measure the accuracy on")
    return Accuracy(100 * top1 / count, 100 * top5 / count, count, answered)
