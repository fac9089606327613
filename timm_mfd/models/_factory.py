"""`create_model` and `list_models`: timm's factory, with errors that tell what to do."""

import fnmatch
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, parse_model_name, split_model_name_tag
from torch import nn


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build any timm model, a `*_mfd` model, or a saved one.

    Args:
        name: A name of timm's registry or of `list_models`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        pretrained: Load the weights. For `hf-hub:` and `local-dir:` without it the weights are random.
        **kwargs: For `timm.create_model`, such as `num_classes` and `in_chans`. `*_mfd` models also take `stem`:
            `"imagenet"` (timm's own strides, default), `"small"` (first convolution 3x3 with stride 1, max-pool kept:
            for images of 64 px) or `"cifar"` (no max-pool either: for 32 px). The stem is saved with the model.

    Returns:
        A plain timm model: same class and same keys as without this package.

    Raises:
        ValueError: If the name, the stem or the source is unknown, or the model takes no stem.

    Example:
        >>> model = timm_mfd.create_model("resnet50_mfd", num_classes=100, stem="cifar")
    """
    source, model_id = parse_model_name(name)
    if source is None:
        arch, _ = split_model_name_tag(model_id)
        if not is_model(arch):
            raise ValueError(f"unknown model {arch!r}; {_suggestion(arch, timm.list_models())}")
        if kwargs.get("stem") is not None and arch not in _mfd_names():
            raise ValueError(f"{arch!r} takes no stem; models with a stem: {', '.join(_mfd_names())}")
    elif source == "local-dir" and not (Path(model_id) / "config.json").is_file():
        raise ValueError(f"no saved model in {model_id!r}: config.json is missing")
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """List the architectures that this package adds to timm.

    Args:
        filter: Pattern with wildcards, such as `"resnet*"`.
        pretrained: Only names with published weights, as `name.tag`.

    Returns:
        Sorted names, each usable in `create_model`.

    Example:
        >>> timm_mfd.list_models("resnet*")
        ['resnet18_mfd', 'resnet50_mfd']
    """
    names = timm.list_pretrained("*_mfd*") if pretrained else _mfd_names()
    return [name for name in names if fnmatch.fnmatch(name, filter)]


def _mfd_names() -> list[str]:
    return timm.list_models("*_mfd")


def _suggestion(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=4, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else "see timm_mfd.list_models() and timm.list_models()"
