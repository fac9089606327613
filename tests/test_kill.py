"""The promise of a run: killed at any moment, however often, it ends with the bits of a run that never was."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

KILLS = 20
CONTEXT = multiprocessing.get_context("forkserver")  # each process starts where the imports are done


def train_in(folder, rank, processes, port):
    """One process of `train.py --resume auto`."""
    import train
    from train import Args, main

    os.chdir(folder)
    log = os.open(f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        )  # fmt: skip
        train.torch.set_num_threads(1)
    main(
        Args(
            model="test_resnet", epochs=24, batch_size=256, lr=0.05, ema_decay=0.9, checkpoint_minutes=0.0,
            output_dir="run", resume="auto",
        )
    )  # fmt: skip


def start(folder, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=train_in, args=(str(folder), rank, processes, port)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def finish(folder, processes):
    running = start(folder, processes)
    for process in running:
        process.join(timeout=120)
        assert process.exitcode == 0, (folder / "log0.txt").read_text()[-2000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"]
    return (folder / "run" / "model" / "model.safetensors").read_bytes(), lines


@pytest.fixture(scope="module", autouse=True)
def _imports_are_done_once():
    CONTEXT.set_forkserver_preload(["train", "sklearn.datasets", "sklearn.model_selection"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_twenty_random_moments_ends_with_the_bits_of_one_never_interrupted(processes, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    began = time.monotonic()
    expected = finish(whole, processes)
    length = time.monotonic() - began

    chance, partial = random.Random(processes), cut / "run" / "checkpoint" / "state.safetensors.partial"
    in_a_write = 0
    for kill in range(KILLS):
        running = start(cut, processes)
        # Any moment: while it starts, trains, evaluates; for every second kill, a moment in which it writes.
        until = time.monotonic() + chance.uniform(0, 0.6) * length
        while time.monotonic() < until and all(process.is_alive() for process in running):
            time.sleep(0.001)
        while kill % 2 and not partial.exists() and all(process.is_alive() for process in running):
            pass
        assert all(process.is_alive() for process in running), "the run ended before it was killed often enough"
        chance.shuffle(running)
        for process in running:
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(chance.choice((0, 0.01)))
        for process in running:
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 1)  # 1: it noticed that the other one was gone
        in_a_write += partial.exists()
    assert finish(cut, processes) == expected
    assert in_a_write >= KILLS // 5, "too few kills hit a write to prove anything"
    assert len(list(Path(cut / "run" / "checkpoint").iterdir())) == 2, "the lock and one checkpoint"
