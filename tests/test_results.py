"""Results: exactly what a finished run of a recipe left, and nothing that is not one."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_report import BASE, WITH, WITHOUT

from timm_mfd import recipes, results
from timm_mfd.training.environment import environment


@pytest.fixture
def run(tmp_path):
    """A run folder as train.py leaves it, of three epochs."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe, _ = recipes.find("resnet50/cifar100/softmax+mfd")
    args = asdict(replace(recipe.arguments(seed=2), data_dir="/home/me/data", workers=7, mixed_precision="bf16"))
    args["environment"] = {"git_commit": "abc", "git_modified": False, "device": "gpu"}
    (folder / "args.json").write_text(json.dumps(args))
    lines = [
        {"epoch": e, "top1": 100 * (352 + e) / 360, "top5": 20.0 * e, "loss": 3.123456789 / e,
         "criterion_loss": 2.0 / e,
         "mfd_loss": 1.0, "lr": 0.1, "seconds": 100.25, "images_per_second": 500.0, "mfd_per_stage": [0.5, 0.5]}
        for e in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "top1": 100 * 355 / 360, "top5": 60.0, "count": 10000, "split": "test", "stages": [0, 1], "device": "1 x gpu",
        "mean_abs_correlation": {"before": [0.123456789, 0.2], "after": [0.01, 0.02]}, "images_per_second": 500.0,
        "data": "sha", "warnings": ["mind the gap"],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_result_holds_what_the_run_left_and_no_path_of_the_machine(run, tmp_path):
    result = results.collect(run)
    assert (result.recipe, result.protocol, result.seed) == ("resnet50/cifar100/softmax+mfd", "paper", 2)
    assert (result.top1, result.top5, result.images, result.split) == (100 * 355 / 360, 60.0, 10000, "test")
    assert result.curve["top1"] == [98.0556, 98.3333, 98.6111]
    assert result.curve["loss"] == [3.12346, 1.56173, 1.04115]
    assert result.correlation_before == [0.12346, 0.2]
    assert (result.wall_seconds, result.images_per_second) == (300.8, 500.0)  # 3 x 100.25, rounded to even
    assert result.arithmetic["mixed_precision"] == "bf16"
    assert (result.environment["git_commit"], result.warnings) == ("abc", ["mind the gap"])
    path = results.write(result, tmp_path / "results")
    assert path == tmp_path / "results" / "paper" / "resnet50-cifar100-softmax+mfd-seed2.json"
    assert results.read(path) == result
    assert "/home/me" not in path.read_text()
    assert path.stat().st_size < 3000


def test_a_run_at_a_lowered_priority_says_that_its_times_are_no_speeds(run):
    assert results.collect(run).shared_machine is False
    args = json.loads((run / "args.json").read_text())
    lowered = {"environment": args["environment"] | {"shared_machine": True}}
    edit(run / "args.json", **lowered)
    assert results.collect(run).shared_machine is True
    # Begun so and finished alone: a part of its times is no speed either.
    edit(run / "args.json", environment=args["environment"], history=[args | lowered])
    assert results.collect(run).shared_machine is True


@pytest.mark.parametrize(("niceness", "shared"), [(0, False), (19, True), (-5, False)])
def test_an_environment_says_whether_the_priority_is_lowered(niceness, shared, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda _: niceness)
    assert environment(torch.device("cpu"), 1)["shared_machine"] is shared


def test_a_result_in_the_first_format_can_be_read_for_ever(tmp_path):
    first = Path(__file__).with_name("golden") / "mobilenetv2-cifar100-softmax-seed0.json"
    assert "shared_machine" not in first.read_text()
    path = tmp_path / "paper" / first.name
    path.parent.mkdir()
    path.write_text(first.read_text())
    result = results.read(path)
    assert (result.recipe, result.top1, result.shared_machine) == ("mobilenetv2/cifar100/softmax", 54.16, False)
    results.write(result, tmp_path)
    assert results.read(path) == result
    assert result.recipe in {ours.recipe for ours in results.read_all(Path(__file__).parents[1] / "results")}


def edit(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1}, "was not trained as its recipe says: --epochs 1 instead of 100"),
        ({"lr": 0.05, "mfd_center": "position"}, "--mfd-center position instead of channel, --lr 0.05 instead of 0.1"),
        ({"mfd_max_samples": 64}, "--mfd-max-samples 64 instead of None"),
        ({"recipe": None}, "is not a run of a recipe"),
        ({"recipe": "resnet50/cifar100/softmax"}, "--mfd-weight 1.0 instead of 0.0"),
        ({"recipe": "resnet50/cifar100/hinge"}, "unknown recipe"),
    ],
)
def test_a_run_that_is_not_as_its_recipe_says_is_no_result(run, change, message):
    edit(run / "args.json", **change)
    with pytest.raises(ValueError, match=message):
        results.collect(run)


def test_a_damaged_run_is_no_result(run):
    summary = json.loads((run / "summary.json").read_text())
    del summary["split"]
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="run is damaged or of another version: KeyError\\('split'\\)"):
        results.collect(run)


def test_an_unfinished_run_is_no_result(run):
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match="is not a finished run: summary.json is missing"):
        results.collect(run)


def test_all_results_are_read_in_the_order_of_the_tables(tmp_path):
    for result in reversed([*WITHOUT, *WITH]):
        results.write(result, tmp_path)
    assert results.read_all(tmp_path) == [*WITHOUT, *WITH]
    assert results.read_all(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text("{"), "seed0.json is not a result: "),
        (lambda path: path.write_text("[]"), "is not a result: it has other entries"),
        (lambda path: edit(path, more=1), "is not a result: it has other entries"),
        (lambda path: edit(path, recipe="resnet50/cifar100/hinge"), "is not a result: unknown recipe"),
        (lambda path: edit(path, protocol="fast"), "is not a result: unknown protocol"),
        (
            lambda path: path.rename(path.with_name("copy-seed1.json")),
            "copy-seed1.json holds the result that belongs into",
        ),
        (
            lambda path: path.parent.rename(path.parent.with_name("backup")),
            "backup/.* holds the result that belongs into",
        ),
        (lambda path: edit(path, top1=None), "is not a result: top1 is None"),
        (lambda path: edit(path, top1=math.nan), "is not a result: top1 is nan"),
        (lambda path: edit(path, top1=930.5), "is not a result: top1 has 930.5, not a number from 0 to 100"),
        (lambda path: edit(path, top1=41.0), "is not a result: top1 is 41.0, but its curve ends at 0.0"),
        (lambda path: edit(path, wall_seconds=-5), "is not a result: wall_seconds has -5, not a number from 0 to inf"),
        (lambda path: edit(path, correlation_after=[None, 0, 0, 0, 0]), "is not a result: correlation_after has None"),
        (lambda path: edit(path, correlation_after=[1.5, 0, 0, 0, 0]), "is not a result: correlation_after has 1.5"),
        (lambda path: edit(path, correlation_before=[math.nan]), "is not a result: correlation_before has nan"),
        (lambda path: edit(path, curve={"top1": ["0"]}), "is not a result: curve has '0'"),
        (lambda path: edit(path, seed="0"), "is not a result: seed is '0'"),
        (lambda path: edit(path, environment={}), "is not a result: environment lacks git_commit"),
        (lambda path: edit(path, curve={}), "is not a result: curve lacks top1"),
        (lambda path: edit(path, correlation_after=[0.1]), "its curve or its correlations are incomplete"),
        (lambda path: edit(path, seed=4), "holds the result that belongs into .*softmax-seed4.json"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, spoil, message):
    spoil(results.write(replace(BASE, recipe="resnet50/cifar100/softmax"), tmp_path))
    with pytest.raises(ValueError, match=message):
        results.read_all(tmp_path)
