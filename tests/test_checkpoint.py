"""A checkpoint comes back bit for bit, or is refused; the previous one survives whatever cuts the writing short."""

import json
import os
import pickle
import random
import time
from itertools import count
from pathlib import Path

import pytest
import timm
import torch
from processes import CONTEXT, start_process, wait_for
from safetensors.torch import save_file

from timm_mfd import MFDClassificationTask, checkpoint


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "checkpoint" / "state.safetensors"


def trained(model="test_resnet", steps=2, num_classes=3, ema=True, seed=0, momentum=0.9):
    torch.manual_seed(seed)
    network = timm.create_model(model, num_classes=num_classes).to(memory_format=torch.channels_last)
    task = MFDClassificationTask(network, verbose=False).train()
    if ema:
        task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=momentum)
    for _ in range(steps):
        task(torch.randn(4, 3, 64, 64), torch.arange(4) % num_classes)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    return task, optimizer


def bits(tensors):
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def test_tensors_and_numbers_come_back_bit_for_bit(path):
    shared = torch.randn(3)
    tensors = {
        "bf16": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(7),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "strided": torch.randn(6)[::2],
        "tied a": shared,
        "tied b": shared,
        "empty": torch.zeros(0, 3),
        "not a number": torch.tensor([float("nan"), float("inf")]),
    }
    record = {"lr": 0.1 + 0.2, "seconds": 1e-300, "text": "ångström", "none": None, "list": [1, [2.5]]}
    checkpoint.write(path, tensors, record)
    found = checkpoint.read(path)
    assert bits(found.tensors) == bits(tensors)
    assert found.record == record
    assert os.listdir(path.parent) == ["state.safetensors"]


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_a_new_task_goes_on_bit_for_bit_from_the_tensors_of_another(path, model):
    def go_on(task, optimizer):
        torch.manual_seed(1)
        size = 160 if model == "test_vit" else 64
        for _ in range(2):
            task(torch.randn(4, 3, size, size), torch.arange(4) % 3)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        return bits(checkpoint.tensors_of(task, optimizer))

    task, optimizer = trained(model, steps=0 if model == "test_vit" else 2)
    checkpoint.write(path, checkpoint.tensors_of(task, optimizer), {})
    other, other_optimizer = trained(model, steps=0, seed=5)
    checkpoint.restore(other, other_optimizer, checkpoint.read(path).tensors)
    assert go_on(other, other_optimizer) == go_on(task, optimizer)
    for name, values in other_optimizer.state.items():
        assert values["momentum_buffer"].stride() == name.stride()


def test_names_do_not_depend_on_compilation():
    task, optimizer = trained(steps=0)
    plain = checkpoint.tensors_of(task, optimizer).keys()
    task.compile(backend="eager")
    assert checkpoint.tensors_of(task, optimizer).keys() == plain
    assert not any("_orig_mod" in name for name in plain)


@pytest.mark.parametrize(
    ("other", "culprit"),
    [
        ({"num_classes": 4}, "state_dict/fc.bias is (3,) there and (4,) here"),
        ({"model": "test_efficientnet"}, "missing"),
        ({"ema": False}, "state_dict_ema/"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(path, other, culprit):
    checkpoint.write(path, checkpoint.tensors_of(*trained()), {})
    task, optimizer = trained(**{"steps": 0, "seed": 3, **other})
    before = bits(checkpoint.tensors_of(task, optimizer))
    with pytest.raises(ValueError, match="the checkpoint is of another model") as error:
        checkpoint.restore(task, optimizer, checkpoint.read(path).tensors)
    assert culprit in str(error.value)
    assert bits(checkpoint.tensors_of(task, optimizer)) == before


def test_every_truncation_is_refused(path):
    checkpoint.write(path, {"a": torch.arange(50.0)}, {"epoch": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="state.safetensors"):
            checkpoint.read(path)


def test_a_flipped_bit_anywhere_in_the_values_or_the_record_is_refused(path):
    checkpoint.write(path, {"a": torch.arange(20.0), "b": torch.tensor(3)}, {"epoch": 12345})
    whole = path.read_bytes()
    places = [*range(len(whole) - 88, len(whole)), whole.index(b"12345")]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read(path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("the-bomb-went-off",))


def test_a_pickle_is_refused_and_not_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path.parent.mkdir()
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save({"state": Bomb()}, path)):
        write()
        with pytest.raises(ValueError, match="it is damaged or no checkpoint"):
            checkpoint.read(path)
    assert not Path("the-bomb-went-off").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("the-bomb-went-off").exists(), "the bomb of this test is a dud"


def test_what_is_missing_or_foreign_is_refused_with_its_name(path, tmp_path):
    for missing in (path, tmp_path):
        with pytest.raises(ValueError, match=f"there is no checkpoint {missing}"):
            checkpoint.read(missing)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights.safetensors is not a checkpoint of a training run"):
        checkpoint.read(tmp_path / "weights.safetensors")


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(path):
    checkpoint.write(path, {"a": torch.ones(3)}, {"epoch": 1})
    path.with_name("state.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*state.safetensors: .*No space left on device"):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"epoch": 2})
    assert checkpoint.read(path).record == {"epoch": 1}
    assert os.listdir(path.parent) == ["state.safetensors"]
    checkpoint.write(path, {"a": torch.zeros(3)}, {"epoch": 2})
    assert checkpoint.read(path).record == {"epoch": 2}


def test_what_json_cannot_hold_is_an_error_before_anything_is_written(path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write(path, {}, {"loss": float("nan")})
    assert not path.parent.exists()


def write_forever(path, written):
    for number in count(1):
        checkpoint.write(path, {str(i): torch.full((100_000,), number) for i in range(20)}, {"number": number})
        written.value = number


def test_a_killed_writer_leaves_a_whole_checkpoint(path):
    """Writing is all that it does, so nearly every kill hits a write."""
    chance = random.Random(0)
    for _ in range(5):
        written = CONTEXT.RawValue("i", 0)  # without a lock, which the killed one could hold
        writer = start_process(write_forever, path, written)
        wait_for(lambda: written.value)  # noqa: B023
        time.sleep(0.3 * chance.random())
        writer.kill()
        writer.join()
        tensors, record = checkpoint.read(path)
        assert record["number"] in (written.value, written.value + 1)
        assert all((tensor == record["number"]).all() for tensor in tensors.values())


def test_the_header_is_json_that_any_tool_can_read(path):
    checkpoint.write(path, {"a": torch.zeros(1)}, {"epoch": 4})
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert header["format"] == checkpoint.FORMAT
    assert json.loads(header["record"]) == {"epoch": 4}
