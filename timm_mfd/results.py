"""Results: one small JSON file per finished run of a recipe, from which reports are made and from nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from . import recipes
from .atomic import write_text
from .training.environment import shared_machine
from .training.resume import RESUMABLE_WITH_OTHER_VALUE, changes
from .training.run_folder import RunFolder

# How a run was computed; its result says so, and it still is a run of the recipe.
_ARITHMETIC = frozenset(("mixed_precision", "compile", "compile_mode", "deterministic", "sync_batch_norm"))
_CURVE = ("top1", "top5", "loss", "criterion_loss", "mfd_loss", "lr")


@dataclass(frozen=True)
class Result:
    """A finished run of a recipe.

    Attributes:
        recipe: Id of the recipe.
        protocol: Key of `recipes.PROTOCOLS`.
        seed: The run's seed.
        top1: Accuracy after the last epoch, in percent of the held-out images.
        top5: The same for the five best classes.
        images: Number of held-out images.
        split: What they are called in the data set.
        curve: One number per epoch for each of accuracy, losses and learning rate.
        stages: Index of each stage that the correlations belong to.
        correlation_before: Mean |r| of each stage with the initial weights, see `redundancy.mean_abs_correlation`.
        correlation_after: The same after training.
        wall_seconds: Time of training and evaluation over all epochs, also of a run that was interrupted.
        images_per_second: Training images, median over the epochs.
        device: Processes, device, threads and precision.
        arithmetic: How it was computed: precision, compilation and the like.
        environment: Versions, system and the commit of the code.
        data: sha256 of images and classes.
        warnings: What the run warned of.
        shared_machine: Whether it gave way to other work of the machine, at a lowered priority: then its times and
            images/s are no speeds.
    """

    recipe: str
    protocol: str
    seed: int
    top1: float
    top5: float
    images: int
    split: str
    curve: dict[str, list[float]]
    stages: list[int]
    correlation_before: list[float]
    correlation_after: list[float]
    wall_seconds: float
    images_per_second: float
    device: str
    arithmetic: dict[str, Any]
    environment: dict[str, Any]
    data: str
    warnings: list[str]
    shared_machine: bool = False


def path_of(folder: Path, recipe: recipes.Recipe, protocol: str, seed: int) -> Path:
    """Return the file of a result.

    Args:
        folder: Folder of all results.
        recipe: The recipe.
        protocol: Key of `recipes.PROTOCOLS`.
        seed: The run's seed.

    Example:
        >>> path_of(Path("results"), recipes.find("resnet50/cifar100/softmax+mfd")[0], "paper", 0)
        PosixPath('results/paper/resnet50-cifar100-softmax+mfd-seed0.json')
    """
    return folder / protocol / f"{recipe.id.replace('/', '-')}-seed{seed}.json"


def collect(run: Path) -> Result:
    """Make the result of a finished run.

    Args:
        run: The run folder.

    Returns:
        The result. Paths of the machine are not in it.

    Raises:
        ValueError: If the run is not finished, or was not trained as its recipe says.
    """
    folder = RunFolder(run)
    folder.check_finished()
    try:
        return _collect(folder)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run} is damaged or of another version: {error!r}") from None


def _collect(run: RunFolder) -> Result:
    args, summary, metrics = run.args, run.summary, run.metrics
    if args.get("recipe") is None:
        raise ValueError(f"{run} is not a run of a recipe; train it with --recipe")
    recipe, protocol = recipes.find(args["recipe"])
    wanted = asdict(recipe.arguments(protocol, args["seed"]))
    if different := changes(wanted, args, RESUMABLE_WITH_OTHER_VALUE | _ARITHMETIC):
        words = ", ".join(f"--{name.replace('_', '-')} {args[name]} instead of {wanted[name]}" for name in different)
        raise ValueError(f"{run} was not trained as its recipe says: {words}")
    return Result(
        recipe=recipe.id,
        protocol=protocol,
        seed=args["seed"],
        top1=summary["top1"],
        top5=summary["top5"],
        images=summary["count"],
        split=summary["split"],
        curve={key: [float(f"{line[key]:.6g}") for line in metrics] for key in _CURVE},
        stages=summary["stages"],
        correlation_before=[round(r, 5) for r in summary["mean_abs_correlation"]["before"]],
        correlation_after=[round(r, 5) for r in summary["mean_abs_correlation"]["after"]],
        wall_seconds=run.facts["seconds"],
        images_per_second=summary["images_per_second"],
        device=summary["device"],
        arithmetic={key: args[key] for key in sorted(_ARITHMETIC)},
        environment=args["environment"],
        data=summary["data"],
        warnings=summary["warnings"],
        shared_machine=shared_machine(args),
    )


def write(result: Result, folder: Path) -> Path:
    """Write a result under its name; one that is there is replaced.

    Args:
        result: The result.
        folder: Folder of all results.

    Returns:
        The file.
    """
    path = path_of(folder, recipes.find(result.recipe)[0], result.protocol, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in asdict(result).items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")  # one line per entry, so that a curve is one line
    return path


def read(path: Path) -> Result:
    """Read a result.

    Raises:
        ValueError: If the file is no result, or not of the recipe that its name says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        known = {field.name: field.default is MISSING for field in fields(Result)}
        needed = {name for name, is_needed in known.items() if is_needed}  # later ones have defaults
        if not isinstance(content, Mapping) or not needed <= content.keys() <= known.keys():
            raise ValueError("it has other entries than a result")
        result = Result(**content)
        _check(result)
        recipe, _ = recipes.find(f"{result.recipe}@{result.protocol}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a result: {error}") from None
    place = path_of(path.parent.parent, recipe, result.protocol, result.seed)
    if path != place:
        raise ValueError(f"{path} holds the result that belongs into {place}")
    return result


def _check(result: Result) -> None:
    for field in fields(Result):
        value = getattr(result, field.name)
        kind: Any = get_origin(field.type) or field.type
        fits = isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{field.name} is {value!r}")
    needed = {"curve": ("top1",), "arithmetic": ("mixed_precision",), "environment": ("git_commit", "git_modified")}
    for name, keys in needed.items():
        if missing := [key for key in keys if key not in getattr(result, name)]:
            raise ValueError(f"{name} lacks {missing[0]}")
    if not result.curve["top1"] or len(result.correlation_after) != len(result.stages):
        raise ValueError("its curve or its correlations are incomplete")
    ranges: dict[str, tuple[list[Any], float, float]] = {
        "top1": ([result.top1], 0, 100), "top5": ([result.top5], 0, 100), "images": ([result.images], 1, math.inf),
        "wall_seconds": ([result.wall_seconds], 0, math.inf), "curve": (result.curve["top1"], 0, 100),
        "images_per_second": ([result.images_per_second], 0, math.inf), "seed": ([result.seed], 0, math.inf),
        "correlation_before": (result.correlation_before, 0, 1), "correlation_after": (result.correlation_after, 0, 1),
    }  # fmt: skip
    for name, (numbers, low, high) in ranges.items():
        # Mean |r| may be above 1 by its rounding; a comparison with NaN is false, and so is it refused.
        if bad := [n for n in numbers if not isinstance(n, int | float) or not low <= n <= high + 1e-4]:
            raise ValueError(f"{name} has {bad[0]!r}, not a number from {low} to {high}")
    if not math.isclose(result.curve["top1"][-1], result.top1, rel_tol=1e-5, abs_tol=1e-5):
        raise ValueError(f"top1 is {result.top1}, but its curve ends at {result.curve['top1'][-1]}")


def read_all(folder: Path) -> list[Result]:
    """Read all results below a folder, in the order of recipes and seeds.

    Raises:
        ValueError: If a file is no result.
    """
    order = {recipe: index for index, recipe in enumerate(recipes.RECIPES)}
    found = [read(path) for path in sorted(folder.glob("*/*.json"))]
    return sorted(found, key=lambda result: (result.protocol, order[result.recipe], result.seed))
