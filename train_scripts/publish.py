"""Publish the model of a finished run on the Hugging Face Hub; without --push, show what would be published.

python train_scripts/publish.py --run-dir runs/NAME --repo-id ORG/NAME

HF_TOKEN=... python train_scripts/publish.py --run-dir runs/NAME --repo-id ORG/NAME --push

The token comes from HF_TOKEN or `hf auth login`, never from the command line.
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

import json
import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from safetensors.torch import load_file

from timm_mfd import create_model, push_to_hub, recipes, report, results
from timm_mfd.atomic import replace_folder
from timm_mfd.hub import FILES, check_folder, check_target, probe
from timm_mfd.launch import one_line_errors
from timm_mfd.model_card import LICENSES, render_card
from timm_mfd.models.saved import CARD, CONFIG, WEIGHTS, check_config, check_weights, sha256_of
from timm_mfd.training.run_folder import RunFolder


@dataclass(frozen=True)
class Args:
    """Arguments of a publication."""

    run_dir: Path
    """The folder of a finished run of train.py. What is sent is built in its folder `publish/`, anew every time."""
    repo_id: str
    """ORG/NAME on the Hub, such as me/resnet50_mfd.cifar100."""
    push: bool = False
    """Really publish. Without it nothing leaves this machine."""
    private: bool = False
    """Make the repository private."""
    tag: str = "v1.0"
    """Name for the published commit; an existing one is never moved."""
    license: str = "apache-2.0"
    """Licence of the weights, by the Hub's name."""
    results: Path = Path("results")
    """Results of reproduce.py, for the comparison with the baseline and the paper, if there are any."""


def main(args: Args) -> None:
    """Build the folder, prove that it loads, and publish it if asked to."""
    with one_line_errors(ValueError, OSError):
        check_target(args.repo_id, args.tag)
        folder = build(args)
        check_folder(folder)
        prove(folder)
        visible = "private" if args.private else "public, if it is new"
        print(f"{folder}, built anew, would be published as {args.repo_id} ({visible}), tag {args.tag}:\n")
        for name in FILES:
            if (folder / name).is_file():
                print(f"  {name:<18} {(folder / name).stat().st_size:>12,} bytes  sha256 {sha256_of(folder / name)}")
        print("\nthe card is in order; timm and timm_mfd load the folder, and answer bit for bit as the run's weights")
        if not args.push:
            print("nothing was sent; add --push to publish")
            return
        published = push_to_hub(folder, args.repo_id, private=args.private, tag=args.tag)
    print(f"\n{'published' if published.changed else 'was there already'}: {args.repo_id} at {published.commit}")
    print(f"tagged {published.tag}; read back from the Hub, it answers bit for bit as the folder\n")
    config = check_config(folder)
    if name := tag_name(args.repo_id, config):
        print("paste this row into _AVAILABLE in timm_mfd/models/_pretrained.py; then pretrained=True loads them:\n")
        where = {"repo": published.repo_id, "commit": published.commit, "sha256": published.sha256}
        print(table_row(name, config, where))


def build(args: Args) -> Path:
    """Copy the run's model into `RUN/publish/`, with its pictures and the card for this repository."""
    run = open_run(args.run_dir)
    license, usable = args.license.lower(), sorted(LICENSES - {"other"})  # which needs a name and a link
    if license not in usable:
        close = get_close_matches(license, usable, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"it knows {', '.join(usable)}"
        raise ValueError(f"--license {args.license} is none of the Hub's names; {hint}")
    if args.results != Args.results and not args.results.is_dir():
        raise ValueError(f"--results {args.results} is not a folder")
    config = check_config(run.model)
    check_weights(run.model / WEIGHTS, config)
    folder = run.publish
    others = [path.name for path in folder.iterdir() if path.name not in FILES] if folder.is_dir() else []
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or others:
        raise ValueError(f"{folder} is built anew, and holds {', '.join(others) or 'no folder'}; move that away first")
    new = folder.with_name("publish.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(run.model / name, new / name)
    pictures = [run.curves] if run.curves.is_file() else []
    for picture in pictures:
        shutil.copyfile(picture, new / picture.name)
    try:
        card = render_card(
            config,
            sha256_of(new / WEIGHTS),
            run.facts,
            repo_id=args.repo_id,
            license=license,
            comparison=compare(run.args.get("recipe"), args.results),
            pictures=tuple(picture.name for picture in pictures),
        )
    except KeyError as error:
        raise ValueError(f"--run-dir {run} is damaged: args.json or summary.json lacks {error}") from None
    (new / CARD).write_text(card, encoding="utf-8")
    replace_folder(new, folder)
    return folder


def open_run(path: Path) -> RunFolder:
    """Return a run after reading all that its card tells; what is no finished run is refused."""
    run = RunFolder(path)
    try:
        run.check_finished()
        _ = run.facts
    except KeyError as error:
        raise ValueError(f"--run-dir {run} is damaged: its metrics lack {error}") from None
    except ValueError as error:
        raise ValueError(f"--run-dir {error}") from None
    return run


def compare(recipe_name: str | None, folder: Path) -> dict[str, str] | None:
    """Say how runs of a recipe compare with those of its baseline, and with the paper; None without any."""
    if recipe_name is None or not folder.is_dir():
        return None
    recipe, protocol = recipes.find(recipe_name)
    ran = [result for result in results.read_all(folder) if result.protocol == protocol]
    for table in recipes.TABLES:
        for row in report.rows_of(table, ran):
            usual = recipe == row.baseline and not row.recipe.variant
            if (usual or recipe == row.recipe) and row.ours and row.ours_baseline:
                paper = [str(value or "not given") for value in (row.recipe.accuracy, row.baseline.accuracy)]
                difference = row.paper_difference
                return {
                    "ours": str(row.ours),
                    "baseline": str(row.ours_baseline),
                    "difference": str(row.difference or "no pairs"),
                    "paper": "" if row.recipe.accuracy is None else f"{paper[0]} (protocol here: {protocol})",
                    "paper_baseline": paper[1],
                    "paper_difference": "" if difference is None else f"{difference:+.2f}",
                }
    return None


def prove(folder: Path) -> None:
    """Load the folder in two ways; each must answer bit for bit as the weights, put into the network by hand."""
    config = check_config(folder)
    size = config["pretrained_cfg"]["input_size"]
    by_hand = create_model(config["architecture"], **{"num_classes": config["num_classes"], **config["model_args"]})
    by_hand.load_state_dict(load_file(folder / WEIGHTS))
    wanted = probe(by_hand, size)
    for create in (create_model, timm.create_model):
        if not torch.equal(probe(create(f"local-dir:{folder}", pretrained=True), size), wanted):
            raise ValueError(f"{folder} loaded by {create.__module__} does not answer as its own weights")


def tag_name(repo_id: str, config: dict[str, Any]) -> str | None:
    """Return ARCH.TAG if a repository is called so; None if it could be no pretrained tag."""
    name = repo_id.split("/")[1]
    arch, _, tag = name.partition(".")
    return name if arch == config["architecture"] and tag and arch.endswith("_mfd") else None


def table_row(name: str, config: dict[str, Any], where: dict[str, str]) -> str:
    """Return the line that makes weights a pretrained tag of the package.

    Args:
        name: ARCH.TAG.
        config: Configuration of the saved model.
        where: Entries of `Pretrained` that say where the weights are.
    """
    cfg = config["pretrained_cfg"]
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    preprocessing = {key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key] for key in keys}
    usual = {"in_chans": 3, "global_pool": "avg"}
    arguments = {"stem": "imagenet", "num_classes": config["num_classes"], **config["model_args"]}
    arguments = {key: value for key, value in arguments.items() if (key, value) not in usual.items()}
    lines = [f'    "{name}": Pretrained(']
    for field, entries in (("arguments", arguments), ("preprocessing", preprocessing)):
        items = (f'            "{key}": {_code(value)},' for key, value in entries.items())
        lines += [f"        {field}={{", *items, "        },"]
    return "\n".join([*lines, *(f"        {key}={_code(where[key])}," for key in where), "    ),"])


def _code(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, description=__doc__))
