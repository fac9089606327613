"""The training script as users start it, and what it refuses."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import train
from accelerate.state import AcceleratorState
from processes import start_ranks

import timm_mfd
from timm_mfd.data import load_dataset
from timm_mfd.figures import training_curves

SCRIPT = Path(train.__file__)


pytestmark = pytest.mark.usefixtures("runs_here")


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


def launch(*flags, processes=1, timeout=300):
    # `accelerate launch` starts several processes on GPUs only; on the CPU it is torchrun that does.
    launcher = ["accelerate.commands.launch"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *map(str, flags)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_a_run_leaves_the_promised_folder_and_a_model_that_loads(folder_dataset, capsys, monkeypatch):
    monkeypatch.setattr("timm_mfd.figures.training_curves", training_curves)  # which other runs here do without
    run_dir = run(dataset="folder", data_dir=str(folder_dataset), epochs=2, milestones=(1,))
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "args.json", "checkpoint", "curves.png", "metrics.jsonl", "model", "summary.json",
    ]  # fmt: skip
    files = ["lease", "lock", "state.safetensors"]  # the first one is this process's, until it ends
    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == files
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["dataset"], args["epochs"], args["mfd_weight"]) == ("folder", 2, 1.0)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == [0.01, pytest.approx(0.001)]
    for line in lines:
        assert set(line) == {
            "epoch", "top1", "top5", "loss", "criterion_loss", "mfd_loss", "mfd_per_stage", "lr", "images_per_second",
            "seconds", "mean_abs_correlation",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(line["criterion_loss"] + line["mfd_loss"], abs=1e-5)
        assert line["mfd_loss"] == pytest.approx(sum(line["mfd_per_stage"]), abs=1e-5)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["top1"], summary["count"], summary["split"]) == (lines[-1]["top1"], 12, "val")
    after = summary["mean_abs_correlation"]["after"]
    assert lines[-1]["mean_abs_correlation"] == pytest.approx(after, abs=1e-5)  # of held-out images, every epoch
    assert lines[0]["mean_abs_correlation"] != lines[1]["mean_abs_correlation"]
    assert len(summary["mean_abs_correlation"]["before"]) == len(summary["mean_abs_correlation"]["after"]) == 5

    loaded = timm.create_model(f"local-dir:{run_dir}/model", pretrained=True).eval()
    data = load_dataset("folder", folder_dataset)
    hits = 0
    for images, labels in train.EvalLoader(data, 4, device=torch.device("cpu")):
        hits += int((loaded(images).argmax(1) == labels).sum())
    assert 100 * hits / 12 == pytest.approx(summary["top1"])

    shown = capsys.readouterr().out
    assert "stage  module" in shown
    assert "mean |r|   at the start   at the end of training (on 12 held-out images)" in shown
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
    train.set_seed(0)
    start = dict(timm.create_model("test_resnet", num_classes=3).named_parameters())
    for name, value in timm.create_model(f"local-dir:{still}/model", pretrained=True).named_parameters():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-5, msg=name)


def test_mixed_precision_rounds_the_network_and_stages_keep_their_numbers(folder_dataset, capsys, monkeypatch):
    losses, drawn, tracked = [], [], []
    monkeypatch.setattr("timm_mfd.figures.training_curves", lambda *arguments: drawn.append(arguments[3]))
    monkeypatch.setattr("timm_mfd.training.session.Tracker.log", lambda _, values, step: tracked.append(values))
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run_dir = run(
            dataset="folder",
            data_dir=str(folder_dataset),
            image_size=64,
            mixed_precision=precision,
            stages=(0, 2),
            output_dir=precision,
        )
        losses.append(json.loads((run_dir / "metrics.jsonl").read_text()))
        assert json.loads((run_dir / "summary.json").read_text())["stages"] == [0, 2]
    assert drawn == [[0, 2], [0, 2]]
    assert len(tracked) == len(losses) == 2
    for line, values in zip(losses, tracked, strict=True):
        named = {name: value for name, value in values.items() if name.startswith("mfd_stage")}
        assert named == dict(zip(("mfd_stage0", "mfd_stage2"), line["mfd_per_stage"], strict=True))
    assert losses[0]["criterion_loss"] != losses[1]["criterion_loss"]
    assert losses[0]["criterion_loss"] == pytest.approx(losses[1]["criterion_loss"], rel=0.05)
    shown = capsys.readouterr().out
    assert "    2  layer2 " in shown
    assert shown.count("warning: bf16 on a CPU") == 1


def test_optimizer_settings_reach_the_weights(folder_dataset):
    """SGD with momentum 0.9 and the given decay, against a loop of its own."""
    run_dir = run(dataset="folder", data_dir=str(folder_dataset), mfd_weight=0.5, weight_decay=0.01, epochs=1)
    trained = timm.create_model(f"local-dir:{run_dir}/model", pretrained=True).state_dict()
    torch.manual_seed(0)
    train.set_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last).train()
    data = load_dataset("folder", folder_dataset)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for images, labels in train.TrainLoader(data, 8, seed=0, device=torch.device("cpu")).epoch(0):
        out = timm_mfd.forward_stages(model, images)
        loss = torch.nn.functional.cross_entropy(out.logits, labels) + 0.5 * sum(map(timm_mfd.mfd_loss, out.stages))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 0.01 * p
                p -= 0.01 * velocity[name]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_saved_model_can_be_trained_further(folder_dataset):
    first = run(dataset="folder", data_dir=str(folder_dataset))
    AcceleratorState._reset_state(reset_partial_state=True)
    second = run(
        model=f"local-dir:{first}/model", pretrained=True, lr=1e-9, dataset="folder", data_dir=str(folder_dataset),
        output_dir="second",
    )  # fmt: skip
    a, b = (
        timm.create_model(f"local-dir:{path}/model", pretrained=True).state_dict()["fc.weight"]
        for path in (first, second)
    )
    torch.testing.assert_close(a, b)


def test_a_transformer_is_built_for_the_size_of_the_images_and_loads_again(folder_dataset):
    run_dir = run(model="test_vit", dataset="folder", data_dir=str(folder_dataset), image_size=32)
    assert timm.create_model(f"local-dir:{run_dir}/model", pretrained=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


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


def test_a_folder_with_another_run_is_refused_and_untouched(folder_dataset):
    run_dir = run(dataset="folder", data_dir=str(folder_dataset))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(
        SystemExit, match="holds another run; nothing was changed, choose a new folder or resume it with --resume auto"
    ):
        run(dataset="folder", data_dir=str(folder_dataset))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_an_undecodable_image_is_named_from_a_decoding_process(folder_dataset):
    broken = folder_dataset / "train" / "bee" / "5.png"
    broken.write_bytes(b"no image")
    result = launch(
        "--loader", "workers",
        "--dataset", "folder", "--data-dir", folder_dataset, "--model", "test_resnet", "--batch-size", 24,
        "--output-dir", "run", "--workers", 2,
    )  # fmt: skip
    assert result.returncode != 0
    assert f"\ntrain.py: error: cannot decode {broken}: not an image" in f"\n{result.stderr}"


def train_convnext(folder, **kwargs):
    """test_convnext has no batch norm, whose statistics are those of each process."""
    os.chdir(folder)
    data = {"dataset": "folder", "data_dir": "images", "image_size": 64}
    run(model="test_convnext", epochs=2, lr=0.05, ema_decay=0.5, **data, **kwargs)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_give_the_weights_of_one_with_the_same_batches(parts, folder_dataset):
    weights, summaries = [], []
    in_parts = partial(train_convnext, accumulate=parts)
    in_parts(folder_dataset.parent, output_dir="run1")
    for process in start_ranks(partial(in_parts, output_dir="run2"), 2, folder_dataset.parent):
        process.join(120)
        assert process.exitcode == 0
    for processes in (1, 2):
        summaries.append(json.loads(Path(f"run{processes}/summary.json").read_text()))
        weights.append(timm.create_model(f"local-dir:run{processes}/model", pretrained=True).state_dict())
    assert summaries[1]["device"].startswith("2 x cpu")
    assert summaries[0]["count"] == summaries[1]["count"] == 12
    torch.manual_seed(0)
    train.set_seed(0)
    start = timm.create_model("test_convnext", num_classes=3).state_dict()
    for key, value in weights[0].items():
        moved = (value - start[key]).norm()
        assert (weights[1][key] - value).norm() <= 1e-3 * moved + 1e-6, key


def train_digits(folder):
    os.chdir(folder)
    run(batch_size=64, lr=0.05, ema_decay=0.5)


@pytest.mark.parametrize("how", ["ranks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_reported_accuracy_is_that_of_the_saved_model_with_two_processes(how, tmp_path):
    """Torchrun costs 20 s; tests/test_launch.py starts it with a script that imports less."""
    if how == "ranks":
        for process in start_ranks(train_digits, 2, tmp_path):
            process.join(120)
            assert process.exitcode == 0
    else:
        flags = ["--model", "test_resnet", "--epochs", 1, "--batch-size", 64, "--output-dir", "run", "--lr", 0.05]
        flags += ["--ema-decay", 0.5]
        result = launch(*flags, processes=2)
        assert result.returncode == 0, result.stderr
    summary = json.loads(Path("run/summary.json").read_text())
    model = timm.create_model("local-dir:run/model", pretrained=True).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        loader = train.EvalLoader(load_dataset("digits"), 256, device=torch.device("cpu"))
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    assert summary["top1"] == pytest.approx(100 * hits / 360)
    if how == "torchrun":  # the others end without what Python does at exit
        assert not Path("run/checkpoint/lease").exists(), "another node would wait for it"


@pytest.mark.slow
def test_two_nodes_train_to_the_weights_of_two_processes_of_one(tmp_path):
    """Two agents of torchrun that meet, one process each, as `srun torchrun` starts them."""
    flags = ["--model", "test_resnet", "--epochs", "2", "--lr", "0.05"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment["OMP_NUM_THREADS"] = "2"  # not 1, which means that nobody chose
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    agent = [*torchrun, *meet, "--nproc-per-node", "1", str(SCRIPT), *flags, "--output-dir", "nodes"]
    agents = [subprocess.Popen(agent, env=environment) for _ in range(2)]
    assert [process.wait(900) for process in agents] == [0, 0]
    alone = [*torchrun, "--standalone", "--nproc-per-node", "2", str(SCRIPT), *flags, "--output-dir", "node"]
    subprocess.run(alone, env=environment, check=True, timeout=900)
    weights = [Path(run, "model", "model.safetensors").read_bytes() for run in ("node", "nodes")]
    assert weights[0] == weights[1]
    assert json.loads(Path("nodes/summary.json").read_text())["device"].startswith("2 x cpu")


def test_an_exported_arcface_model_answers_as_the_training_head_on_all_test_images(monkeypatch):
    tasks = []
    real = train.build_task
    monkeypatch.setattr(train, "build_task", lambda *args: tasks.append(real(*args)) or tasks[-1])
    run_dir = run(criterion="arcface", epochs=2, batch_size=64, lr=0.05)
    loaded = timm.create_model(f"local-dir:{run_dir}/model", pretrained=True).eval()
    loaded = loaded.to(memory_format=torch.channels_last)
    head = tasks[0].eval()
    answers, hits = set(), 0
    with torch.no_grad():
        for images, labels in train.EvalLoader(load_dataset("digits"), 256, device=torch.device("cpu")):
            trained, folded = head(images, labels)["output"].argmax(1), loaded(images).argmax(1)
            assert torch.equal(trained, folded)
            answers |= set(trained.tolist())
            hits += int((trained == labels).sum())
    assert len(answers) > 3
    assert json.loads((run_dir / "summary.json").read_text())["top1"] == pytest.approx(100 * hits / 360)


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


def test_a_compiled_run_is_measured_and_saved_like_any_other(monkeypatch):
    """With a backend that compiles nothing; inductor is slow, and the graph itself is tested elsewhere."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend="eager", dynamic=False))
    run_dir = run(compile=True, epochs=1, ema_decay=0.5, batch_size=360)
    line = json.loads((run_dir / "metrics.jsonl").read_text())
    assert len(line["mean_abs_correlation"]) == 5
    timm.create_model(f"local-dir:{run_dir}/model", pretrained=True)
