"""What training the paper's runs costs, before it is paid: images, and operations of the networks.

python train_scripts/cost.py

python train_scripts/cost.py --table 5 --rows mobilenetv2/tiny_imagenet --seeds 1 --tflops 0.3
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import math
from collections import Counter

import torch
import tyro
from counters import Operations
from reproduce import Protocol

from timm_mfd import create_model, recipes
from timm_mfd.launch import one_line_errors
from timm_mfd.recipes import Recipe


def cost(
    table: str | None = None,
    rows: tuple[str, ...] = (),
    seeds: int = 3,
    protocol: Protocol = "paper",
    tflops: float | None = None,
) -> None:
    """Print what the runs cost, whether they are done or not.

    Counted are the products and convolutions of the network, forward and backward. MFD adds little to them; what it
    adds to the time is measured by `benchmark.py --parts step`.

    Args:
        table: As for reproduce.py run. Default: all tables of the paper.
        rows: As for reproduce.py run.
        seeds: Runs of each recipe.
        protocol: paper, strong or quick.
        tflops: Operations that a machine gets done in training, in 10^12 a second: images a second times the operations
            of an image. With it, times are printed.
    """
    with one_line_errors(ValueError):
        if seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {seeds}")
        if tflops is not None and not 0 < tflops < math.inf:
            raise ValueError(f"--tflops must be a number above 0, not {tflops:g}")
        chosen = recipes.select(table, rows)
    # What a run costs, its network, images and schedule say; criterion and MFD do not.
    alike = {(recipe.backbone, recipe.dataset): recipe for recipe in chosen}
    counts = Counter((recipe.backbone, recipe.dataset) for recipe in chosen)
    print(f"{'network / data set':<28} {'runs':>5} {'images/run':>11} {'GFLOP/image':>12} {'PFLOP/run':>10}")
    images = operations = 0.0
    for key, recipe in alike.items():
        runs, seen, each = counts[key] * seeds, images_of(recipe, protocol), operations_of(recipe, protocol)
        work = seen * each
        row = f"{'/'.join(key):<28} {runs:>5} {seen / 1e6:>9.4g} M {each / 1e9:>12.4g} {work / 1e15:>10.4g}"
        print(row + ("" if tflops is None else f"  {duration(work / tflops / 1e12)} a run"))
        images, operations = images + runs * seen, operations + runs * work
    time = "" if tflops is None else f", {duration(operations / tflops / 1e12)} at {tflops:g} TFLOP/s"
    print(f"\n{len(chosen) * seeds} runs: {images / 1e6:.4g} million images, {operations / 1e15:,.4g} PFLOP{time}")


def images_of(recipe: Recipe, protocol: str) -> int:
    """Return how many images a run trains on, over all epochs."""
    how = recipes.PROTOCOLS[protocol]
    return how.epochs * (recipes.DATA_SIZES[recipe.dataset].train // how.batch_size) * how.batch_size


def operations_of(recipe: Recipe, protocol: str) -> float:
    """Return the operations of a forward and backward pass of one image; nothing is computed for it."""
    size = recipes.DATA_SIZES[recipe.dataset]
    with torch.device("meta"):
        model = create_model(
            recipes.MODELS[recipe.backbone],
            num_classes=size.classes,
            stem=recipe.stem,
        )
        images = torch.empty(2, 3, size.side, size.side)
    with Operations() as counted:
        model.train()(images).sum().backward()
    return counted.total / len(images)


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(cost, description=__doc__)
