"""Time things side by side, and count what they do: the tools of the benchmark."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from counters import Kernels, Operations, Traffic, opened


def seconds_of(thing: Callable[[], object], device: torch.device, calls: int) -> float:
    """Time one call on a CPU, or the mean of many on a GPU: between two events, as the host runs ahead of it."""
    if device.type != "cuda":
        started = time.perf_counter()
        thing()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        thing()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls / 1e3


def time_side_by_side(
    things: dict[str, Callable[[], object]], rounds: int, device: torch.device, calls: int = 20
) -> dict[str, Any]:
    """Return `{name: {median, spread, ratio}}` in seconds; ratios are to the first thing, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name, thing in things.items():
            value = seconds_of(thing, device, calls)
            if number:  # the first round warms up
                seconds[name].append(value)
    first = seconds[next(iter(things))]
    return {
        name: {
            "median": statistics.median(values),
            "spread": float(np.subtract(*np.percentile(values, [75, 25]))) / 2,
            "ratio": statistics.median(value / base for value, base in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def show(title: str, timings: dict[str, Any]) -> None:
    """Print one row a thing."""
    for name, value in timings.items():
        milliseconds = f"{value['median'] * 1e3:9.2f} ms +- {value['spread'] * 1e3:6.2f}"
        print(f"  {title:<14} {name:<22} {milliseconds}   x{value['ratio']:.3f}")


def counts_of(thing: Callable[[], object]) -> dict[str, int]:
    """Count what a call does: kernels, bytes moved and operations."""
    with opened(), Kernels() as kernels, Traffic() as traffic, Operations() as operations:
        thing()
    return {"kernels": kernels.started, "bytes": traffic.bytes, "operations": operations.total}


@functools.cache
def measured_rates(rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: operations per second of a large product or convolution, bytes per second of a copy."""
    side, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    maps = torch.randn(side // 16, 256, 16, 16, device=device, dtype=dtype)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    maps, kernel = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (maps, kernel))
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    # On some CPUs, libraries for convolutions are faster than those for products.
    things = {"product": lambda: a @ b, "convolution": lambda: F.conv2d(maps, kernel, padding=1)}
    timings = time_side_by_side({**things, "copy": lambda: target.copy_(source)}, rounds, device)
    speeds = []
    for name, thing in things.items():
        with Operations() as operations:
            thing()
        speeds.append(operations.total / timings[name]["median"])
    return {"operations": max(speeds), "bytes": 2 * source.nbytes / timings["copy"]["median"]}
