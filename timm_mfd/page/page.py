"""From statistics, maps and pictures to the page."""

import base64
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from torch import Tensor

from ..figures.canvas import COLOURS, ink_on
from ..redundancy import StageRedundancy
from .sprites import sprite, thousandths, thumbnail

_FIRST = 64  # channels that one looks at first, as in the paper's figures
_MOST = 192  # channels of a stage whose maps are in the page
_COLUMNS = 16
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def write_page(
    path: str | Path,
    models: Mapping[str, Sequence[StageRedundancy]],
    maps: Mapping[str, Sequence[Tensor]],
    images: Tensor,
    labels: Sequence[str],
    *,
    data: str,
    pictures: Mapping[str, Path],
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write a page with tables, pictures, and a viewer of feature maps: image, stage and group, A beside B.

    Args:
        path: Where to write.
        models: For each model what `measure_redundancy` returns, of as many stages.
        maps: For each model and stage the maps of the images, `[V, C, H, W]`.
        images: Those images, `[V, 3, H, W]` in [0, 1].
        labels: What they show.
        data: What the statistics were measured on, such as `"1,000 held-out images of digits"`.
        pictures: PNG or SVG files by caption; they go into the page.
        facts: What else to say of a model in the headline, such as its accuracy.
        notes: Sentences below the tables.

    Returns:
        The path.

    Raises:
        ValueError: If there is no model or no image.

    Example:
        >>> write_page("report.html", {"resnet18": measured}, {"resnet18": maps}, images, ["cat"], data="a cat",
        ...            pictures={"Correlations": Path("correlations.svg")})
    """
    if not models or not len(images):
        raise ValueError("no models or no images to show")
    viewer = {
        "colours": [[colour, ink_on(colour)] for colour in COLOURS],
        "columns": _COLUMNS,
        "images": [{"label": label, "src": thumbnail(image)} for image, label in zip(images, labels, strict=True)],
        "models": [
            {"name": name, "stages": [_viewed(*stage) for stage in zip(stages, maps[name], strict=True)]}
            for name, stages in models.items()
        ],
    }
    page = Environment(loader=PackageLoader("timm_mfd", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = page.get_template("page.html").render(
        models=models,
        letters=dict(zip(models, "AB", strict=False)),
        largest=max(stage.mean_abs_r for stages in models.values() for stage in stages) or 1.0,
        stages=list(zip(*models.values(), strict=True)),
        data=data,
        tau=next(iter(models.values()))[0].tau,
        facts=facts or {},
        version=importlib.metadata.version("timm_mfd"),
        pictures={caption: _embedded(file) for caption, file in pictures.items()},
        notes=notes,
        # In a script element only "<" could end the data.
        viewer=json.dumps(viewer, separators=(",", ":")).replace("<", "\\u003c"),
    )
    Path(path).write_text(html, encoding="utf-8")
    return Path(path)


def viewed_channels(stage: StageRedundancy) -> list[int]:
    """Return the channels whose maps are in the page: the first 64, then those of the largest groups."""
    grouped = [channel for group in stage.groups for channel in group]
    return sorted(list(dict.fromkeys([*range(min(stage.channels, _FIRST)), *grouped, *range(stage.channels)]))[:_MOST])


def _viewed(stage: StageRedundancy, maps: Tensor) -> dict[str, Any]:
    channels = viewed_channels(stage)
    return {
        "stage": stage.stage,
        "title": f"{stage.module}, {stage.channels:,} channels of {stage.size[0]}x{stage.size[1]}",
        "facts": f"mean |r| {stage.mean_abs_r:.3f}, effective rank {stage.effective_rank:.1f}, "
        f"{sum(map(len, stage.groups)):,} channels in {len(stage.groups):,} group{'s'[len(stage.groups) == 1 :]} "
        f"with |r| > {stage.tau:g}, "
        f"{len(stage.dead):,} dead",
        "tau": stage.tau,
        "shape": stage.size[1] / stage.size[0],
        "total": stage.channels,
        "channels": channels,
        "groups": stage.groups,
        "dead": stage.dead,
        "r": thousandths(stage.correlation[channels][:, channels]),
        "sprites": [sprite(one[channels], _COLUMNS) for one in maps],
    }


def _embedded(picture: Path) -> str:
    return f"data:{_TYPES[picture.suffix]};base64," + base64.b64encode(picture.read_bytes()).decode()
