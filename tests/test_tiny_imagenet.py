"""The rows of Tiny ImageNet: all of them, in order, with arguments that the training script takes, within the time."""

import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reproduce
import tiny_imagenet
import train

from timm_mfd import recipes


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is handed on to be done, on a machine that seems to have a GPU, when its clock says 1000 seconds."""
    calls = []
    monkeypatch.setattr("reproduce.time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tiny_imagenet, "load_dataset", lambda *_: None)
    monkeypatch.setattr(reproduce, "do_missing", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(reproduce, "report", lambda folder: calls.append(folder))
    args = tiny_imagenet.Args(tmp_path / "my data", 100, parallel=6, output_dir=tmp_path / "out")
    return args, calls


def test_all_rows_of_tiny_imagenet_are_trained_with_three_seeds_those_first_that_tell_most(asked, tmp_path):
    args, calls = asked
    tiny_imagenet.main(args)
    (runs, parallel, options, data_dir, _workers, decoded, deadline), report = calls
    wanted = {recipe.id for recipe in recipes.RECIPES.values() if recipe.dataset == "tiny_imagenet"}
    assert {(run.recipe.id, run.seed) for run in runs} == {(name, seed) for name in wanted for seed in range(3)}
    assert len(runs) == 3 * len(wanted) == 27
    order = [(run.recipe.backbone, run.recipe.mfd_center, run.seed) for run in runs]
    usual = [(backbone, "channel", seed) for seed in range(3) for backbone in ["mobilenetv2"] * 2 + ["resnet50"] * 2]
    assert order[:15] == [*usual, *(("mobilenetv2", "position", seed) for seed in range(3))]
    assert (parallel, data_dir, decoded, report) == (6, args.data_dir, args.output_dir / "decoded", runs[0].results_dir)
    assert {run.protocol for run in runs} == {"paper"}
    assert deadline == 1000 + 6000
    for run in runs:
        args = train.parse(run.job(options).command[2:])
        assert (args.mixed_precision, args.compile, args.epochs) == ("bf16", True, 100)
        assert run.folder.is_relative_to(tmp_path / "out" / "runs")


def test_what_stops_the_runs_stops_all_before_the_report(asked, monkeypatch):
    args, calls = asked

    def stop(*_):
        raise reproduce.Stopped("stopped at the time limit with 3 runs to do", signal.SIGALRM)

    monkeypatch.setattr(reproduce, "do_missing", stop)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGALRM)):
        tiny_imagenet.main(args)
    assert not calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.5}, "the time limit must be more than 1 minute, not 0.5"),
        ({}, "tiny_imagenet: .* lacks wnids.txt"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = {"data_dir": tmp_path, "minutes": 10, "output_dir": tmp_path / "out", **change}
    with pytest.raises(SystemExit) as error:
        tiny_imagenet.main(tiny_imagenet.Args(**arguments))
    error.match(message)
    assert not list(tmp_path.iterdir())


def test_no_run_at_a_time_is_a_mistake(asked, monkeypatch):
    args, _ = asked
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tiny_imagenet, "load_dataset", lambda *_: None)
    with pytest.raises(SystemExit, match="--parallel must be at least 1, not 0"):
        tiny_imagenet.main(replace(args, parallel=0))


def test_without_a_gpu_the_command_for_a_cpu_is_named(asked, monkeypatch):
    args, calls = asked
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = f"reproduce.py run --table 5 --rows mobilenetv2/tiny_imagenet --data-dir {args.data_dir} --time-limit 100"
    with pytest.raises(SystemExit, match=re.escape(f"there is no GPU that torch can use; on a CPU: {command}")):
        tiny_imagenet.main(args)
    assert not calls


def test_missing_data_are_found_before_a_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="tiny_imagenet: .* lacks wnids.txt"):
        tiny_imagenet.main(tiny_imagenet.Args(tmp_path, 10))
