"""The promise of a run: killed at any moment, however often, it ends with the bits of a run that never was."""

import json
import os
import random
import signal
import time

import pytest
from processes import start_process, start_ranks

from timm_mfd.training.run_folder import STOPPED

MODERN = {
    "opt": "adamw", "lr": 2e-3, "schedule": "cosine", "warmup_epochs": 1, "augment": "timm", "aa": "rand-m5",
    "workers": 1, "mixup": 0.2, "clip_grad": 1.0, "accumulate": 2,
}  # fmt: skip


def train_in(folder, epochs, options):
    """One process of `train.py --resume auto`."""
    from train import Args, main

    os.chdir(folder)
    log = os.open(f"log{os.environ.get('RANK', '0')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    places = {"output_dir": "run", "resume": "auto", "checkpoint_minutes": 0.0}
    main(
        Args(
            **{"model": "test_resnet", "epochs": epochs, "batch_size": 240, "lr": 0.05, "ema_decay": 0.9}
            | places
            | options
        )
    )


def start(folder, processes, epochs, options):
    return (
        [start_process(train_in, folder, epochs, options)]
        if processes == 1
        else start_ranks(train_in, processes, folder, epochs, options)
    )


def finish(folder, processes, epochs, options):
    running = start(folder, processes, epochs, options)
    for process in running:
        process.join(timeout=300)
        assert process.exitcode == 0, (folder / "log0.txt").read_text()[-2000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"], line["seconds"]
    return (folder / "run" / "model" / "model.safetensors").read_bytes(), lines


def stopped_in_a_write(process, partial):
    if not partial.exists():
        return False
    os.kill(process.pid, signal.SIGSTOP)
    if partial.exists():
        return True
    os.kill(process.pid, signal.SIGCONT)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number", "rank"),
    [(1, signal.SIGUSR1, 0), (1, signal.SIGUSR2, 0), (2, signal.SIGUSR1, 0), (2, signal.SIGUSR2, 1)],
)
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_leaves_a_mark(processes, number, rank, tmp_path):
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    expected = finish(folders[0], processes, 3, {})
    run = folders[1] / "run"
    running = start(folders[1], processes, 3, {})
    until((run / "checkpoint" / "state.safetensors").exists, running)
    os.kill(running[rank].pid, number)
    for process in running:
        process.join(timeout=120)
        assert process.exitcode == 128 + number, (folders[1] / "log0.txt").read_text()[-2000:]
    assert f"{number.name}: stopped in epoch" in (run / STOPPED).read_text()
    assert finish(folders[1], processes, 3, {}) == expected
    assert not (run / STOPPED).exists()


def until(condition, running):
    deadline = time.monotonic() + 60
    while not condition() and all(process.is_alive() for process in running) and time.monotonic() < deadline:
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("processes", "kills", "options"),
    [
        (1, 3, {}),
        pytest.param(1, 20, {}, marks=pytest.mark.slow),
        pytest.param(2, 3, {}, marks=pytest.mark.slow),
        pytest.param(2, 20, {}, marks=pytest.mark.slow),
        pytest.param(3, 4, {}, marks=pytest.mark.slow),
        pytest.param(1, 4, MODERN, marks=pytest.mark.slow, id="modern"),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_never_interrupted(
    processes, kills, options, tmp_path
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    epochs = 3 + round(1.3 * kills)
    expected = finish(whole, processes, epochs, options)
    checkpoint = cut / "run" / "checkpoint" / "state.safetensors"
    partial = checkpoint.with_name(f"{checkpoint.name}.partial")
    chance = random.Random(processes)
    for kill in range(kills):
        running = start(cut, processes, epochs, options)

        # Any moment: while it starts, after some steps or evaluations, and in the middle of a write.
        if kill % 4 == 0:
            time.sleep(chance.uniform(0, 0.5) * processes)
        else:
            for _ in range(chance.randint(1, 9)):
                written = checkpoint.stat().st_ino if checkpoint.exists() else None
                until(lambda: checkpoint.exists() and checkpoint.stat().st_ino != written, running)  # noqa: B023
            if kill % 4 == 1:
                time.sleep(chance.uniform(0, 0.1))
            else:
                writer = running[0]
                until(lambda: stopped_in_a_write(writer, partial), running)  # noqa: B023
                assert partial.exists()
        assert all(process.is_alive() for process in running), (cut / "log0.txt").read_text()[-2000:]
        chance.shuffle(running)
        for process in running:
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(chance.choice((0, 0.01)))
        for process in running:
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 1)  # 1: it noticed that the other one was gone
    assert finish(cut, processes, epochs, options) == expected
    # These processes end without what Python does at exit, so the last one's lease is still there.
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["lease", "lock", checkpoint.name]
