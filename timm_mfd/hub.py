"""Export folders: weights, configuration and model card, as timm and the Hugging Face Hub read them."""

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    dataset: str | None = None,
    top1: float | None = None,
    mfd_weight: float | None = None,
    summary: str = "",
) -> Path:
    """Write `model.safetensors`, timm's `config.json` and `README.md` (the model card) into a folder.

    The model itself is left as it is: wrappers (DDP, `torch.compile`) and channels_last memory are undone on a copy.

    Args:
        model: A model from `create_model`, possibly wrapped.
        folder: New or empty folder.
        label_names: One name per class.
        mean: Per-channel mean of pixel values in [0, 1] that the model was trained with.
        std: Per-channel standard deviation.
        image_size: `(H, W)` of the images.
        dataset: Name of the data set, for the card.
        top1: Top-1 accuracy in percent, for the card.
        mfd_weight: The balance factor it was trained with, for the card.
        summary: A paragraph for the card.

    Returns:
        The folder; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it after `import timm_mfd`.

    Raises:
        FileExistsError: If the folder already holds something.
        ValueError: If the model did not come from `create_model`, or has another number of classes than `label_names`.

    Example:
        >>> save_pretrained(model, "export", label_names=["cat", "dog"])
    """
    folder = Path(folder)
    plain = unwrap_model(model)
    if getattr(plain, "pretrained_cfg", None) is None:
        raise ValueError(f"{type(plain).__name__} did not come from create_model, so its architecture has no name")
    if label_names is not None and len(label_names) != plain.num_classes:
        raise ValueError(f"{len(label_names)} label names for a model of {plain.num_classes} classes")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} is not empty; choose a new folder for the model")
    copy = deepcopy(plain).cpu().to(memory_format=torch.contiguous_format)
    preprocessing: dict[str, object] = {}
    if image_size is not None:  # the size as it is: nothing is cropped off a test image
        preprocessing |= {"input_size": (plain.in_chans, *image_size), "crop_pct": 1.0}
    if mean is not None:
        preprocessing["mean"] = tuple(mean)
    if std is not None:
        preprocessing["std"] = tuple(std)
    save_for_hf(
        copy,
        str(folder),
        model_config={
            # The tag of the default weights says nothing about these.
            "pretrained_cfg": {"tag": ""},
            **({"label_names": list(label_names)} if label_names is not None else {}),
        },
        safe_serialization=True,
        data_config=preprocessing,
    )
    os.chmod(folder / "model.safetensors", (folder / "config.json").stat().st_mode & 0o777)  # was for the owner alone
    architecture = plain.pretrained_cfg["architecture"]
    _card(architecture, dataset, top1, mfd_weight, summary).save(folder / "README.md")
    return folder


def _card(
    architecture: str, dataset: str | None, top1: float | None, mfd_weight: float | None, summary: str
) -> ModelCard:
    measured = dataset is not None and top1 is not None
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_mfd", *(["mfd"] if mfd_weight else [])],
        model_name=architecture if measured else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=round(float(top1), 4),
            )
        ]
        if measured and dataset is not None and top1 is not None
        else None,
    )
    paper = "multi-stage feature decorrelation (MFD, https://arxiv.org/abs/2308.12880)"
    method = ""
    if mfd_weight is not None:
        method = (
            f" trained with {paper} of weight {mfd_weight:g}" if mfd_weight else f" trained without {paper}: a baseline"
        )
    result = f"\nTop-1 on the held-out images of {dataset}: {top1:.2f} %.\n" if measured else ""
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {architecture}

A timm image classifier{method}.
{summary}
{result}
## Usage

```python
import timm
import timm_mfd  # makes the architecture known to timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```
"""
    )
