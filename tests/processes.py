"""Functions of a test module in processes of their own, which start where the imports are already done."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train", "sklearn.datasets", "sklearn.model_selection"])


def start_process(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function which it can import."""
    process = _CONTEXT.Process(target=function, args=arguments)
    # The server that it is forked from, started by the first call, looks for modules nowhere else.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> None:
    """Return as soon as a condition holds; fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_processes(function: Callable[..., Any], processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call `function(rank, processes, *arguments)` in several gloo processes and return what each returned."""
    running = [start_process(_enter, rank, function, processes, str(folder), arguments) for rank in range(processes)]
    for process in running:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _enter(rank: int, function: Callable[..., Any], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, processes, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
