"""Tables for the terminal."""

from collections.abc import Sequence

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
    return "\n".join(rows)


def correlation_table(stages: Sequence[int], before: Sequence[float], after: Sequence[float], images: int) -> str:
    """Set the mean |r| of every stage before and after training side by side, as Tables I and III do.

    Args:
        stages: Index of every stage.
        before: Mean |r| of every stage.
        after: The same after training.
        images: Number of images behind the figures.

    Returns:
        Lines of text.
    """
    rows = [f"mean |r|   before   after   (on {images:,} held-out images)"]
    rows += [f"stage {s:<3} {b:>8.3f} {a:>7.3f}" for s, b, a in zip(stages, before, after, strict=True)]
    return "\n".join(rows)
