"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .pruning import Pruned
from .redundancy import StageRedundancy
from .stages import StageInfo


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


def redundancy_table(
    models: Mapping[str, Sequence[StageRedundancy]], unmeasured: Mapping[str, Sequence[StageInfo]] | None = None
) -> str:
    """Set what `measure_redundancy` found in each stage side by side for one or more models.

    Args:
        models: For each model its stages.
        unmeasured: For each model the stages that gave one sample only, of which nothing is known.

    Returns:
        A Markdown table.
    """
    rows = [
        "| model | stage | channels | size | mean \\|r\\| | mean r^2 | above noise | effective rank | dead | near-dead "
        "| in groups | of class means |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, stages in models.items():
        for s in stages:
            grouped = sum(len(group) for group in s.groups)
            of_means = "-" if s.class_mean_abs_r is None else f"{s.class_mean_abs_r:.3f}"
            rows.append(
                f"| {name} | {s.stage} | {s.channels} | {s.size[0]}x{s.size[1]} | {s.mean_abs_r:.3f} | {s.mean_r2:.4f} "
                f"| {s.corrected_r2:.4f} | {s.effective_rank:.1f} | {len(s.dead)} | {len(s.near_dead)} | {grouped} "
                f"| {of_means} |"
            )
        for info in (unmeasured or {}).get(name, ()):
            rows.append(f"| {name} | {info.index} | {info.channels} |" + " - |" * 9)
    return "\n".join(rows)


def removable_text(name: str, pruned: Pruned) -> str:
    """Say what the silent channels of a model cost.

    Args:
        name: Of the model.
        pruned: What `prune_silent` returned.

    Returns:
        A sentence.
    """
    if not pruned.channels:
        return f"{name}: no channel is 0 on all of these images in every layer that uses it, so none is free to remove."
    saved = [
        f"{before - after:,} of {before:,} {what} ({100 * (before - after) / before:.1f} %)"
        for (before, after), what in ((pruned.parameters, "parameters"), (pruned.multiply_adds, "multiply-adds"))
    ]
    return (
        f"{name}: {pruned.channels:,} channels, inside of stages and at their ends, are 0 on all of these images in "
        f"every layer that uses them; they cost {' and '.join(saved)}."
    )
