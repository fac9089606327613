"""The folder of a run: the one place that knows what its files are called, and that reads and writes them."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic import replace_folder, to_json, write_text
from .lock import lock

BUSY = "another process writes into this run"
_ARGS, _METRICS, _SUMMARY, _BAD_BATCH = "args.json", "metrics.jsonl", "summary.json", "nonfinite.json"
STOPPED = "stopped"  # a signal stopped the run, which can be resumed; schedulers look for this file
_CHECKPOINT = Path("checkpoint") / "state.safetensors"
_BEFORE_A_CHECKPOINT = (_METRICS, _BAD_BATCH)  # what a run may write before its first one
_AFTER_A_CHECKPOINT = {_SUMMARY, "curves.png", "model", "model.partial", "publish"}


class RunFolder:
    """A run on disk, finished or not.

    Args:
        path: The folder; whether there is one is asked when something is read.

    Attributes:
        model: The exported model, loaded as `local-dir:`.
        publish: What `publish.py` builds beside it.
        checkpoint: The state that a run is resumed from.
        curves: Picture of losses and accuracy.
        bad_batch: Which images were in the batch whose loss was not finite.

    Example:
        >>> run = RunFolder("runs/digits")
        >>> run.summary["top1"], run.metrics[-1]["mfd_per_stage"]
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.model = self.path / "model"
        self.publish = self.path / "publish"
        self.checkpoint = self.path / _CHECKPOINT
        self.curves = self.path / "curves.png"
        self.bad_batch = self.path / _BAD_BATCH

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, name: str | Path) -> "RunFolder | None":
        """Return the run that a name means, or None: its folder, or that of the model in it, as path or `local-dir:`.

        Args:
            name: From the command line.
        """
        path = Path(str(name).removeprefix("local-dir:"))
        return next((run for run in (cls(path), cls(path.parent)) if run.is_begun), None)

    # What a run says of itself.

    @property
    def is_begun(self) -> bool:
        """Whether there are arguments, which are written first."""
        return (self.path / _ARGS).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether it has a summary, which is written last."""
        return (self.path / _SUMMARY).is_file()

    def check_finished(self) -> None:
        """Refuse what is no finished run.

        Raises:
            ValueError: Naming the folder and what it lacks.
        """
        if not self.path.is_dir():
            raise ValueError(f"{self} does not exist or is not a folder")
        if not self.is_finished:
            raise ValueError(f"{self} is not a finished run: {_SUMMARY} is missing")

    @cached_property
    def args(self) -> dict[str, Any]:
        """Arguments and `environment` of the run; in `history` those of its parts before it was resumed.

        Raises:
            ValueError: If the file is missing or damaged. So do `summary` and `metrics`.
        """
        return self._read(_ARGS)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run ended with."""
        return self._read(_SUMMARY)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry per finished epoch; none before the first."""
        path = self.path / _METRICS
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); fix or delete it") from None

    @property
    def facts(self) -> dict[str, Any]:
        """What the card of its model tells: `args`, `summary` and, over all parts of the run, `seconds`."""
        seconds = round(sum(line["seconds"] for line in self.metrics), 1)
        return {"args": self.args, "summary": self.summary, "seconds": seconds}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ValueError(f"{self} is no run, or it is damaged: {name} is missing") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds no arguments or results by name")
        return content

    # A new run, and one that is resumed.

    @classmethod
    def check_new(cls, output_dir: str | None, resume: bool = False) -> None:
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
        own = {name.removesuffix(".partial") for name in names} <= {_ARGS, "checkpoint", STOPPED, *_BEFORE_A_CHECKPOINT}
        left = own or (_ARGS in names and not names & _AFTER_A_CHECKPOINT)
        begun = resume and left and not cls(path).checkpoint.exists()
        if names and not begun:
            other = "holds another run" if _ARGS in names else "is not an empty folder"
            hint = " or resume it with --resume auto" if cls(path).checkpoint.exists() else ""
            raise FileExistsError(f"--output-dir {path} {other}; nothing was changed, choose a new folder{hint}")

    @classmethod
    def create(cls, output_dir: str | None, name: str, args: Mapping[str, Any], resume: bool = False) -> "RunFolder":
        """Make the folder of a run, lock it and write `args.json` into it, so that no two runs share a folder.

        Args:
            output_dir: The user's choice, if any.
            name: What the run is, for a default under `runs/` with the time in its name.
            args: Arguments and environment.
            resume: As for `check_new`.

        Returns:
            The folder.

        Raises:
            FileExistsError: If `output_dir` holds something, or another run took it just now.
            OSError: If it cannot be made.
        """
        cls.check_new(output_dir, resume)
        path = _new_under_runs(name) if output_dir is None else Path(output_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make --output-dir {path}: {error.strerror}; choose another one") from None
        folder = cls(path)
        folder.lock()
        cls.check_new(str(path), resume=True)  # another process may have been faster, and have ended
        for left in _BEFORE_A_CHECKPOINT:
            (path / left).unlink(missing_ok=True)
        folder._write(_ARGS, args)
        return folder

    @classmethod
    def to_resume(cls, resume: str, output_dir: str | None, name: str) -> "RunFolder | None":
        """Find the run that `--resume` means.

        Args:
            resume: A run folder, or `"auto"`: the one in `output_dir`, or without that the newest unfinished one under
                `runs/`.
            output_dir: The user's choice, if any.
            name: What the run is, as for `create`.

        Returns:
            The run, which has a checkpoint or is finished; None if `"auto"` finds none, so that the run begins.

        Raises:
            ValueError: If `resume` is no such folder.
        """
        if resume != "auto":
            folder = cls(resume)
            if not folder._can_be_resumed():
                raise ValueError(f"--resume {resume}: no checkpoint there, expected a run folder with {_CHECKPOINT}")
            return folder
        if output_dir is not None:
            return cls(output_dir) if cls(output_dir)._can_be_resumed() else None
        return next(_unfinished_runs(_file_name(name)), None)

    def note_changes(self, args: Mapping[str, Any]) -> None:
        """Bring `args.json` up to date when the run is resumed; what it held before goes to its `history`."""
        before = dict(self.args)
        history = before.pop("history", [])
        if before != json.loads(json.dumps(args)):
            self._write(_ARGS, {**args, "history": [*history, before]})

    def lock(self, patience: float = 20.0) -> None:
        """Keep other processes from writing into the run until this one ends, however it ends.

        Args:
            patience: Seconds to wait for another process: a launcher may end before the process that saves the state.

        Raises:
            FileExistsError: If another process has locked it.
        """
        self.checkpoint.parent.mkdir(exist_ok=True)
        if not lock(self.checkpoint.parent, patience):
            raise FileExistsError(f"{self}: {BUSY}; nothing was changed")

    # What a run leaves.

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write one line per finished epoch."""
        write_text(self.path / _METRICS, "".join(to_json(line, indent=None) for line in lines))

    def write_bad_batch(self, details: Mapping[str, Any]) -> None:
        """Write which images were in a batch whose loss is not finite."""
        write_text(self.bad_batch, to_json(details, indent=None))

    def put_model(self, new: Path) -> None:
        """Give a complete folder the name of the model; what an interrupted export left there goes."""
        replace_folder(new, self.model)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, by which a run is known to be finished."""
        self._write(_SUMMARY, summary)

    def mark_stopped(self, words: str) -> None:
        """Say for schedulers that a signal stopped the run, unless the folder holds something else."""
        with suppress(OSError):
            if self.is_begun or not any(self.path.iterdir()):
                write_text(self.path / STOPPED, f"{words}\n")

    def unmark(self) -> None:
        """Remove what `mark_stopped` wrote."""
        with suppress(OSError):
            (self.path / STOPPED).unlink(missing_ok=True)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.path / name, to_json(content))
        self.__dict__.pop(name.removesuffix(".json"), None)  # what was read before

    def _can_be_resumed(self) -> bool:
        return self.checkpoint.is_file() or self.is_finished


def _new_under_runs(name: str) -> Path:
    wanted = f"{_file_name(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(1, 1000))):
        path = Path("runs") / (wanted + suffix)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise FileExistsError(f"runs/{wanted} and 999 more of its name are there already; choose an --output-dir")


def _unfinished_runs(prefix: str) -> Iterator[RunFolder]:
    runs = (path for path in Path("runs").glob(f"*/{_ARGS}") if path.parent.name.startswith(f"{prefix}-"))
    for args in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True):
        folder = RunFolder(args.parent)
        if folder.checkpoint.is_file() and not folder.is_finished:
            yield folder


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name)
