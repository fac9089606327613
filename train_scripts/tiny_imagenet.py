"""Train the paper's Tiny ImageNet rows on a machine with a GPU and no network, as far as they get in the given time.

python train_scripts/tiny_imagenet.py --data-dir DIR --minutes 110

In the order of what they tell: MobileNetV2 and ResNet50 with and without MFD, more seeds of both, the other reading of
Eq. 6, the other networks; with bf16, channels_last and torch.compile. The same command goes on where it stopped (exit
code 142). Run folders, results and decoded images are in --output-dir, which is all that has to be kept.
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import reproduce
import torch
import tyro

from timm_mfd import recipes
from timm_mfd.data import ImageDecodeError, load_dataset
from timm_mfd.launch import one_line_errors
from timm_mfd.recipes import Recipe

SEEDS = 3
_PHASES = (
    [*recipes.select("5", ["mobilenetv2/tiny_imagenet"]), *recipes.select("4", ["resnet50/tiny_imagenet"])],
    recipes.select("eq6", ["mobilenetv2/tiny_imagenet"]),
    recipes.select("5", ["resnext50/tiny_imagenet", "densenet121/tiny_imagenet"]),
)


@dataclass(frozen=True)
class Args:
    """What is there, and how long."""

    data_dir: Path
    """The folder that holds tiny-imagenet-200/, as its archive unpacks."""
    minutes: float
    """End after so many minutes, more than 1; a minute before, the runs save themselves and stop."""
    parallel: int = 4
    """Runs that share the GPU; as many as fit into its memory."""
    output_dir: Path = Path("runs/tiny_imagenet")
    """Where everything is written: runs/, results/ and decoded/."""
    workers: int = 4
    """Processes that decode the images, once."""


def main(args: Args) -> None:
    """Do what is missing, then report."""
    deadline = reproduce.deadline_in(args.minutes)
    with one_line_errors(ValueError, OSError, ImageDecodeError):
        load_dataset("tiny_imagenet", args.data_dir)  # missing data are found before a GPU is paid for
        if not torch.cuda.is_available():
            on_a_cpu = (
                f"--table 5 --rows mobilenetv2/tiny_imagenet --data-dir {args.data_dir} --time-limit {args.minutes:g}"
            )
            raise ValueError(f"there is no GPU that torch can use; on a CPU: reproduce.py run {on_a_cpu}")
        places = args.output_dir / "runs", args.output_dir / "results"
        runs = [reproduce.Run(recipe, "paper", seed, *places) for recipe, seed in in_order()]
        options = ["--mixed-precision", "bf16", "--compile", "--workers", str(args.workers)]
        decoded = args.output_dir / "decoded"
        reproduce.do_missing(runs, args.parallel, options, args.data_dir, args.workers, decoded, deadline)
    reproduce.report(places[1])


def in_order() -> Iterator[tuple[Recipe, int]]:
    """Each recipe of the data set with each seed, those first that tell most."""
    for recipes_of_phase in _PHASES:
        for seed in range(SEEDS):
            for recipe in recipes_of_phase:
                yield recipe, seed


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
