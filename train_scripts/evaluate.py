"""Measure the accuracy of a saved, published or pretrained model on the held-out images of a data set.

python train_scripts/evaluate.py --model runs/NAME

python train_scripts/evaluate.py --model hf-hub:ORG/NAME@v1.0 --dataset tiny_imagenet --data-dir DIR --json top1.json
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from timm_mfd import create_model
from timm_mfd.data import EvalLoader, ImageData, ImageDecodeError, load_dataset, place
from timm_mfd.evaluation import evaluate
from timm_mfd.launch import one_line_errors, prepare_cpu
from timm_mfd.models.saved import names_by_index
from timm_mfd.sources import data_name, data_of, source_of, split_seed


@dataclass(frozen=True)
class Args:
    """Arguments of an evaluation."""

    model: str
    """A run folder, a saved model, a name with pretrained weights, or hf-hub:ORG/NAME[@REVISION]."""
    dataset: str | None = None
    """As for train.py: digits, cifar10, cifar100, tiny_imagenet, facescrub, folder or hfds/NAME. Default: that of the
    run, with its --data-dir and --image-size."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none."""
    image_size: int | None = None
    """For folder and hfds/NAME: resize all images to this side. Default: as they are. Of resized images
    the part is taken that the model's configuration names (its crop_pct)."""
    val_fraction: float | None = None
    """For --dataset folder without a held-out split: the part that was held out of the training, with --seed."""
    seed: int | None = None
    """For --val-fraction: that of the training. Default: that of the run."""
    batch_size: int = 256
    """Images at a time; it does not change the counts."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic of the network."""
    workers: int = 2
    """Decoding processes, for images in files."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: ~/.cache/timm_mfd."""
    json: Path | None = None
    """Also write the numbers to this new file."""


def main(args: Args) -> None:
    """Refuse what cannot be written, measure, show."""
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        if args.json and args.json.exists():
            raise FileExistsError(f"--json {args.json} exists; nothing was changed, choose a new file")
        if args.json and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: there is no folder {args.json.parent}")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
        args = with_data_of_run(args)
        numbers = measure(args)
        print("| model | data | top-1 % | top-5 % | images |\n|---|---|---|---|---|")
        name = data_name(args.dataset, args.data_dir)
        words = f"{name} {numbers['split']} | {numbers['top1']:.2f} | {numbers['top5']:.2f}"
        print(f"| {args.model} | {words} | {numbers['count']:,} |")
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def with_data_of_run(args: Args) -> Args:
    """Fill in the data that a run was trained on, where no data set is given."""
    if args.dataset:
        return args
    if not (of_run := data_of(args.model)):
        raise ValueError(f"give a --dataset: {args.model} is no run folder, which would name its own")
    given = {name: value for name in of_run if (value := getattr(args, name)) is not None}
    return replace(args, **of_run | given)


def measure(args: Args) -> dict[str, Any]:
    """Load model and data, check that they speak of the same classes, and count."""
    held_out = {"val_fraction": args.val_fraction, "seed": split_seed(args.model, args.val_fraction, args.seed)}
    shared = {"cache_dir": args.cache_dir, "workers": args.workers}
    data = load_dataset(args.dataset, args.data_dir, args.image_size, **held_out, **shared)
    model = create_model(source_of(args.model), pretrained=True)
    data = as_trained(data, model, args.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu":
        prepare_cpu()
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 as on a CPU: one image more or less is seen
    identity = data.identity()
    data = place(data, "auto", device, train=False, **shared)
    loader = EvalLoader(data, args.batch_size, device=device, workers=args.workers)
    model = model.to(device, memory_format=torch.channels_last)
    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    autocast = bf16 if args.mixed_precision == "bf16" else nullcontext
    batches = tqdm(loader, unit="batch", disable=None, leave=False)
    accuracy = evaluate(model, batches, data.num_classes, autocast)
    return {
        "model": args.model,
        "dataset": data.name,
        "split": data.test_split,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "count": accuracy.images,
        "image_size": list(data.image_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "data": identity,
        "precision": args.mixed_precision,
        "device": device.type,
    }


def as_trained(data: ImageData, model: torch.nn.Module, name: str) -> ImageData:
    """Give the data the model's own preprocessing; refuse data of other classes than the model's.

    Args:
        data: The data set, with the preprocessing that a training on it would use.
        model: The loaded model.
        name: What it is called in messages.
    """
    cfg = model.pretrained_cfg
    if model.num_classes != data.num_classes:
        raise ValueError(f"{name} has {model.num_classes} classes, {data.name} has {data.num_classes}")
    if getattr(model, "in_chans", 3) != 3:
        raise ValueError(f"{name} takes images of {model.in_chans} channels, {data.name} has 3")
    labels = names_by_index(cfg.get("label_names") or [], model.num_classes)
    if labels and len(labels) != data.num_classes:
        raise ValueError(f"{name} has {len(labels)} label names for {data.num_classes} classes")
    if labels and tuple(labels) != tuple(data.class_names):
        ours, theirs = next(pair for pair in zip(labels, data.class_names, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"{name} calls a class {ours!r} that {data.name} calls {theirs!r}: other data, or another order"
        )
    if cfg.get("fixed_input_size") and tuple(cfg["input_size"][1:]) != data.image_size:
        raise ValueError(f"{name} needs images of {cfg['input_size'][1:]}, {data.name} has {data.image_size}")
    return replace(data, mean=tuple(cfg["mean"]), std=tuple(cfg["std"])).cropped(cfg["crop_pct"])


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
