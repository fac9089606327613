"""Channels that are zero wherever they go are removed, and nothing else changes."""

import json

import pytest
import timm
import torch
from processes import run_processes
from safetensors.torch import load_file
from torch import nn

import timm_mfd
from timm_mfd.models.pruned import fit_widths
from timm_mfd.pruning import SilentInputs, prune_silent
from timm_mfd.stages import stage_info

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def lively(name, **arguments):
    """A model in which every channel says something: an untrained one has silent channels by chance."""
    torch.manual_seed(0)
    model = timm_mfd.create_model(name, num_classes=10, **arguments)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.fill_(0.5)
            norm.bias.fill_(3.0)
        model.train()(IMAGES.repeat(8, 1, 1, 1) + 0.1 * torch.randn(32, 3, 32, 32))
    return model.eval()


def silence(norm, channels, value=0.0):
    """Make channels of a batch norm constant."""
    with torch.no_grad():
        norm.weight[channels] = 0
        norm.bias[channels] = value


def heard(model, images=IMAGES):
    with SilentInputs(model.eval()) as silent, torch.no_grad():
        for part in images.split(3):
            model(part)
    return silent


def pruned(model):
    return prune_silent(model, heard(model), [(IMAGES, None)], (32, 32))


def test_layers_that_got_only_zeros_are_known_by_channel():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(2), nn.Linear(900, 5))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 1.0, -100.0, 0.0, 0.0, 0.0]))
        model[0].weight[:3] = 0
        model[0].weight[4:] = 0
        model[0].weight[5, 0, 1, 1] = 1
    images = IMAGES.abs()
    images[:3, 0] = -1  # channel 5 is heard in the last image alone
    silent = heard(model, images)
    assert silent.masks["0"].tolist() == [False] * 3
    assert silent.masks["2"].tolist() == [True, False, True, False, True, False]
    assert silent.masks["4"].shape == (900,)
    assert not any(module._forward_pre_hooks for module in model.modules())


def masks_of_share(rank, processes):
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 1, 1))
    images = torch.full((1, 3, 2, 2), -1.0)
    images[0, rank] = 1  # every process hears one channel
    silent = heard(model, images)
    silent.gather()
    return silent.masks["1"].tolist()


def test_what_one_process_hears_is_heard(tmp_path):
    assert list(run_processes(masks_of_share, 2, tmp_path)) == [[False, False, True]] * 2


def test_exactly_the_planted_channels_go_with_all_they_cost():
    model = lively("resnet18_mfd", stem="cifar")
    silence(model.layer2[0].bn1, [3, 5], -1.0)  # inside of a block: two channels of 128
    # A channel of the first stage goes wherever shortcuts take it: the stem, and both blocks.
    for norm in (model.bn1, model.layer1[0].bn2, model.layer1[1].bn2):
        silence(norm, [7])
    silence(model.layer1[0].bn2, [8])  # silent in one of its places only
    silence(model.layer3[0].bn1, [0], 1.0)  # constant, but not 0
    found = pruned(model)
    assert found.layers == {"conv1": [7], "layer2.0.conv1": [3, 5]}
    assert found.channels == 3
    gone = 2 * (64 * 9 + 2 + 128 * 9)  # 3x3 from 64, batch norm, 3x3 to 128
    gone += 27 + 2  # the stem
    # Both blocks of the first stage: 3x3 into 64 inner channels and 3x3 back, with the batch norm behind.
    gone += 2 * (64 * 9 + 64 * 9 + 2)
    gone += 128 * 9 - 2 * 9 + 128  # into the second stage: 3x3 to the 126 inner channels that are left, 1x1 shortcut
    assert found.parameters[0] == sum(p.numel() for p in model.parameters())
    assert found.parameters[0] - found.parameters[1] == gone
    saved = 2 * (16 * 16 * 64 * 9 + 16 * 16 * 128 * 9)  # the second stage has 16x16 pixels
    saved += 32 * 32 * 27 + 2 * 32 * 32 * (64 * 9 + 64 * 9) + 16 * 16 * (126 * 9 + 128)
    assert found.multiply_adds[0] - found.multiply_adds[1] == saved
    assert found.model.layer1[0].conv1.weight.shape == (64, 63, 3, 3)
    assert [stage.channels for stage in stage_info(found.model)] == [63, 63, 128, 256, 512]
    torch.testing.assert_close(found.model(IMAGES), model(IMAGES), atol=1e-5, rtol=0)
    assert 0 < found.difference <= 1e-5
    assert found.largest_logit == float(model(IMAGES).detach().abs().max())


@pytest.mark.parametrize(
    "name",
    ["densenet121_mfd", "mobilenetv2_100_mfd", "resnext50_32x4d_mfd", "efficientnet_b0", "seresnet18", "repvit_m0_9"],
)
def test_pruned_models_answer_as_before_and_load_again(name, tmp_path):
    model = timm_mfd.create_model(name, num_classes=10)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        silence(norm, slice(0, norm.num_features // 4))
        silence(norm, [norm.num_features // 4], -2.0)
    found = pruned(model)
    assert found.channels > 100
    assert found.parameters[1] < 0.9 * found.parameters[0]
    torch.testing.assert_close(found.model(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)
    timm_mfd.save_pretrained(found.model, tmp_path / "pruned", label_names=list("abcdefghij"))
    routes = [timm_mfd.create_model]
    if name.endswith("_mfd"):
        routes.append(timm.create_model)
    for create in routes:
        loaded = create(f"local-dir:{tmp_path}/pruned", pretrained=True).eval()
        assert torch.equal(loaded(IMAGES), found.model(IMAGES))
        stages = timm_mfd.forward_stages(loaded, IMAGES).stages
        assert [stage.channels for stage in stage_info(loaded)] == [stage.shape[1] for stage in stages]
        assert loaded.num_features == loaded.forward_features(IMAGES).shape[1]
    # Once more, from what was loaded.
    timm_mfd.save_pretrained(loaded, tmp_path / "again")
    again = timm_mfd.create_model(f"local-dir:{tmp_path}/again", pretrained=True).eval()
    assert torch.equal(again(IMAGES), found.model(IMAGES))
    assert "timm.create_model takes it" in (tmp_path / "pruned" / "README.md").read_text() or len(routes) == 1


def test_the_model_itself_stays_as_it_is():
    model = timm_mfd.create_model("resnet18_mfd", num_classes=10).requires_grad_(False)
    silence(model.layer2[0].bn1, [3])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = pruned(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "pruned")
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_a_layer_keeps_one_channel_and_what_is_never_silent_stays():
    model = lively("resnet18_mfd")
    silence(model.layer4[0].bn1, slice(None))
    found = pruned(model)
    assert found.model.layer4[0].conv1.out_channels == 1
    assert pruned(lively("resnet18_mfd")).channels == 0


def test_models_that_mix_channels_in_other_ways_are_left_alone_or_refused():
    torch.manual_seed(0)
    convnext = timm.create_model("convnext_atto", num_classes=10)
    assert pruned(convnext).parameters[1] == pruned(convnext).parameters[0]
    ghost = timm.create_model("ghostnet_100", num_classes=10)
    for norm in (module for module in ghost.modules() if isinstance(module, nn.BatchNorm2d)):
        silence(norm, slice(0, norm.num_features // 4))
        nn.init.normal_(norm.bias[norm.num_features // 4 :])
    with pytest.raises(ValueError, match=r"Torch-Pruning (cannot follow|does not understand)"):
        pruned(ghost)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s", "botnet26t_256"])
def test_attention_is_refused_before_it_takes_gigabytes(name):
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    silent = heard(model, torch.zeros(1, *size))
    with pytest.raises(ValueError, match="multiplies activations with each other, as attention does"):
        prune_silent(model, silent, [], size[1:])


def test_a_logit_that_moves_is_refused():
    model = lively("resnet18_mfd")
    silent = heard(model)
    silent.masks["layer2.0.conv2"][:5] = True  # which is not so
    with pytest.raises(ValueError, match="a logit of ResNet is .* off"):
        prune_silent(model, silent, [(IMAGES, None)], (32, 32))


def test_logits_that_are_not_finite_equal_nothing():
    model = lively("resnet18_mfd")
    silence(model.layer2[0].bn1, [3])
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="a logit of ResNet is inf off"):
        pruned(model)


def test_the_mode_of_the_model_is_kept_and_its_statistics_too():
    model = lively("resnet18_mfd")
    silent = heard(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prune_silent(model.train(), silent, [(IMAGES, None)], (32, 32))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_networks_that_cannot_be_compared_or_followed_are_refused_at_once():
    for name, classes, message in (("resnet18", 0, "no classifier"), ("eca_resnet33ts", 10, "over channels")):
        model = timm.create_model(name, num_classes=classes).eval()
        with pytest.raises(ValueError, match=message):
            prune_silent(model, heard(model), [], (32, 32))


@pytest.fixture
def saved(tmp_path):
    model = timm_mfd.create_model("resnet18", num_classes=10)
    silence(model.layer2[0].bn1, [3])
    return timm_mfd.save_pretrained(pruned(model).model, tmp_path / "saved")


def test_a_pruned_model_keeps_its_classes_and_channels(saved):
    for argument in ({"num_classes": 5}, {"in_chans": 1}, {"global_pool": "catavgmax"}, {"features_only": True}):
        with pytest.raises(ValueError, match=r"is pruned and takes no .*; load it as it is"):
            timm_mfd.create_model(f"local-dir:{saved}", pretrained=True, **argument)
    timm_mfd.create_model(f"local-dir:{saved}", pretrained=True, num_classes=10, drop_rate=0.1)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_without_its_weights_a_pruned_model_has_its_widths(saved):
    model = timm_mfd.create_model(f"local-dir:{saved}", pretrained=False)
    assert model.layer2[0].conv1.out_channels == pruned_shape(saved)
    assert model.eval()(IMAGES).isfinite().all()


def pruned_shape(folder):
    return len(load_file(folder / "model.safetensors")["layer2.0.conv1.weight"])


def test_pruned_weights_in_a_configuration_that_does_not_say_so_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["pruned"] is True
    for value in (False, "yes"):
        (saved / "config.json").write_text(json.dumps(config | {"pruned": value}))
        with pytest.raises(ValueError, match="pruned"):
            timm_mfd.create_model(f"local-dir:{saved}", pretrained=True)


def test_weights_that_no_pruning_made_do_not_fit():
    shapes = {key: list(value.shape) for key, value in timm.create_model("resnet18").state_dict().items()}
    for key, shape in (("conv1.weight", None), ("conv1.weight", [65, 3, 7, 7]), ("bn1.num_batches_tracked", [1])):
        changed = {**shapes, key: shape or []}
        with pytest.raises(ValueError, match=rf"{key} is \[.*\] in the network"):
            fit_widths(timm.create_model("resnet18"), changed)
