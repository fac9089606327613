"""The method of the paper: squared Pearson correlation between the channels of a feature map (Eq. 5-7).

Pure tensor maths that imports torch only; how it is computed fast and exactly is in `loss/correlation.py`.

Source: Zhu, Zu, Liu, "Multi-stage feature decorrelation constraints for improving CNN classification performance",
https://arxiv.org/abs/2308.12880.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .loss.correlation import correlation, mean_squared_correlations
from .loss.samples import Center, Scope


def channel_correlation(x: Tensor, center: Center = "channel") -> Tensor:
    r"""Pearson correlation between every two channels of a feature map.

    Eq. 6: `F_ij = <I - mean(I), J - mean(J)> / (|I - mean(I)| |J - mean(J)|)`, where `I` and `J` are the values of the
    channels i and j over the whole batch.

    Args:
        x: Feature map `[B, C, H, W]` of any floating dtype. The statistics are taken in float32 or better.
        center: What the mean in Eq. 6 is. `"channel"`: one number per channel, so that every pixel of every image is a
            sample (n = B*H*W). `"position"`: one map `[H, W]` per channel, the mean over the images.

    Returns:
        Symmetric matrix `[C, C]` in [-1, 1] with ones on its diagonal. A constant channel has correlation 0 with every
        channel, itself included. Constant is what varies by less than its own rounding (bf16 and fp16 on CUDA: by less
        than 1/300 of its mean), or less than a millionth of the channel that varies most.

    Raises:
        ValueError: If `x` is not 4-D and floating, or has fewer than 2 samples, or `center` is unknown.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> x[:, 1] = -2 * x[:, 0] + 5
        >>> channel_correlation(x)[0, 1]
        tensor(-1.0000)
    """
    _check_map(x, center)
    return correlation(x, Scope(center)).clamp(-1, 1)


def mfd_loss(x: Tensor, center: Center = "channel") -> Tensor:
    r"""Mean squared correlation between the different channels of one stage.

    Eq. 5: `L = sum_{i != j} F_ij^2 / (d (d - 1))` with `F` of Eq. 6 and d = C channels. The value does not depend on
    the order of channels or samples, nor on a scale and shift of each channel (up to what counts as constant, see
    `channel_correlation`).

    Args:
        x: Feature map `[B, C, H, W]`, as for `channel_correlation`.
        center: As for `channel_correlation`.

    Returns:
        Scalar in [0, 1] up to rounding: 0 for uncorrelated channels, 1 for identical ones. A map of one channel gives
        0. The gradient is finite everywhere and 0 at constant channels.

    Raises:
        ValueError: As `channel_correlation`.

    Example:
        >>> x = torch.randn(128, 64, 8, 8, requires_grad=True)
        >>> mfd_loss(x).backward()
    """
    _check_map(x, center)
    return mean_squared_correlations([x], Scope(center))[0]


class MFDOutput(NamedTuple):
    """What `MFDLoss` returns.

    Attributes:
        loss: Scalar to add to the classification loss: `weight * sum(per_stage)`.
        per_stage: `[S]`, Eq. 5 of each stage in [0, 1]; NaN where nothing was computed (`weight=0`).
    """

    loss: Tensor
    per_stage: Tensor


def nothing_measured(stages: Sequence[Tensor]) -> MFDOutput:
    """Return a loss of 0 and NaN for each stage."""
    device = stages[0].device
    return MFDOutput(torch.zeros((), device=device), torch.full((len(stages),), math.nan, device=device))


class MFDLoss(nn.Module):
    r"""Multi-stage feature decorrelation: the second term of Eq. 7.

    Eq. 7: `L = L_classification + weight * sum_s L_MFD(stage s)`.

    Args:
        weight: The balance factor lambda, one for all stages; the paper uses 1 (Table II). 0 switches the method off:
            the loss is an exact 0 and no statistics are computed, unless `measure` asks for them.
        center: How Eq. 6 takes the mean, see `channel_correlation`.
        sync: Whether the samples of all processes count together. `"auto"`: when torch.distributed runs with several.
            Then N processes with b images each have the loss, and after DDP's averaging the gradient, of one process
            with N*b images, also for uneven b; it costs one collective per call, however many stages (two for
            `center="position"`, whose mean maps have to be known first). All processes of the default group must call
            the loss, with stages of the same sizes. In evaluation mode each process measures its own images, so that
            shards of unequal length do not wait for each other.
        measure: Whether to measure Eq. 5 also where `weight` is 0: without gradients, for `per_stage` alone. It may be
            set at any time: `mfd.measure = step % 50 == 0`.
        max_samples: Upper bound on the samples (image positions) per stage and process: an evenly spaced subset of the
            positions of every image is used, at least one. Cheaper and noisier, and N processes then see N times as
            many as one. For `center="channel"` only. None uses all.

    Under gradient accumulation the statistics are those of each micro-batch. Correlations are taken in float32 or
    better whatever autocast and the precision modes say (bf16 and fp16 maps on CUDA: as products of what they are, with
    float32 sums). Under `torch.compile` the loss is part of the graph, with the same values. The loss can be
    differentiated once, by autograd (not `torch.func`).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> mfd = MFDLoss(weight=1.0)
        >>> loss, per_stage = mfd([torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4)])
        >>> per_stage.shape
        torch.Size([2])
    """

    def __init__(
        self,
        weight: float = 1.0,
        center: Center = "channel",
        sync: Literal["auto"] | bool = "auto",
        max_samples: int | None = None,
        measure: bool = False,
    ):
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number >= 0, not {weight}")
        _check_center(center)
        if sync not in ("auto", True, False):
            raise ValueError(f"sync must be 'auto', True or False, not {sync!r}")
        if max_samples is not None and max_samples < 2:
            raise ValueError(f"max_samples must be at least 2 or None, not {max_samples}")
        if max_samples is not None and center == "position":
            raise ValueError(f"max_samples={max_samples} needs center='channel', not 'position'")
        self.weight = float(weight)
        self.center: Center = center
        self.sync: Literal["auto"] | bool = sync
        self.max_samples = max_samples
        self.measure = measure

    def forward(self, stages: Sequence[Tensor]) -> MFDOutput:
        """Penalise the correlation in every stage.

        Args:
            stages: Feature maps `[B, C_s, H_s, W_s]`, at least one, as `forward_stages` returns them.

        Returns:
            The weighted loss and its parts.

        Raises:
            ValueError: If there is no stage, or a stage is unusable (the message has its index).
        """
        if isinstance(stages, Tensor):
            raise ValueError(f"MFDLoss takes a sequence of stages, not one tensor {list(stages.shape)}; pass [stage]")
        if len(stages) == 0:
            raise ValueError("MFDLoss needs at least one stage, got none")
        synced = self._is_synced() if self.training else False
        for index, stage in enumerate(stages):
            try:
                _check_map(stage, self.center, synced=synced)
            except ValueError as error:
                raise ValueError(f"stage {index}: {error}") from None
        nothing = nothing_measured(stages)
        if self.weight == 0 and not self.measure:
            return nothing
        if self.weight == 0:
            stages = [stage.detach() for stage in stages]
        per_stage = mean_squared_correlations(stages, Scope(self.center, self.max_samples, synced))
        return MFDOutput(self.weight * per_stage.sum() if self.weight else nothing.loss, per_stage)

    if TYPE_CHECKING:  # nn.Module's own call gives Any

        def __call__(self, stages: Sequence[Tensor]) -> MFDOutput: ...  # noqa: D102

    def extra_repr(self) -> str:
        """Arguments as they show in `print(task)`."""
        measure = ", measure=True" if self.measure else ""
        samples = f"max_samples={self.max_samples}{measure}"
        return f"weight={self.weight:g}, center={self.center!r}, sync={self.sync!r}, {samples}"

    def _is_synced(self) -> bool:
        running = dist.is_available() and dist.is_initialized()
        if self.sync is True and not running:
            raise ValueError("sync=True needs an initialised torch.distributed process group; use sync='auto'")
        return bool(self.sync) and running and dist.get_world_size() > 1


def _check_center(center: str) -> None:
    if center not in get_args(Center):
        raise ValueError(f"center must be one of {', '.join(get_args(Center))}, not {center!r}")


def _check_map(x: Tensor, center: str, synced: bool = False) -> None:
    _check_center(center)
    if x.ndim != 4:
        tokens = "; tokens [B, N, C] become such by x.transpose(1, 2)[..., None]" if x.ndim == 3 else ""
        raise ValueError(f"a stage must be 4-D [B, C, H, W], got shape {tuple(x.shape)}{tokens}")
    if not x.is_floating_point():
        raise ValueError(f"a stage must have a floating dtype, got {x.dtype}")
    batch, _, height, width = x.shape
    samples = batch * height * width if center == "channel" else batch
    # With several processes the others have samples too, and an error on one of them would leave the rest waiting.
    if height * width == 0 or (samples < 2 and not synced):
        raise ValueError(
            f"correlation needs at least 2 samples, got {samples} from shape {tuple(x.shape)} with center={center!r}"
        )
