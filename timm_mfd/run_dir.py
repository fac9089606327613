"""Run folders: never shared, never overwritten, and found again when a run is to go on."""

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .atomic import flush, flush_folder, replacing

CHECKPOINT = Path("checkpoint") / "state.safetensors"
_BEFORE_A_CHECKPOINT = ("metrics.jsonl", "nonfinite.json")  # what a run may write before its first one
_AFTER_A_CHECKPOINT = {"summary.json", "curves.png", "model", "model.partial", "publish"}
BUSY = "another process writes into this run"
_held: list[int] = []  # descriptors of lock files, open until the process ends
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
    own = {name.removesuffix(".partial") for name in names} <= {"args.json", "checkpoint", *_BEFORE_A_CHECKPOINT}
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

    Args:
        path: The run folder.
        patience: Seconds to wait for another process: a launcher may end before the process that saves the state.

    Raises:
        FileExistsError: If another process does already.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    (path / CHECKPOINT).parent.mkdir(exist_ok=True)
    lock = os.open((path / CHECKPOINT).with_name("lock"), os.O_WRONLY | os.O_CREAT, 0o666)
    deadline = time.monotonic() + patience
    while True:
        try:
            # Of this process alone: decoding processes that outlive it for a moment do not have it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise FileExistsError(f"{path}: {BUSY}; nothing was changed") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            os.close(lock)
            return
    _held.append(lock)


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
