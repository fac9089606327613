"""Processes that decode images: they outlive a signal to the whole job, but not their training process."""

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from .images import FileImages


def decoded_batches(images: FileImages, workers: int, **options: Any) -> Iterator[Tensor]:
    """Iterate over a `DataLoader` whose processes leave SIGTERM and Ctrl-C to the training process.

    Signals often go to all processes of a job. The training process still has to finish its step and to save its state
    then, and the death of a decoding process would cut that short.

    Args:
        images: Image files.
        workers: Number of processes.
        **options: As for `DataLoader`.
    """
    loader: DataLoader[Tensor] = DataLoader(images, num_workers=workers, **options)
    if not workers or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    _end_with_this_process()
    # What is blocked here while the processes start stays blocked there from their first moment on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _end_with_this_process() -> None:
    """At exit multiprocessing sends SIGTERM and waits, in vain here; this runs before it."""
    atexit.register(_kill_decoding_processes)


def _kill_decoding_processes() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, as if they had crashed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
