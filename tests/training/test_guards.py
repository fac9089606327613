"""A loss that is not finite is found late enough not to stall, and traced to its part."""

import math

import pytest
import torch

from timm_mfd.training.guards import BadStep, LossGuard, all_finite

NAN, INF = math.nan, math.inf


def watch(guard, step, loss, criterion=1.0, per_stage=()):
    guard.watch(step, torch.tensor(loss), torch.tensor(criterion), torch.tensor(list(per_stage)))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_bad_step_is_returned_with_its_parts(bad):
    guard = LossGuard()
    watch(guard, 0, 1.0, 1.0, [0.5, 0.25])
    assert guard.bad_step() is None
    watch(guard, 1, bad, 2.0, [0.5, bad])
    watch(guard, 2, bad, bad, [bad, bad])
    found = guard.bad_step()
    assert (found.step, found.criterion, found.per_stage[0]) == (1, 2.0, 0.5)
    assert guard.bad_step(wait=True).step == 2
    assert guard.bad_step(wait=True) is None


def test_nothing_is_known_before_anything_was_watched():
    assert LossGuard().bad_step(wait=True) is None


def test_on_an_accelerator_the_newest_step_is_read_one_step_later(monkeypatch):
    """The device is played by the CPU; what is checked is when a number is asked for."""
    asked = []

    class Event:
        def record(self):
            pass

        def synchronize(self):
            asked.append(self)

    guard = LossGuard()
    watch(guard, 0, NAN)
    guard._pending[0] = (*guard._pending[0][:2], Event())
    assert guard.bad_step() is None
    assert asked == []
    watch(guard, 1, 1.0)
    guard._pending[1] = (*guard._pending[1][:2], Event())
    assert guard.bad_step().step == 0
    assert len(asked) == 1
    assert guard.bad_step() is None
    assert len(asked) == 1
    assert guard.bad_step(wait=True) is None
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("criterion", "per_stage", "words"),
    [
        (NAN, [0.1, 0.2], "the criterion (nan)"),
        (1.0, [0.1, INF], "the MFD loss of stage 4 (inf)"),
        (NAN, [NAN, 0.1], "the MFD loss of stage 2 (nan), the criterion (nan)"),
        (NAN, [NAN, NAN], "the MFD loss of stage 2 (nan), the MFD loss of stage 4 (nan), the criterion (nan)"),
        (3e38, [0.1, 0.2], "the sum of all"),
        (-INF, [], "the criterion (-inf)"),
    ],
)
def test_culprits_are_named_in_the_order_of_the_network(criterion, per_stage, words):
    assert BadStep(0, criterion, per_stage).culprits([2, 4]) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_bad_value_in_any_tensor_is_found_and_large_ones_are_not_bad(dtype):
    tensors = [torch.full((5,), 1e30, dtype=dtype), torch.arange(3), torch.zeros(0), torch.randn(2, 2, dtype=dtype)]
    assert all_finite(tensors)
    assert all_finite([])
    for bad in (NAN, INF):
        tensors[3][1, 0] = bad
        assert not all_finite(tensors)
