"""What a model is called on the command line, and what the run or the card behind the name says of it."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .training.run_folder import RunFolder


def source_of(name: str) -> str:
    """Return what `create_model` calls a run folder or a saved model; other names as they are.

    Args:
        name: From the command line.

    Raises:
        ValueError: If it looks like a folder in which there is no model.
    """
    path = Path(name)
    for folder in (RunFolder(path).model, path):
        if (folder / "config.json").is_file():
            return f"local-dir:{folder}"
    if RunFolder(path).is_begun:
        raise ValueError(f"{name} is a run without a model yet; it is written when the run ends")
    if "/" in name and ":" not in name:
        beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=1)  # by the last name alone: the folders above are the same
        hint = f"did you mean {path.with_name(close[0])}?" if close else "for a model of the Hub write hf-hub:ORG/NAME"
        raise ValueError(f"there is no run or saved model {name!r}; {hint}")
    return name


def data_of(name: str) -> dict[str, Any]:
    """Return which data set a run was trained on, where it lay, the size of its images, and what was held out.

    Args:
        name: From the command line: a run folder, or the folder of the model in it.

    Returns:
        `dataset`, `data_dir`, `image_size`, `val_fraction` and `seed`; nothing if it is no run.

    Raises:
        ValueError: If the arguments of the run are damaged.
    """
    if not (run := RunFolder.of(name)):
        return {}
    try:
        found = {key: run.args[key] for key in ("dataset", "data_dir", "image_size", "seed")}
        return found | {"val_fraction": run.args.get("val_fraction")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{run} is damaged ({error}); name the data set with --dataset") from None


def split_seed(name: str, val_fraction: float | None, seed: int | None) -> int:
    """Return the seed that held images out: the one that is given, or that of the run.

    With another one, a model would be tested on images that it was trained on.

    Args:
        name: From the command line.
        val_fraction: The part that was held out, if one was.
        seed: From the command line.

    Raises:
        ValueError: If the arguments of the run are damaged.
    """
    if seed is not None or val_fraction is None:
        return seed or 0
    return data_of(name).get("seed", 0)


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
