"""All pictures of an analysis."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..redundancy import StageRedundancy
from .correlations import correlation_by_stage, correlation_distribution, correlation_heat_maps
from .curves import compared_curves, training_curves
from .feature_maps import feature_maps

_SUFFIXES = ("", "_second")  # of the files of the first and the second model


def analysis_pictures(
    folder: Path,
    ending: str,
    where: str,
    measured: dict[str, list[StageRedundancy]],
    maps: dict[str, list[Tensor]],
    image: Tensor,
    of: str,
    curves: dict[str, list[dict[str, Any]]],
    curve_stages: dict[str, list[int] | None],
) -> dict[str, Path]:
    """Draw every picture of an analysis of one model, or of two side by side.

    Args:
        folder: Where to write.
        ending: Which format: png, svg, pdf.
        where: What the statistics were measured on.
        measured: For each model what `measure_redundancy` returns.
        maps: For each model and stage the maps of some images, `[V, C, H, W]`; the first is drawn.
        image: That image, `[3, H, W]` in [0, 1].
        of: What it is.
        curves: For each model the lines of its `metrics.jsonl`, if any.
        curve_stages: For each model the stages that MFD saw in its training, if other than all.

    Returns:
        The files by caption.
    """
    values = {name: [stage.mean_abs_r for stage in stages] for name, stages in measured.items()}
    indices = [stage.stage for stage in next(iter(measured.values()))]
    paths = {name: folder / f"{name}.{ending}" for name in ("stages", "distribution", "correlations")}
    pictures = {
        "Mean |r| between the channels of each stage": correlation_by_stage(
            values, indices, paths["stages"], f"Mean |r|, {where}"
        ),
        "How |r| is distributed over the pairs of channels": correlation_distribution(
            measured, paths["distribution"], f"Pairs of channels, {where}"
        ),
        "|r| between channels: near-duplicates first and framed, dead channels last": correlation_heat_maps(
            measured, paths["correlations"], f"|r| between channels, {where}"
        ),
    }
    for number, (name, stages) in enumerate(measured.items()):
        pictures[f"Feature maps of {name}: one image, the first two stages"] = feature_maps(
            image,
            [stage[0] for stage in maps[name][:2]],
            stages[:2],
            folder / f"feature_maps{_SUFFIXES[number]}.{ending}",
            f"Feature maps of {name}, {of}",
        )
    for number, name in enumerate(measured):
        if curves[name]:
            path = folder / f"curves{_SUFFIXES[number]}.{ending}"
            pictures[f"Training of {name}"] = training_curves(
                curves[name], path, f"Training of {name}", curve_stages[name]
            )
    if len(measured) == 2 and all(curves.values()):
        path, both = folder / f"curves_compared.{ending}", " and ".join(measured)
        numbers, others = (curve_stages[name] for name in measured)
        if numbers != others:  # other stages cannot be compared
            curves = {name: [{**line, "mean_abs_correlation": []} for line in lines] for name, lines in curves.items()}
        pictures[f"Training of {both}"] = compared_curves(curves, path, f"Training of {both}", numbers)
    return pictures
