"""Files that hold either their old content or their new one, whatever cuts the writing short."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Write a file under another name, flush it to the disk and rename it to `path`.

    If the block raises, `path` keeps what it held and nothing else is left behind.

    Args:
        path: The file to make or to replace; its folder exists.
        shared: Whether several processes may write it at once; then each writes under a name of its own.

    Yields:
        The name to write to, in the same folder.

    Example:
        >>> with replacing(Path("metrics.jsonl")) as partial:
        ...     partial.write_text("{}", encoding="utf-8")
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial" if shared else f"{path.name}.partial")
    if shared:
        _remove_abandoned(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # as the user has it for new files; safetensors makes private ones
        yield partial
        os.chmod(partial, mode)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(content: Any, indent: int | None = 2) -> str:
    """Format as JSON that every reader accepts; NaN and infinity are errors."""
    return json.dumps(content, indent=indent, allow_nan=False) + "\n"


def replace_folder(new: Path, path: Path) -> None:
    """Flush a complete folder to the disk and give it its name; what an interrupted run left there goes."""
    for file in new.iterdir():
        flush(file)
    flush_folder(new)
    if path.exists():
        shutil.rmtree(path)
    new.rename(path)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Make the names in a folder outlast a power cut, on systems where a folder can be opened."""
    with suppress(OSError):
        flush(path)


def flush(path: Path) -> None:
    """Make the content of a file outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left: a name of its own is never written to again."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > 3600:
                partial.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a place to write into, which becomes the folder when all of it is there.

    Args:
        path: The folder; it does not exist, or is empty.

    Raises:
        FileExistsError: If it has been filled meanwhile.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        try:
            new.replace(path)
        except OSError:
            raise FileExistsError(f"{path} has been filled by somebody else meanwhile; nothing was written") from None
