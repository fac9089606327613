"""A stage whose loss is mostly chance is named; a model that learned nothing is called so."""

import re
from types import SimpleNamespace

import pytest
import torch

from timm_mfd import mfd_loss
from timm_mfd.training.diagnosis import few_steps, sample_warnings, verdicts


def test_a_stage_is_named_where_its_noise_floor_is_a_sizeable_share_of_its_loss():
    stages = [SimpleNamespace(index=0, channels=8), SimpleNamespace(index=3, channels=512)]
    assert sample_warnings(stages, [128, 128]) == []  # the default run's: 0.0079
    (warning,) = sample_warnings(stages, [128, 9])
    assert "stage 3 has 9 samples in a batch, so chance alone gives its MFD loss 0.12, the noise floor" in warning
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
    found = verdicts(losses, answers, LABELS, top1, NAMES)
    assert len(found) == len(words)
    for sentence, pattern in zip(found, words, strict=True):
        assert re.search(pattern, sentence)


def test_one_class_is_no_reason_to_complain():
    assert verdicts([1.0], [0, 4], torch.ones(4, dtype=torch.long), 100.0, ("a", "b")) == []
    assert verdicts([1.0], [4], torch.zeros(4, dtype=torch.long), 100.0, ("only",)) == []


def test_so_few_steps_are_the_likelier_reason():
    assert few_steps(50) == ""
    (sentence,) = verdicts([1.0], [0, 10, 0], LABELS, 40.0, NAMES, few_steps(9))
    assert sentence.endswith("images; 9 steps are few; try more --epochs, or a smaller --batch-size")
