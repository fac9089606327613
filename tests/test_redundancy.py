"""Streaming statistics against numpy on all samples at once."""

import json

import numpy as np
import pytest
import timm
import torch
from processes import run_processes

from timm_mfd import create_model, forward_stages
from timm_mfd.moments import ChannelMoments, ClassMeans
from timm_mfd.redundancy import (
    StageRedundancy,
    mean_abs_correlation,
    measure_redundancy,
    near_duplicates,
)
from timm_mfd.stages import stage_info

CLASSES = 4


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


def model_and_data(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    size = model.pretrained_cfg["input_size"]
    size = size if model.pretrained_cfg.get("fixed_input_size") else (3, 64, 64)
    return model, torch.randn(11, *size), torch.tensor([0, 1, 3, 3, 1, 0, 3, 0, 0, 1, 3])  # class 2 has no image


def by_numpy(x, labels):
    """All statistics of one stage from all activations at once, in float64."""
    samples = x.double().numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
    varies = np.ptp(samples, axis=1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(samples))
    r[~varies], r[:, ~varies] = 0, 0
    n, channels = samples.shape[1], len(r)
    pairs = [(i, j) for i in range(channels) for j in range(channels) if i != j]
    eigenvalues = np.linalg.eigvalsh(r[np.ix_(varies, varies)])
    share = eigenvalues[eigenvalues > 1e-15] / varies.sum()
    means = np.stack([x.double().numpy()[labels.numpy() == k].mean((0, 2, 3)) for k in sorted(set(labels.tolist()))])
    with np.errstate(invalid="ignore", divide="ignore"):
        of_means = np.nan_to_num(np.corrcoef(means.T))
    std = samples.std(axis=1)
    return {
        "samples": n,
        "mean_abs_r": np.mean([abs(r[pair]) for pair in pairs]),
        "mean_r2": np.mean([r[pair] ** 2 for pair in pairs]),
        "noise_floor": 1 / (n - 1),
        "corrected_r2": np.mean(
            [r[i, j] ** 2 - (1 - r[i, j] ** 2) / (n - 2) if varies[i] and varies[j] else 0 for i, j in pairs]
        ),
        "effective_rank": np.exp(-np.sum(share * np.log(share))),
        "class_mean_abs_r": np.mean([abs(of_means[pair]) for pair in pairs]),
        "dead": tuple(np.flatnonzero(~varies)),
        "near_dead": tuple(np.flatnonzero(varies & (std < 0.01 * np.median(std[varies])))),
    }


def check_against_numpy(found, model, images, labels):
    with torch.no_grad():
        stages = forward_stages(model.eval(), images).stages
    assert len(found) == len(stages)
    for stage, x in zip(found, stages, strict=True):
        for name, value in by_numpy(x, labels).items():
            assert getattr(stage, name) == pytest.approx(value, abs=1e-6), (stage.stage, name)
        assert (stage.channels, stage.size) == (x.shape[1], tuple(x.shape[2:]))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_every_statistic_equals_that_of_all_activations_at_once(name):
    model, images, labels = model_and_data(name)
    batches = zip(images.split([1, 4, 6]), labels.split([1, 4, 6]), strict=True)
    found = measure_redundancy(model.train(), batches, num_classes=CLASSES)
    assert model.training
    check_against_numpy(found, model, images, labels)
    json.dumps([stage.to_json() for stage in found])


def measure_share(rank, processes, name):
    model, images, labels = model_and_data(name)
    mine = slice(0, 7) if rank == 0 else slice(7, 11)
    return measure_redundancy(model, [(images[mine], labels[mine])], num_classes=CLASSES)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_two_processes_with_uneven_shares_give_the_statistics_of_one(name, tmp_path):
    for found in run_processes(measure_share, 2, tmp_path, name):
        check_against_numpy(found, *model_and_data(name))


def test_planted_groups_and_dead_channels_are_found_and_no_others():
    torch.manual_seed(0)
    model = create_model("mobilenetv2_100_mfd", stem="cifar").eval()
    block = model.blocks[0][0]  # its output is linear: batch norm without an activation, without a shortcut
    weight, scale, shift = block.conv_pw.weight.data, block.bn2.weight.data, block.bn2.bias.data
    for copy, of, factor in ((5, 2, 1.0), (11, 2, -3.0), (9, 7, 0.5)):
        weight[copy], scale[copy], shift[copy] = weight[of], factor * scale[of], 4.0
    scale[13] = 0.0
    shift[13] = 0.7
    scale[14] *= 1e-4
    stage = measure_redundancy(model, [(torch.randn(16, 3, 16, 16), None)], indices=[0])[0]
    assert stage.groups == ((2, 5, 11), (7, 9))
    assert stage.dead == (13,)
    assert stage.near_dead == (14,)
    assert stage.correlation[2, 11] == pytest.approx(-1)
    assert stage.class_mean_abs_r is None


def test_no_pair_of_a_group_is_below_the_threshold_and_no_two_groups_could_be_one():
    torch.manual_seed(0)
    mixed = torch.randn(40, 4) @ torch.randn(4, 500) + 0.3 * torch.randn(40, 500)
    r, tau = torch.corrcoef(mixed.double()), 0.8
    groups = near_duplicates(r, tau)
    members = [channel for group in groups for channel in group]
    assert len(members) == len(set(members)) > 4
    alone = [(channel,) for channel in range(40) if channel not in members]
    for group in groups:
        assert all(abs(r[i, j]) > tau for i in group for j in group)
    for one in (*groups, *alone):
        for other in (*groups, *alone):
            assert one == other or any(abs(r[i, j]) <= tau for i in one for j in other)
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)


def test_the_threshold_itself_is_not_above_the_threshold():
    matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.6], [0.1, 0.6, 1.0]], dtype=torch.double)
    assert near_duplicates(matrix, 0.5) == ((1, 2),)
    assert near_duplicates(matrix, 0.6) == ()
    assert near_duplicates(matrix, 0.59) == ((1, 2),)


def test_noise_has_full_rank_and_nothing_above_its_floor():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    moments = ChannelMoments()
    moments.update(torch.randn(50, 40, 4, 4))
    noise = StageRedundancy.of(stage_info(model)[0], (4, 4), moments, ClassMeans(0), 0.9)
    assert noise.mean_r2 == pytest.approx(noise.noise_floor, rel=0.1)
    assert abs(noise.corrected_r2) < 0.1 * noise.noise_floor
    assert noise.effective_rank > 38
    assert noise.groups == ()


def test_one_tensor_in_place_of_batches_is_refused():
    with pytest.raises(ValueError, match=r"not one tensor \[2, 3, 64, 64\]; pass \[images\]"):
        measure_redundancy(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("tau", [0.0, 1.0, -1.0])
def test_a_threshold_that_says_nothing_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be between 0 and 1"):
        measure_redundancy(timm.create_model("test_resnet"), [], tau=tau)


def test_batches_without_labels_are_plain_tensors():
    model, images = timm.create_model("test_resnet"), torch.randn(4, 3, 64, 64)
    plain, paired = measure_redundancy(model, [images]), measure_redundancy(model, [(images, None)])
    assert [stage.to_json() for stage in plain] == [stage.to_json() for stage in paired]
    assert "tensor" not in repr(plain)


def test_labels_of_no_class_and_values_that_are_not_finite_are_refused():
    model, images = timm.create_model("test_resnet"), torch.randn(4, 3, 64, 64)
    for label in (13, -1):
        with pytest.raises(ValueError, match=f"label {label} is outside of the 10 classes"):
            measure_redundancy(model, [(images, torch.tensor([0, 1, 2, label]))], num_classes=10)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"stage 0 \(.*\) is not finite on these images"):
        measure_redundancy(model, [images])


def test_one_image_of_one_pixel_has_no_correlation():
    with pytest.raises(ValueError, match="stage 4 gave 1 sample; correlation needs more images"):
        measure_redundancy(timm.create_model("test_resnet"), [(torch.randn(1, 3, 32, 32), None)], indices=[-1])
