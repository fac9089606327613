"""What a script does around its work: start its processes, end in one line, use the cores, fix the random numbers."""

import ctypes
import hashlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .interruption import Stopped

Result = TypeVar("Result")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # looked up here: a forked process should not


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn mistakes of the user into one line on standard error and exit code 1, without a traceback.

    Interruptions, SIGTERM among them, end in one line, too, with 128 and the number of the signal, and what was being
    written is removed.

    Args:
        *kinds: Exceptions that mean a mistake of the user here; all others pass.

    Example:
        >>> with one_line_errors(ValueError):
        ...     load_dataset("cifar11")
    """
    script = Path(sys.argv[0]).name
    try:
        with _sigterm_unwinds():
            yield
    except _ToldElsewhere:
        sys.exit(1)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{script}: {stopped}", file=sys.stderr)  # noqa: T201
        sys.exit(stopped.exit_code)
    except kinds as error:
        # An error from a decoding process carries that process's traceback before its own message.
        message = str(error).rsplit("ImageDecodeError: ", 1)[-1].strip()
        sys.exit(f"{script}: error: {message}")
    except dist.DistError as error:
        sys.exit(f"{script}: stopped, because another process of the run ended: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if _is_torchrun() and "peer" in str(error):  # gloo raises nothing more specific
            sys.exit(f"{script}: stopped, because another process of the run ended")
        if "does not have a deterministic implementation" in str(error):
            operation = str(error).split(" does not")[0]
            sys.exit(f"{script}: error: --deterministic: {operation} has no deterministic implementation here")
        raise
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise as Ctrl-C does, so that half-written files are removed; `StopSignals` takes over from it."""
    # Only the first process writes files; the others may be waiting for it where nothing can be raised.
    writes = os.environ.get("RANK", "0") == "0"
    may_set = threading.current_thread() is threading.main_thread()
    if not writes or not may_set or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise Stopped("SIGTERM: ended", number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _ToldElsewhere(Exception):
    """The main process failed and says why."""


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in the main process and return its result in every process.

    Args:
        function: Called in process 0 only. If it raises, that process raises, and the others end quietly.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    outcome: list[Any] = [None, True]
    error = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as caught:
            error, outcome[1] = caught, False
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if not outcome[1]:
        raise _ToldElsewhere
    return outcome[0]


def start_all_processes() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for.

    It starts one; this replaces that one by torchrun with N. Does nothing when all processes are there.

    Raises:
        ValueError: If their number cannot be found out.
    """
    environment = os.environ
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if not asked or "LOCAL_RANK" in environment or torch.accelerator.is_available():
        return
    if any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        return
    count = _asked_processes()
    script = [sys.argv[0], *sys.argv[1:]]
    if count is None:
        raise ValueError(
            "accelerate launch starts one process on a CPU; start several with "
            f"torchrun --nproc-per-node N {' '.join(script)}"
        )
    environment.pop("MASTER_ADDR")
    environment.pop("MASTER_PORT", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    follow_launcher()
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, *script])


def _asked_processes() -> int | None:
    """Read N from the command line of the launcher, which does not pass it on."""
    import psutil

    try:
        words = [word for argument in psutil.Process().parent().cmdline() for word in argument.split("=", 1)]
    except (psutil.Error, AttributeError):
        return None
    for flag, value in pairwise(words):
        if flag == sys.argv[0]:  # from here on they are the script's own
            break
        if flag.replace("-", "_") == "__num_processes" and value.isdigit():
            return int(value)
    return None


def follow_launcher() -> None:
    """Ask for SIGTERM when the launcher ends: killed alone, `accelerate launch` would leave the training running."""
    if sys.platform != "linux" or not _is_launched():
        return
    end_with_parent()
    if os.getppid() == 1 and not any(word in Path("/proc/1/cmdline").read_text() for word in ("accelerate", "torch")):
        sys.exit(f"{Path(sys.argv[0]).name}: its launcher has ended already")


def end_with_parent() -> None:
    """Ask for SIGTERM when the process that started this one ends, where the system can do that."""
    if _LIBC is not None:
        _LIBC.prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM


def cpu_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_cpu() -> None:
    """Let a training process use the CPU well: all its cores, and memory that is kept between steps.

    `accelerate launch` and torchrun give a process one thread; the cores are shared out instead, unless OMP_NUM_THREADS
    has another number. glibc returns every large tensor to the system and asks for it again, zeroed page by page, in
    the next step; here it keeps them.
    """
    if _is_launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep what is freed


def use_deterministic_kernels() -> None:
    """Choose kernels that give the same bits every time, where there are slower and faster ones.

    On a CPU all kernels used here do so anyway. Call it before the first use of a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_step(seed: int, epoch: int, step: int, process: int) -> None:
    """Seed torch for one training step, so that dropout does not depend on where a run was resumed.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch.
        step: Number of the step in it.
        process: Number of the process; each draws numbers of its own.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {step} {process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _is_launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or _is_torchrun()
