"""Put the weights of a finished run of a recipe into the package, so that `pretrained=True` needs no network.

It ends with a row that makes them known: paste it into `_AVAILABLE` in timm_mfd/models/_pretrained.py.

python train_scripts/embed.py --run-dir runs/reproduce/paper/mobilenetv2-tiny_imagenet-softmax+mfd-seed0 --data-dir DIR

Weights of layers become float16; what batch norm holds stays float32. What the package then holds is measured on the
held-out images, and that is the accuracy on its card and in results/ARCH.TAG.json.
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import evaluate
import torch
import tyro
from publish import compare, open_run, table_row
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_mfd import recipes, results
from timm_mfd.atomic import replacing, write_text
from timm_mfd.data import ImageDecodeError
from timm_mfd.launch import one_line_errors
from timm_mfd.model_card import render_card
from timm_mfd.models.saved import CONFIG, WEIGHTS, check_config, check_weights, identity, sha256_of

LARGEST = 50_000_000  # bytes that everybody who installs the package has to carry
FARTHEST = 0.5  # points that the rounding may change the accuracy by
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Args:
    """Arguments of an embedding."""

    run_dir: Path
    """The folder of a finished run of a recipe with softmax and MFD of weight 1, under the protocol paper."""
    data_dir: str | None = None
    """The folder of its data set, or the folder above it."""
    replace: bool = False
    """Replace weights of the same name that are in the package."""
    results: Path = ROOT / "results"
    """Results of reproduce.py, for the comparison on the card; the measured accuracy is written there, too."""
    package: Path = ROOT / "timm_mfd"
    """The package; the weights go into its folder weights/."""
    cards: Path = ROOT / "model_cards"
    """Where the card is written."""
    cache_dir: str | None = None
    """Where decoded images are kept. Default: ~/.cache/timm_mfd."""


def main(args: Args) -> None:
    """Round, measure, write, and show the row that makes the weights known."""
    with one_line_errors(ValueError, OSError, ImageDecodeError), tempfile.TemporaryDirectory() as scratch:
        run = open_run(args.run_dir)
        result = results.collect(args.run_dir)  # refuses what is no run of a recipe
        recipe, _ = recipes.find(result.recipe)
        config = check_config(run.model)
        name = f"{config['architecture']}.{recipe.dataset}"
        if recipe.id != f"{recipe.backbone}/{recipe.dataset}/softmax+mfd" or result.protocol != "paper":
            raise ValueError(
                f"{name} stands for {recipe.backbone}/{recipe.dataset}/softmax+mfd under the protocol paper, and "
                f"--run-dir {args.run_dir} is {recipe.name(result.protocol)}"
            )
        weights, card, accuracy = (
            args.package / "weights" / f"{name}.safetensors", args.cards / f"{name}.md", args.results / f"{name}.json"
        )  # fmt: skip
        if weights.exists() and not args.replace:
            raise ValueError(f"{weights} is there already; give --replace to put others in its place")
        for path in (weights, card, accuracy):
            path.parent.mkdir(parents=True, exist_ok=True)

        new = Path(scratch)
        original = load_file(check_weights(run.model / WEIGHTS, config))
        save_file(rounded(original), new / WEIGHTS, {"timm_mfd": json.dumps(identity(config))})
        if (size := (new / WEIGHTS).stat().st_size) > LARGEST:
            raise ValueError(f"the weights of {name} take {size:,} bytes, more than {LARGEST:,}: too much to install")
        (new / CONFIG).write_text(json.dumps(identity(config)), encoding="utf-8")
        measured = evaluate.measure(
            evaluate.Args(str(new), recipe.dataset, args.data_dir, cache_dir=args.cache_dir)
        ) | {"model": name, "sha256": sha256_of(new / WEIGHTS)}  # fmt: skip
        if measured["data"] != result.data:
            raise ValueError(f"--data-dir {args.data_dir} holds other images than those that the run was measured on")
        if not abs(measured["top1"] - result.top1) <= FARTHEST:
            raise ValueError(
                f"the rounded weights have a top-1 of {measured['top1']:.2f} %, the run says {result.top1:.2f} %: "
                f"either {run.model} is not its model, or float16 does not do for it"
            )

        facts = run.facts
        facts["summary"] = facts["summary"] | {key: measured[key] for key in ("top1", "top5")}
        # A tag has no names of classes: timm reads none from a table.
        plain = {key: value for key, value in config.items() if key != "label_names"}
        comparison = compare(run.args["recipe"], args.results)
        text = render_card(plain, measured["sha256"], facts, tag=name, comparison=comparison)
        write_text(card, text)
        write_text(accuracy, json.dumps(measured, indent=2) + "\n")
        with replacing(weights) as partial:  # last: what stands for them is there
            shutil.copyfile(new / WEIGHTS, partial)
    print(f"{weights}: {size:,} bytes\n{card}\n{accuracy}\n")
    print(f"top-1 {measured['top1']:.2f} % of {measured['count']:,} images; {result.top1:.2f} % before the rounding")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("paste this row into _AVAILABLE in timm_mfd/models/_pretrained.py; then pretrained=True loads them:\n")
    print(table_row(name, config, {"file": f"weights/{name}.safetensors", "sha256": measured["sha256"]}))


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the kernels and matrices as float16; statistics and biases are few, and stay as they are.

    Raises:
        ValueError: If a number is too large for float16.
    """
    half = {}
    for key, value in tensors.items():
        half[key] = value.half() if value.is_floating_point() and value.dim() > 1 else value
        if not torch.isfinite(half[key]).all():
            raise ValueError(f"{key} has numbers that float16 cannot hold")
    return half


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
