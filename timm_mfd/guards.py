"""What keeps a run from going wrong in silence: losses that are no numbers, and models that learned nothing."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .stages import StageInfo

_SIZEABLE = 0.03  # of an MFD loss between 0 and 1 per stage; trained stages of the paper's networks reach 0.01 to 0.1


class BadStep(NamedTuple):
    """A training step whose loss is not finite.

    Attributes:
        step: Number of the step in its epoch.
        criterion: Its classification loss.
        per_stage: Its MFD loss of each stage, empty where it is not computed.
    """

    step: int
    criterion: float
    per_stage: list[float]

    def culprits(self, stages: Sequence[int]) -> str:
        """Name the parts of the loss that are not finite, in the order of the network.

        Args:
            stages: Index of each stage.
        """
        parts = [(f"the MFD loss of stage {s}", value) for s, value in zip(stages, self.per_stage, strict=False)]
        parts.append(("the criterion", self.criterion))
        return ", ".join(f"{name} ({value})" for name, value in parts if not math.isfinite(value)) or "the sum of all"


class LossGuard:
    """Look at the loss of every step without holding up an accelerator: there a number is read one step later."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def watch(self, step: int, loss: Tensor, criterion: Tensor, per_stage: Tensor) -> None:
        """Hand over the numbers of a step.

        Args:
            step: Number of the step.
            loss: Scalar.
            criterion: Scalar.
            per_stage: `[S]`; empty where it is not computed.
        """
        numbers = torch.cat([torch.stack([loss, criterion]).detach(), per_stage.detach()])
        copied = None
        if numbers.device.type == "cuda":
            numbers, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append((step, numbers, copied))

    def bad_step(self, wait: bool = False) -> BadStep | None:
        """Return the first step whose loss is not finite.

        Args:
            wait: Also read the newest step, which may stall an accelerator.
        """
        while self._pending:
            step, numbers, copied = self._pending[0]
            if not wait and copied is not None and len(self._pending) == 1:
                return None
            if copied is not None:
                copied.synchronize()
            loss, criterion, *per_stage = numbers.tolist()
            self._pending.popleft()
            if not math.isfinite(loss):
                return BadStep(step, criterion, per_stage)
        return None


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no floating-point tensor holds NaN or infinity."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(get_total_norm(floating, math.inf).isfinite())  # of squares, a finite sum could overflow


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


def verdicts(
    losses: Sequence[float],
    answers: Sequence[int],
    labels: Tensor,
    top1: float,
    class_names: Sequence[str],
    average: str = "",
) -> list[str]:
    """Say in words what is wrong with a trained model, if anything plainly is.

    Args:
        losses: Mean classification loss of each epoch.
        answers: How often the model answered each class.
        labels: Class indices `[N]` of the held-out images.
        top1: Accuracy on them in percent.
        class_names: One name per class.
        average: What `average_warnings` says, if anything: then it is the likelier reason.

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
            f"held-out images; {average or 'try a lower --lr, or look at the images'}"
        )
    elif top1 <= chance:
        found.append(
            f"the model learned nothing that helps: it is right for {top1:.2f} % of the held-out images, and one that "
            f"always answered {class_names[usual]!r} would be for {chance:.2f} %{'; ' * bool(average)}{average}"
        )
    if losses and losses[-1] > 1.5 * min(losses):
        best = min(range(len(losses)), key=losses.__getitem__)
        found.append(
            f"training diverged: the classification loss was {losses[best]:.4g} in epoch {best + 1} and "
            f"{losses[-1]:.4g} in the last one; try a lower --lr"
        )
    return found
