"""Run a function of a test module in several gloo processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_processes(function: Callable[..., Any], processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call `function(rank, processes, *arguments)` in each process and return what each returned."""
    torch.multiprocessing.spawn(_enter, (function, processes, str(folder), arguments), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _enter(rank: int, function: Callable[..., Any], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, processes, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
