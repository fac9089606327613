"""Processes that start where the imports are already done: functions of a test module, scripts, and lines of code."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "sklearn.datasets", "sklearn.model_selection"])
# Their constants are those of the environment in which they were imported.
_IMPORTED_ANEW = ("huggingface_hub", "timm", "timm_mfd", "train")


def start_process(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function which it can import, in the environment of this one."""
    process = CONTEXT.Process(target=_in_environment, args=(dict(os.environ), function, arguments))
    # The server that it is forked from, started by the first call, looks for modules nowhere else.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def start_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[BaseProcess]:
    """Start a function in several processes that find each other by the environment, as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        with mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}):
            processes.append(start_process(function, *arguments))
    return processes


def run_python(
    *words: Any, env: Mapping[str, str] | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Do as `python WORDS` does, with a script or `-c CODE`, without the seconds that importing torch takes.

    Where imports, the end of the interpreter or its launcher are what is tested, start a real one.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        with mock.patch.dict(os.environ, os.environ if env is None else env, clear=True):
            process = start_process(_python, os.getcwd(), [str(word) for word in words], *map(str, outputs))
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words} took more than {timeout} seconds")
        stdout, stderr = (path.read_text() for path in outputs)
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> None:
    """Return as soon as a condition holds; fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_processes(function: Callable[..., Any], processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call `function(rank, processes, *arguments)` in several gloo processes and return what each returned."""
    running = [start_process(_enter, rank, function, processes, str(folder), arguments) for rank in range(processes)]
    for process in running:
        process.join(timeout=600)  # it ends what hangs; busy machines take long
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _in_environment(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _python(folder: str, words: list[str], stdout: str, stderr: str) -> None:
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    for name in [name for name in sys.modules if name.partition(".")[0] in _IMPORTED_ANEW]:
        if not name.startswith("timm_mfd.loss"):  # torch registers an operator once a process
            del sys.modules[name]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _enter(rank: int, function: Callable[..., Any], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, processes, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
