"""What the scripts share: errors in one line, run folders, and the cores of the machine."""

import json
import os
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


def new_run_dir(output_dir: str | None, name: str) -> Path:
    """Choose the folder of a run; never one that holds something.

    Args:
        output_dir: The user's choice, if any.
        name: What the run is, for a default under `runs/` with the time in its name.

    Returns:
        A path that does not exist yet or is an empty folder.

    Raises:
        FileExistsError: If `output_dir` holds something.
    """
    if output_dir is None:
        safe = "".join(char if char.isalnum() or char in "._-" else "-" for char in name)
        return Path("runs") / f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(output_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        holds = "holds another run" if (run_dir / "args.json").exists() else "is not an empty folder"
        raise FileExistsError(f"--output-dir {run_dir} {holds}; nothing was changed, choose a new folder")
    return run_dir


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a readable JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def use_idle_cores(processes: int) -> None:
    """Undo the single thread that `accelerate launch` and torchrun give a process unless told otherwise.

    Args:
        processes: Training processes on this machine.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
