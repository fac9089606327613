"""Model cards: rendered from one template, and checked offline as strictly as the Hub would or more."""

import importlib.metadata
import math
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from . import recipes
from .arguments import Args
from .redundancy import CORRELATION_IMAGES
from .sources import data_name
from .training.environment import shared_machine
from .training.resume import RESUMABLE_WITH_OTHER_VALUE, changes

# In a source checkout the template lies in `model_cards/`; in an installed package beside this file.
_TEMPLATES = (Path(__file__).with_name("model_card.md"), Path(__file__).parents[1] / "model_cards" / "template.md")
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
}
PICTURES = {"curves.png": "Losses and accuracy over the epochs"}
# Of every run: what a command names although it is the default, which a later version may change.
_NAMED = frozenset(
    ("model", "dataset", "criterion", "mfd_weight", "epochs", "batch_size", "lr", "milestones", "weight_decay", "seed")
)
_PAPER = "multi-stage feature decorrelation (MFD, https://arxiv.org/abs/2308.12880)"


def render_card(
    config: Mapping[str, Any],
    sha256: str,
    run: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    tag: str | None = None,
    license: str = "apache-2.0",
    comparison: Mapping[str, str] | None = None,
    pictures: tuple[str, ...] = (),
) -> str:
    """Write the card of a saved model.

    Args:
        config: Content of its `config.json`.
        sha256: Of its weights.
        run: How it was trained: `args` and `summary` as a run folder has them, and the time in `seconds`.
        repo_id: Where it will be published.
        tag: Or its name `ARCH.TAG`, for weights in float16 that lie inside this package.
        license: Licence of the weights, by the Hub's name.
        comparison: Accuracies over several runs in words: `ours`, `baseline`, `difference`, `paper`, `paper_baseline`,
            `paper_difference`.
        pictures: Which of `PICTURES` lie beside it.

    Returns:
        Markdown with the Hub's metadata in front; `check_card` accepts it.
    """
    args, summary = (run or {}).get("args", {}), (run or {}).get("summary", {})
    name = repo_id or tag or config["architecture"]
    mfd_weight = args.get("mfd_weight")
    dataset = _data_name(args)
    hub_dataset = _HUB_DATASETS.get(dataset) or _hub_name(args.get("dataset", ""))
    results = None
    if run:
        measured = EvalResult(
            task_type="image-classification",
            dataset_type=hub_dataset or re.sub(r"[^\w.-]+", "-", dataset).strip("-.") or "folder",
            dataset_name=dataset,
            dataset_split=summary["split"],
            metric_type="accuracy",
            metric_name="top-1 accuracy (%)",
            metric_value=round(float(summary["top1"]), 4),
        )
        results = [measured]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        datasets=[hub_dataset] if hub_dataset else None,
        metrics=["accuracy"] if run else None,
        tags=["image-classification", "timm", "timm_mfd", *(["mfd"] if mfd_weight else [])],
        model_name=name if results else None,
        eval_results=results,
    )
    correlation = summary.get("mean_abs_correlation", {})
    size = config["pretrained_cfg"]["input_size"]
    return _template().render(
        front_matter=data.to_yaml().strip(),
        title=name,
        claim=_claim(config, args, summary),
        source=f"hf-hub:{repo_id}" if repo_id else tag or "local-dir:FOLDER",
        tag=tag,
        input_size=size,
        install=_install((args or {}).get("environment", {}), tag),
        label_names=config.get("label_names"),
        num_classes=config["num_classes"],
        # timm has no way to know the widths of a pruned network; our entry points have.
        pruned=config.get("pruned", False),
        only_here=config.get("pruned", False) and not config["architecture"].endswith("_mfd"),
        run=run,
        args=args,
        summary=summary,
        dataset=dataset,
        comparison=comparison,
        pictures=[{"file": file, "text": PICTURES[file]} for file in pictures],
        correlation_images=min(CORRELATION_IMAGES, summary.get("count", 0)),
        before=[f"{r:.3f}" for r in correlation.get("before", [])],
        after=[f"{r:.3f}" for r in correlation.get("after", [])],
        same_at_start=any(first == second for first, second in pairwise(correlation.get("before", []))),
        noise=[f"{math.sqrt(r2):.3f}" for r2 in summary.get("noise_floor", [])],
        command=_command(args) if run else "",
        training=_training(config, run) if run else {},
        warnings=[str(warning).rstrip(".") for warning in summary.get("warnings", [])],
        sha256=sha256,
    )


def check_card(text: str, folder: Path | None = None) -> None:
    """Refuse a card that the Hub would refuse, show wrongly or not find; needs no network.

    Args:
        text: The card.
        folder: Where the pictures lie that it shows.

    Raises:
        ValueError: Naming the first fault.
    """
    match = re.match(r"\A---\n(.*?)\n---\n(.*)\Z", text, re.DOTALL)
    if match is None:
        raise ValueError("the card has no metadata between two lines of ---")
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the card's metadata is not plain YAML: {' '.join(str(error).split())}") from None
    keys = re.findall(r"^([\w-]+):", match[1], re.MULTILINE)
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the card's metadata has {twice[0]} twice")
    if not isinstance(data, dict):
        raise ValueError("the card's metadata is not a mapping")
    for key, value in data.items():
        if key not in _KEYS:
            raise ValueError(f"the card's metadata has the unknown key {key!r}")
        if not _KEYS[key](value):
            raise ValueError(f"the card's metadata has {key}: {value!r}, which is not of the kind that the Hub reads")
    for key, wanted in {"library_name": "timm", "pipeline_tag": "image-classification"}.items():
        if data.get(key) != wanted:
            raise ValueError(f"the card's metadata must have {key}: {wanted}, not {data.get(key)!r}")
    if "license" not in data:
        raise ValueError("the card's metadata names no license")
    if data["license"] == "other" and not {"license_name", "license_link"} <= data.keys():
        raise ValueError("license: other needs license_name and license_link")
    if "timm_mfd" not in data.get("tags", []):
        raise ValueError("the card's tags lack timm_mfd")
    body = match[2]
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for left in ("[More Information Needed]", "{{", "{%", "!!python"):
        if left in text:
            raise ValueError(f"the card still holds {left}")
    if not re.search(r"^# \S", prose, re.MULTILINE):
        raise ValueError("the card has no title")
    if not -1 < body.find("import timm_mfd") < body.find("create_model"):
        raise ValueError("the card does not import timm_mfd before it creates the model")
    for link in re.findall(r"""!\[[^]]*\]\(([^)\s]+)|<img[^>]*\ssrc=["']?([^"'\s>]+)""", prose):
        link = link[0] or link[1]
        if not link.startswith("https://") and (folder is None or not (folder / link).is_file()):
            raise ValueError(f"the card shows {link}, which is not beside it")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", value) is not None


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _is_index(value: Any) -> bool:
    """Whether it is a model-index: named models with results, each with a task, a data set and finite numbers."""
    try:
        return bool(value) and all(
            _is_text(model["name"])
            and bool(model["results"])
            and all(
                _is_text(result["task"]["type"])
                and _is_id(result["dataset"]["type"])
                and _is_text(result["dataset"]["name"])
                and bool(result["metrics"])
                and all(
                    _is_text(metric["type"])
                    and isinstance(metric["value"], int | float)
                    and not isinstance(metric["value"], bool)
                    and math.isfinite(metric["value"])
                    for metric in result["metrics"]
                )
                for result in model["results"]
            )
            for model in value
        )
    except (TypeError, KeyError, OverflowError):
        return False


# The Hub's names of licences that fit weights or data.
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause
bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0
cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr unknown other
"""
LICENSES = frozenset(_LICENSES.split())
_KEYS = {
    "library_name": _is_text,
    "pipeline_tag": _is_text,
    "license": lambda value: isinstance(value, str) and value in LICENSES,
    "license_name": _is_text,
    "license_link": _is_text,
    "datasets": _are_ids,
    "metrics": _are_texts,
    "tags": _are_texts,
    "base_model": lambda value: _is_id(value) or _are_ids(value),
    "base_model_relation": lambda value: value in ("finetune", "quantized", "adapter", "merge"),
    "language": lambda value: _is_text(value) or _are_texts(value),
    "thumbnail": _is_text,
    "model-index": _is_index,
}


def _template() -> jinja2.Template:
    path = next(path for path in _TEMPLATES if path.is_file())
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    ).from_string(path.read_text(encoding="utf-8-sig"))


def _claim(config: Mapping[str, Any], args: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if not args:
        return f"A timm image classifier of {config['num_classes']} classes."
    weight = args["mfd_weight"]
    method = f"with {_PAPER} of weight {weight:g}" if weight else f"without {_PAPER}: a baseline"
    classes = f"{config['num_classes']} classes of {_data_name(args)}"
    return (
        f"{config['architecture']} for the {classes}, trained {method}: "
        f"{summary['top1']:.2f} % top-1 on {summary['count']:,} held-out images."
    )


def _training(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    args, summary, environment = run["args"], run["summary"], run["args"]["environment"]
    stem = config.get("model_args", {}).get("stem")
    shared = shared_machine(args)
    return {
        "architecture": config["architecture"] + (f", {stem} stem" if stem else ""),
        "recipe": args["recipe"] or "none of the paper's",
        "criterion, MFD weight": f"{args['criterion']}, {args['mfd_weight']:g}",
        "seed": args["seed"],
        "hardware": summary["device"] + ", shared with other work" * shared,
        "wall-clock": "-" if shared else _duration(run.get("seconds", summary["seconds"])),
        "code": _code(environment),
        "packages": ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items() if v),
        "sha256 of images and classes": f"`{summary['data']}`",
    }


def _command(args: Mapping[str, Any]) -> str:
    """Return the command that trains such a model, without what concerns one machine only."""
    processes = args["environment"].get("processes", 1)
    words, base = ["accelerate launch" + f" --num_processes {processes}" * (processes > 1)], Args()
    words[0] += " train_scripts/train.py"
    named = set(_NAMED)
    if args["recipe"]:
        recipe, protocol = recipes.find(args["recipe"])
        base = replace(recipe.arguments(protocol), recipe=args["recipe"])
        words.append(f"--recipe {args['recipe']}")
        named = {"seed"}
    changed = changes(args, asdict(base), RESUMABLE_WITH_OTHER_VALUE)
    for name in (name for name in asdict(base) if name in args and (name in changed or name in named)):
        value, flag = args[name], name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words.append(" ".join([f"--{flag}", *(shlex.quote(_public(str(item))) for item in values)]))
    if args["data_dir"]:
        words.append("--data-dir DIR")
    return " ".join(words)


def _data_name(args: Mapping[str, Any]) -> str:
    """Return what a data set is called on a card: images of one's own by the name of their folder."""
    return data_name(_public(args.get("dataset", "")), args.get("data_dir"))


def _public(source: str) -> str:
    """Return a source of data or weights, without the path of a folder of this machine."""
    if source.startswith("local-dir:"):
        return "local-dir:DIR"
    return "hfds/DIR" if source.startswith("hfds/") and not _hub_name(source) else source


def _hub_name(dataset: str) -> str | None:
    name = dataset.removeprefix("hfds/")
    return name if name != dataset and _is_id(name) and not name.startswith(".") else None


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _install(environment: Mapping[str, Any], tag: str | None) -> dict[str, str | None]:
    """Return what the lines name by which the package is installed: its version, commit and home page."""
    version, home = environment.get("packages", {}).get("timm_mfd"), None
    with suppress(importlib.metadata.PackageNotFoundError):  # a copy of the code beside other packages
        package = importlib.metadata.metadata("timm_mfd")
        version = version or package["Version"]
        urls = dict(url.split(", ", 1) for url in package.get_all("Project-URL") or [])
        home = urls.get("Repository")
    # Weights inside of the package came into it after the commit that trained them.
    return {"version": version, "commit": None if tag else environment.get("git_commit"), "home": home}


def _code(environment: Mapping[str, Any]) -> str:
    commit = environment.get("git_commit")
    version = environment.get("packages", {}).get("timm_mfd")
    modified = ", with changes that were not committed" if environment.get("git_modified") else ""
    return f"timm_mfd {version}" + (f", commit `{commit}`{modified}" if commit else "")
