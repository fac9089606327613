"""Mixed batches are timm's, and a function of the position in the run alone."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from timm_mfd.data.mixing import Mixing


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 3, 1])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_a_step_mixes_as_timm_does_and_as_it_did_before(mixup, cutmix):
    mixing = Mixing(4, mixup=mixup, cutmix=cutmix, seed=5)
    images, targets = mixing(*batch(), epoch=2, step=7)
    np.random.seed(np.random.SeedSequence((5, 2, 7)).generate_state(4))
    expected, expected_targets = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=4)(*batch())
    assert torch.equal(images, expected)
    assert torch.equal(targets, expected_targets)
    assert not torch.equal(images, batch()[0])
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    mixing(*batch(), epoch=0, step=0)
    again, _ = mixing(*batch(), epoch=2, step=7)
    assert torch.equal(again, images)
    for other in ({"epoch": 2, "step": 8}, {"epoch": 3, "step": 7}):
        assert not torch.equal(mixing(*batch(), **other)[0], images)


def test_it_is_off_by_default_and_leaves_numpys_generator_alone():
    images, labels = batch()
    off = Mixing(4, mixup=0, cutmix=0, seed=0)
    assert all(a is b for a, b in zip(off(images, labels, 0, 0), (images, labels), strict=True))
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    Mixing(4, mixup=0.2, cutmix=0.5, seed=0)(images, labels, 0, 0)
    assert np.random.rand() == expected
