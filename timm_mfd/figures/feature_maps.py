"""The feature maps of one image, similar ones framed alike: the paper's Figures 1, 4 and 5."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from torch import Tensor

from ..redundancy import StageRedundancy
from .canvas import COLOURS, new_figure, save

_COLUMNS = 8


def feature_maps(
    image: Tensor, maps: Sequence[Tensor], stages: Sequence[StageRedundancy], path: str | Path, title: str
) -> Path:
    """Draw an image and the first 64 channels of stages; near-duplicates have one colour and letter, dead ones a cross.

    Each map is scaled by itself, so that a sign-flipped copy looks like a negative.

    Args:
        image: `[3, H, W]` in [0, 1].
        maps: For each stage its maps of that image, `[C, H, W]`.
        stages: What `measure_redundancy` found in these stages, on many images.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: Which model, on which data.

    Returns:
        The path.

    Raises:
        ValueError: If there is no stage.

    Example:
        >>> maps = [stage[0] for stage in forward_stages(model, images).stages[:2]]
        >>> feature_maps(image, maps, measured[:2], "maps.png", "resnet18 on a cat")
    """
    if not stages:
        raise ValueError("no stages to draw")
    figure = new_figure(2.6 + 5.2 * len(stages), 5.9, title)
    parts = figure.subfigures(1, 1 + len(stages), squeeze=False, width_ratios=[2.2, *(5.2 for _ in stages)])
    left, *panels = parts[0]
    axes = left.subplots()
    axes.imshow(image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(title="image", xticks=[], yticks=[])
    for panel, values, stage in zip(panels, maps, stages, strict=True):
        shown = min(len(values), _COLUMNS**2)
        frames = frames_of(stage.groups, shown)
        duplicates = f"{len(frames)} in groups with |r| > {stage.tau:g}" if frames else f"no |r| > {stage.tau:g}"
        gone = sum(channel < shown for channel in stage.dead)
        panel.suptitle(f"stage {stage.stage}, channels 0-{shown - 1}: {duplicates}, {gone} dead", fontsize=10)
        grid = panel.subplots(
            -(-shown // _COLUMNS), _COLUMNS, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05}
        )
        for channel, axes in enumerate(grid.flat):
            axes.set(xticks=[], yticks=[])
            if channel >= shown:
                axes.set_visible(False)
                continue
            axes.imshow(values[channel].detach().cpu().float().numpy(), cmap="gray", interpolation="nearest")
            _frame(axes, frames.get(channel), channel in stage.dead)
    return save(figure, path)


def frames_of(groups: Sequence[Sequence[int]], shown: int) -> dict[int, tuple[str, str]]:
    """Return colour and letter of each channel that is shown together with a near-duplicate.

    Args:
        groups: As `near_duplicates` finds them.
        shown: How many channels are shown.
    """
    visible = [[channel for channel in group if channel < shown] for group in groups]
    visible = [group for group in visible if len(group) > 1]
    return {
        channel: (COLOURS[number % len(COLOURS)], letter(number))
        for number, group in enumerate(visible)
        for channel in group
    }


def letter(number: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _frame(axes: Axes, frame: tuple[str, str] | None, dead: bool) -> None:
    if frame:
        colour, name = frame
        axes.spines[:].set(color=colour, linewidth=2.5)
        box = {"boxstyle": "square,pad=0.15", "fc": colour, "ec": "none"}
        axes.text(0.03, 0.97, name, color="white", fontsize=7, va="top", transform=axes.transAxes, bbox=box)
    elif dead:
        axes.spines[:].set(color="0.6", linewidth=1)
        for ends in ((0, 1), (1, 0)):
            axes.plot([0, 1], ends, color="0.6", lw=1, transform=axes.transAxes)
    else:
        axes.spines[:].set_visible(False)
