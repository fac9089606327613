"""Runs side by side, each in a process of its own: started, watched and stopped together."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .interruption import StopSignals
from .launch import cpu_cores, end_with_parent

_PAUSE = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Job:
    """A command whose output goes to a file.

    Attributes:
        name: What to call it.
        command: The command line.
        log: Where its output goes; it is appended.
    """

    name: str
    command: tuple[str, ...]
    log: Path

    def log_size(self) -> int:
        """Return how long the log is."""
        return self.log.stat().st_size if self.log.is_file() else 0

    def last_words(self, start: int = 0) -> str:
        """Return the last line of the log that names an error, or else the last one that says something.

        Args:
            start: Where to begin reading, in bytes.
        """
        text = self.log.read_bytes()[start:].decode(errors="replace") if self.log.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if ": error: " in line]
        return (errors or lines or ["no output"])[-1]


class Ended(NamedTuple):
    """A job that ended.

    Attributes:
        job: The job.
        code: Its exit code; 0 if all is well.
        words: Why it ended, if not.
    """

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
    waiting = deque(jobs)
    parallel = min(parallel, len(jobs))
    free = deque(range(parallel))
    running: dict[int, tuple[Job, subprocess.Popen[bytes], int]] = {}
    told = False
    try:
        while waiting or running:
            while waiting and free and not stop.received:
                job, size = waiting[0], waiting.popleft().log_size()
                try:
                    running[free[0]] = job, _start(job, free[0], parallel), size
                except OSError as error:
                    yield Ended(job, 1, str(error))
                    continue
                free.popleft()
                started(job)
            if stop.received:
                waiting.clear()
                if not told:
                    for _, process, _ in running.values():
                        process.terminate()
                    told = True
            for slot, (job, process, size) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    free.append(slot)
                    killed = f"killed by {signal.Signals(-code).name} after: " if code < 0 else ""
                    yield Ended(job, code, killed + job.last_words(size))
            watch()
            time.sleep(_PAUSE)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.wait()


def _start(job: Job, slot: int, parallel: int) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    gpus = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // parallel)))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=end_with_parent,
        )
