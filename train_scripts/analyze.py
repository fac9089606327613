"""Measure and show how redundant the channels of a model are, stage by stage, alone or beside another model.

python train_scripts/analyze.py --model runs/NAME --output-dir analysis

python train_scripts/analyze.py --model runs/A --compare runs/B --dataset cifar10 --data-dir DIR --output-dir analysis

python train_scripts/analyze.py --model resnet50 --image photo.jpg --output-dir analysis

python train_scripts/analyze.py --model runs/NAME --dataset digits --output-dir analysis --prune pruned

accelerate launch train_scripts/analyze.py ...   (several processes share the images)
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from accelerate import PartialState
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm import tqdm

from timm_mfd import create_model, forward_stages, save_pretrained
from timm_mfd.atomic import new_folder
from timm_mfd.data import EvalLoader, ImageData, ImageDecodeError, load_dataset, place, single_image
from timm_mfd.figures import analysis_pictures
from timm_mfd.launch import one_line_errors, prepare_cpu, start_all_processes
from timm_mfd.models import arguments_for
from timm_mfd.models.saved import names_by_index
from timm_mfd.page import write_page
from timm_mfd.pruning import Pruned, SilentInputs, prune_silent
from timm_mfd.redundancy import CORRELATION_IMAGES, StageRedundancy, measure_redundancy
from timm_mfd.sources import data_of, license_of, source_of, split_seed
from timm_mfd.stages import StageInfo, stage_shapes
from timm_mfd.tables import redundancy_table, removable_text
from timm_mfd.training.run_folder import RunFolder

SHOWN = 6  # images in the viewer of the page
CAN_PRUNE = find_spec("torch_pruning") is not None


@dataclass(frozen=True)
class Args:
    """Arguments of an analysis."""

    model: str
    """A run folder, the folder of a saved model, a timm name with pretrained weights, or hf-hub:ORG/NAME[@REVISION]."""
    output_dir: Path
    """New folder for report.html, redundancy.json and the pictures."""
    dataset: str | None = None
    """As for train.py: digits, cifar10, cifar100, tiny_imagenet, facescrub, folder or hfds/NAME. Default, without an
    --image: that of the run, with its --data-dir and --image-size."""
    image: Path | None = None
    """An image to show; without --dataset, the statistics are those of its pixels."""
    compare: str | None = None
    """Another model to set beside it, with as many stages."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none."""
    image_size: int | None = None
    """For folder, hfds/NAME and --image alone: resize images to this side. Default: the model's, for --image."""
    images: int = CORRELATION_IMAGES
    """How many held-out images, evenly spaced over the split."""
    prune: Path | None = None
    """New folder for --model without the channels that are 0 on every held-out image; needs timm_mfd[prune]."""
    tau: float = 0.95
    """Every pair of a group of near-duplicates has |r| above it."""
    val_fraction: float | None = None
    """For --dataset folder without a held-out split: the part that was held out of the training, with --seed."""
    seed: int | None = None
    """For --val-fraction: that of the training. Default: that of the run."""
    batch_size: int = 128
    """Images at a time in each process."""
    workers: int = 2
    """Decoding processes, for images in files."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: ~/.cache/timm_mfd."""


class Opened(NamedTuple):
    """A model to look into, and the mean and standard deviation of pixels that it was trained with."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def main(args: Args) -> None:
    """Measure each model on the same images, then write tables, pictures and the page."""
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        if not args.dataset and not args.image and (of_run := data_of(args.model)):
            given = {name: value for name in of_run if (value := getattr(args, name)) is not None}
            args = replace(args, **of_run | given)
        check(args)
        state = PartialState(cpu=not torch.accelerator.is_available())
        device = state.device
        share = {"rank": state.process_index, "processes": state.num_processes, "workers": args.workers}
        if device.type == "cpu":
            prepare_cpu()
        torch.backends.cudnn.allow_tf32 = False  # or the logits of a pruned model would differ by its rounding
        shared = {"cache_dir": args.cache_dir, "workers": args.workers}
        held_out = {"val_fraction": args.val_fraction, "seed": split_seed(args.model, args.val_fraction, args.seed)}
        data = (
            load_dataset(args.dataset, args.data_dir, args.image_size, **held_out, **shared) if args.dataset else None
        )
        size = data.image_size if data else (args.image_size,) * 2 if args.image_size else None
        names = [args.model, *([args.compare] if args.compare else [])]
        opened = {name: open_model(name, size, device) for name in names}
        photo = single_image(args.image, size or common_size(opened)) if args.image else None
        if data and len(crops := {one.model.pretrained_cfg["crop_pct"] for one in opened.values()}) == 1:
            data = data.cropped(crops.pop())  # as the run saw them; models that want different crops share whole images
        identity = (data or photo).identity()  # of the files, before they are decoded
        if data:
            if args.dataset == "folder":
                data = replace(data, name=Path(args.data_dir).absolute().name)
            data = place(data, "auto", device, train=False, **shared)
        count = min(args.images, len((data or photo).test))
        kept, silent_stages = measurable(opened, (data or photo).image_size, count, device)
        curves = {
            name: run.metrics if (run := RunFolder.of(name)) else [] for name in names
        }  # if damaged, now rather than at the end
        measured: dict[str, list[StageRedundancy]] = {}
        removable: dict[str, Pruned | str] = {}
        for name, one in opened.items():
            loader = batches_for(one, data or photo, args.batch_size, device, **share, limit=args.images)
            classes = data.num_classes if data else None
            with SilentInputs(one.model) as silent:
                batches = with_progress(loader, name, state)
                measured[name] = measure_redundancy(
                    one.model, batches, indices=kept[name], num_classes=classes, tau=args.tau
                )
            removable[name] = try_to_prune(one.model, silent, loader)
        if state.is_main_process:
            about = {"name": (data or photo).name, "split": (data or photo).test_split, "sha256": identity}
            where = f"{count:,} held-out images of {data.name}" if data else photo.name
            print(redundancy_table(measured, silent_stages))
            print(f"\nover the pixels of {where}; |r| > {args.tau:g} in groups of near-duplicates")
            write(args, about | {"images": count}, where, opened, measured, removable, photo or data, curves)
        if args.prune:
            one = opened[args.model]
            everything = batches_for(one, data, args.batch_size, device, **share)
            prune(args.prune, args.model, one.model, everything, state)


def check(args: Args) -> None:
    """Find what is wrong before anything is loaded."""
    check_place("--output-dir", args.output_dir)
    for flag, value, least in (
        ("--images", args.images, 1),
        ("--batch-size", args.batch_size, 1),
        ("--workers", args.workers, 0),
        ("--image-size", args.image_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, not {value}")
    if not args.dataset and not args.image:
        raise ValueError("give a --dataset, an --image, or both; a run folder as --model names its own data set")
    if args.prune:
        if not args.dataset:
            raise ValueError("--prune needs a --dataset, on all of whose images the answers are to stay")
        check_place("--prune", args.prune)
        places = args.prune.absolute(), args.output_dir.absolute()
        if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
            raise ValueError(f"--prune {args.prune} and --output-dir {args.output_dir} are in each other")
        if not CAN_PRUNE:
            raise ValueError("--prune needs Torch-Pruning: pip install -e '.[prune]'")
    if args.data_dir and not args.dataset:
        raise ValueError(f"--data-dir {args.data_dir} needs a --dataset")
    if not 0 < args.tau < 1:
        raise ValueError(f"--tau must be between 0 and 1, not {args.tau:g}")
    if args.compare and source_of(args.compare) == source_of(args.model):
        raise ValueError(f"--compare {args.compare} is the model itself; name another one")


def check_place(flag: str, path: Path) -> None:
    """Refuse a place where no new folder can be made."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{flag} {path} is there already; choose a new folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{flag} {path}: {above} is a file; choose another place")


def open_model(name: str, size: tuple[int, int] | None, device: torch.device) -> Opened:
    """Load a model for images of a size, its own by default."""
    source = source_of(name)
    arguments = arguments_for(source, size) if size else {}
    arguments.pop("stem", None)  # that of the weights
    model = create_model(source, pretrained=True, **arguments)
    if model.in_chans != 3:
        raise ValueError(f"{name} takes images of {model.in_chans} channels, these have 3")
    cfg = model.pretrained_cfg
    own = tuple(cfg["input_size"][1:])
    if size and cfg.get("fixed_input_size") and "img_size" not in arguments and own != size:
        raise ValueError(
            f"{name} needs images of {own[0]}x{own[1]}, these are {size[0]}x{size[1]}; --image-size resizes those of "
            "folder and hfds/NAME"
        )
    model = model.to(device, memory_format=torch.channels_last).eval()
    return Opened(model, tuple(cfg["mean"]), tuple(cfg["std"]))


def common_size(opened: dict[str, Opened]) -> tuple[int, int]:
    """Return the size of the images that all models were made for."""
    sizes = {name: tuple(one.model.pretrained_cfg["input_size"][1:]) for name, one in opened.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} for {height}x{width}" for name, (height, width) in sizes.items())
        raise ValueError(f"the models are made for images of other sizes ({said}); choose an --image-size")
    return sizes.popitem()[1]


def measurable(
    opened: dict[str, Opened], size: tuple[int, int], images: int, device: torch.device
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[StageInfo]]]:
    """Return for each model the stages that give two samples at least, and those that do not.

    Models that do not take images of the size, or that cannot be set side by side, are refused.
    """
    shapes = {}
    for name, one in opened.items():
        try:
            shapes[name] = stage_shapes(one.model, torch.zeros(1, 3, *size, device=device))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    counts = {name: len(stages) for name, stages in shapes.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"models of different numbers of stages cannot be compared ({said})")
    places = range(next(iter(counts.values())))
    enough = [p for p in places if all(images * stages[p][1][2:].numel() > 1 for stages in shapes.values())]
    if not enough:
        raise ValueError("every stage gives one sample; correlation needs more images (--dataset) or larger ones")
    kept = {name: tuple(stages[p][0].index for p in enough) for name, stages in shapes.items()}
    rest = {name: [stages[p][0] for p in places if p not in enough] for name, stages in shapes.items()}
    return kept, rest


def batches_for(opened: Opened, data: ImageData, batch_size: int, device: torch.device, **options: int) -> EvalLoader:
    """Return the held-out images as a model wants them; the options are those of `EvalLoader`."""
    return EvalLoader(replace(data, mean=opened.mean, std=opened.std), batch_size, device=device, **options)


def with_progress(loader: EvalLoader, name: str, state: PartialState) -> Iterable[tuple[Tensor, Tensor]]:
    """Show on the main process' terminal how far a pass over images is."""
    return tqdm(loader, name, unit="batch", disable=None if state.is_main_process else True, leave=False)


def try_to_prune(model: nn.Module, silent: SilentInputs, loader: EvalLoader) -> Pruned | str:
    """Remove what is silent from a copy, to see what it costs, or say why that cannot be done."""
    silent.gather()
    if not CAN_PRUNE:
        return "Torch-Pruning is not installed, pip install -e '.[prune]'"
    try:
        return prune_silent(model, silent, islice(loader, 1), loader.data.image_size)
    except ValueError as error:
        return str(error)


def prune(folder: Path, name: str, model: nn.Module, loader: EvalLoader, state: PartialState) -> None:
    """Save a model without what is silent on all images, after comparing the logits of all of them."""
    with SilentInputs(model) as silent, torch.no_grad():
        for images, _ in with_progress(loader, f"{name}: what is silent", state):
            model(images)
    silent.gather()
    compared = with_progress(loader, f"{name}: comparing logits", state)
    pruned = prune_silent(model, silent, compared, loader.data.image_size)
    if not pruned.channels:
        raise ValueError(f"{removable_text(name, pruned)} There is nothing to prune; {folder} was not written")
    if state.is_main_process:
        count = len(loader.data.test)
        about = {"model": name, "data": loader.data.name, "images": count, **pruned.to_json()}
        with new_folder(folder) as new:
            save_pretrained(pruned.model, new, license=license_of(name, model))
            (new / "pruning.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        print(f"\nOver all {count:,} held-out images: {removable_text(name, pruned)}")
        print(
            f"{folder} is the model without them; on these images no logit differs by more than "
            f"{pruned.difference:.1e} (the largest is {pruned.largest_logit:.3g}); others may excite what is gone"
        )


def write(
    args: Args,
    about: dict[str, object],
    where: str,
    opened: dict[str, Opened],
    measured: dict[str, list[StageRedundancy]],
    removable: dict[str, Pruned | str],
    shown: ImageData,
    curves: dict[str, list[dict[str, Any]]],
) -> None:
    """Write numbers, pictures and the page."""
    found = {
        "data": about,
        "models": {name: [stage.to_json() for stage in stages] for name, stages in measured.items()},
        "removable": {
            name: pruned.to_json() if isinstance(pruned, Pruned) else {"unknown": pruned}
            for name, pruned in removable.items()
        },
    }
    notes = [
        removable_text(name, pruned)
        if isinstance(pruned, Pruned)
        else f"{name}: what its dead channels cost is not counted: {pruned}."
        for name, pruned in removable.items()
    ]
    print("\n".join(["", *notes]))
    maps, answers, images, labels = {}, {}, torch.empty(0), torch.empty(0)
    for name, one in opened.items():
        images, labels, maps[name], answers[name] = look(one, shown, [stage.stage for stage in measured[name]])
    caption = shown.name if args.image else f"one image of {shown.name}"
    pictures: dict[str, Path] = {}
    names = [shown.class_names[label] for label in labels.tolist()]
    if args.image:
        print("\n".join(f"{name} takes {shown.name} for {said[0]}" for name, said in answers.items()))
    marks = ["", ""] if len(opened) == 1 else ["A: ", "B: "]
    names = [
        "; ".join([called, *(mark + said[place] for mark, said in zip(marks, answers.values(), strict=False))])
        for place, called in enumerate(names)
    ]
    called = dict(zip(opened, short_names(list(opened)), strict=True))
    finished = {name: run.summary for name in opened if (run := RunFolder.of(name)) and run.is_finished}
    trained_on = {name: finished[name]["stages"] if name in finished else None for name in opened}
    drawn, seen, learned, numbers = (
        {called[name]: of[name] for name in of} for of in (measured, maps, curves, trained_on)
    )
    facts = {
        name: f"top-1 {summary['top1']:.2f} % of {summary['count']:,} {summary['split']} images"
        for name, summary in finished.items()
    }
    with new_folder(args.output_dir) as new:
        (new / "redundancy.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        for ending in ("png", "svg"):  # the page takes the last
            pictures = analysis_pictures(new, ending, where, drawn, seen, images[0], caption, learned, numbers)
        page = new / "report.html"
        write_page(page, measured, maps, images, names, data=where, pictures=pictures, facts=facts, notes=notes)
    print(f"{' and '.join(measured)}: report.html, redundancy.json and pictures are in {args.output_dir}")


def short_names(names: Sequence[str]) -> list[str]:
    """Return what pictures call the models: a path without the folders that all share.

    Example:
        >>> short_names(["runs/quick/without", "runs/quick/mfd"])
        ['without', 'mfd']
    """
    if any("/" not in name or ":" in name for name in names):
        return list(names)
    paths = [Path(name).absolute() for name in names]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(shared)) for path in paths]


@torch.no_grad()
def look(opened: Opened, data: ImageData, stages: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor], list[str]]:
    """Return some held-out images in [0, 1], `[V, 3, H, W]`, labels, maps in stages, and what they are taken for."""
    device = next(opened.model.parameters()).device
    images, labels = next(iter(batches_for(opened, data, SHOWN, device, limit=SHOWN)))
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (opened.mean, opened.std))
    out = forward_stages(opened.model, images, stages)
    maps = [stage.cpu() for stage in out.stages]
    answers = [""] * len(images)
    if out.logits is not None:
        chances, classes = out.logits.softmax(1).max(1)
        pairs = zip(classes.tolist(), chances.tolist(), strict=True)
        answers = [f"{class_name(opened.model, index)} ({chance:.0%})" for index, chance in pairs]
    return (images * std + mean).cpu(), labels.cpu(), maps, answers


def class_name(model: nn.Module, index: int) -> str:
    """Return what a model calls a class: by its own names, or those of ImageNet for 1,000 classes without any."""
    names = model.pretrained_cfg.get("label_names")
    if not names and model.num_classes == 1000:
        return ImageNetInfo().index_to_description(index)
    return names_by_index(names, model.num_classes)[index] if names else f"class {index}"


if __name__ == "__main__":
    with one_line_errors(ValueError):
        parsed = tyro.cli(Args, description=__doc__)
        start_all_processes()
    with one_line_errors():
        main(parsed)
