"""Several runs at a time on this one machine, each in a process of its own; a cluster has Slurm (`slurm.py`)."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .interruption import StopSignals
from .launch import cpu_cores, end_with_parent

_PAUSE = 0.2  # seconds between two looks at the processes


class Job(NamedTuple):
    """A command line with a name; its output is appended to a log."""

    name: str
    command: tuple[str, ...]
    log: Path


class Ended(NamedTuple):
    """A job that ended, its exit code, and the last words of this attempt: an error, if one was named."""

    job: Job
    code: int
    words: str


def run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    stop: StopSignals,
    watch: Callable[[], None] = lambda: None,
    started: Callable[[Job], None] = lambda job: None,
) -> Iterator[Ended]:
    """Run jobs, several at a time, each on one of the GPUs in turn and on its share of the CPU cores.

    After a signal no job is started, and those that run are asked to end with SIGTERM.

    Args:
        jobs: What to run, in this order.
        parallel: How many at a time.
        stop: Notes the signals.
        watch: Called a few times a second.
        started: Called with each job that was started.

    Yields:
        Each job as soon as it ends, also one that could not be started. After a signal: those that it ended, too.
    """
    waiting, parallel = deque(jobs), min(parallel, len(jobs))
    free = deque(range(parallel))
    running: dict[int, tuple[Job, subprocess.Popen[bytes], int]] = {}
    told = False
    try:
        while waiting or running:
            if stop.received and not told:
                told = True
                waiting.clear()
                for _, process, _ in running.values():
                    process.terminate()
            while waiting and free:
                job = waiting.popleft()
                try:
                    running[free[0]] = job, *_start(job, free[0], parallel)
                except OSError as error:
                    yield Ended(job, 1, str(error))
                    continue
                free.popleft()
                started(job)
            for slot, (job, process, begin) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    free.append(slot)
                    killed = f"killed by {signal.Signals(-code).name} after: " if code < 0 else ""
                    yield Ended(job, code, killed + _last_words(job.log, begin))
            watch()
            time.sleep(_PAUSE)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.wait()


def _start(job: Job, slot: int, parallel: int) -> "tuple[subprocess.Popen[bytes], int]":
    """Return the process, and where its words begin in the log."""
    environment = {"OMP_NUM_THREADS": str(max(1, cpu_cores() // parallel)), **os.environ}
    if count := torch.cuda.device_count():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        begin = log.tell()  # read here: the process moves the same position
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    return process, begin


def _last_words(log: Path, begin: int) -> str:
    lines = [line.strip() for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if ": error: " in line] or lines or ["no output"])[-1]
