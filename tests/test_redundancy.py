"""Streaming statistics against numpy on all samples at once."""

import numpy as np
import pytest
import timm
import torch

from timm_mfd import forward_stages
from timm_mfd.redundancy import ChannelMoments, mean_abs_correlation


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


def test_model_measurement_equals_all_activations_at_once_and_restores_the_mode():
    model = timm.create_model("test_resnet").train()
    images = torch.randn(6, 3, 64, 64)
    measured = mean_abs_correlation(model, images.split(2))
    assert model.training
    with torch.no_grad():
        stages = forward_stages(model.eval(), images).stages
    for value, stage in zip(measured, stages, strict=True):
        with np.errstate(invalid="ignore"):  # an untrained ReLU network has dead channels: 0 / 0 is 0 here
            r = np.nan_to_num(np.corrcoef(stage.double().transpose(0, 1).flatten(1).numpy()))
        assert value == pytest.approx(np.abs(r)[~np.eye(len(r), dtype=bool)].mean(), abs=1e-6)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no images"):
        mean_abs_correlation(timm.create_model("test_resnet"), [])
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        ChannelMoments().correlation()
