"""What the scripts share: errors in one line, run folders, and the cores of the machine."""

import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn mistakes of the user into one line on standard error and exit code 1, without a traceback.

    Args:
        *kinds: Exceptions that mean a mistake of the user here; all others pass.

    Example:
        >>> with one_line_errors(ValueError):
        ...     load_dataset("cifar11")
    """
    try:
        yield
    except kinds as error:
        # An error from a decoding process carries that process's traceback before its own message.
        message = str(error).rsplit("ImageDecodeError: ", 1)[-1].strip()
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
    except KeyboardInterrupt:
        sys.exit(f"\n{Path(sys.argv[0]).name}: interrupted")


def check_run_dir(output_dir: str | None) -> None:
    """Refuse a folder that holds something.

    Raises:
        FileExistsError: If `output_dir` exists and is not an empty folder.
    """
    if output_dir is None or not (run_dir := Path(output_dir)).exists():
        return
    if not run_dir.is_dir() or any(run_dir.iterdir()):
        holds = "holds another run" if (run_dir / "args.json").exists() else "is not an empty folder"
        raise FileExistsError(f"--output-dir {run_dir} {holds}; nothing was changed, choose a new folder")


def claim_run_dir(output_dir: str | None, name: str, args: dict[str, Any]) -> Path:
    """Make the folder of a run and write `args.json` into it, so that no two runs share a folder.

    Args:
        output_dir: The user's choice, if any.
        name: What the run is, for a default under `runs/` with the time in its name.
        args: Content of `args.json`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `output_dir` holds something, or another run claimed it just now.
    """
    check_run_dir(output_dir)
    if output_dir is None:
        safe = "".join(char if char.isalnum() or char in "._-" else "-" for char in name)
        wanted = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{number}" for number in range(1, 1000))):
            run_dir = Path("runs") / (wanted + suffix)
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:
                continue
    else:
        run_dir = Path(output_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "args.json").open("x") as file:  # fails if another process was faster
        file.write(to_json(args))
    return run_dir


def to_json(content: Any, indent: int | None = 2) -> str:
    """Format as JSON that every reader accepts; NaN and infinity are errors."""
    return json.dumps(content, indent=indent, allow_nan=False) + "\n"


def prepare_cpu() -> None:
    """Let a training process use the CPU well: all its cores, and memory that is kept between steps.

    `accelerate launch` and torchrun give a process one thread; the cores are shared out instead, unless OMP_NUM_THREADS
    has another number. glibc returns every large tensor to the system and asks for it again, zeroed page by page, in
    the next step; here it keeps them.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep what is freed
