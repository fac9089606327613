"""A training over its epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from .canvas import COLOURS, new_figure, plain, save


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
    figure = new_figure(12 if measured else 8, 3.6, title)
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
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    plain(figure.axes)
    return save(figure, path)
