"""Non-finite losses: found without holding up an accelerator, and traced to the part of the loss."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


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
