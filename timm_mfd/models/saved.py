"""Saved models, in a folder or in a package: everything that is checked before their weights are used."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm import create_model as timm_create_model
from timm.models import PretrainedCfg, build_model_with_cfg, is_model

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# A saved configuration chooses the network by arguments of its constructor; these are timm's own, and could do more.
_TIMMS_OWN = frozenset((*signature(timm_create_model).parameters, *signature(build_model_with_cfg).parameters)) | {
    *("features_only", "out_indices", "feature_cls", "pruned", "device", "dtype"),
}
_SOURCES = frozenset(("url", "file", "state_dict", "hf_hub_id", "source"))
_PREPROCESSING = frozenset(field.name for field in fields(PretrainedCfg)) - _SOURCES


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration decides the answers of a model; its weights carry a copy."""
    keys = ("architecture", "num_classes", "model_args", "pretrained_cfg", "label_names", "pruned")
    return json.loads(json.dumps({key: config[key] for key in keys if key in config}))


def check_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a saved model, and refuse one that asks for more than a classifier of timm.

    Args:
        folder: Where `config.json` lies.

    Raises:
        ValueError: If it is missing or damaged, names an unknown architecture or argument, or contradicts itself.
    """
    path = folder / CONFIG
    if not path.is_file():
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}")
        hint = "; did you mean its folder 'model'?" if (folder / "model" / CONFIG).is_file() else ""
        raise ValueError(f"no saved model in {str(folder)!r}: {CONFIG} missing{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(f"{str(path)!r} begins with a byte order mark, which timm does not read; save it without")
        config = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        config = None
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key, {}), dict) for key in ("model_args", "pretrained_cfg", "timm_mfd")
    ):
        raise ValueError(f"{str(path)!r} is not a model configuration")
    if not is_model(str(config.get("architecture"))):
        raise ValueError(f"{str(path)!r} names an unknown architecture: {config.get('architecture')!r}")
    arguments, preprocessing = config.get("model_args", {}), config.get("pretrained_cfg", {})
    for name, value in arguments.items():
        if name in _TIMMS_OWN or not _is_plain(value):
            raise ValueError(f"{str(path)!r} has the argument {name}={value!r}, which a saved model may not set")
    if unknown := sorted(preprocessing.keys() - _PREPROCESSING):
        raise ValueError(f"{str(path)!r} has an entry in pretrained_cfg that a saved model may not set: {unknown[0]}")
    classes = config.get("num_classes")
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ValueError(f"{str(path)!r} must say num_classes as a number, not {classes!r}")
    if not isinstance(config.get("pruned", False), bool):
        raise ValueError(f"{str(path)!r} has pruned: {config['pruned']!r}, which is not true or false")
    labels = config.get("label_names", [])
    if not _are_texts(list(labels.values()) if isinstance(labels, dict) else labels):
        raise ValueError(f"{str(path)!r} has label_names that are not a list of names, nor names by their index")
    for layer in ("classifier", "first_conv"):
        value = preprocessing.get(layer)
        if value is not None and not isinstance(value, str) and not _are_texts(value):
            raise ValueError(f"{str(path)!r} has {layer}: {value!r}, which is not the name of a layer")
    places = {
        "num_classes": config.get("num_classes"),
        "model_args.num_classes": arguments.get("num_classes"),
        "pretrained_cfg.num_classes": preprocessing.get("num_classes"),
    }
    said = {place: number for place, number in places.items() if number is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"{str(path)!r} contradicts itself: {', '.join(f'{k} is {v!r}' for k, v in said.items())}")
    return config


def names_by_index(labels: Sequence[str] | Mapping[Any, str], classes: int) -> list[str]:
    """Return one name per class of what timm keeps, which may be names by index with gaps between them.

    Args:
        labels: `label_names` of a configuration.
        classes: How many there are.
    """
    if not isinstance(labels, Mapping):
        return list(labels)
    known = {str(index): name for index, name in labels.items()}
    return [known.get(str(index), f"class {index}") for index in range(classes)]


def check_weights(path: Path, config: Mapping[str, Any], sha256: str | None = None) -> Path:
    """Refuse weights that are not the ones that were saved, or not those of their configuration.

    Args:
        path: A safetensors file.
        config: What `check_config` returned.
        sha256: What the file must be; also checked against the configuration where that names one.

    Returns:
        The path.

    Raises:
        ValueError: Naming what differs.
    """
    if not path.is_file():
        raise ValueError(f"no saved model in {str(path.parent)!r}: {path.name} missing; other formats are not loaded")
    for expected in (sha256, config.get("timm_mfd", {}).get("sha256")):
        check_sha256(path, expected)
    try:
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
            saved_with = json.loads(metadata.get("timm_mfd", "null"))
    except (SafetensorError, ValueError):
        raise ValueError(f"{str(path)!r} is damaged: it is not a safetensors file") from None
    now = identity(config)
    if saved_with is not None and saved_with != now:
        key = next(key for key in (*saved_with, *now) if saved_with.get(key) != now.get(key))
        raise ValueError(
            f"{str(path.with_name(CONFIG))!r} is not the configuration that the weights were saved with: "
            f"{key} is {_short(now.get(key))}, was {_short(saved_with.get(key))}"
        )
    classes = config.get("num_classes")
    for layer in _names(config.get("pretrained_cfg", {}).get("classifier")):
        shape = shapes.get(f"{layer}.weight")
        if classes is not None and shape is not None and shape[0] != classes:
            raise ValueError(f"{str(path)!r} has a classifier of {shape[0]} classes, its configuration says {classes}")
    return path


def check_sha256(path: Path, expected: str | None) -> None:
    """Refuse a file with another sha256.

    Raises:
        ValueError: Naming both.
    """
    if expected is not None and (found := sha256_of(path)) != expected:
        raise ValueError(
            f"{str(path)!r} is not what was saved: its sha256 is {found}, expected {expected}; nothing was loaded, "
            "delete the file and get it again"
        )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)  # one load asks several times
def _sha256(path: Path, mtime: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
