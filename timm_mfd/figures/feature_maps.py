"""The feature maps of one image, similar ones framed alike: the paper's Figures 1, 4 and 5."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ..redundancy import StageRedundancy
from .canvas import COLOURS, ink_on, new_figure, save

_COLUMNS = 8
_PIXELS = 32  # a map is enlarged to at least so many, for the gap between maps to be fine
_GAP = 0.06  # on each side of a map, as a share of it


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
    rows = max(-(-min(len(values), _COLUMNS**2) // _COLUMNS) for values in maps)
    figure = new_figure(2.6 + 5.2 * len(stages), max(1.1 + 0.6 * rows, 3.2), title)
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
        axes = panel.subplots()
        extent = (0, _COLUMNS, rows, 0)  # a cell is 1 wide and 1 high
        shape = values.shape[1] / values.shape[2]
        sheet = contact_sheet(values[:shown], rows)
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect=shape)
        axes.set(xlim=(-0.1, _COLUMNS + 0.1), ylim=(rows + 0.1, -0.1))
        axes.axis("off")
        for channel in range(shown):
            _mark(axes, channel, frames.get(channel), channel in stage.dead)
    return save(figure, path)


def frames_of(groups: Sequence[Sequence[int]], shown: int) -> dict[int, tuple[str, str]]:
    """Return colour and letter of each channel that is shown together with a near-duplicate.

    Args:
        groups: As `near_duplicates` finds them.
        shown: How many channels are shown.
    """
    frames: dict[int, tuple[str, str]] = {}
    for number, group in enumerate(groups):
        visible = [channel for channel in group if channel < shown]
        if len(visible) > 1:
            frames |= dict.fromkeys(visible, (COLOURS[number % len(COLOURS)], letter(number)))
    return frames


def letter(number: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def contact_sheet(maps: Tensor, rows: int) -> np.ndarray:
    """Lay maps out on a white sheet, each scaled to [0, 1] by itself; constant ones are grey.

    Args:
        maps: `[C, H, W]`.
        rows: Of 8 maps each; those that are not needed stay white.

    Returns:
        `[rows * height of a cell, 8 * its width]`, in [0, 1].
    """
    grey = scaled(maps).numpy()
    height, width = grey.shape[1:]
    grey = grey.repeat(-(-_PIXELS // height), 1).repeat(-(-_PIXELS // width), 2)
    gap = round(_GAP * min(grey.shape[1:]))
    cells = np.ones((rows * _COLUMNS, grey.shape[1] + 2 * gap, grey.shape[2] + 2 * gap), np.float32)
    cells[: len(grey), gap:-gap, gap:-gap] = grey
    grid = cells.reshape(rows, _COLUMNS, *cells.shape[1:]).transpose(0, 2, 1, 3)
    return grid.reshape(rows * cells.shape[1], _COLUMNS * cells.shape[2])


def scaled(maps: Tensor) -> Tensor:
    """Scale each map `[C, H, W]` to [0, 1] by itself, those of one pixel together; constant ones become 0.5."""
    maps = maps.detach().cpu().float()
    dims = (-2, -1) if maps.shape[-2:] != (1, 1) else (-3, -2, -1)
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.5)


def _mark(axes: Axes, channel: int, frame: tuple[str, str] | None, dead: bool) -> None:
    top, left = divmod(channel, _COLUMNS)
    corner, side = (left + _GAP / 2, top + _GAP / 2), 1 - _GAP
    if frame:
        colour, name = frame
        axes.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=2.5))
        box = {"boxstyle": "square,pad=0.15", "fc": colour, "ec": "none"}
        axes.text(left + 0.1, top + 0.1, name, color=ink_on(colour), fontsize=7, ha="left", va="top", bbox=box)
    elif dead:
        axes.add_patch(Rectangle(corner, side, side, fc="white", ec="0.6", lw=1))
        ends = (corner[0], corner[0] + side)
        for first, last in ((0, side), (side, 0)):
            axes.plot(ends, (corner[1] + first, corner[1] + last), color="0.6", lw=1)
