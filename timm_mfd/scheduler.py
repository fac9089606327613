"""Runs side by side, each in a process of its own: started, watched and stopped together."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def last_words(self) -> str:
        """Return the last line of the log that says something."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    stop: StopSignals,
    watch: Callable[[], None] = lambda: None,
    started: Callable[[Job], None] = lambda job: None,
) -> Iterator[tuple[Job, int]]:
    """Run jobs, several at a time, each on one of the GPUs in turn and on its share of the CPU cores.

    After a signal no job is started, and those that run are asked to end with SIGTERM.

    Args:
        jobs: What to run, in this order.
        parallel: How many at a time.
        stop: Notes the signals.
        watch: Called a few times a second.
        started: Called with each job that was started.

    Yields:
        Each job that ended, with its exit code, as soon as it ends. After a signal: those that it ended, too.
    """
    waiting = deque(jobs)
    free = deque(range(min(parallel, len(jobs))))
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    told = False
    try:
        while waiting or running:
            while waiting and free and not stop.received:
                slot = free.popleft()
                job = waiting.popleft()
                running[slot] = job, _start(job, slot, parallel)
                started(job)
            if stop.received:
                waiting.clear()
                if not told:
                    for _, process in running.values():
                        process.terminate()
                    told = True
            for slot, (job, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    free.append(slot)
                    yield job, code
            watch()
            time.sleep(_PAUSE)
    finally:
        for _, process in running.values():
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
