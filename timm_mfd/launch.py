"""What a script does around its work: start its processes, end in one line, use the cores, fix the random numbers."""

import ctypes
import hashlib
import io
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import one_line
from .interruption import STOP_SIGNALS, Stopped

Result = TypeVar("Result")
_PATIENCE = 10.0  # seconds
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # looked up here: a forked process should not
# The first letters of every name under which a launcher is started.
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
_ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# They say which devices there are, and which process uses what, or are overruled by an argument. They stay.
_ARRANGEMENT = {f"ACCELERATE_{name}" for name in ("USE_CPU", "CPU_AFFINITY", "MIXED_PRECISION", "LOG_LEVEL")}
_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # images of NVIDIA have the second
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What `accelerate launch` sets if nobody asked for anything.
_DEFAULTS = {
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false",),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("false",),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ("false",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
}


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn mistakes of the user into one line on standard error and exit code 1, without a traceback.

    Interruptions, `STOP_SIGNALS` among them, end in one line, too, with 128 and the number of the signal, and what
    was being written is removed. Warnings are one line as well, without a file and code of this package.

    Args:
        *kinds: Exceptions that mean a mistake of the user here; all others pass.

    Example:
        >>> with one_line_errors(ValueError):
        ...     load_dataset("cifar11")
    """
    script = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # no name of a class ends a run for a terminal's encoding
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        with _plain_warnings(), _stop_signals_unwind():
            yield
    except _ToldElsewhere:
        sys.exit(1)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone
                print(f"\n{script}: {stopped}", file=sys.stderr)  # noqa: T201
        sys.exit(stopped.exit_code)
    except kinds as error:
        if _is_torchrun() and os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)  # most mistakes are every process's: the first one tells, and the launcher ends this
        sys.exit(f"{script}: error: {one_line(error)}")
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


class _Lasting(io.FileIO):
    """Where a script writes what it says: a reader that is gone, or a full disk below a log, ends no run."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _lasting(stream: Any) -> Any:
    """Return a stream of this process whose writing cannot fail; others, such as those of a test, as they are."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # without a buffer between them: python -u
    if type(raw) is not io.FileIO or raw.fileno() not in (1, 2):
        return stream
    lasting: Any = _Lasting(raw.fileno(), "w", closefd=False)
    lines, at_once = stream.line_buffering, stream.write_through
    content = lasting if buffer is raw else io.BufferedWriter(lasting)
    return io.TextIOWrapper(content, stream.encoding, stream.errors, line_buffering=lines, write_through=at_once)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as every other line of a script is shown, once for all processes."""

    def plain(message: Warning | str, *_: object, **__: object) -> str:
        told_by_another = os.environ.get("RANK", "0") != "0"
        return "" if told_by_another else f"warning: {' '.join(str(message).split())}\n"

    before = warnings.formatwarning
    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _stop_signals_unwind() -> Iterator[None]:
    """Let signals raise as Ctrl-C does, so that half-written files are removed; `StopSignals` takes over from it."""
    # Only the first process writes files; the others may be waiting for it where nothing can be raised.
    writes = os.environ.get("RANK", "0") == "0"
    if not writes or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise Stopped(f"{signal.Signals(number).name}: ended", number)

    # What nohup or somebody else has chosen stays; Ctrl-C raises by itself.
    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


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
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for, and end when it does.

    It starts one; this replaces that one by torchrun with N, if they are not there yet.

    Raises:
        ValueError: If their number cannot be found out, or the environment has a part only of what a launcher sets.
    """
    _check_launcher()
    if _is_alone_on_cpu():
        count = _asked_processes()
        script = [sys.argv[0], *sys.argv[1:]]
        if count is None:
            raise ValueError(
                "accelerate launch starts one process on a CPU; start several with "
                f"torchrun --nproc-per-node N {' '.join(script)}"
            )
        os.environ.pop("MASTER_ADDR")
        os.environ.pop("MASTER_PORT", None)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        follow_launcher()
        sys.stdout.flush()
        os.execv(sys.executable, [*torchrun, *script])
    follow_launcher()


def _check_launcher() -> None:
    """Refuse a part only of what a launcher sets, left there from another job."""
    left = [f"{name}={os.environ[name]}" for name in _OF_A_LAUNCHER[:3] if name in os.environ]
    missing = [name for name in _OF_A_LAUNCHER if name not in os.environ]
    if left and missing and not any(name in os.environ for name in _MPI):
        raise ValueError(
            f"the environment has {', '.join(left)}, as of a launcher, but no {', '.join(missing)}; unset what is left "
            "there from another job, or start with torchrun or accelerate launch"
        )


def _is_alone_on_cpu() -> bool:
    """Whether `accelerate launch` started one process where it was asked for several, which it does on a CPU."""
    environment = os.environ
    asked = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if not asked or not _is_launched() or "LOCAL_RANK" in environment or torch.accelerator.is_available():
        return False
    return not any(name in environment for name in ("WORLD_SIZE", *_MPI))


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
    launcher = os.getppid()
    if sys.platform != "linux" or not _is_launched():
        return
    end_with_parent()
    if os.getppid() != launcher:
        sys.exit(f"{Path(sys.argv[0]).name}: its launcher has ended already")


def forget_foreign_settings() -> list[str]:
    """Take from the environment what Accelerate or torch would read there and a run does not mean.

    Variables that another project, `accelerate config` or a container left there would win over arguments: the
    gradients would be divided, the model compiled, sharded or rounded, without a word.

    Returns:
        Those that would have changed something, as `NAME=value`.
    """
    found = []
    for name, value in sorted(os.environ.items()):
        if name.startswith(_ACCELERATE) and name not in _ARRANGEMENT:
            del os.environ[name]
            if value.lower() not in _DEFAULTS.get(name, ()):
                found.append(f"{name}={value}")
        elif name == "ACCELERATE_MIXED_PRECISION" and value.lower() != "no":  # an argument wins over it
            found.append(f"{name}={value}")
        elif name == "ACCELERATE_USE_CPU" and torch.accelerator.is_available() and not _is_launched():
            del os.environ[name]
            found.append(f"{name}={value}")
        elif name in _TF32:
            del os.environ[name]
            torch.set_float32_matmul_precision("highest")  # torch has read it
            found.append(f"{name}={value}")
    return found


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
    """Whether a launcher started this process: its variables alone may be left from elsewhere."""
    if not _is_torchrun() and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    if sys.platform != "linux":
        return True
    try:
        program, *words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # of another user, or behind a wall of containers
        return _is_torchrun()
    names = [Path(word).name for word in (program, *words)]
    return names[0].startswith(("python", *_LAUNCHERS)) and any(name.startswith(_LAUNCHERS) for name in names)
