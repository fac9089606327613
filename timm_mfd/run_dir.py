"""Run folders: never shared, never overwritten, and found again when a run is to go on."""

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLease, Timeout

from .atomic import flush, flush_folder, replacing
from .interruption import Stopped

CHECKPOINT = Path("checkpoint") / "state.safetensors"
STOPPED = "stopped"  # a signal stopped the run, which can go on; schedulers look for this file
_BEFORE_A_CHECKPOINT = ("metrics.jsonl", "nonfinite.json")  # what a run may write before its first one
_AFTER_A_CHECKPOINT = {"summary.json", "curves.png", "model", "model.partial", "publish"}
BUSY = "another process writes into this run"
_LEASE = 30.0  # seconds after which a process on another node that gave no sign of life has none
_held: dict[Path, tuple[int, SoftFileLease]] = {}  # lock file and lease of each run, until the process ends
_PACKAGES = ("timm_mfd", "torch", "timm", "torchvision", "accelerate", "safetensors", "numpy", "pillow")


def check(output_dir: str | None, resume: bool = False) -> None:
    """Refuse a folder that holds something.

    Args:
        output_dir: The folder that a run is to write into, if it was chosen.
        resume: Whether it may hold a run that was cut off before its first checkpoint.

    Raises:
        FileExistsError: If `output_dir` exists and is not an empty folder.
    """
    if output_dir is None or not (path := Path(output_dir)).exists():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {""}
    # What others put beside args.json, such as the log of a scheduler, says nothing; what a run writes later does.
    begun_with = {"args.json", "checkpoint", STOPPED, *_BEFORE_A_CHECKPOINT}
    own = {name.removesuffix(".partial") for name in names} <= begun_with
    left = own or ("args.json" in names and not names & _AFTER_A_CHECKPOINT)
    begun = resume and left and not (path / CHECKPOINT).exists()
    if names and not begun:
        other = "holds another run" if "args.json" in names else "is not an empty folder"
        hint = " or go on with --resume auto" if (path / CHECKPOINT).exists() else ""
        raise FileExistsError(f"--output-dir {path} {other}; nothing was changed, choose a new folder{hint}")


def claim(output_dir: str | None, name: str, args: Mapping[str, Any], resume: bool = False) -> Path:
    """Make the folder of a run and write `args.json` into it, so that no two runs share a folder.

    Args:
        output_dir: The user's choice, if any.
        name: What the run is, for a default under `runs/` with the time in its name.
        args: Content of `args.json`.
        resume: As for `check`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `output_dir` holds something, or another run claimed it just now.
        OSError: If it cannot be made.
    """
    check(output_dir, resume)
    if output_dir is None:
        wanted = f"{_file_name(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{number}" for number in range(1, 1000))):
            path = Path("runs") / (wanted + suffix)
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                continue
    else:
        path = Path(output_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make --output-dir {path}: {error.strerror}; choose another one") from None
    hold(path)
    check(str(path), resume=True)  # another process may have been faster, and have ended
    for name in _BEFORE_A_CHECKPOINT:
        (path / name).unlink(missing_ok=True)
    write_text(path / "args.json", to_json(args))
    return path


def note_changes(path: Path, args: Mapping[str, Any]) -> None:
    """Bring `args.json` up to date when a run goes on in its folder; what it held before goes to its `history`."""
    before = json.loads((path / "args.json").read_text(encoding="utf-8-sig"))
    history = before.pop("history", [])
    if before != json.loads(json.dumps(args)):
        write_text(path / "args.json", to_json({**args, "history": [*history, before]}))


def hold(path: Path, patience: float = 20.0) -> None:
    """Keep other processes from writing into a run until this one ends, however it ends.

    Two locks, as neither is enough. The kernel's ends with its process at that moment, but on some shared file systems
    (Lustre with `localflock`, BeeGFS as it comes) it holds within one node only, without saying so. The lease is a file
    that this process touches every ten seconds: on any node it counts until it was not touched for `_LEASE` seconds.

    Args:
        path: The run folder.
        patience: Seconds to wait for another process: a launcher may end before the process that saves the state.

    Raises:
        FileExistsError: If another process does already.
    """
    folder = (path / CHECKPOINT).parent.resolve()
    folder.mkdir(exist_ok=True)
    if folder in _held:
        if (folder / "lease").exists():
            return
        _release(folder)  # somebody removed it, and this process begins anew
    lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o666)
    lease = SoftFileLease(
        folder / "lease", lease_duration=_LEASE, timeout=patience + _LEASE, poll_interval=0.2, thread_local=False,
        on_compromise=lambda loss: _end_if_taken(folder, loss.reason),
    )  # fmt: skip
    try:
        free = _lock_in_kernel(lock, patience) and lease.acquire()
    except Timeout:
        free = None
    if not free:
        os.close(lock)
        raise FileExistsError(f"{path}: {BUSY}; nothing was changed")
    _held[folder] = lock, lease


def _release(folder: Path) -> None:
    lock, lease = _held.pop(folder)
    lease.release()
    os.close(lock)


def _lock_in_kernel(lock: int, patience: float) -> bool:
    """Return whether no other process has this lock, as far as the system knows; where it has none, nobody does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            # Of this process alone: decoding processes that outlive it for a moment do not have it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


@contextmanager
def marking_a_stop(folder: Path | None) -> Iterator[None]:
    """Leave the mark `STOPPED` in the folder of a run that a signal stops, after its state; an older one goes first.

    An exit code does not tell: launchers return 1 for every reason. A run that fails has a checkpoint, too, but no
    mark, nor has one whose state could not be written, so that nobody starts those again and again.

    Args:
        folder: The run folder, if it is known. In one that holds something else nothing is written.
    """
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with suppress(OSError):
        (folder / STOPPED).unlink(missing_ok=True)
    try:
        yield
    except (Stopped, SystemExit) as error:
        stopped = error if isinstance(error, Stopped) else error.__context__  # which became an exit of one line
        if isinstance(stopped, Stopped) and stopped.saved:
            with suppress(OSError):
                if (folder / "args.json").exists() or not any(folder.iterdir()):
                    write_text(folder / STOPPED, f"{stopped}\n")
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_folder(new: Path, path: Path) -> None:
    """Flush a complete folder to the disk and give it its name; what an interrupted run left there goes."""
    for file in new.iterdir():
        flush(file)
    flush_folder(new)
    if path.exists():
        shutil.rmtree(path)
    new.rename(path)
    flush_folder(path.parent)


def find_checkpoint(resume: str, output_dir: str | None, name: str) -> Path | None:
    """Find the checkpoint that `--resume` means.

    Args:
        resume: A run folder or a checkpoint in it, or `"auto"`: the run in `output_dir`, or without one the newest
            unfinished run under `runs/`.
        output_dir: The user's choice, if any.
        name: What the run is, as for `claim`.

    Returns:
        The checkpoint; None if `"auto"` finds none, so that the run begins.

    Raises:
        ValueError: If `resume` is a path without a checkpoint.
    """
    if resume != "auto":
        path = Path(resume)
        for file in (path / CHECKPOINT, path / CHECKPOINT.name, path):
            if file.is_file():
                return file
        raise ValueError(f"--resume {resume}: no checkpoint there, expected a run folder with {CHECKPOINT}, or auto")
    if output_dir is not None:
        path = Path(output_dir) / CHECKPOINT
        return path if path.is_file() else None
    return next(_unfinished_runs(_file_name(name)), None)


def to_go_on_in(checkpoint: Path, output_dir: str | None) -> Path | None:
    """Return the run folder of a checkpoint, or None if the run is to go on in a new folder.

    Args:
        checkpoint: What `find_checkpoint` found.
        output_dir: The user's choice, if any.
    """
    folder = checkpoint.parent.parent
    if not checkpoint.match(str(CHECKPOINT)) or not (folder / "args.json").is_file():
        return None
    return folder if output_dir is None or Path(output_dir).resolve() == folder.resolve() else None


def changes(now: Mapping[str, Any], before: Mapping[str, Any], ignore: Collection[str] = ()) -> dict[str, str]:
    """Compare two sets of arguments.

    Args:
        now: Arguments by name.
        before: The arguments they are compared with; one that is missing there is no difference.
        ignore: Names that do not matter.

    Returns:
        For each name that differs: the change in words.
    """
    now, before = (json.loads(json.dumps(arguments)) for arguments in (now, before))  # tuples become lists
    return {
        name: f"--{name.replace('_', '-')} {_words(now[name])} (was {_words(before[name])})"
        for name in now
        if name in before and name not in ignore and now[name] != before[name]
    }


def check_same(now: dict[str, Any], data: str, before: Mapping[str, Any]) -> str:
    """Refuse to go on where a run would become another one.

    Args:
        now: What `environment` returns.
        data: Identity of the data set.
        before: Record of the checkpoint, with both as they were.

    Returns:
        What differs and may change the last bits of the result, in words; empty if nothing does.

    Raises:
        ValueError: If the number of processes, the kind of device or the data differ.
    """
    was = before["environment"]
    for key, words in (("processes", "number of processes"), ("device_type", "kind of device")):
        if now[key] != was[key]:
            raise ValueError(
                f"cannot resume on another {words}: {now[key]} now, {was[key]} when the run began; "
                "start it as it was, or begin a new run without --resume"
            )
    if data != before["data"]:
        raise ValueError(
            "cannot resume: the data set is not the one that the run began with; restore it, or begin a new run"
        )
    now, was = now | now["packages"], was | was["packages"]
    others = [key for key in ("device", "cpu_threads", *_PACKAGES, "git_commit") if now.get(key) != was.get(key)]
    return ", ".join(f"{key} {now.get(key)} (was {was.get(key)})" for key in others)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Describe what a run runs on, for `args.json`: package versions, the commit of the code, device and system.

    Args:
        device: Device of this process.
        processes: Number of processes.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit, modified = _commit()
    return {
        "device": name,
        "device_type": device.type,
        "processes": processes,
        "cpu_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "shared_machine": hasattr(os, "nice") and os.nice(0) > 0,  # at a lowered priority other work goes first
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": commit,
        "git_modified": modified,
    }


def shared_machine(args: Mapping[str, Any]) -> bool:
    """Return whether some part of a run was trained at a lowered priority.

    Args:
        args: What `args.json` holds.
    """
    return any(part["environment"].get("shared_machine", False) for part in (args, *args.get("history", [])))


def to_json(content: Any, indent: int | None = 2) -> str:
    """Format as JSON that every reader accepts; NaN and infinity are errors."""
    return json.dumps(content, indent=indent, allow_nan=False) + "\n"


def _unfinished_runs(prefix: str) -> Iterator[Path]:
    runs = (path for path in Path("runs").glob("*/args.json") if path.parent.name.startswith(f"{prefix}-"))
    for args in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True):
        checkpoint = args.parent / CHECKPOINT
        if checkpoint.is_file() and not (args.parent / "summary.json").exists():
            yield checkpoint


@functools.cache  # of the code that this process imported
def _commit() -> tuple[str | None, bool | None]:
    """Return the git commit of this package's code and whether it was modified; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.SubprocessError):
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 20}
        # An installed copy may lie inside somebody else's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], **options)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout
        return commit, bool(status.strip())
    return None, None


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
