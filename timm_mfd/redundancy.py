"""Streaming per-stage correlation statistics: the paper's Tables I and III, and which channels are superfluous."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import nextafter
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from .gathering import from_all_processes
from .moments import ChannelMoments, ClassMeans, mean_of_pairs
from .stages import StageInfo, read_stages, stage_info

CORRELATION_IMAGES = 1000  # held-out images behind the correlations before and after training
NEAR_DEAD = 0.01  # a channel is near-dead if its std is below this share of the median std of its stage


@dataclass(frozen=True)
class StageRedundancy:
    """How redundant the channels of one stage are, over n samples (pixels of all images).

    Attributes:
        stage: Index of the stage.
        module: Its name in the model.
        channels: C.
        size: `(H, W)`.
        samples: n.
        mean_abs_r: Mean |r| of pairs of different channels, in [0, 1]: an entry of Tables I and III.
        mean_r2: Mean r^2 of pairs, in [0, 1]: Eq. 5.
        noise_floor: 1 / (n - 1), the mean r^2 of independent channels if the samples are independent. Neighbouring
            pixels are not, so that the true floor is higher.
        corrected_r2: Mean of r^2 - (1 - r^2) / (n - 2) over pairs of channels that vary: about 0 for noise.
        effective_rank: exp(entropy) of the eigenvalues of the correlation matrix as shares of their sum, in [1, C]
            (Roy and Vetterli, 2007); 0 if no channel varies.
        dead: Channels that are constant.
        near_dead: Channels that vary, with less than `NEAR_DEAD` of the median std of those that vary.
        groups: Groups of near-duplicates, the largest first: |r| > tau for every pair in a group.
        tau: That threshold.
        class_mean_abs_r: Mean |r| of pairs over the class means; None without labels or with fewer than 3 classes.
        correlation: The matrix `[C, C]`.
    """

    stage: int
    module: str
    channels: int
    size: tuple[int, int]
    samples: int
    mean_abs_r: float
    mean_r2: float
    noise_floor: float
    corrected_r2: float
    effective_rank: float
    dead: tuple[int, ...]
    near_dead: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    tau: float
    class_mean_abs_r: float | None
    correlation: Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return all but the matrix, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "correlation"}

    @classmethod
    def of(
        cls, info: StageInfo, size: tuple[int, int], moments: ChannelMoments, means: ClassMeans, tau: float
    ) -> "StageRedundancy":
        """Summarise the sums over all samples of a stage.

        Args:
            info: Which stage.
            size: `(H, W)` of its maps.
            moments: Of all samples.
            means: Of the classes, if any.
            tau: Channels with |r| above it are near-duplicates.

        Raises:
            ValueError: If there are fewer than 2 samples.
        """
        if moments.count < 2:
            raise ValueError(
                f"stage {info.index} gave {moments.count} sample; correlation needs more images (--dataset) or larger "
                "ones (--image-size)"
            )
        if not moments.is_finite():
            raise ValueError(f"stage {info.index} ({info.module}) is not finite on these images")
        r, varies, std, n = moments.correlation(), moments.varies(), moments.std(), moments.count
        faint = varies & (std < NEAR_DEAD * std[varies].quantile(0.5)) if varies.any() else varies
        # A pair with a constant channel has no noise to be corrected.
        live = varies[:, None] & varies
        corrected = torch.where(live, r.square() - (1 - r.square()) / max(n - 2, 1), 0.0)
        return cls(
            stage=info.index,
            module=info.module,
            channels=len(r),
            size=size,
            samples=n,
            mean_abs_r=mean_of_pairs(r.abs()),
            mean_r2=mean_of_pairs(r.square()),
            noise_floor=1 / (n - 1),
            corrected_r2=mean_of_pairs(corrected),
            effective_rank=_effective_rank(r[varies][:, varies]),
            dead=_positions(~varies),
            near_dead=_positions(faint),
            groups=near_duplicates(r, tau),
            tau=tau,
            class_mean_abs_r=means.mean_abs_correlation(),
            correlation=r,
        )


@torch.no_grad()
def measure_redundancy(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Tensor | None]],
    *,
    indices: Sequence[int] | None = None,
    num_classes: int | None = None,
    tau: float = 0.95,
) -> list[StageRedundancy]:
    """Measure how redundant the channels of every stage of a model are.

    One pass over the data; the memory does not grow with the number of images. Under torch.distributed every process
    brings its own images, and all get the statistics of all of them.

    Args:
        model: Any timm model; run in evaluation mode, its training mode is restored.
        batches: Images `[B, in_chans, H, W]` on the model's device, or pairs of images and labels `[B]` or None.
        indices: Which stages, see `timm_mfd.forward_stages`.
        num_classes: Number of classes behind the labels. Default: no class means.
        tau: Channels with |r| above it are near-duplicates, in (0, 1).

    Returns:
        One entry per stage.

    Raises:
        ValueError: If there is no image or no sequence of batches, `tau` or a label is out of range, or a stage is not
            finite.

    Example:
        >>> measure_redundancy(model, [(images, labels)], num_classes=10)[0].mean_abs_r
        0.31
    """
    if isinstance(batches, Tensor):
        raise ValueError(f"expected a sequence of batches, not one tensor {list(batches.shape)}; pass [images]")
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1, not {tau}")
    infos = stage_info(model, indices)
    moments = [ChannelMoments() for _ in infos]
    means = [ClassMeans(num_classes or 0) for _ in infos]
    sizes: list[tuple[int, int]] | None = None
    for stages, labels in _outputs(model, batches, indices):
        sizes = [(stage.shape[2], stage.shape[3]) for stage in stages]
        for number, stage in enumerate(stages):
            moments[number].update(stage)
            if num_classes and labels is not None:
                means[number].update(stage, labels)
    everywhere = from_all_processes((moments, means, sizes))
    if len(everywhere) > 1:
        moments, means = [ChannelMoments() for _ in infos], [ClassMeans(num_classes or 0) for _ in infos]
        for their_moments, their_means, their_sizes in everywhere:
            sizes = sizes or their_sizes
            for number in range(len(infos)):
                moments[number].merge(their_moments[number])
                means[number].merge(their_means[number])
    if sizes is None:
        raise ValueError("no images to measure the correlation on")
    return [StageRedundancy.of(*stage, tau) for stage in zip(infos, sizes, moments, means, strict=True)]


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
        One value in [0, 1] per stage, over the samples of all batches of this process together.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> mean_abs_correlation(model, [images])
        [0.31, 0.22, 0.18, 0.09, 0.12]
    """
    moments: list[ChannelMoments] = []
    for stages, _ in _outputs(model, batches, indices):
        moments = moments or [ChannelMoments() for _ in stages]
        for moment, stage in zip(moments, stages, strict=True):
            moment.update(stage)
    if not moments:
        raise ValueError("no images to measure the correlation on")
    return [moment.mean_abs_correlation() for moment in moments]


def near_duplicates(correlation: Tensor, tau: float) -> tuple[tuple[int, ...], ...]:
    """Find groups of channels that are near-duplicates of each other, up to scale, offset and sign.

    Complete linkage: the two most similar groups are united as long as every pair of their channels has |r| > tau.

    Args:
        correlation: `[C, C]`; a constant channel correlates 0 with every other, and is in no group.
        tau: The threshold.

    Returns:
        Groups of at least two channels in ascending order, the largest group first.

    Example:
        >>> near_duplicates(torch.tensor([[1.0, -0.99, 0.1], [-0.99, 1.0, 0.2], [0.1, 0.2, 1.0]]), 0.95)
        ((0, 1),)
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # here, so that `import timm_mfd` does not need it

    channels = len(correlation)
    if channels < 2:
        return ()
    distance = 1 - correlation.abs().cpu().double()
    rows, columns = torch.triu_indices(channels, channels, 1)
    of_channel = fcluster(linkage(distance[rows, columns].numpy(), "complete"), nextafter(1 - tau, 0), "distance")
    groups: dict[int, list[int]] = {}
    for channel, group in enumerate(of_channel.tolist()):
        groups.setdefault(group, []).append(channel)
    found = (tuple(group) for group in groups.values() if len(group) > 1)
    return tuple(sorted(found, key=lambda group: (-len(group), group)))


def _outputs(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor | None]], indices: Sequence[int] | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    model = unwrap_model(model)  # statistics need no wrapper
    taken = [stage.index for stage in stage_info(model, indices)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            images, labels = (batch, None) if isinstance(batch, Tensor) else batch
            yield read_stages(model, images, taken).stages, labels
    finally:
        model.train(was_training)


def _effective_rank(correlation: Tensor) -> float:
    if len(correlation) == 0:
        return 0.0
    share = torch.linalg.eigvalsh(correlation).clamp_min(0) / len(correlation)
    return float(torch.special.entr(share).sum().exp())


def _positions(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
