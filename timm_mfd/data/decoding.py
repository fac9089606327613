"""Processes that decode images: they outlive a signal to the whole job, but not their training process."""

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import first_words
from ..interruption import STOP_SIGNALS
from .images import ImageDecodeError


def decoded_batches(images: Dataset[Tensor], workers: int, **options: Any) -> Iterator[Tensor]:
    """Iterate over a `DataLoader` whose processes leave `STOP_SIGNALS` and Ctrl-C to the training process.

    Signals often go to all processes of a job. The training process still has to finish its step and to save its state
    then, and the death of a decoding process would cut that short.

    Args:
        images: What decodes an image when it is indexed.
        workers: Number of processes.
        **options: As for `DataLoader`.

    Raises:
        ImageDecodeError: While iterating, if an image cannot be decoded, or the processes fail.
    """
    loader: DataLoader[Tensor] = DataLoader(images, num_workers=workers, **options)
    if not workers or not hasattr(signal, "pthread_sigmask"):
        return _in_one_line(iter(loader), workers)
    _end_with_this_process()
    # What is blocked here while the processes start stays blocked there from their first moment on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT})
    try:
        return _in_one_line(iter(loader), workers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_one_line(batches: Iterator[Tensor], workers: int) -> Iterator[Tensor]:
    """Pass batches on; what a process raised arrives with its traceback, of which the last line says what it was."""
    try:
        yield from batches
    except ImageDecodeError as error:
        raise ImageDecodeError(str(error).rsplit("ImageDecodeError: ", 1)[-1].strip()) from None
    except (OSError, RuntimeError) as error:
        if not workers:
            raise
        last = str(error).strip().rpartition("\n")[2]
        raise ImageDecodeError(
            f"the decoding processes failed: {first_words(RuntimeError(last))}; if /dev/shm is full or small, let "
            "docker make it larger (--shm-size), or decode in the training process (workers=0, --workers 0)"
        ) from error


@functools.cache
def _end_with_this_process() -> None:
    """At exit multiprocessing sends SIGTERM and waits, in vain here; this runs before it."""
    atexit.register(_kill_decoding_processes)


def _kill_decoding_processes() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, as if they had crashed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
