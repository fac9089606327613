"""Processes that decode images: they outlive a signal to the whole job, but not their training process."""

import atexit
import functools
import multiprocessing
import signal
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from .images import FileImages


def decoding_loader(images: FileImages, workers: int, **options: Any) -> "DataLoader[Tensor]":
    """Make a `DataLoader` whose processes leave SIGTERM and Ctrl-C to the training process.

    Signals often go to all processes of a job. The training process still has to finish its step and to save its state
    then, and the death of a decoding process would cut that short.

    Args:
        images: Image files.
        workers: Number of processes.
        **options: As for `DataLoader`.
    """
    if workers:
        _end_with_this_process()
    return DataLoader(images, num_workers=workers, worker_init_fn=_leave_signals_to_training, **options)


def _leave_signals_to_training(_worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _end_with_this_process() -> None:
    """At exit multiprocessing sends SIGTERM and waits, in vain here; this runs before it."""
    atexit.register(_kill_decoding_processes)


def _kill_decoding_processes() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
