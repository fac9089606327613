"""The method of the paper: squared Pearson correlation between the channels of a feature map (Eq. 5-7).

Pure tensor maths. This module imports torch only, and everything else in the package stands on it.

Source: Zhu, Zu, Liu, "Multi-stage feature decorrelation constraints for improving CNN classification performance",
https://arxiv.org/abs/2308.12880.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Center = Literal["channel", "position"]


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
        channel, itself included.

    Raises:
        ValueError: If `x` is not 4-D and floating, or has fewer than 2 samples, or `center` is unknown.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> x[:, 1] = -2 * x[:, 0] + 5
        >>> channel_correlation(x)[0, 1]
        tensor(-1.0000)
    """
    return _correlation(x, center).clamp(-1, 1)


def mfd_loss(x: Tensor, center: Center = "channel") -> Tensor:
    r"""Mean squared correlation between the different channels of one stage.

    Eq. 5: `L = sum_{i != j} F_ij^2 / (d (d - 1))` with `F` of Eq. 6 and d = C channels. The value does not depend on
    the order of channels or samples, nor on any per-channel scale and shift.

    Args:
        x: Feature map `[B, C, H, W]`, as for `channel_correlation`.
        center: As for `channel_correlation`.

    Returns:
        Scalar in [0, 1]: 0 for uncorrelated channels, 1 for identical ones. A map of one channel gives 0. The gradient
        is finite everywhere and 0 at constant channels.

    Raises:
        ValueError: As `channel_correlation`.

    Example:
        >>> x = torch.randn(128, 64, 8, 8, requires_grad=True)
        >>> mfd_loss(x).backward()
    """
    r = _correlation(x, center)
    channels = r.shape[0]
    off_diagonal = r * (1 - torch.eye(channels, dtype=r.dtype, device=r.device))
    return off_diagonal.square().sum() / max(channels * (channels - 1), 1)


class MFDOutput(NamedTuple):
    """What `MFDLoss` returns.

    Attributes:
        loss: Scalar to add to the classification loss: `weight * sum(per_stage)`.
        per_stage: `[S]`, Eq. 5 of each stage in [0, 1]; NaN where nothing was computed (`weight=0`).
    """

    loss: Tensor
    per_stage: Tensor


class MFDLoss(nn.Module):
    r"""Multi-stage feature decorrelation: the second term of Eq. 7.

    Eq. 7: `L = L_classification + weight * sum_s L_MFD(stage s)`.

    Args:
        weight: The balance factor lambda, one for all stages; the paper uses 1 (Table II). 0 switches the method off:
            the loss is an exact 0 and no statistics are computed.
        center: How Eq. 6 takes the mean, see `channel_correlation`.

    Raises:
        ValueError: If `weight` is negative or not finite, or `center` is unknown.

    Example:
        >>> mfd = MFDLoss(weight=1.0)
        >>> loss, per_stage = mfd([torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4)])
        >>> per_stage.shape
        torch.Size([2])
    """

    def __init__(self, weight: float = 1.0, center: Center = "channel"):
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number >= 0, not {weight}")
        _check_center(center)
        self.weight = float(weight)
        self.center: Center = center

    def forward(self, stages: Sequence[Tensor]) -> MFDOutput:
        """Penalise the correlation in every stage.

        Args:
            stages: Feature maps `[B, C_s, H_s, W_s]`, at least one, as `forward_stages` returns them.

        Returns:
            The weighted loss and its parts.

        Raises:
            ValueError: If there is no stage, or a stage is unusable (the message has its index).
        """
        if len(stages) == 0:
            raise ValueError("MFDLoss needs at least one stage, got none")
        if self.weight == 0:
            reference = stages[0]
            return MFDOutput(
                loss=torch.zeros((), device=reference.device),
                per_stage=torch.full((len(stages),), math.nan, device=reference.device),
            )
        losses = []
        for index, stage in enumerate(stages):
            try:
                losses.append(mfd_loss(stage, self.center))
            except ValueError as error:
                raise ValueError(f"stage {index}: {error}") from None
        per_stage = torch.stack(losses)
        return MFDOutput(loss=self.weight * per_stage.sum(), per_stage=per_stage)

    def extra_repr(self) -> str:
        """Arguments as they show in `print(task)`."""
        return f"weight={self.weight:g}, center={self.center!r}"


def _check_center(center: str) -> None:
    if center not in get_args(Center):
        raise ValueError(f"center must be one of {', '.join(get_args(Center))}, not {center!r}")


def _check_map(x: Tensor, center: str) -> None:
    _check_center(center)
    if x.ndim != 4:
        raise ValueError(f"a stage must be 4-D [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"a stage must have a floating dtype, got {x.dtype}")
    batch, _, height, width = x.shape
    samples = batch * height * width if center == "channel" else batch
    if samples < 2 or height * width == 0:
        raise ValueError(
            f"correlation needs at least 2 samples, got {samples} from shape {tuple(x.shape)} with center={center!r}"
        )


def _correlation(x: Tensor, center: Center) -> Tensor:
    """Eq. 6 up to rounding, which may leave [-1, 1] by an ulp."""
    _check_map(x, center)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        samples = x.permute(0, 2, 3, 1)
        mean_over = (0, 1, 2) if center == "channel" else (0,)
        origin = samples[:1, :1, :1] if center == "channel" else samples[:1]
        # Subtracting one sample first keeps |mean| >> std accurate and makes a constant channel exactly 0.
        shifted = samples - origin.detach()
        y = (shifted - shifted.mean(mean_over, keepdim=True)).flatten(0, 2)
        variance = y.square().mean(0)
        info = torch.finfo(y.dtype)
        varies = variance > info.tiny / info.eps  # below this the squares underflow
        inverse_norm = torch.where(varies, variance * y.shape[0], torch.inf).rsqrt()
        z = y * inverse_norm
        return z.T @ z
