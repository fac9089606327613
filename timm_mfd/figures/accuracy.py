"""Accuracies of the recipes, ours beside the paper's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .canvas import new_figure, plain, save

if TYPE_CHECKING:  # the training script draws curves and needs nothing of a report
    from ..report import Row

_GAIN, _LOSS, _CHANCE = "#0072B2", "#D55E00", "#000000"
_OURS: dict[str, Any] = {"marker": "o", "color": "black"}
_PAPER: dict[str, Any] = {"marker": "D", "color": "#8c8c8c"}


def ours_against_paper(rows: "Sequence[Row]", path: str | Path, title: str) -> Path:
    """Draw for each row the accuracies with and without MFD, ours beside the paper's, and their difference.

    A difference has a colour only where its confidence interval leaves out 0.

    Args:
        rows: What `report.rows_of` returns.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: What was trained, and how.

    Returns:
        The path.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> ours_against_paper(rows_of("5", results), "table5.png", "Table V, paper's protocol")
    """
    if not rows:
        raise ValueError("no rows to draw")
    with_paper = any(row.recipe.accuracy is not None for row in rows)
    figure = new_figure(10.5, 1.9 + (0.6 if with_paper else 0.4) * len(rows), title)
    accuracy, difference = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    shift = 0.2 if with_paper else 0.0  # ours above the middle of the row, the paper's below
    for y, row in enumerate(rows):
        ours = [(spread.mean, spread.std) if spread else (None, None) for spread in (row.ours_baseline, row.ours)]
        paper = [(row.baseline.accuracy, None), (row.recipe.accuracy, None)]
        for points, style, top in ((ours, _OURS, y - shift - 0.1), (paper, _PAPER, y + shift - 0.1)):
            for (value, std), fill, height in zip(points, ("white", style["color"]), (top, top + 0.2), strict=True):
                if value is not None:
                    accuracy.errorbar(value, height, xerr=std, mfc=fill, ms=6, capsize=3, lw=1, **style)
        if (d := row.difference) is not None:
            ends = None if d.low is None or d.high is None else [[d.mean - d.low], [d.high - d.mean]]
            colour = (_LOSS, _CHANCE, _GAIN)[d.sign + 1]
            difference.errorbar(d.mean, y - shift, xerr=ends, fmt="o", color=colour, capsize=3, ms=7)
        if row.paper_difference is not None:
            difference.errorbar(row.paper_difference, y + shift, ms=6, **_PAPER)
    signs = {row.difference.sign for row in rows if row.difference is not None}
    styles: list[tuple[dict[str, Any], str]] = [
        ({**_OURS, "mfc": "white"}, "ours, without MFD"),
        (_OURS, "ours, with MFD"),
    ]
    styles += [({**_OURS, "color": _GAIN}, "significant gain")] * (1 in signs)
    styles += [({**_OURS, "color": _LOSS}, "significant loss")] * (-1 in signs)
    if with_paper:
        styles += [({**_PAPER, "mfc": "white"}, "paper, without"), (_PAPER, "paper, with; its gain")]
    handles = [Line2D([], [], ls="", ms=6, label=label, **style) for style, label in styles]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    names = [row.baseline.id.replace("/", ", ") + row.recipe.variant for row in rows]
    any_std = any(spread and spread.std is not None for row in rows for spread in (row.ours_baseline, row.ours))
    accuracy.set(xlabel="top-1, %" + " (bars: standard deviation)" * any_std)
    accuracy.set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    any_interval = any(row.difference is not None and row.difference.low is not None for row in rows)
    meaning = "gain by MFD, points" + " (95 % interval)" * any_interval
    difference.set(xlabel=meaning + "\nin black: may be chance" * (0 in signs))
    for line in range(1, len(rows)):
        accuracy.axhline(line - 0.5, color="0.9", lw=0.8)
        difference.axhline(line - 0.5, color="0.9", lw=0.8)
    difference.axvline(0, color="black", lw=0.8)
    plain((accuracy, difference), "x")
    for axes in (accuracy, difference):
        axes.margins(x=0.08)
    return save(figure, path)


def accuracy_against_weight(rows: "Sequence[Row]", path: str | Path, title: str) -> Path:
    """Draw accuracy against lg(lambda), as Table II, ours beside the paper's; the level without MFD is a line.

    Args:
        rows: Rows that differ in the weight only, such as `report.rows_of("2", results)`.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: What was trained on which data.

    Returns:
        The path.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> accuracy_against_weight(rows_of("2", results), "table2.png", "ResNet50 on CIFAR-100")
    """
    if not rows:
        raise ValueError("no rows to draw")
    rows = sorted(rows, key=lambda row: row.recipe.mfd_weight)
    weights = [math.log10(row.recipe.mfd_weight) for row in rows]
    figure = new_figure(6.4, 4.2, title)
    axes = figure.subplots()
    levels = (("ours", rows[0].ours_baseline and rows[0].ours_baseline.mean, "black", "o"),
              ("paper", rows[0].baseline.accuracy, _LOSS, "D"))  # fmt: skip
    for who, level, colour, marker in levels:
        if who == "ours":
            points = [(x, row.ours.mean, row.ours.std) for x, row in zip(weights, rows, strict=True) if row.ours]
        else:
            paper = ((x, row.recipe.accuracy) for x, row in zip(weights, rows, strict=True))
            points = [(x, y, None) for x, y in paper if y is not None]
        if points:
            xs, ys, stds = zip(*points, strict=True)
            bars = [std or 0 for std in stds] if any(stds) else None
            axes.errorbar(xs, ys, yerr=bars, color=colour, marker=marker, capsize=3, lw=1.5, label=f"{who}, with MFD")
        if level is not None:
            axes.axhline(level, color=colour, ls=":", lw=1.5, label=f"{who}, without MFD")
    axes.set(xlabel="lg(λ)", ylabel="top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain([axes])
    axes.legend(frameon=False, fontsize=9)
    return save(figure, path)
