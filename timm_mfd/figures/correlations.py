"""Correlations of channels: matrices, distributions, and one number per stage."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from ..redundancy import StageRedundancy
from .canvas import COLOURS, legend_label, new_figure, plain, save


def correlation_by_stage(
    values: Mapping[str, Sequence[float]], stages: Sequence[int], path: str | Path, title: str
) -> Path:
    """Draw the mean |r| of every stage for one or more models, as Tables I and III.

    Args:
        values: For each model or moment, such as `"before"` and `"after"`, one number per stage.
        stages: Indices of the stages.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: Which models, on which data.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> correlation_by_stage({"without": [0.39, 0.29], "MFD": [0.2, 0.13]}, [0, 1], "r.png", "resnet18 on digits")
    """
    if not values or not stages:
        raise ValueError("no correlations to draw")
    figure = new_figure(1.6 + max(1.1, 0.55 * len(values)) * len(stages), 3.8, title)
    axes = figure.subplots()
    width = 0.8 / len(values)
    for number, (name, numbers) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(stages))]
        bars = axes.bar(places, numbers, width * 0.94, color=COLOURS[number % len(COLOURS)], label=legend_label(name))
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    axes.set(ylabel="mean |r| between channels", xticks=range(len(stages)), ylim=(0, None))
    axes.set_xticklabels([f"stage {stage}" for stage in stages])
    axes.margins(y=0.1)
    plain([axes], "y")
    axes.set_axisbelow(True)
    if len(values) > 1:
        columns = len(values) if sum(map(len, values)) < 70 else 1
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return save(figure, path)


def correlation_distribution(
    models: Mapping[str, Sequence[StageRedundancy]], path: str | Path, title: str, bins: int = 50
) -> Path:
    """Draw how |r| is distributed over the pairs of channels of each stage, for one or more models.

    Args:
        models: For each model what `measure_redundancy` returns, of the same stages.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: Which models, on which data.
        bins: Number of bins between 0 and 1.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> correlation_distribution({"MFD": measured}, "distribution.png", "resnet18 on digits")
    """
    stages = _stages_of(models)
    figure = new_figure(2.6 * len(stages) + 0.6, 3.2, title)
    for number, axes in enumerate(np.atleast_1d(figure.subplots(1, len(stages), sharey=True))):
        for colour, style, measured in zip(COLOURS, ("-", "--", "-.", ":"), models.values(), strict=False):
            r = measured[number].correlation.abs().cpu().numpy()
            share, edges = np.histogram(r[np.triu_indices(len(r), 1)], bins, (0, 1))
            seen = np.where(share > 0, share / max(share.sum(), 1), np.nan)  # no line down to a log of 0
            axes.stairs(seen, edges, baseline=None, color=colour, ls=style, lw=1.5)
        axes.set(title=f"stage {stages[number].stage}", xlabel="|r|", xlim=(0, 1), yscale="log")
    figure.axes[0].set_ylabel(f"share of pairs per 1/{bins}")
    plain(figure.axes)
    handles = [
        Line2D([], [], color=colour, ls=style, label=legend_label(name))
        for colour, style, name in zip(COLOURS, ("-", "--", "-.", ":"), models, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return save(figure, path)


def correlation_heat_maps(models: Mapping[str, Sequence[StageRedundancy]], path: str | Path, title: str) -> Path:
    """Draw the matrix of |r| of each stage, one row per model: near-duplicates first and framed, dead channels last.

    Args:
        models: For each model what `measure_redundancy` returns, of the same stages.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: Which models, on which data.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> correlation_heat_maps({"MFD": measured}, "heat_maps.png", "resnet18 on digits")
    """
    stages = _stages_of(models)
    figure = new_figure(2.5 * len(stages) + 1.0, 2.8 * len(models) + 0.5, title)
    rows = figure.subplots(len(models), len(stages), squeeze=False)
    for row, (name, measured) in zip(rows, models.items(), strict=True):
        for axes, stage in zip(row, measured, strict=True):
            order = by_group(stage.correlation, stage.groups, stage.dead)
            r = stage.correlation.abs().cpu().numpy()[np.ix_(order, order)]
            axes.imshow(r, cmap="Blues", vmin=0, vmax=1, interpolation="antialiased")
            start = 0
            for group in stage.groups:
                axes.add_patch(
                    Rectangle((start - 0.5, start - 0.5), len(group), len(group), fill=False, ec=COLOURS[1], lw=1)
                )
                start += len(group)
            dead = f", {len(stage.dead)} dead" if stage.dead else ""
            axes.set_title(
                f"stage {stage.stage}: mean |r| {stage.mean_abs_r:.3f}\n{stage.channels} channels{dead}", fontsize=9
            )
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel("\n".join(textwrap.wrap(name, 34)), fontsize=10)
    figure.colorbar(rows[0][0].images[0], ax=rows, label="|r|", shrink=0.8, aspect=30)
    return save(figure, path)


def by_group(correlation: Tensor, groups: Sequence[Sequence[int]], dead: Sequence[int]) -> list[int]:
    """Order channels for a matrix: groups of near-duplicates, the others so that similar ones are neighbours, the dead.

    Args:
        correlation: `[C, C]`.
        groups: Groups, as `near_duplicates` finds them.
        dead: Constant channels.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    first = [channel for group in groups for channel in group]
    placed = {*first, *dead}
    rest = [channel for channel in range(len(correlation)) if channel not in placed]
    if len(rest) > 2:
        distance = 1 - correlation.abs().cpu().numpy()[np.ix_(rest, rest)]
        leaves = leaves_list(linkage(distance[np.triu_indices(len(rest), 1)], "average"))
        rest = [rest[leaf] for leaf in leaves]
    return [*first, *rest, *dead]


def _stages_of(models: Mapping[str, Sequence[StageRedundancy]]) -> Sequence[StageRedundancy]:
    stages = next(iter(models.values()), ())
    if not stages:
        raise ValueError("no correlations to draw")
    return stages
