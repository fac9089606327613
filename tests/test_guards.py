"""A loss that is no number is traced to its part; a model that learned nothing is called so."""

import math
from types import SimpleNamespace

import pytest
import torch

from timm_mfd.guards import BadStep, LossGuard, all_finite, sample_warnings, verdicts

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


def test_a_stage_is_named_where_its_noise_floor_is_a_sizeable_share_of_its_loss():
    stages = [SimpleNamespace(index=0, channels=8), SimpleNamespace(index=3, channels=512)]
    assert sample_warnings(stages, [128, 128]) == []  # the default run's: 0.0079
    (warning,) = sample_warnings(stages, [128, 9])
    assert "stage 3 has 9 samples in a batch, so chance alone gives its MFD loss 0.12, the noise floor" in warning
    from timm_mfd import mfd_loss

    assert torch.stack([mfd_loss(torch.randn(9, 64, 1, 1)) for _ in range(200)]).mean() == pytest.approx(
        1 / 8, rel=0.05
    )


LABELS = torch.tensor([0] * 6 + [1] * 4)
NAMES = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("losses", "answers", "top1", "words"),
    [
        ([1.0, 0.5], [5, 5, 0], 70.0, []),
        ([1.0, 0.5], [0, 10, 0], 40.0, ["the model is constant: it answers 'bee' for every one of the 10"]),
        ([1.0, 0.9], [5, 5, 0], 60.0, ["learned nothing that helps: .* for 60.00 % .* 'ant' would be for 60.00 %"]),
        ([1.0, 0.5, 0.9], [5, 5, 0], 70.0, ["diverged: .* was 0.5 in epoch 2 and 0.9 in the last one"]),
        ([1.0, 0.5, 0.7], [5, 5, 0], 70.0, []),
        ([1.0, 9.0], [10, 0, 0], 60.0, ["constant", "diverged"]),
    ],
)
def test_a_model_that_learned_nothing_is_described_in_words(losses, answers, top1, words):
    import re

    found = verdicts(losses, answers, LABELS, top1, NAMES)
    assert len(found) == len(words)
    for sentence, pattern in zip(found, words, strict=True):
        assert re.search(pattern, sentence)


def test_one_class_is_no_reason_to_complain():
    assert verdicts([1.0], [0, 4], torch.ones(4, dtype=torch.long), 100.0, ("a", "b")) == []
    assert verdicts([1.0], [4], torch.zeros(4, dtype=torch.long), 100.0, ("only",)) == []
