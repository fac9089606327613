"""A training over its epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from .canvas import COLOURS, new_figure, plain, save

_PER_STAGE = {
    "mfd_per_stage": "Mean squared correlation (Eq. 5)",
    "mean_abs_correlation": "Mean |r|, held-out images",
}


def training_curves(
    metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str, stages: Sequence[int] | None = None
) -> Path:
    """Draw accuracy, loss parts, and correlations per stage over the epochs.

    The decorrelation loss is that of the training batches, and is drawn where MFD measured it; mean |r| is that of
    held-out images, where the metrics have it.

    Args:
        metrics: Lines of `metrics.jsonl`, one per epoch.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: What was trained on which data.
        stages: Indices of the stages behind the correlations. Default: 0, 1, ...

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
    panels = {
        title: key
        for key, title in _PER_STAGE.items()
        if all(line.get(key, [None])[0] is not None for line in metrics)  # an earlier version wrote fewer
    }
    figure = new_figure(8 + 4 * len(panels), 3.6, title)
    accuracy, loss, *correlations = figure.subplots(1, 2 + len(panels))

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
    for axes, (title, key) in zip(correlations, panels.items(), strict=True):
        for number, values in enumerate(_by_stage(metrics, key)):
            colour = COLOURS[number % len(COLOURS)]
            stage = number if stages is None else stages[number]
            axes.plot(epochs, values, marker=marker, ms=3, color=colour, label=f"stage {stage}")
        axes.set(title=title)
        axes.set_ylim(bottom=0)
    _finish(figure, len(epochs))
    return save(figure, path)


def compared_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    title: str,
    stages: Sequence[int] | None = None,
) -> Path:
    """Draw two trainings over each other: accuracy, criterion, and mean |r| of each stage on held-out images.

    Args:
        metrics: For each run the lines of its `metrics.jsonl`.
        path: Where to write; the ending chooses the format (png, svg, pdf).
        title: What was trained on which data.
        stages: Indices of the stages behind the correlations. Default: 0, 1, ...

    Returns:
        The path.

    Raises:
        ValueError: If a run has no epoch.

    Example:
        >>> compared_curves({"without MFD": without, "with MFD": with_mfd}, "curves.png", "ResNet-18 on digits")
    """
    if any(not lines for lines in metrics.values()):
        raise ValueError("no epochs to draw")
    key = "mean_abs_correlation"
    both = all(key in line for lines in metrics.values() for line in lines)
    counts = {len(lines[-1][key]) for lines in metrics.values()} if both else set()
    panels = min(counts) if len(counts) == 1 else 0
    figure = new_figure(8 + 2.4 * panels, 3.6, title)
    accuracy, loss, *correlations = figure.subplots(1, 2 + panels)
    for number, (name, lines) in enumerate(metrics.items()):
        epochs = [line["epoch"] for line in lines]
        style = {"color": COLOURS[number], "label": name, "ls": ("-", "--")[number % 2]}
        accuracy.plot(epochs, [line["top1"] for line in lines], **style)
        loss.plot(epochs, [line["criterion_loss"] for line in lines], **style)
        for axes, values in zip(correlations, _by_stage(lines, key) if panels else (), strict=True):
            axes.plot(epochs, values, **style)
    accuracy.set(title="Held-out top-1", ylabel="%")
    loss.set(title="Training criterion", yscale="log")
    for number, axes in enumerate(correlations):
        axes.set(title=f"mean |r|, stage {number if stages is None else stages[number]}")
        axes.set_ylim(bottom=0)
    _finish(figure, max(map(len, metrics.values())))
    for axes in (loss, *correlations):  # one legend is enough
        axes.get_legend().remove()
    return save(figure, path)


def _by_stage(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, ...]]:
    return list(zip(*(line[key] for line in metrics), strict=True))


def _finish(figure: Any, epochs: int) -> None:
    for axes in figure.axes:
        axes.set(xlabel="epoch")
        if epochs == 1:
            axes.set_xlim(0, 2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    plain(figure.axes)
