"""The state of a training run on disk: one file, replaced in one step, never pickled.

Everything that a run draws at random is a function of (seed, epoch, step, process), see `data/augmentation.py` and
`launch.seed_step`. So weights, optimizer and position are the whole state, and a resumed run goes on bit for bit.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
    _pack(optimizer.state_dict(), "optimizer", tensors)
    return tensors


def values_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps beside its tensors, such as counters, also in its groups, as JSON holds it."""
    return _pack(optimizer.state_dict(), "optimizer", {})


def _task_tensors(task: TrainingTask) -> dict[str, Tensor]:
    entries = task.get_checkpoint_state() | (task.get_checkpoint_state(ema=True) if task.has_ema() else {})
    return {f"{entry}/{name}": tensor for entry, values in entries.items() for name, tensor in values.items()}


def disk_space(task: TrainingTask) -> int:
    """Return about how many bytes a run takes: two checkpoints for a moment, with momentum, and the exported model."""
    weights = sum(parameter.nbytes for parameter in task.parameters() if parameter.requires_grad)
    state = sum(tensor.nbytes for tensor in _task_tensors(task).values())
    return 2 * (state + weights) + weights


def restore(
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Put the tensors of a checkpoint back where `tensors_of` found them.

    Args:
        task: A task like the one they were taken from, with its moving average set up if there was one.
        optimizer: A new optimizer over its parameters.
        tensors: The tensors; names without a slash are not theirs.
        values: What `values_of` returned. Default: every tensor of the optimizer is as its parameter.

    Raises:
        ValueError: If they belong to another model; nothing is changed then.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    tensors = {name: tensor for name, tensor in tensors.items() if "/" in name}
    for name, tensor in tensors.items():
        entry, _, rest = name.partition("/")
        entries.setdefault(entry, {})[rest] = tensor
    of_optimizer = entries.pop("optimizer", {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {name: tuple(tensor.shape) for name, tensor in _task_tensors(task).items()}
    found = {f"{entry}/{name}": tuple(tensor.shape) for entry in entries for name, tensor in entries[entry].items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    state = values["state"] if values else _as_parameters(of_optimizer, parameters)
    wrong += [f"optimizer/{number}" for number in state if int(number) >= len(parameters)]
    if wrong:
        there, here = (shapes.get(wrong[0], "missing") for shapes in (found, expected))
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} is {there} there and {here} here")
    task.load_checkpoint_state(entries["state_dict"], entries.get("task_state"))
    if task.has_ema():
        task.load_checkpoint_state(entries["state_dict_ema"], entries.get("task_state_ema"), ema=True)
    # Not by `load_state_dict`, which would give every tensor the dtype of its parameter.
    for number, value in state.items():
        optimizer.state[parameters[int(number)]] = _unpack(value, tensors, parameters[int(number)])
    for group, saved in zip(optimizer.param_groups, values["param_groups"] if values else (), strict=False):
        kept = {key: value for key, value in saved.items() if key not in _NOT_OF_THE_RUN}
        group.update(_unpack(kept, tensors, group["params"][0]))


_NOT_OF_THE_RUN = ("params", "fused", "foreach", "capturable", "differentiable")  # but of the device


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors in a value aside, each under a name, and return the rest as JSON holds it."""
    if isinstance(value, Tensor):
        tensors[name] = value
        last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return {"tensor": name, "on_cpu": value.device.type == "cpu", "channels_last": last}
    if isinstance(value, Mapping):
        names = {key: f"{name}/{key}".replace("optimizer/state/", "optimizer/") for key in value}
        return {str(key): _pack(part, names[key], tensors) for key, part in value.items() if _is_packable(part)}
    if isinstance(value, list | tuple):
        parts = [_pack(part, f"{name}/{index}", tensors) for index, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    return value


def _is_packable(value: Any) -> bool:
    """Whether JSON holds it; functions, dtypes and infinities in a group are arguments, which are there again."""
    return isinstance(value, Tensor | Mapping | list | tuple | str | int | None) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor], parameter: Tensor) -> Any:
    """Return what `_pack` was given; on the device of the parameter what lay on an accelerator."""
    if isinstance(value, Mapping) and "tuple" in value:
        return tuple(_unpack(part, tensors, parameter) for part in value["tuple"])
    if isinstance(value, Mapping) and "tensor" in value:
        found = tensors[value["tensor"]]
        layout = torch.channels_last if value["channels_last"] else torch.contiguous_format
        return found.to(found.device if value["on_cpu"] else parameter.device, copy=True, memory_format=layout)
    if isinstance(value, Mapping):
        return {key: _unpack(part, tensors, parameter) for key, part in value.items()}
    if isinstance(value, list):
        return [_unpack(part, tensors, parameter) for part in value]
    return value


def _as_parameters(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Return the state of a checkpoint of an earlier version, which kept tensors only."""
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        last = tensor.ndim == 4 and parameters[int(index)].is_contiguous(memory_format=torch.channels_last)
        state.setdefault(index, {})[key] = {"tensor": f"optimizer/{name}", "on_cpu": False, "channels_last": last}
    return state


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
