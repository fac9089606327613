"""One process writes into a run folder, on one node or on several."""

import atexit
import os
import sys
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

LEASE = 30.0  # seconds after which a process on another node that gave no sign of life has none
_held: dict[Path, tuple[int, SoftFileLease]] = {}  # lock file and lease of each folder, until the process ends


def lock(folder: Path, patience: float) -> bool:
    """Keep other processes from writing into a folder until this one ends, however it ends.

    Two locks, as neither is enough. The kernel's ends with its process at that moment, but on some shared file systems
    (Lustre with `localflock`, BeeGFS as it comes) it holds within one node only, without saying so. The lease is a file
    that this process touches every ten seconds: on any node it counts until it was not touched for `LEASE` seconds.

    Args:
        folder: Where the files `lock` and `lease` are; it is there.
        patience: Seconds to wait for another process.

    Returns:
        Whether this process has it now.
    """
    folder = folder.resolve()
    if folder in _held:
        if (folder / "lease").exists():
            return True
        _release(folder)  # somebody removed it, and this process begins anew
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o666)
    lease = SoftFileLease(
        folder / "lease", lease_duration=LEASE, timeout=patience + LEASE, poll_interval=0.2, thread_local=False,
        on_compromise=lambda loss: _end_if_taken(folder, loss.reason),
    )  # fmt: skip
    try:
        free = _lock_in_kernel(descriptor, patience) and bool(lease.acquire())
    except Timeout:
        free = False
    if not free:
        os.close(descriptor)
        return False
    if not _held:
        atexit.register(release_all)  # or another node would wait for the lease to run out
    _held[folder] = descriptor, lease
    return True


def release_all() -> None:
    """Let go of every folder, for another process to go on with."""
    for folder in list(_held):
        _release(folder)


def _release(folder: Path) -> None:
    descriptor, lease = _held.pop(folder)
    lease.release()
    os.close(descriptor)


def _lock_in_kernel(descriptor: int, patience: float) -> bool:
    """Return whether no other process has this lock, as far as the system knows; where it has none, nobody does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            # Of this process alone: decoding processes that outlive it for a moment do not have it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True


def _end_if_taken(folder: Path, reason: str) -> None:
    """End this process at once if another one took its run, as when it was suspended for longer than a lease lasts."""
    if reason == "owner-changed" or (reason == "marker-missing" and folder.exists()):
        print(f"error: another process took over {folder.parent}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # from the thread that touches the lease: the main one must not save any more
