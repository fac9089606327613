"""A run that is stopped, resumed, poisoned or out of disk: what is kept, what is said, and that the bits agree."""

import json
import os
import re
import signal
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
from accelerate.state import AcceleratorState
from processes import CONTEXT, start_process
from safetensors.torch import load_file

import timm_mfd
from timm_mfd import checkpoint, data
from timm_mfd.training import lock, session
from timm_mfd.training import run as run_module
from timm_mfd.training.run_folder import STOPPED, RunFolder

CHECKPOINT = "checkpoint/state.safetensors"


@pytest.fixture(autouse=True)
def _dropout(runs_here, monkeypatch):
    """A model whose every step draws random numbers."""
    real = train.create_model
    monkeypatch.setattr(train, "create_model", lambda *args, **kwargs: real(*args, **kwargs, drop_rate=0.5))


def run(output_dir="run", **kwargs):
    """Digits in 11 steps an epoch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults = {"model": "test_resnet", "epochs": 3, "lr": 0.05, "ema_decay": 0.9, "output_dir": output_dir}
    train.main(train.Args(**(defaults | kwargs)))
    return None if output_dir is None else Path(output_dir)


def outcome(run_dir):
    """All that a run leaves, without what tells its speed or its way."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    for content in (*lines, summary):
        content.pop("images_per_second")
        content.pop("seconds")
    tensors, record = checkpoint.read(run_dir / CHECKPOINT)
    weights = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return (run_dir / "model" / "model.safetensors").read_bytes(), lines, summary, weights, record["before"]


@cache
def uninterrupted(**kwargs):
    """What a run leaves that nothing interrupts; each is trained once."""
    return outcome(run("whole", **kwargs))


def at_step(monkeypatch, wanted, act):
    """Call `act` at the start of a step, counted over the run."""
    real, steps = session.seed_step, []

    def seed_step(*position):
        steps.append(position)
        if len(steps) == wanted:
            act()
        real(*position)

    monkeypatch.setattr(session, "seed_step", seed_step)
    return steps


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 15), (signal.SIGTERM, 143, 22)]
)
def test_a_signal_stops_between_two_steps_and_resuming_gives_the_same_bits(number, code, step, monkeypatch, capsys):
    whole = uninterrupted()
    with monkeypatch.context() as patch:
        steps = at_step(patch, step, send(number))
        with pytest.raises(SystemExit) as exit_:
            run("cut")
    assert exit_.value.code == code
    assert steps == [(0, done // 11, done % 11, 0) for done in range(step)], "seed, epoch, step and process"
    said = capsys.readouterr().err
    assert f"{number.name}: stopped in epoch {(step - 1) // 11 + 1} after step {(step - 1) % 11 + 1} of 11" in said
    assert "resume with --resume cut" in said
    assert not Path("cut/model").exists()
    assert Path("cut", STOPPED).exists()
    steps = at_step(monkeypatch, -1, None)
    run("cut", resume="auto")
    assert not Path("cut", STOPPED).exists()
    assert len(steps) == 33 - step
    assert outcome(Path("cut")) == whole


def test_a_run_stopped_many_times_and_resumed_by_path_gives_the_same_bits(monkeypatch):
    whole = uninterrupted()
    resume = None
    for step in (3, 4, 1, 9, 7):
        with monkeypatch.context() as patch:
            at_step(patch, step, send(signal.SIGTERM))
            with pytest.raises(SystemExit):
                run("cut", resume=resume)
        resume = "cut"
    run(None, resume="cut")
    assert outcome(Path("cut")) == whole


MODERN = {
    "opt": "adamw", "lr": 2e-3, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 1, "mixup": 0.2,
    "cutmix": 1.0, "clip_grad": 1.0, "accumulate": 2, "label_smoothing": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("step", [4, 17])
def test_a_modern_recipe_is_resumed_to_the_bit_too(step, monkeypatch):
    whole = uninterrupted(**MODERN)
    rates = [line["lr"] for line in whole[1]]
    assert rates == [pytest.approx(1e-5), pytest.approx(1.5e-3), pytest.approx(5e-4)]  # the cosine at 1/3 and 2/3
    with monkeypatch.context() as patch:
        at_step(patch, step, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("cut", **MODERN)
    run("cut", resume="auto", **MODERN)
    assert outcome(Path("cut")) == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_images_augmented_by_timm_are_resumed_to_the_bit_with_any_number_of_workers(folder_dataset, monkeypatch):
    options = {
        "dataset": "folder",
        "data_dir": str(folder_dataset),
        "image_size": 12,
        "batch_size": 8,
        "augment": "timm",
    }
    options |= {"aa": "rand-m9-mstd0.5-inc1", "random_erasing": 0.3} | MODERN
    whole = outcome(run("whole", workers=0, **options))
    for step, workers in ((2, 1), (7, 3)):
        folder = f"cut{workers}"
        with monkeypatch.context() as patch:
            at_step(patch, step, send(signal.SIGTERM))
            with pytest.raises(SystemExit):
                run(folder, workers=workers, **options)
        run(folder, resume="auto", workers=workers, **options)
        assert outcome(Path(folder)) == whole


def test_the_parts_of_a_batch_add_up_to_its_gradient(folder_dataset, monkeypatch):
    """Without batch norm, dropout and MFD, which see a part at a time."""
    monkeypatch.setattr(train, "create_model", timm_mfd.create_model)
    options = {"model": "test_convnext", "dataset": "folder", "data_dir": str(folder_dataset), "image_size": 64}
    options |= {"epochs": 1, "batch_size": 8, "mfd_weight": 0.0, "ema_decay": 0.0, "lr": 0.01, "clip_grad": 0.05}
    folders = [run(f"parts{parts}", accumulate=parts, **options) for parts in (1, 4)]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    whole, part = (RunFolder(folder).summary["samples"] for folder in folders)
    assert whole == [4 * samples for samples in part]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_warm_up_step_of_several_processes_is_as_large_as_a_part_of_a_batch_and_leaves_no_trace():
    model, seen = torch.nn.BatchNorm1d(3), []

    def net(images, labels):
        seen.append((len(images), labels.tolist()))
        return {"loss": model(images).sum()}

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = SimpleNamespace(backward=lambda loss: loss.backward())
    args = SimpleNamespace(accumulate=4)
    begun = SimpleNamespace(task=model, net=net, optimizer=optimizer, accelerator=accelerator, args=args)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session.Session._settle(begun, torch.randn(8, 3), torch.arange(8))
    assert seen == [(2, [0, 1])]
    assert begun._is_settled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.weight.grad is None


def test_a_signal_during_the_evaluation_loses_no_step(monkeypatch, capsys):
    whole = uninterrupted()
    evaluations = []
    real = train.EvalLoader.__iter__

    def iterate(self):
        evaluations.append(self)
        if len(evaluations) == 4:  # correlations before training; accuracy and correlations of epoch 1; and now epoch 2
            send(signal.SIGTERM)()
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.EvalLoader, "__iter__", iterate)
        with pytest.raises(SystemExit) as exit_:
            run("cut")
    assert exit_.value.code == 143
    assert "SIGTERM: stopped while evaluating epoch 2; resume with --resume cut" in capsys.readouterr().err
    assert Path("cut", STOPPED).exists()
    steps = at_step(monkeypatch, -1, None)
    run("cut", resume="auto")
    assert len(steps) == 11
    assert outcome(Path("cut")) == whole


def test_the_state_is_written_as_often_as_asked(monkeypatch):
    written = []
    real = checkpoint.write
    monkeypatch.setattr(
        checkpoint, "write", lambda path, tensors, record: written.append((record["epoch"], record["step"]))
        or real(path, tensors, record),
    )  # fmt: skip
    run("usually", epochs=2)
    assert written == [(0, 11), (1, 11)]
    written.clear()
    run("often", epochs=1, checkpoint_minutes=0.0)
    assert written == [(0, step) for step in range(1, 12)]
    written.clear()
    run("seldom", epochs=3, checkpoint_minutes=60.0)
    assert written == [(2, 11)], "at the end, so that the export can be repeated"


def test_a_signal_during_an_evaluation_whose_epoch_is_not_saved_is_met_in_the_next_step(monkeypatch):
    whole = uninterrupted()
    real = train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args: send(signal.SIGTERM)() or real(*args))
        with pytest.raises(SystemExit) as exit_:
            run("cut", checkpoint_minutes=60.0)
    assert exit_.value.code == 143
    assert (checkpoint.read_record(Path("cut") / CHECKPOINT)["step"], len(RunFolder("cut").metrics)) == (1, 1)
    run("cut", resume="auto", checkpoint_minutes=60.0)
    assert outcome(Path("cut")) == whole


def test_a_slim_run_leaves_no_state_and_says_what_would_have_kept_it(capsys):
    run("slim", epochs=1, slim=True)
    assert not (Path("slim") / CHECKPOINT).exists()
    before = {path: path.read_bytes() for path in Path("slim").rglob("*") if path.is_file()}
    run(None, epochs=1, resume="slim")
    assert "slim is finished" in capsys.readouterr().out
    assert train.parse(["--resume", "slim"]).model == "test_resnet"
    for output_dir, epochs in (("slim", 2), ("other", 1), (None, 2)):
        with pytest.raises(SystemExit, match="slim is finished, and --slim deleted its state; .* without --slim"):
            run(output_dir, epochs=epochs, resume="slim", milestones=(1,))
    assert {path: path.read_bytes() for path in Path("slim").rglob("*") if path.is_file()} == before


def test_a_log_is_told_how_far_a_long_epoch_is(monkeypatch, capsys):
    run("short", epochs=1)
    assert "step" not in capsys.readouterr().err
    monkeypatch.setattr(session, "SECONDS_PER_LINE", 0)
    run("long", epochs=2)
    steps = re.findall(r"^epoch (\d), step (\d+) of 11, loss ([\d.]+) = ([\d.]+) \+ MFD ([\d.]+)$",
                       capsys.readouterr().err, re.MULTILINE)  # fmt: skip
    assert [(int(epoch), int(step)) for epoch, step, *_ in steps] == [(e, s) for e in (1, 2) for s in range(1, 12)]
    for *_, loss, criterion, mfd in steps:
        assert float(loss) == pytest.approx(float(criterion) + float(mfd), abs=2e-3)


def hold(folder, held):
    RunFolder(folder).lock()
    held.set()
    time.sleep(60)


def test_auto_begins_a_run_then_goes_on_with_it_and_knows_when_it_is_finished(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(None, resume="auto")
    (folder,) = Path("runs").iterdir()
    lock.release_all()  # the run that was cut off was this process's
    with monkeypatch.context() as patch:
        real = RunFolder.lock
        patch.setattr(RunFolder, "lock", lambda self: real(self, patience=0.2))
        writer = start_process(hold, folder.resolve(), held := CONTEXT.Event())
        assert held.wait(60)
        written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit, match="another process writes into this run; nothing was changed"):
            run(None, resume="auto")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == written
        writer.kill()
        writer.join()
    run(None, resume="auto")
    assert [*Path("runs").iterdir()] == [folder]
    assert f"resuming {folder} after epoch 1, step 5 of 11" in capsys.readouterr().out
    before = (folder / "summary.json").read_bytes()
    run(str(folder), resume="auto")
    assert f"{folder} is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is finished; to train on for more epochs, choose a new --output-dir"):
        run(str(folder), resume="auto", epochs=4, milestones=(1, 2, 3))
    assert (folder / "summary.json").read_bytes() == before
    run(None, resume="auto")
    assert len([*Path("runs").iterdir()]) == 2, "a finished run is not gone on with"


def test_a_finished_run_goes_on_in_a_new_folder_as_if_it_had_been_longer():
    whole = uninterrupted(epochs=4, milestones=(1,))
    short = run("short", epochs=2, milestones=(1,))
    before = outcome(short)
    run("long", epochs=4, milestones=(1,), resume="short")
    assert outcome(Path("long")) == whole
    assert outcome(short) == before
    run("copy", epochs=2, milestones=(1,), resume="short")
    assert outcome(Path("copy")) == before


def test_what_an_interrupted_export_left_is_replaced(monkeypatch):
    whole = uninterrupted(epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr("timm_mfd.figures.training_curves", lambda *_: send(signal.SIGINT)())
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            run("cut", epochs=1)
    (Path("cut/model/model.safetensors")).write_text("half")
    Path("cut/model.partial").mkdir()
    run("cut", epochs=1, resume="auto")
    assert outcome(Path("cut")) == whole
    assert not Path("cut/model.partial").exists()


def poison(monkeypatch, steps, value=float("nan")):
    """Put a bad pixel into the batches of some steps of the first epoch; each is poisoned once."""
    real, left = data.TrainLoader.epoch, set(steps)

    def epoch(self, epoch, start=0):
        for step, (images, labels) in enumerate(real(self, epoch, start), start):
            if epoch == 0 and step in left:
                left.remove(step)
                images = images.clone()
                images[0, 0, 0, 0] = value
            yield images, labels

    monkeypatch.setattr(data.TrainLoader, "epoch", epoch)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_stage_step_and_images(monkeypatch):
    poison(monkeypatch, [6])
    with pytest.raises(SystemExit) as exit_:
        run(checkpoint_minutes=0.0)
    message = str(exit_.value.code)
    assert "error: not finite in step 7 of epoch 1: the MFD loss of stage 0 (nan), the MFD loss of stage 1 (" in message
    assert "the criterion (nan); the images of the batch are in run/nonfinite.json" in message
    assert "run/checkpoint/state.safetensors keeps the last good state" in message
    assert "\n" not in message
    details = json.loads(Path("run/nonfinite.json").read_text())
    loader = data.TrainLoader(data.load_dataset("digits"), 128, seed=0, device=torch.device("cpu"))
    order = data.augmentation.plan_epoch(1437, seed=0, epoch=0, pad=1, flip=False).order
    assert details["image_indices"] == order[6 * 128 : 7 * 128].tolist() == loader.batch_indices(0, 6)
    assert (details["epoch"], details["step"], details["criterion_loss"]) == (1, 7, "nan")
    tensors, record = checkpoint.read(Path("run") / CHECKPOINT)
    assert (record["epoch"], record["step"]) == (0, 6)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not Path("run/model").exists()


def test_the_run_goes_on_from_the_last_good_state_as_if_nothing_had_happened(monkeypatch):
    whole = uninterrupted()
    with monkeypatch.context() as patch:
        poison(patch, [6])
        with pytest.raises(SystemExit):
            run("cut", checkpoint_minutes=0.0)
    run("cut", resume="auto")
    assert outcome(Path("cut")) == whole


def test_weights_that_are_not_finite_are_never_saved(monkeypatch):
    """The loss is finite, its gradient is not."""
    real = train.MFDClassificationTask.forward

    def forward(self, images, labels):
        out = real(self, images, labels)
        weight = self.model.fc.weight
        # The square root of an exact 0 has an infinite slope, times 0 it is no number.
        return out | {"loss": out["loss"] + 0 * (weight * 0).sum().sqrt()}

    monkeypatch.setattr(train.MFDClassificationTask, "forward", forward)
    with pytest.raises(
        SystemExit, match="not finite after step 1 of epoch 1: a weight; there is no checkpoint yet; try a lower"
    ):
        run(checkpoint_minutes=0.0)
    assert not (Path("run") / CHECKPOINT).exists()


def test_a_learning_rate_that_diverges_ends_in_one_line():
    with pytest.raises(SystemExit, match=r"not finite in step \d+ of epoch 1: .*; try a lower --lr"):
        run(lr=1e30)
    assert not Path("run/model").exists()


def test_a_model_that_learned_nothing_is_called_so(capsys):
    run_dir = run(lr=1e-12, epochs=1, ema_decay=0.0)
    *_, warning = json.loads((run_dir / "summary.json").read_text())["warnings"]
    assert "the model is constant" in warning or "learned nothing" in warning
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_disk_that_is_full_for_a_while_costs_no_step_and_keeps_the_last_checkpoint(monkeypatch, capsys):
    whole = uninterrupted()
    real, calls = checkpoint.write, []

    def write(path, tensors, record):
        calls.append((record["epoch"], record["step"]))
        partial = path.with_name(f"{path.name}.partial")
        if 4 <= len(calls) <= 6:
            partial.symlink_to("/dev/full")  # every write fails as on a full disk
        real(path, tensors, record)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write)
        at_step(patch, 6, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("cut", checkpoint_minutes=0.0)
    said = capsys.readouterr().err
    assert said.count("No space left on device; the previous one is kept, and training goes on") == 3
    assert "resume with --resume cut, with an older checkpoint" in said
    assert not Path("cut", STOPPED).exists(), "nobody should start it again and again"
    assert checkpoint.read(Path("cut") / CHECKPOINT).record["step"] == 3
    run("cut", resume="auto", checkpoint_minutes=0.0)
    assert outcome(Path("cut")) == whole


def train_as_a_job(folder, said):
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    data = {"dataset": "folder", "data_dir": "images", "loader": "workers", "batch_size": 4}
    run("cut", epochs=500, lr=0.01, ema_decay=0.0, resume="auto", **data)


def test_a_signal_to_the_whole_job_loses_no_step_when_decoding_processes_run(folder_dataset):
    """As systemd, slurm and `kill -- -PGID` send it."""
    for number, code in ((signal.SIGUSR1, 138), (signal.SIGINT, 130)):
        process = start_process(train_as_a_job, folder_dataset.parent, f"{number.name}.txt")
        written = (Path("cut") / CHECKPOINT).stat().st_mtime_ns if (Path("cut") / CHECKPOINT).exists() else 0
        while not ((Path("cut") / CHECKPOINT).exists() and (Path("cut") / CHECKPOINT).stat().st_mtime_ns > written):
            assert process.is_alive()
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(process.pid, number)
        process.join(60)
        said = Path(f"{number.name}.txt").read_text()
        assert process.exitcode == code, said
        assert f"{number.name}: stopped" in said
        assert "Traceback" not in said


def test_arguments_versions_commit_and_device_are_on_record():
    content = json.loads((run(epochs=1) / "args.json").read_text())
    assert content["model"] == "test_resnet"
    assert content["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"device", "processes", "git_commit", "python", "system"} <= content["environment"].keys()
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["samples"] == [2048, 512, 128, 128, 128]
    assert summary["noise_floor"][0] == 1 / 2047


def test_a_run_goes_on_under_its_own_arguments_unless_others_are_given(monkeypatch, capsys):
    whole = uninterrupted()
    with monkeypatch.context() as patch:
        at_step(patch, 14, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("cut", resume="auto")
    first = json.loads(Path("cut/args.json").read_text())
    args = train.parse(["--resume", "cut", "--checkpoint-minutes", "9", "--workers", "0"])
    assert (args.model, args.lr, args.ema_decay, args.output_dir) == ("test_resnet", 0.05, 0.9, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(args)
    assert "note: --workers 0 (was 2), --checkpoint-minutes 9.0 (was None)" in capsys.readouterr().out
    assert outcome(Path("cut")) == whole
    args = json.loads(Path("cut/args.json").read_text())
    assert (args["checkpoint_minutes"], args["history"]) == (9.0, [first])
    assert train.parse(["--resume", "auto", "--output-dir", "new", "--lr", "0.3"]).lr == 0.3, "nothing to go on with"


def test_a_run_that_failed_before_its_first_checkpoint_begins_again_with_auto():
    with pytest.raises(SystemExit, match="not finite"):
        run(lr=1e30)
    assert Path("run/nonfinite.json").exists()
    with pytest.raises(SystemExit, match="holds another run"):
        run(epochs=1)
    run(epochs=1, resume="auto")
    assert not Path("run/nonfinite.json").exists()


def test_a_run_that_fails_has_no_mark_of_a_stop_not_even_of_an_earlier_one(monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("cut")
    assert Path("cut", STOPPED).exists()
    with pytest.raises(SystemExit, match="data set is not the one"), monkeypatch.context() as patch:
        patch.setattr(data.ImageData, "identity", lambda _: "other")
        run("cut", resume="auto")
    assert not Path("cut", STOPPED).exists()


def test_a_run_whose_state_could_not_be_written_has_no_mark_when_its_evaluation_is_stopped(monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    real = train.EvalLoader.__iter__
    monkeypatch.setattr(train.EvalLoader, "__iter__", lambda self: send(signal.SIGTERM)() or real(self))
    monkeypatch.setattr(run_module.Run, "correlations", lambda *_: [0.0] * 5)
    with pytest.raises(SystemExit) as exit_:
        run("cut", epochs=1)
    assert exit_.value.code == 143
    assert "stopped while evaluating epoch 1" in capsys.readouterr().err
    assert not Path("cut", STOPPED).exists()


def test_a_run_that_is_stopped_before_it_has_begun_has_a_mark_where_its_folder_is_there(monkeypatch):
    Path("cut").mkdir()
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    for folder in ("cut", "other", "none"):
        with pytest.raises(SystemExit) as exit_, monkeypatch.context() as patch:
            patch.setattr(train, "create_model", lambda *_, **__: send(signal.SIGTERM)())
            run(folder, resume="auto")
        assert exit_.value.code == 143
    assert [path.name for path in Path("cut").iterdir()] == [STOPPED]
    assert [path.name for path in Path("other").iterdir()] == ["notes.txt"]
    assert not Path("none").exists()
    assert outcome(run("cut", resume="auto", epochs=1)) == uninterrupted(epochs=1)


def test_too_little_space_is_said_before_the_first_step(monkeypatch, capsys):
    usage = run_module.shutil.disk_usage(".")
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    run_dir = run(epochs=1)
    (warning,) = re.findall("warning: (the run needs about .*)", capsys.readouterr().out)
    assert warning.endswith("MiB in run, 1 MiB are free")
    needed = int(re.search(r"about (\d+) MiB", warning)[1]) << 20
    model, state = (run_dir / name for name in ("model/model.safetensors", CHECKPOINT))
    assert abs(needed - 2 * state.stat().st_size - model.stat().st_size) < 2 << 20


def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_export_can_be_repeated(monkeypatch):
    whole = uninterrupted(epochs=1)

    def full(*_args, **_kwargs):
        raise run_module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_pretrained", full)
        with pytest.raises(
            SystemExit, match="cannot write the model: .*No space left on device .*once it can be, --resume cut"
        ):
            run("cut", epochs=1)
    run("cut", epochs=1, resume="auto")
    assert outcome(Path("cut")) == whole


def test_deterministic_kernels_are_on_when_asked_for(monkeypatch):
    seen = []
    at_step(monkeypatch, 1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    try:
        run(epochs=1, deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True]
