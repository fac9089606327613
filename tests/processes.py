"""Processes that start where the imports are already done: functions of a test module, scripts, and lines of code."""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["train", "reproduce", "sklearn.datasets", "sklearn.model_selection"]
CONTEXT.set_forkserver_preload(_PRELOADED)
# Their constants are those of the environment in which they were imported.
_IMPORTED_ANEW = ("huggingface_hub", "timm", "timm_mfd", "train")


def fork_the_server() -> None:
    """Make a copy of this process the server that `start_process` forks from: it need not import all once more.

    Call it before anything was computed, as the threads of torch are not copied.
    """
    for name in _PRELOADED:
        importlib.import_module(name)
    resource_tracker.ensure_running()  # an interpreter of its own
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork_instead), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which pytest-xdist has one
        ensure_running()


def _fork_instead(_: str, words: Sequence[str], kept: Sequence[int]) -> int:
    if pid := os.fork():
        return pid
    try:
        # The server ends when all others have closed what it listens to, so it keeps nothing else open. But objects
        # that came along would close the numbers of their files some day, and must not meet a later socket there.
        null = os.open(os.devnull, os.O_RDWR)
        for number in {int(name) for name in os.listdir("/dev/fd")} - {0, 1, 2, null, *kept}:
            with suppress(OSError):  # of the listing itself
                os.fstat(number)
                os.dup2(null, number)
        importlib.reload(multiprocessing.forkserver)  # its lock is taken while it starts
        importlib.reload(warnings)  # which pytest turns into errors
        exec(words[-1], {})
    finally:
        os._exit(1)


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
    *words: Any, env: Mapping[str, str] | None = None, timeout: float = 300
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


class ForkedPython:
    """Takes the place of `subprocess.Popen` with a Python script, where all is imported and nothing computed yet.

    The script finds what was changed in the modules that it imports, and no signal handler.
    """

    def __init__(
        self, command: Sequence[str], stdout: IO[bytes], env: dict[str, str], preexec_fn: Callable[[], None], **_: Any
    ):
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_script, args=(list(command[1:]), stdout.fileno(), env, preexec_fn))
        self._process.start()
        self.terminate, self.kill, self.wait = self._process.terminate, self._process.kill, self._process.join

    def poll(self) -> int | None:
        return self._process.exitcode


def _script(words: list[str], output: int, environment: dict[str, str], first: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first()
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


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
    multiprocessing.set_start_method(None, force=True)  # what this one starts, it starts as anywhere
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
