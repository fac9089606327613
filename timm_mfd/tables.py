"""Tables for the terminal."""

from collections.abc import Sequence

import torch

from .stages import StageInfo


def stage_table(shapes: Sequence[tuple[StageInfo, torch.Size]], batch_size: int) -> str:
    """Describe the stages that MFD sees: index, module, channels, size and samples of a batch.

    Args:
        shapes: What `stage_shapes` returns.
        batch_size: Images whose samples count together.

    Returns:
        Lines of text; stages with fewer samples than channels are marked.
    """
    rows = ["stage  module              channels  size     samples per batch"]
    for stage, (_, _, height, width) in shapes:
        size, samples = f"{height}x{width}", batch_size * height * width
        few = "  (fewer than channels: expect spurious correlation)" if samples < stage.channels else ""
        rows.append(f"{stage.index:>5}  {stage.module:<18}  {stage.channels:>8}  {size:<7}  {samples:>17,}{few}")
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
