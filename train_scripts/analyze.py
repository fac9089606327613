"""Measure and draw how redundant the channels of a model are, stage by stage, alone or beside another model.

python train_scripts/analyze.py --model runs/NAME --dataset digits --output-dir analysis

python train_scripts/analyze.py --model runs/A --compare runs/B --dataset cifar10 --data-dir DIR --output-dir analysis

accelerate launch train_scripts/analyze.py ...   (several processes share the images)
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from timm_mfd import create_model, forward_stages
from timm_mfd.data import EvalLoader, ImageData, ImageDecodeError, load_dataset, place
from timm_mfd.figures import correlation_by_stage, correlation_distribution, correlation_heat_maps, feature_maps
from timm_mfd.launch import follow_launcher, one_line_errors, prepare_cpu, start_all_processes
from timm_mfd.models import arguments_for
from timm_mfd.redundancy import CORRELATION_IMAGES, StageRedundancy, measure_redundancy
from timm_mfd.run_dir import replace_folder
from timm_mfd.tables import redundancy_table

Opened = tuple[nn.Module, tuple[float, ...], tuple[float, ...]]  # with the mean and std of its training


@dataclass(frozen=True)
class Args:
    """Arguments of an analysis."""

    model: str
    """A run folder, a timm name with pretrained weights, local-dir:FOLDER or hf-hub:ORG/NAME[@REVISION]."""
    dataset: str
    """As for train.py: digits, cifar10, cifar100, tiny_imagenet, facescrub, folder or hfds/NAME."""
    output_dir: Path
    """New folder for redundancy.json and the pictures."""
    compare: str | None = None
    """Another model to set beside it, with as many stages."""
    data_dir: str | None = None
    """Where the data set lies; digits needs none."""
    image_size: int | None = None
    """For folder and hfds/NAME: resize all images to this side."""
    images: int = CORRELATION_IMAGES
    """How many held-out images, evenly spaced over the split."""
    tau: float = 0.95
    """Channels with |r| above it are near-duplicates."""
    batch_size: int = 128
    """Images at a time in each process."""
    workers: int = 2
    """Decoding processes, for images in files."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: ~/.cache/timm_mfd."""


def main(args: Args) -> None:
    """Measure each model on the same images, then write tables and pictures."""
    follow_launcher()
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        check(args)
        state = PartialState(cpu=not torch.accelerator.is_available())
        if state.device.type == "cpu":
            prepare_cpu()
        data = load_dataset(args.dataset, args.data_dir, args.image_size)
        identity = data.identity()  # of the files, before they are decoded
        names = [args.model, *([args.compare] if args.compare else [])]
        opened = {name: open_model(name, data, state.device) for name in names}
        data = place(data, "auto", state.device, workers=args.workers, cache_dir=args.cache_dir)
        measured: dict[str, list[StageRedundancy]] = {}
        for name, (model, mean, std) in opened.items():
            loader = EvalLoader(
                replace(data, mean=mean, std=std),
                args.batch_size,
                device=state.device,
                rank=state.process_index,
                processes=state.num_processes,
                workers=args.workers,
                limit=args.images,
            )
            batches = tqdm(loader, name, unit="batch", disable=None if state.is_main_process else True, leave=False)
            measured[name] = measure_redundancy(model, batches, num_classes=data.num_classes, tau=args.tau)
        if len({len(stages) for stages in measured.values()}) > 1:
            raise ValueError(f"{args.model} and {args.compare} have different numbers of stages; nothing was written")
        if state.is_main_process:
            write(args, data, identity, opened, measured)


def check(args: Args) -> None:
    """Find what is wrong before anything is loaded."""
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        raise FileExistsError(f"--output-dir {args.output_dir} is there already; choose a new folder")
    for flag, value in {"--images": args.images, "--batch-size": args.batch_size}.items():
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    if not 0 < args.tau < 1:
        raise ValueError(f"--tau must be between 0 and 1, not {args.tau:g}")
    if args.compare == args.model:
        raise ValueError(f"--compare {args.compare} is the model itself; name another one")


def open_model(name: str, data: ImageData, device: torch.device) -> Opened:
    """Load a model for images of a size, with the mean and std that it was trained with."""
    folder = Path(name) / "model"
    source = f"local-dir:{folder}" if folder.is_dir() else name
    arguments = arguments_for(source, data.image_size)
    arguments.pop("stem", None)  # that of the weights
    model = create_model(source, pretrained=True, **arguments)
    if model.in_chans != 3:
        raise ValueError(f"{name} takes images of {model.in_chans} channels, {data.name} has 3")
    cfg = model.pretrained_cfg
    if cfg.get("fixed_input_size") and source != name and tuple(cfg["input_size"][1:]) != data.image_size:
        raise ValueError(f"{name} needs images of {cfg['input_size'][1:]}, {data.name} has {data.image_size}")
    model = model.to(device, memory_format=torch.channels_last).eval()
    return model, tuple(cfg["mean"]), tuple(cfg["std"])


def write(
    args: Args,
    data: ImageData,
    identity: str,
    opened: dict[str, Opened],
    measured: dict[str, list[StageRedundancy]],
) -> None:
    """Print the table, and write `redundancy.json` and the pictures; the folder appears when it is complete."""
    count = min(args.images, len(data.test))
    where = f"{count:,} held-out images of {data.name}"
    print(redundancy_table(measured))
    print(f"\nover the pixels of {where}; |r| > {args.tau:g} in groups of near-duplicates")
    new = args.output_dir.with_name(f"{args.output_dir.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    found = {
        "data": {"name": data.name, "split": data.test_split, "images": count, "sha256": identity},
        "models": {name: [stage.to_json() for stage in stages] for name, stages in measured.items()},
    }
    (new / "redundancy.json").write_text(json.dumps(found, indent=2) + "\n")
    titles = " and ".join(measured)
    for ending in ("png", "svg"):
        correlation_heat_maps(measured, new / f"correlations.{ending}", f"|r| between channels, {where}")
        correlation_distribution(measured, new / f"distribution.{ending}", f"Pairs of channels, {where}")
        values = {name: [stage.mean_abs_r for stage in stages] for name, stages in measured.items()}
        indices = [stage.stage for stage in measured[args.model]]
        correlation_by_stage(values, indices, new / f"stages.{ending}", f"Mean |r|, {where}")
        for number, (name, (model, mean, std)) in enumerate(opened.items()):
            image, maps = one_image(model, replace(data, mean=mean, std=std))
            path = new / f"feature_maps{'_compared' if number else ''}.{ending}"
            feature_maps(image, maps[:2], measured[name][:2], path, f"Feature maps of {name}, one image of {data.name}")
    replace_folder(new, args.output_dir)
    print(f"{titles}: redundancy.json and pictures are in {args.output_dir}")


@torch.no_grad()
def one_image(model: nn.Module, data: ImageData) -> tuple[Tensor, list[Tensor]]:
    """Return the first held-out image in [0, 1], `[3, H, W]`, and its maps in every stage, `[C, H, W]`."""
    device = next(model.parameters()).device
    images, _ = next(iter(EvalLoader(data, 1, device=device, limit=1)))
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))
    return images[0] * std + mean, [stage[0] for stage in forward_stages(model, images).stages]


if __name__ == "__main__":
    with one_line_errors(ValueError):
        parsed = tyro.cli(Args, description=__doc__)
        start_all_processes()
    with one_line_errors():
        main(parsed)
