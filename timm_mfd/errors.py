"""What foreign code raises, as one line that names the culprit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def one_line(error: BaseException) -> str:
    """Return what an error says in one line; the name of its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def named(what: str) -> Iterator[None]:
    """Name the culprit of whatever is raised while foreign code does its work.

    A ValueError or OSError passes as it is: those say what is wrong already. So does lack of memory.

    Args:
        what: What cannot be done, and with what.

    Raises:
        ValueError: `what`, and the first words of the error.

    Example:
        >>> with named("resnet18 cannot be compiled"):
        ...     compiled(images)
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {first_words(error)}") from error


def first_words(error: BaseException, most: int = 300) -> str:
    """Return the beginning of what an error says in one line, with its class where the words alone say little."""
    words = one_line(error)
    short = words if len(words) <= most else f"{words[:most]}..."
    return short if " " in short or not str(error) else f"{type(error).__name__}: {short}"
