"""What every process found, brought together."""

from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def from_all_processes(value: _T) -> list[_T]:
    """Return the value of every process in the order of their ranks; without torch.distributed, that of this one.

    Args:
        value: Anything that can be pickled; every process must call this.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
