"""Leave a run between two steps when the system or the user asks for it, all processes at the same one."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
# Beside Ctrl-C. SIGHUP says that the terminal or the connection closed; SIGUSR1 and SIGUSR2 are what schedulers of
# clusters are often told to send before a time limit.
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_PATIENCE = 2.0  # seconds after which a second Ctrl-C is meant; a launcher passes the first one on at once


class Stopped(Exception):
    """The run was asked to end and ended in an orderly way.

    Args:
        message: What was kept.
        signum: The signal; the exit code is 128 plus its number, as shells count.
        saved: Whether the run can go on from here; False if its state could not be written.
    """

    def __init__(self, message: str, signum: int, saved: bool = True):
        super().__init__(message)
        self.exit_code = 128 + signum
        self.saved = saved


class StopSignals:
    """Note `STOP_SIGNALS` and Ctrl-C instead of dying of them, inside a `with` block.

    A second Ctrl-C ends the process at once. SIGHUP stays ignored where nohup has it so. In a thread other than the
    main one, where Python lets nobody choose what signals do, they do what they did.

    Attributes:
        received: Number of the first signal, or 0.

    Example:
        >>> with StopSignals() as stop:
        ...     while not stop.received:
        ...         step()
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._terminal: list[int] = []

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._terminal = [number for number in (0, 1, 2) if os.isatty(number)]
            ignored = [number for number in STOP_SIGNALS[1:] if signal.getsignal(number) is signal.SIG_IGN]
            chosen = [number for number in (*STOP_SIGNALS, signal.SIGINT) if number not in ignored]
            self._previous = {number: signal.signal(number, self._note) for number in chosen}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ask(self, number: int) -> None:
        """Do as if a signal came, unless one came before.

        Args:
            number: Of the signal.
        """
        if not self.received:
            self.received, self._since = number, time.monotonic()

    def _note(self, number: int, _: FrameType | None) -> None:
        for gone in (terminal for terminal in self._terminal if not os.isatty(terminal)):
            os.dup2(os.open(os.devnull, os.O_RDWR), gone)  # a line to it would raise before the state is saved
        if not self.received:
            self.ask(number)
        elif number == signal.SIGINT and time.monotonic() - self._since > _PATIENCE:
            raise KeyboardInterrupt

    def watch(self, items: Iterable[Item], message: str, saved: bool = True) -> Iterator[Item]:
        """Pass items on until a signal comes.

        Args:
            items: What to pass on.
            message: What was kept.
            saved: As for `Stopped`.

        Raises:
            Stopped: With `message`, as soon as one came.
        """
        for item in items:
            if self.received:
                raise Stopped(f"{signal.Signals(self.received).name}: {message}", self.received, saved)
            yield item


class Agreement:
    """Let all processes act on the same numbers: the largest over them, without touching the accelerator's queue.

    Example:
        >>> agree = Agreement()
        >>> stop, save = agree([signal_here, save_is_due_here])
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        """Return the element-wise maximum of `numbers` over all processes; all must call it."""
        if self._group is None:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest.tolist()
