"""Sums over batches against numpy on all samples at once."""

import numpy as np
import pytest
import torch

from timm_mfd.moments import ChannelMoments


def test_batches_add_up_to_numpys_correlation_of_all_samples():
    x = torch.einsum("ij,bjhw->bihw", torch.randn(6, 6), torch.randn(20, 6, 3, 4)) + 50
    moments = ChannelMoments()
    for part in x.split([1, 7, 12]):
        moments.update(part)
    expected = np.corrcoef(x.double().transpose(0, 1).flatten(1).numpy())
    np.testing.assert_allclose(moments.correlation().numpy(), expected, atol=1e-9)
    off_diagonal = np.abs(expected)[~np.eye(6, dtype=bool)].mean()
    assert moments.mean_abs_correlation() == pytest.approx(off_diagonal, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_channels_correlate_with_nothing(value):
    x = torch.randn(8, 3, 4, 4)
    x[:, 1] = value
    moments = ChannelMoments()
    for part in x.split(3):
        moments.update(part)
    assert torch.equal(moments.correlation()[1], torch.zeros(3, dtype=torch.float64))


def test_merging_is_adding_batches_and_leaves_the_other_as_it_is():
    x = torch.randn(30, 5, 2, 2) * 3 + 100
    x[:, 3] = 0.1
    whole, parts = ChannelMoments(), [ChannelMoments() for _ in range(4)]
    whole.update(x)
    for moments, part in zip(parts, x.split([1, 12, 17]), strict=False):
        moments.update(part)  # the last one stays empty
    before = parts[1].correlation()
    total = ChannelMoments()
    for moments in parts:
        total.merge(moments)
    assert total.count == whole.count
    torch.testing.assert_close(total.correlation(), whole.correlation(), atol=1e-12, rtol=0)
    assert total.std()[3] == 0
    assert torch.equal(parts[1].correlation(), before)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        ChannelMoments().correlation()
