"""What a run runs on, for the record: versions, the commit of the code, device and system."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("timm_mfd", "torch", "timm", "torchvision", "accelerate", "safetensors", "numpy", "pillow")


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
    for package in PACKAGES:
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
    """Return whether some part of a run gave way to other work, at a lowered priority: its times are no speeds.

    Args:
        args: What `args.json` holds.
    """
    return any(part["environment"].get("shared_machine", False) for part in (args, *args.get("history", [])))


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
