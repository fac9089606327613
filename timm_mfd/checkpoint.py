"""The state of a training run on disk: one file, replaced in one step, never pickled.

Everything that a run draws at random is a function of (seed, epoch, step, process), see `data/augmentation.py` and
`launch.seed_step`. So weights, optimizer and position are the whole state, and a resumed run goes on bit for bit.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.task import TrainingTask
from torch import Tensor

from .atomic import replacing

FORMAT = "timm_mfd training state 1"


class Checkpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        tensors: Named tensors, on the CPU.
        record: Everything else, as JSON holds it.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a checkpoint; the previous one under the same name stays until the new one is complete and on the disk.

    Args:
        path: A `.safetensors` file; its folder is made.
        tensors: Tensors on any device, in any memory format.
        record: What JSON can hold; NaN and infinity are errors.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. The previous one is untouched.

    Example:
        >>> checkpoint.write(Path("checkpoint/state.safetensors"), checkpoint.tensors_of(task, optimizer), {"epoch": 3})
    """
    # Copies: tensors that share memory, as tied weights do, cannot be stored.
    on_cpu = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    text = json.dumps(record, allow_nan=False)
    header = {"format": FORMAT, "record": text, "crc32": str(_checksum(on_cpu, text))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            # Not save_file: it writes to a hidden file of its own first, which a kill would leave behind.
            partial.write_bytes(save(on_cpu, metadata=header))
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is ever executed.

    Args:
        path: What `write` wrote.

    Returns:
        Its tensors and its record.

    Raises:
        ValueError: If the file is missing, is no checkpoint, or is damaged.

    Example:
        >>> checkpoint.read(Path("checkpoint/state.safetensors")).record["epoch"]
        3
    """
    with _opened(path) as (file, header):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if header.get("crc32") != str(_checksum(tensors, header["record"])):
        raise ValueError(f"the checkpoint {path} is damaged: its checksum does not fit its content")
    return Checkpoint(tensors, json.loads(header["record"]))


def read_record(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds beside its tensors, without reading these.

    Raises:
        ValueError: If the file is missing or is no checkpoint.
    """
    with _opened(path) as (_, header):
        return json.loads(header["record"])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is not a checkpoint of a training run ({FORMAT!r})")
            yield file, header
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}; it is damaged or no checkpoint") from None


def tensors_of(task: TrainingTask, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect the tensors that training changes: weights, buffers, moving average, criterion and optimizer.

    Args:
        task: The task, not its distributed wrapper.
        optimizer: The optimizer itself, not a wrapper of it.

    Returns:
        Tensors under names that do not depend on compilation or distribution.
    """
    tensors = _task_tensors(task)
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items() if value is not None}
    return tensors


def _task_tensors(task: TrainingTask) -> dict[str, Tensor]:
    entries = task.get_checkpoint_state() | (task.get_checkpoint_state(ema=True) if task.has_ema() else {})
    return {f"{entry}/{name}": tensor for entry, values in entries.items() for name, tensor in values.items()}


def disk_space(task: TrainingTask) -> int:
    """Return about how many bytes a run takes: two checkpoints for a moment, with momentum, and the exported model."""
    weights = sum(parameter.nbytes for parameter in task.parameters() if parameter.requires_grad)
    state = sum(tensor.nbytes for tensor in _task_tensors(task).values())
    return 2 * (state + weights) + weights


def restore(task: TrainingTask, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of a checkpoint back where `tensors_of` found them.

    Args:
        task: A task like the one they were taken from, with its moving average set up if there was one.
        optimizer: A new optimizer over its parameters.
        tensors: The tensors; names without a slash are not theirs.

    Raises:
        ValueError: If they belong to another model; nothing is changed then.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    tensors = {name: tensor for name, tensor in tensors.items() if "/" in name}
    for name, tensor in tensors.items():
        entry, _, rest = name.partition("/")
        entries.setdefault(entry, {})[rest] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in entries.pop("optimizer", {}).items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value

    expected = {name: tuple(tensor.shape) for name, tensor in tensors_of(task, optimizer).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong += [f"optimizer/{number}" for number in state if number >= len(parameters)]
    if wrong:
        there, here = (shapes.get(wrong[0], "missing") for shapes in (found, expected))
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} is {there} there and {here} here")
    task.load_checkpoint_state(entries["state_dict"], entries.get("task_state"))
    if task.has_ema():
        task.load_checkpoint_state(entries["state_dict_ema"], entries.get("task_state_ema"), ema=True)
    for number, values in state.items():
        # In the memory format of the parameter, so that the update stays one fused pass.
        like = parameters[number]
        for key, value in values.items():
            values[key] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
