"""`create_model` and `list_models`: timm's factory, with errors that tell what to do."""

import fnmatch
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, parse_model_name, split_model_name_tag
from torch import nn

from ..errors import first_words, named
from ._pretrained import PRETRAINED, unpublished
from ._stem import Stem, paper_stem
from .download import check_reachable, download
from .pruned import check_arguments, fit_widths, saved_shapes
from .saved import WEIGHTS, check_config, check_weights


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build any timm model, a `*_mfd` model, or a saved one.

    Args:
        name: A name of timm's registry or of `list_models`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        pretrained: Load the weights. For `*_mfd` models, `hf-hub:` and `local-dir:` exactly what was published or
            saved, or an error: they are read from safetensors only and compared with the sha256 of the tag, of the
            configuration that they were saved with, and of the Hub; without it the weights of `hf-hub:` and
            `local-dir:` are random, with a warning. Weights of timm's own names, and those that you name in a
            `pretrained_cfg` of your own, are loaded as timm does.
        **kwargs: For `timm.create_model`, such as `num_classes` and `in_chans`. `*_mfd` models also take `stem`:
            `"imagenet"` (timm's own strides, default), `"small"` (first convolution 3x3 with stride 1, max-pool kept:
            for images of 64 px) or `"cifar"` (no max-pool either: for 32 px). The stem is saved with the model.
            (`train_scripts/train.py` chooses the stem for the size of the images instead.) With timm's own stem
            timm's weights of the same network fit: `pretrained_cfg=timm.models.get_pretrained_cfg("resnet50")`.

    Returns:
        A plain timm model: same class and same keys as without this package.

    Raises:
        ValueError: If the name, the stem or the source is unknown, the model takes no stem or not these arguments, or
            what is saved there is damaged or is not what was saved.
        ConnectionError: If the Hub cannot be reached and its cache does not hold the model.

    Example:
        >>> model = timm_mfd.create_model("resnet50_mfd", num_classes=100, stem="cifar")
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of a model is a text, not {name!r:.60}")
    source, model_id = parse_model_name(name)
    if source is None:
        arch, tag = split_model_name_tag(model_id)
        if not is_model(arch):
            raise ValueError(f"unknown model {arch!r}; {_suggestion(arch, timm.list_models())}")
        if tag and model_id not in timm.list_models(f"{arch}.*", include_tags=True):
            known = [name for name in timm.list_models(f"{arch}.*", include_tags=True) if "." in name]
            raise ValueError(f"{arch!r} has no tag {tag!r}; it has {', '.join(known) or 'none'}")
        if kwargs.get("stem") is not None and arch not in _mfd_names():
            raise ValueError(f"{arch!r} takes no stem; models with a stem: {', '.join(_mfd_names())}")
        foreign = pretrained and arch not in _mfd_names() and not kwargs.get("pretrained_cfg")
        if foreign and not timm.is_model_pretrained(model_id):
            raise ValueError(unpublished(model_id, PRETRAINED.get(model_id)))
        cfg = get_pretrained_cfg(model_id)
        if foreign and cfg.hf_hub_id and not kwargs.get("pretrained_cfg_overlay"):
            check_reachable(cfg.hf_hub_id, cfg.hf_hub_filename, kwargs.get("cache_dir"))
        given: Any = kwargs.get("pretrained_cfg")
        if pretrained and getattr(given, "hf_hub_id", None) and not getattr(given, "file", None):
            check_reachable(given.hf_hub_id, given.hf_hub_filename, kwargs.get("cache_dir"))
        with named(f"{name} cannot be built{_with(kwargs)}"):
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    if not pretrained:
        warnings.warn(f"{name} without pretrained=True has random weights", stacklevel=2)
    if kwargs.get("pretrained_cfg") is not None:
        raise ValueError(f"{name} has its own configuration and takes no pretrained_cfg")
    cache_dir = kwargs.pop("cache_dir", None)
    folder = Path(model_id) if source == "local-dir" else download(model_id, cache_dir, weights=pretrained)
    config = check_config(folder)
    if pretrained:
        check_weights(folder / WEIGHTS, config)
    try:
        if config.get("pruned") and not (pretrained and config["architecture"] in _mfd_names()):
            check_arguments(name, config, kwargs)
            if not pretrained and source == "hf-hub":  # whose shapes are in the weights
                folder = download(model_id, cache_dir)
            model = timm.create_model(f"local-dir:{folder}", pretrained=False, **kwargs)
            fit_widths(model, saved_shapes(folder / WEIGHTS))
            if pretrained:
                model.load_state_dict(load_file(folder / WEIGHTS))
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # other keys or shapes, or an argument that the network does not take
        raise ValueError(
            f"{name} does not fit {config['architecture']}{_with(kwargs)}: {first_words(error)}"
        ) from error
    if source == "hf-hub":
        pinned = f"{model_id.partition('@')[0]}@{folder.name}"
        model.pretrained_cfg.update(source="hf-hub", hf_hub_id=pinned, hf_hub_filename=WEIGHTS)
        model.pretrained_cfg.pop("file", None)
    return model


def arguments_for(name: str, image_size: tuple[int, int], stem: Stem | None = None) -> dict[str, Any]:
    """Choose the arguments of `create_model` that fit a model to the size of the images.

    Args:
        name: As for `create_model`; a saved model or a tag already has its arguments.
        image_size: `(H, W)`.
        stem: The stem to use. Default: the paper's choice for `*_mfd` models (Section IV).

    Returns:
        `stem` for `*_mfd` models (and wherever one was asked for), `img_size` for models that are built for one size.

    Example:
        >>> arguments_for("resnet50_mfd", (32, 32))
        {'stem': 'cifar'}
    """
    source, model_id = parse_model_name(name)
    architecture, tag = split_model_name_tag(model_id)
    arguments: dict[str, Any] = {} if stem is None else {"stem": stem}
    if source is None and is_model(architecture):
        if stem is None and not tag and architecture in _mfd_names():
            arguments["stem"] = paper_stem(architecture, max(image_size))
        cfg = get_pretrained_cfg(architecture)
        if cfg is not None and cfg.fixed_input_size:
            arguments["img_size"] = image_size
    elif source is not None:
        cfg = None
        with suppress(ValueError):  # `create_model` says what is wrong with it
            cfg = preprocessing_of(name)
        if cfg and cfg.fixed_input_size and tuple(cfg.input_size[1:]) != tuple(image_size):
            arguments["img_size"] = image_size
    return arguments


def preprocessing_of(name: str) -> PretrainedCfg | None:
    """Return how the images of a model were prepared, without building it; None if nobody knows the model.

    Args:
        name: As for `create_model`.

    Returns:
        timm's configuration of the weights: `mean`, `std`, `input_size` `(3, H, W)`, and whether it is fixed.

    Raises:
        ValueError: If what is saved there is damaged.
        ConnectionError: If it lies on the Hub, which cannot be reached.
    """
    source, model_id = parse_model_name(name)
    if source is None:
        return get_pretrained_cfg(model_id) if is_model(split_model_name_tag(model_id)[0]) else None
    config = check_config(Path(model_id) if source == "local-dir" else download(model_id, weights=False))
    cfg = {key: tuple(v) if isinstance(v, list) else v for key, v in config.get("pretrained_cfg", {}).items()}
    return PretrainedCfg(**cfg)


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """List the architectures that this package adds to timm.

    Args:
        filter: Pattern with wildcards, such as `"resnet*"`.
        pretrained: Only names with published weights, also as `name.tag`.

    Returns:
        Sorted names, each usable in `create_model`.

    Example:
        >>> timm_mfd.list_models("resnet*")
        ['resnet18_mfd', 'resnet34_mfd', 'resnet50_mfd']
    """
    names = timm.list_pretrained("*_mfd*") if pretrained else _mfd_names()
    return [name for name in names if fnmatch.fnmatch(name, filter)]


def _with(kwargs: dict[str, Any]) -> str:
    said = ", ".join(f"{key}={value!r:.60}" for key, value in kwargs.items() if value is not None)
    return f" with {said}" if said else ""


def _mfd_names() -> list[str]:
    return timm.list_models("*_mfd")


def _suggestion(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=4, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else "see timm_mfd.list_models() and timm.list_models()"
