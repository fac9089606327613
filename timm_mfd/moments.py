"""Sums over batches and processes from which correlations follow exactly."""

import torch
from torch import Tensor


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

    def merge(self, other: "ChannelMoments") -> None:
        """Add the samples of another one, which is left as it is; the order of merging changes rounding only.

        Args:
            other: Moments of the same channels.
        """
        if other._origin is None or other._sum is None or other._gram is None:
            return
        if self._origin is None or self._sum is None or self._gram is None:
            self._origin = other._origin.clone()
            self._sum, self._gram = torch.zeros_like(other._sum), torch.zeros_like(other._gram)
        shift = other._origin.to(self._origin) - self._origin  # 0 for a channel that is constant in both
        total = other._sum.to(self._sum)
        cross = torch.outer(total, shift)
        self._gram += other._gram.to(self._gram) + cross + cross.T + other.count * torch.outer(shift, shift)
        self._sum += total + other.count * shift
        self.count += other.count

    def correlation(self) -> Tensor:
        """Return the Pearson correlation matrix `[C, C]` in float64; constant channels correlate 0 with everything.

        Raises:
            ValueError: If fewer than 2 samples were added.
        """
        gram, total = self._sums()
        covariance = gram - torch.outer(total, total) / self.count
        inverse_norm = torch.where(self.varies(), covariance.diagonal(), torch.inf).rsqrt()
        return (covariance * inverse_norm * inverse_norm[:, None]).clamp(-1, 1)

    def std(self) -> Tensor:
        """Return the standard deviation of each channel, `[C]`; exactly 0 for a constant one."""
        gram, total = self._sums()
        variance = (gram.diagonal() - total.square() / self.count) / self.count
        return torch.where(self.varies(), variance, 0.0).sqrt()

    def varies(self) -> Tensor:
        """Return which channels are not constant, `[C]`."""
        gram, total = self._sums()
        squares = gram.diagonal()
        # What is left of a variance below this is rounding of the two sums it is the difference of.
        return squares - total.square() / self.count > 1e-12 * squares

    def is_finite(self) -> bool:
        """Return whether every value that was added is finite."""
        return self._sum is not None and bool(self._sum.isfinite().all())

    def mean_abs_correlation(self) -> float:
        """Return the mean of |r| over all pairs of different channels, in [0, 1] (0 for a single channel)."""
        return mean_of_pairs(self.correlation().abs())

    def _sums(self) -> tuple[Tensor, Tensor]:
        if self.count < 2 or self._gram is None or self._sum is None:
            raise ValueError(f"correlation needs at least 2 samples, got {self.count}")
        return self._gram, self._sum


class ClassMeans:
    """Mean activation of each channel over the images of each class, summed over batches in float64."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._sum: Tensor | None = None
        self._images = torch.zeros(num_classes, dtype=torch.double)

    def update(self, x: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            x: Feature map `[B, C, H, W]`.
            labels: `[B]`.

        Raises:
            ValueError: If there is no such class.
        """
        wrong = labels[(labels < 0) | (labels >= self._num_classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is outside of the {self._num_classes} classes")
        means, labels = x.detach().cpu().double().mean((2, 3)), labels.cpu()
        if self._sum is None:
            self._sum = means.new_zeros(self._num_classes, means.shape[1])
        self._sum.index_add_(0, labels, means)
        self._images += torch.bincount(labels, minlength=self._num_classes)

    def merge(self, other: "ClassMeans") -> None:
        """Add the images of another one, which is left as it is."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
            self._images = self._images + other._images

    def mean_abs_correlation(self) -> float | None:
        """Return the mean |r| of pairs of channels over the class means; None with fewer than 3 classes."""
        seen = self._images > 0
        if self._sum is None or seen.sum() < 3:
            return None
        moments = ChannelMoments()
        moments.update((self._sum[seen] / self._images[seen, None])[:, :, None, None])
        return moments.mean_abs_correlation()


def mean_of_pairs(values: Tensor) -> float:
    """Return the mean of a symmetric matrix `[C, C]` outside its diagonal; 0 for a single channel."""
    channels = values.shape[0]
    return float((values.sum() - values.diagonal().sum()) / max(channels * (channels - 1), 1))
