"""The training script as users start it, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import train
from accelerate.state import AcceleratorState

import timm_mfd

SCRIPT = Path(train.__file__)


@pytest.fixture(autouse=True)
def _fresh_accelerator_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(**kwargs):
    args = {
        "model": "test_resnet",
        "epochs": 1,
        "batch_size": 8,
        "lr": 0.01,
        "output_dir": "run",
        "workers": 0,
        **kwargs,
    }
    train.main(train.Args(**args))
    return Path(args["output_dir"])


def launch(*flags, processes=1, timeout=120):
    # `accelerate launch` starts several processes on GPUs only; on the CPU it is torchrun that does.
    launcher = ["accelerate.commands.launch"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *map(str, flags)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_a_run_leaves_the_promised_folder_and_a_model_that_loads(folder_dataset, capsys):
    run_dir = run(dataset="folder", data_dir=str(folder_dataset), epochs=2, milestones=(1,))
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "args.json", "curves.png", "metrics.jsonl", "model", "summary.json",
    ]  # fmt: skip
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["dataset"], args["epochs"], args["mfd_weight"]) == ("folder", 2, 1.0)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == [0.01, pytest.approx(0.001)]
    for line in lines:
        assert set(line) == {
            "epoch", "top1", "top5", "loss", "criterion_loss", "mfd_loss", "mfd_per_stage", "lr", "images_per_second",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(line["criterion_loss"] + line["mfd_loss"], abs=1e-5)
        assert line["mfd_loss"] == pytest.approx(sum(line["mfd_per_stage"]), abs=1e-5)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["top1"], summary["count"], summary["split"]) == (lines[-1]["top1"], 12, "val")
    assert len(summary["mean_abs_correlation"]["before"]) == len(summary["mean_abs_correlation"]["after"]) == 5

    loaded = timm.create_model(f"local-dir:{run_dir}/model", pretrained=True).eval()
    data = train.load_dataset("folder", folder_dataset)
    hits = 0
    for images, labels in train.EvalLoader(data, 4, device=torch.device("cpu")):
        hits += int((loaded(images).argmax(1) == labels).sum())
    assert 100 * hits / 12 == pytest.approx(summary["top1"])

    shown = capsys.readouterr().out
    assert "stage  module" in shown
    assert "mean |r|   before   after" in shown
    assert f'timm.create_model("local-dir:{run_dir}/model", pretrained=True)' in shown


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(folder_dataset):
    runs = [
        run(dataset="folder", data_dir=str(folder_dataset), output_dir=f"run{i}", seed=seed)
        for i, seed in enumerate((5, 5, 6))
    ]
    weights = [(run_dir / "model" / "model.safetensors").read_bytes() for run_dir in runs]
    assert weights[0] == weights[1] != weights[2]


def test_weight_zero_is_the_baseline_and_says_so(folder_dataset):
    run_dir = run(dataset="folder", data_dir=str(folder_dataset), mfd_weight=0.0)
    line = json.loads((run_dir / "metrics.jsonl").read_text())
    assert line["mfd_loss"] == 0
    assert line["mfd_per_stage"] == [None] * 5


def test_the_moving_average_is_what_is_evaluated_and_saved(folder_dataset):
    still = run(dataset="folder", data_dir=str(folder_dataset), ema_decay=0.999999, epochs=2)
    initial = json.loads((still / "summary.json").read_text())["mean_abs_correlation"]
    assert initial["after"] == pytest.approx(initial["before"], abs=5e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixed_precision_and_stage_choice_run(folder_dataset):
    run_dir = run(dataset="folder", data_dir=str(folder_dataset), mixed_precision="bf16", stages=(0, 2))
    assert len(json.loads((run_dir / "metrics.jsonl").read_text())["mfd_per_stage"]) == 2


def test_stems_follow_the_paper_unless_chosen(folder_dataset, capsys):
    for stem, first_side in (("auto", "16x16"), ("imagenet", "8x8")):
        run(
            model="resnet18_mfd",
            stem=stem,
            dataset="folder",
            data_dir=str(folder_dataset),
            output_dir=stem,
            batch_size=24,
        )
        assert f"0  act1                      64  {first_side}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnt18_mfd"}, "unknown model 'resnt18_mfd'; did you mean resnet18_mfd"),
        ({"model": "resnet18", "stem": "cifar"}, "'resnet18' takes no stem"),
        ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean digits?"),
        ({"dataset": "cifar10"}, "needs a data directory (--data-dir)"),
        ({"dataset": "folder", "data_dir": "/no/such"}, "'/no/such' does not exist"),
        ({"mfd_weight": -1.0}, "weight must be a finite number >= 0, not -1"),
        ({"mfd_weight": float("nan")}, "not nan"),
        ({"stages": (0, 9)}, "stage index 9 is out of range: the model has stages 0 to 4"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"lr": float("nan")}, "--lr must be a finite number above 0, not nan"),
        ({"weight_decay": -1.0}, "--weight-decay must be"),
        ({"ema_decay": 1.0}, "--ema-decay must be in [0, 1), not 1.0"),
        ({"milestones": (5, 3)}, "--milestones must be increasing epochs above 0, not 5 3"),
        ({"batch_size": 5000}, "batch size 5000 is larger than the 1437 training images"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"dataset": "folder", "image_size": 0}, "--image-size must be at least 1"),
        ({"tracker": "wandb"}, "--tracker wandb is not installed"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        train.main(replace(train.Args(model="test_resnet", output_dir="run"), **change))
    assert message in str(exit_.value.code)
    assert "\n" not in str(exit_.value.code)
    assert list(tmp_path.glob("run*")) == []


def test_a_folder_with_another_run_is_refused_and_untouched(folder_dataset):
    run_dir = run(dataset="folder", data_dir=str(folder_dataset))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="holds another run; nothing was changed"):
        run(dataset="folder", data_dir=str(folder_dataset))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_an_undecodable_image_is_named_from_a_decoding_process(folder_dataset):
    broken = folder_dataset / "train" / "bee" / "5.png"
    broken.write_bytes(b"no image")
    result = launch(
        "--dataset", "folder", "--data-dir", folder_dataset, "--model", "test_resnet", "--batch-size", 24,
        "--output-dir", "run", "--workers", 2,
    )  # fmt: skip
    assert result.returncode != 0
    assert f"train.py: error: cannot decode {broken}: not an image" in result.stderr.splitlines()


def test_two_processes_train_as_one_run(folder_dataset):
    result = launch(
        "--dataset", "folder", "--data-dir", folder_dataset, "--model", "test_resnet", "--epochs", 1, "--batch-size", 8,
        "--output-dir", "run", "--workers", 0, processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["count"] == 12
    assert summary["device"].startswith("2 x cpu")
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_default_run_learns_the_digits_and_decorrelates(tmp_path):
    """The README's first command, and the same run without MFD."""
    summaries = {}
    for weight in (1, 0):
        result = launch("--mfd-weight", weight, "--output-dir", f"run{weight}", timeout=600)
        assert result.returncode == 0, result.stderr
        summaries[weight] = json.loads(Path(f"run{weight}/summary.json").read_text())
    assert summaries[1]["top1"] >= 97
    with_mfd, without = (summaries[weight]["mean_abs_correlation"]["after"] for weight in (1, 0))
    assert all(a < b for a, b in zip(with_mfd, without, strict=True))
    assert timm_mfd.create_model("local-dir:run1/model", pretrained=True).num_classes == 10
