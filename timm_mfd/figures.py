"""Pictures. matplotlib is imported here and nowhere else."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:  # the training script draws curves and needs nothing of a report
    from .report import Row

# Okabe and Ito's colours: told apart by colour-blind people and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GAIN, _LOSS, _CHANCE = "#0072B2", "#D55E00", "#000000"
_OURS: dict[str, Any] = {"marker": "o", "color": "black"}
_PAPER: dict[str, Any] = {"marker": "D", "color": "#8c8c8c"}


def training_curves(
    metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str, stages: Sequence[int] | None = None
) -> Path:
    """Draw accuracy, loss parts and decorrelation loss per stage over the epochs.

    Args:
        metrics: Lines of `metrics.jsonl`, one per epoch.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: What was trained on which data.
        stages: Indices of the stages behind `mfd_per_stage`. Default: 0, 1, ...

    Returns:
        The path.

    Raises:
        ValueError: If there is no epoch.

    Example:
        >>> metrics = [json.loads(line) for line in open("metrics.jsonl")]
        >>> training_curves(metrics, "curves.png", "resnet18_mfd on digits")
    """
    if not metrics:
        raise ValueError("no epochs to draw")
    epochs = [line["epoch"] for line in metrics]
    marker = "o" if len(epochs) < 40 else None
    per_stage = [line["mfd_per_stage"] for line in metrics]
    measured = per_stage[-1][0] is not None  # with MFD weight 0 there is nothing to draw
    figure = Figure(figsize=(12 if measured else 8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    accuracy, loss, *correlation = figure.subplots(1, 3 if measured else 2)

    for key, label, colour in (("top1", "top-1", COLOURS[0]), ("top5", "top-5", COLOURS[5])):
        accuracy.plot(epochs, [line[key] for line in metrics], marker=marker, ms=3, color=colour, label=label)
    accuracy.set(title="Held-out accuracy", ylabel="%")
    accuracy.margins(y=0.12)
    accuracy.annotate(
        f"{metrics[-1]['top1']:.2f}",
        (epochs[-1], metrics[-1]["top1"]),
        xytext=(-4, -14),
        textcoords="offset points",
        ha="right",
        color=COLOURS[0],
    )
    loss.plot(
        epochs, [line["criterion_loss"] for line in metrics], marker=marker, ms=3, color=COLOURS[0], label="criterion"
    )
    if any(line["mfd_loss"] for line in metrics):
        loss.plot(
            epochs, [line["mfd_loss"] for line in metrics], marker=marker, ms=3, color=COLOURS[1], label="weighted MFD"
        )
    loss.set(title="Training loss", yscale="log")
    for axes in correlation:
        for number, values in enumerate(zip(*per_stage, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            stage = number if stages is None else stages[number]
            axes.plot(epochs, values, marker=marker, ms=3, color=colour, label=f"stage {stage}")
        axes.set(title="Mean squared correlation (Eq. 5)")
        axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.set(xlabel="epoch")
        if len(epochs) == 1:
            axes.set_xlim(0, 2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


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
    figure = Figure(figsize=(10.5, 1.7 + (0.6 if with_paper else 0.4) * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
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
        (_OURS, "ours, with MFD (bars: std); gain that may be chance"),
    ]
    styles += [({**_OURS, "color": _GAIN}, "significant gain")] * (1 in signs)
    styles += [({**_OURS, "color": _LOSS}, "significant loss")] * (-1 in signs)
    if with_paper:
        styles += [({**_PAPER, "mfc": "white"}, "paper, without"), (_PAPER, "paper, with; its gain")]
    handles = [Line2D([], [], ls="", ms=6, label=label, **style) for style, label in styles]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    weights = ["" if row.recipe.mfd_weight == 1 else f", MFD x {row.recipe.mfd_weight:g}" for row in rows]
    names = [row.baseline.id.replace("/", ", ") + weight for row, weight in zip(rows, weights, strict=True)]
    accuracy.set(xlabel="top-1, %", yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    difference.set(xlabel="gain by MFD, points (95 % interval)")
    for line in range(1, len(rows)):
        accuracy.axhline(line - 0.5, color="0.9", lw=0.8)
        difference.axhline(line - 0.5, color="0.9", lw=0.8)
    difference.axvline(0, color="black", lw=0.8)
    for axes in (accuracy, difference):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
    figure.savefig(path, dpi=150)
    return Path(path)


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
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
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
    axes.set(title=title, xlabel="lg(λ)", ylabel="top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return Path(path)
