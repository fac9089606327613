"""What a run says of itself in words: its stages, what is doubtful about it, and what it came to."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..stages import StageInfo

_SIZEABLE = 0.03  # of an MFD loss between 0 and 1 per stage; trained stages of the paper's networks reach 0.01 to 0.1


def stage_table(stages: Sequence[StageInfo], sizes: Sequence[tuple[int, int]], samples: Sequence[int]) -> str:
    """Describe the stages that MFD sees: index, module, channels, size, samples of a batch and their noise floor.

    Args:
        stages: The stages.
        sizes: `(H, W)` of each stage.
        samples: Effective samples of each stage in a batch of all processes.

    Returns:
        Lines of text.
    """
    rows = ["stage  module              channels  size     samples per batch  noise floor of r^2"]
    for stage, (height, width), n in zip(stages, sizes, samples, strict=True):
        size, floor = f"{height}x{width}", f"{1 / max(n - 1, 1):.2g}"
        rows.append(f"{stage.index:>5}  {stage.module:<18}  {stage.channels:>8}  {size:<7}  {n:>17,}  {floor:>18}")
    rows.append("noise floor: the mean r^2 of channels that have nothing to do with each other, in so few samples")
    return "\n".join(rows)


def losses_text(loss: float, criterion: float, mfd: float, digits: int) -> str:
    """Return a loss and its parts in words; without MFD it has none.

    Args:
        loss: The whole loss.
        criterion: Its part by the classification criterion.
        mfd: Its part by MFD, weighted.
        digits: After the point of the first two.
    """
    parts = f" = {criterion:.{digits}f} + MFD {mfd:.4f}" if mfd else ""
    return f"loss {loss:.{digits}f}{parts}"


def sample_warnings(stages: Sequence[StageInfo], samples: Sequence[int]) -> list[str]:
    """Name the stages whose noise floor, 1 / (n - 1) for n samples, is a sizeable share of any MFD loss.

    Channels that have nothing to do with each other have it as their mean r^2.

    Args:
        stages: The stages.
        samples: What `effective_samples` returns for each.

    Returns:
        One sentence per such stage.
    """
    found = []
    for stage, n in zip(stages, samples, strict=True):
        floor = 1 / max(n - 1, 1)
        if floor > _SIZEABLE:
            found.append(
                f"stage {stage.index} has {n} samples in a batch, so chance alone gives its MFD loss {floor:.2g}, the "
                "noise floor; raise --batch-size, or leave the stage out with --stages"
            )
    return found


def token_warnings(sizes: Sequence[tuple[int, int]], image_size: int | None) -> list[str]:
    """Say that a transformer sees an image as a handful of patches, if it does.

    Args:
        sizes: `(H, W)` of each stage.
        image_size: To which the images are resized, if they are.

    Returns:
        One sentence, or none.
    """
    (height, width), *others = sizes
    if not others or any(size != (height, width) for size in others) or height * width > 16 or height * width == 1:
        return []
    remedy = "a larger --image-size" if image_size else "larger images"
    seen = f"the network sees an image as {height}x{width} patches only"
    return [f"{seen}; give it {remedy}, or choose one with smaller patches"]


def average_warnings(decay: float, steps: int) -> list[str]:
    """Say how much of a moving average of the weights are the initial ones, if that is more than a hundredth.

    Args:
        decay: Of the average per step; 0 is none.
        steps: Of the whole run.

    Returns:
        One sentence, or none.
    """
    left = decay**steps
    if left <= 0.01:
        return []
    return [
        f"the moving average of --ema-decay {decay:g}, which is evaluated and saved, still holds {100 * left:.0f} % of "
        f"the initial weights after {steps:,} steps; at most {0.01 ** (1 / steps):.3g} suits so short a run"
    ]


def few_steps(steps: int) -> str:
    """Say that a run took so few steps that nothing else needs to be wrong, if it did; empty otherwise.

    The moving statistics of batch norm alone need about 50.

    Args:
        steps: Of the whole run.
    """
    return f"{steps:,} steps are few; try more --epochs, or a smaller --batch-size" if steps < 50 else ""


def verdicts(
    losses: Sequence[float],
    answers: Sequence[int],
    labels: Tensor,
    top1: float,
    class_names: Sequence[str],
    reason: str = "",
) -> list[str]:
    """Say in words what is wrong with a trained model, if anything plainly is.

    Args:
        losses: Mean classification loss of each epoch.
        answers: How often the model answered each class.
        labels: Class indices `[N]` of the held-out images.
        top1: Accuracy on them in percent.
        class_names: One name per class.
        reason: What is likelier than the learning rate, if anything: see `average_warnings` and `few_steps`.

    Returns:
        Sentences; none for a model that learned something.
    """
    found = []
    usual = int(torch.bincount(labels).argmax())
    chance = 100 * float((labels == usual).double().mean())
    answered = [index for index, count in enumerate(answers) if count]
    if len(labels.unique()) == 1:
        pass  # an answer that is always the same is right
    elif len(answered) == 1:
        found.append(
            f"the model is constant: it answers {class_names[answered[0]]!r} for every one of the {len(labels):,} "
            f"held-out images; {reason or 'try a lower --lr, or look at the images'}"
        )
    elif top1 <= chance:
        found.append(
            f"the model learned nothing that helps: it is right for {top1:.2f} % of the held-out images, and one that "
            f"always answered {class_names[usual]!r} would be for {chance:.2f} %{'; ' * bool(reason)}{reason}"
        )
    if losses and losses[-1] > 1.5 * min(losses):
        best = min(range(len(losses)), key=losses.__getitem__)
        found.append(
            f"training diverged: the classification loss was {losses[best]:.4g} in epoch {best + 1} and "
            f"{losses[-1]:.4g} in the last one; try a lower --lr"
        )
    return found


def correlation_table(stages: Sequence[int], before: Sequence[float], after: Sequence[float], images: int) -> str:
    """Set the mean |r| of every stage at the start and at the end of a training side by side, as Tables I and III do.

    Args:
        stages: Index of every stage.
        before: Mean |r| of every stage with the weights that the training began with.
        after: The same with those that it ended with.
        images: Number of images behind the figures.

    Returns:
        Lines of text.
    """
    rows = [f"mean |r|   at the start   at the end of training (on {images:,} held-out images)"]
    rows += [f"stage {s:<3} {b:>14.3f} {a:>12.3f}" for s, b, a in zip(stages, before, after, strict=True)]
    if any(first == second for first, second in pairwise(before)):
        rows.append("stages that are equal at the start: the blocks between them begin as identities")
    return "\n".join(rows)
