"""How every `*_mfd` entry point makes its model: whichever way timm was asked, only checked weights are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from ._pretrained import PRETRAINED, Pretrained, default_tag, imagenet_cfg, unpublished
from ._stem import SIDES, Stem, check_stem
from .download import download
from .pruned import check_arguments, fit_widths, saved_shapes
from .saved import WEIGHTS, check_config, check_weights

_OWN_WEIGHTS = ("file", "url", "state_dict", "hf_hub_id")


def build(
    network: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    stem: Stem | None,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build an architecture; with `pretrained`, with weights that are exactly the published or saved ones.

    Args:
        network: Makes the network without weights, from `stem` and timm's arguments.
        name: Name of the entry point.
        pretrained: Whether to load weights.
        stem: The stem, None: that of the weights or `"imagenet"`.
        pretrained_cfg: From timm: the tag, None for the name alone, or the configuration of a saved model.
        pretrained_cfg_overlay: From the caller, see `timm.create_model`.
        cache_dir: From the caller.
        pretrained_model_args: From timm: the arguments of a saved model.
        **kwargs: For `network`.

    Raises:
        ValueError: If there are no such weights, they are not what they should be, or they need another stem.
        ConnectionError: If they are not here and the Hub cannot be reached.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    own = any(overlay.get(key) for key in _OWN_WEIGHTS)  # weights that the caller brings along
    wanted = pretrained and not own
    if pretrained and "num_classes" in overlay:
        raise ValueError("give num_classes itself, not in pretrained_cfg_overlay: the weights have their own classes")
    entry: Pretrained | None = None
    trained_with = (pretrained_model_args or {}).get("stem", "imagenet")
    source: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}  # of pruned weights
    if pretrained_cfg is None and wanted:
        pretrained_cfg = default_tag(name)
    if isinstance(pretrained_cfg, str):
        entry = PRETRAINED.get(f"{name}.{pretrained_cfg}")
        if entry is not None and wanted and not entry.published:
            raise ValueError(unpublished(f"{name}.{pretrained_cfg}", entry))
    elif pretrained_cfg is None:
        # Not the first published tag's, which timm would take: the name alone means the same for ever.
        layers = get_pretrained_cfg(name)
        pretrained_cfg = imagenet_cfg() | {"first_conv": layers.first_conv, "classifier": layers.classifier}
        pretrained_cfg["architecture"] = name
        if side := SIDES.get(stem or ""):  # what `timm.data.resolve_data_config` then says
            pretrained_cfg |= {"input_size": (3, side, side), "pool_size": None, "crop_pct": 1.0}
    elif isinstance(pretrained_cfg, dict) and wanted and pretrained_cfg.get("source") in ("hf-hub", "local-dir"):
        source = pretrained_cfg
        local = source["source"] == "local-dir"
        folder = Path(source["file"]) if local else download(source["hf_hub_id"], cache_dir)
        config = check_config(folder)
        if config["architecture"] != name:
            raise ValueError(f"{str(folder)!r} holds a {config['architecture']}, not a {name}")
        if config.get("model_args", {}) != (pretrained_model_args or {}):
            raise ValueError(f"{str(folder)!r} changed while it was loaded; try again")
        overlay |= {"source": None, "file": str(check_weights(folder / WEIGHTS, config))}
        if config.get("pruned"):
            check_arguments(str(folder), config, kwargs)
            shapes = saved_shapes(folder / WEIGHTS)
    if entry is not None:
        trained_with = entry.arguments["stem"]
        kwargs = {key: value for key, value in entry.arguments.items() if key != "stem"} | kwargs
        if wanted:
            overlay["file"] = str(entry.weights(cache_dir))
    if wanted and (entry or source) and stem not in (None, trained_with):
        raise ValueError(f"the weights of {name} were trained with stem {trained_with!r}, not {stem!r}")
    stem = stem or (trained_with if entry or source else "imagenet")
    check_stem(stem)

    def make(**arguments: Any) -> nn.Module:
        model = network(stem=stem, **arguments)
        return fit_widths(model, shapes) if shapes else model

    model = build_model_with_cfg(
        make,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        pretrained_model_args=pretrained_model_args,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )
    # timm records what `create_model` was given; the stem may come from the weights.
    model._model_args = {**getattr(model, "_model_args", {}), "stem": stem}
    if wanted and not (entry and entry.file):
        model.pretrained_cfg.pop("file", None)  # a path of this machine
        model.pretrained_cfg.update({key: value for key, value in source.items() if key in ("source", "file")})
    return model
