"""Streaming per-stage correlation statistics, as in the paper's Tables I and III."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .stages import forward_stages

CORRELATION_IMAGES = 1000  # held-out images behind the correlations before and after training


class ChannelMoments:
    """First and second moments of the channels of one stage, summed over batches in float64.

    Example:
        >>> moments = ChannelMoments()
        >>> for x in batches:
        ...     moments.update(x)
        >>> moments.mean_abs_correlation()
        0.142
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin: Tensor | None = None
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add one batch.

        Args:
            x: Feature map `[B, C, H, W]`; every pixel of every image is a sample.
        """
        x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # which has no float64
        samples = x.permute(0, 2, 3, 1).flatten(0, 2).double()
        if self._origin is None:
            # One sample of each channel is the origin: constant channels sum to exactly 0, a large mean is harmless.
            self._origin = samples[0].clone()
            self._sum = torch.zeros_like(self._origin)
            self._gram = samples.new_zeros(samples.shape[1], samples.shape[1])
        assert self._sum is not None
        assert self._gram is not None
        samples = samples - self._origin
        self.count += samples.shape[0]
        self._sum += samples.sum(0)
        self._gram.addmm_(samples.T, samples)

    def correlation(self) -> Tensor:
        """Return the Pearson correlation matrix `[C, C]` in float64; constant channels correlate 0 with everything.

        Raises:
            ValueError: If fewer than 2 samples were added.
        """
        if self.count < 2 or self._gram is None or self._sum is None:
            raise ValueError(f"correlation needs at least 2 samples, got {self.count}")
        covariance = self._gram - torch.outer(self._sum, self._sum) / self.count
        variance = covariance.diagonal().clamp_min(0)
        # What is left of a variance below this is rounding of the two sums it is the difference of.
        varies = variance > 1e-12 * self._gram.diagonal()
        inverse_norm = torch.where(varies, variance, torch.inf).rsqrt()
        return (covariance * inverse_norm * inverse_norm[:, None]).clamp(-1, 1)

    def mean_abs_correlation(self) -> float:
        """Return the mean of |r| over all pairs of different channels, in [0, 1] (0 for a single channel)."""
        r = self.correlation().abs()
        channels = r.shape[0]
        return float((r.sum() - r.diagonal().sum()) / max(channels * (channels - 1), 1))


@torch.no_grad()
def mean_abs_correlation(
    model: nn.Module, batches: Iterable[Tensor], indices: Sequence[int] | None = None
) -> list[float]:
    """Measure the mean |r| between the channels of every stage of a model: one row of Table I or III.

    Args:
        model: Any timm model; run in evaluation mode, its training mode is restored.
        batches: Image batches `[B, in_chans, H, W]`.
        indices: Which stages, see `timm_mfd.forward_stages`.

    Returns:
        One value in [0, 1] per stage, over the samples of all batches together.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> mean_abs_correlation(model, [images])
        [0.31, 0.22, 0.18, 0.09, 0.12]
    """
    was_training = model.training
    model.eval()
    moments: list[ChannelMoments] = []
    try:
        for images in batches:
            stages = forward_stages(model, images, indices).stages
            moments = moments or [ChannelMoments() for _ in stages]
            for moment, stage in zip(moments, stages, strict=True):
                moment.update(stage)
    finally:
        model.train(was_training)
    if not moments:
        raise ValueError("no images to measure the correlation on")
    return [moment.mean_abs_correlation() for moment in moments]
