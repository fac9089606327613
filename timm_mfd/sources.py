"""What a model is called on the command line, and what the folder behind the name says of it."""

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


def source_of(name: str) -> str:
    """Return what `create_model` calls a run folder or a saved model; other names as they are.

    Args:
        name: From the command line.

    Raises:
        ValueError: If it looks like a folder in which there is no model.
    """
    path = Path(name)
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return f"local-dir:{folder}"
    if (path / "args.json").is_file():
        raise ValueError(f"{name} is a run without a model yet; it is written when the run ends")
    if "/" in name and ":" not in name:
        beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)  # by the last name alone: the folders above are the same
        hint = f"did you mean {path.with_name(close[0])}?" if close else "for a model of the Hub write hf-hub:ORG/NAME"
        raise ValueError(f"there is no run or saved model {name!r}; {hint}")
    return name


def data_of(name: str) -> dict[str, Any]:
    """Return which data set a run was trained on, where it lay, and the size that its images were resized to.

    Args:
        name: From the command line: a run folder, or the folder of the model in it.

    Returns:
        `dataset`, `data_dir` and `image_size`; nothing if it is no run.

    Raises:
        ValueError: If `args.json` of the run is damaged.
    """
    for folder in (Path(name.removeprefix("local-dir:")), Path(name.removeprefix("local-dir:")).parent):
        if (file := folder / "args.json").is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8-sig"))
                return {key: before[key] for key in ("dataset", "data_dir", "image_size")}
            except (ValueError, KeyError):
                raise ValueError(f"{file} is damaged; name the data set with --dataset") from None
    return {}


def data_name(dataset: str, data_dir: str | None) -> str:
    """Return what people call a data set: images of their own by the name of the folder.

    Args:
        dataset: As for `load_dataset`.
        data_dir: Where it lies.

    Example:
        >>> data_name("folder", "pictures/birds/")
        'birds'
    """
    own = Path(data_dir).resolve().name if dataset == "folder" and data_dir else ""
    return os.fsencode(own).decode("utf-8", "replace") or dataset


def license_of(name: str, model: Any) -> str:
    """Return the licence that the card of a saved model names, or timm's for its weights.

    Args:
        name: From the command line.
        model: What was loaded by it.
    """
    card = Path(source_of(name).removeprefix("local-dir:")) / "README.md"
    named = ModelCard.load(card).data.license if card.is_file() else model.pretrained_cfg.get("license")
    return named or "apache-2.0"


def accuracy_of(run: Path) -> str:
    """Return what a run folder says of the accuracy of its model; empty if it is none.

    Args:
        run: The folder.
    """
    summary = run / "summary.json"
    if not summary.is_file():
        return ""
    found = json.loads(summary.read_text(encoding="utf-8-sig"))
    return f"top-1 {found['top1']:.2f} % of {found['count']:,} {found['split']} images"


def stages_of(run: Path) -> list[int] | None:
    """Return the index of each stage that MFD saw in a finished run; None if it is none.

    Args:
        run: The folder.
    """
    summary = run / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8-sig")).get("stages") if summary.is_file() else None


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Read what a run folder says of its epochs; nothing if it is none.

    Args:
        run: The folder.

    Raises:
        ValueError: If the file is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()] if path.is_file() else []
        )
    except ValueError:
        raise ValueError(f"{path} is damaged; mend or remove it") from None
