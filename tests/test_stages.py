"""`forward_stages` against timm itself: the same logits, the declared stages, nothing changed."""

import warnings

import pytest
import timm
import torch
from torch import nn

from timm_mfd import create_model, forward_stages
from timm_mfd.stages import stage_info, stage_shapes

PYRAMIDS = ("test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_nfnet", "test_mambaout")
ISOTROPIC = ("test_vit", "test_vit_relpos")
# Classifiers that are not simply `linear(pre_logits)`: norm inside, two averaged, convolution, auxiliary, Sequential.
OTHER_HEADS = ("shvit_s1", "deit_tiny_distilled_patch16_224", "resnetv2_18", "volo_d1_224", "mvitv2_tiny")


@pytest.fixture(params=[*PYRAMIDS, *ISOTROPIC, "mobilenetv2_100_mfd"])
def model(request):
    return create_model(request.param, num_classes=7)


def images_for(model, batch=2):
    return torch.randn(batch, *model.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", [*PYRAMIDS, *ISOTROPIC, *OTHER_HEADS, "resnet18_mfd"])
def test_logits_equal_the_plain_forward_pass(name):
    model = create_model(name, num_classes=7).eval()
    x = images_for(model)
    with torch.no_grad():
        out = forward_stages(model, x)
        assert torch.equal(out.logits, model(x))
    if out.embedding is not None:
        assert torch.equal(model.get_classifier()(out.embedding), out.logits)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "shvit_s1", "lcnetv2_small"])
def test_training_mode_draws_the_same_dropout_and_updates_buffers_once(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.4)
    x = images_for(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected, expected_state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.manual_seed(3)
    assert torch.equal(forward_stages(model, x).logits, expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected_state[key]), key


def test_stages_agree_with_feature_info_and_get_gradients(model):
    x = images_for(model)
    out = forward_stages(model, x)
    info = stage_info(model)
    assert [stage.shape[1] for stage in out.stages] == [entry.channels for entry in info]
    for stage, entry in zip(out.stages, info, strict=True):
        assert stage.shape[2] == pytest.approx(x.shape[2] / entry.reduction, abs=1)
    for stage in out.stages:
        gradients = torch.autograd.grad(
            stage.square().mean(), list(model.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_later_layers_do_not_overwrite_an_earlier_stage(model):
    model.eval()
    x = images_for(model)
    with torch.no_grad():
        whole = forward_stages(model, x).stages
        for entry, stage in zip(stage_info(model), whole, strict=True):
            (alone,) = model.forward_intermediates(
                x, indices=[entry.index], stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            assert torch.equal(alone, stage)


def test_pyramids_give_the_five_stages_of_the_paper():
    for name in ("resnet50", "densenet121", "mobilenetv2_100"):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert [stage.reduction for stage in stage_info(model)] == [2, 4, 8, 16, 32]


def test_isotropic_models_give_four_evenly_spaced_blocks():
    with torch.device("meta"):
        blocks = {
            name: timm.create_model(name) for name in ("vit_tiny_patch16_224", "mixer_s16_224", "eva_large_patch14_196")
        }
    taken = {name: [stage.index for stage in stage_info(model)] for name, model in blocks.items()}
    assert taken == {
        "vit_tiny_patch16_224": [2, 5, 8, 11],
        "mixer_s16_224": [1, 3, 5, 7],
        "eva_large_patch14_196": [5, 11, 17, 23],
    }


def test_indices_choose_stages_and_count_from_the_end():
    model = timm.create_model("test_resnet")
    x = images_for(model)
    assert [stage.shape[1] for stage in forward_stages(model, x, (0, -1)).stages] == [32, 96]
    assert [entry.index for entry in stage_info(model, (0, -1))] == [0, 4]


def test_a_model_without_classifier_gives_no_logits_but_its_embedding():
    model = timm.create_model("test_resnet", num_classes=0).eval()
    x = images_for(model)
    out = forward_stages(model, x)
    assert out.logits is None
    assert torch.equal(out.embedding, model(x))


@pytest.mark.parametrize(
    ("indices", "message"),
    [((5,), "stage index 5 is out of range: the model has stages 0 to 4"), ((-6,), "-6 is out of range"),
     ((), "at least one"), ((2, 1), r"increasing.*\[2, 1\]"), ((1, -4), "increasing")],
)  # fmt: skip
def test_wrong_indices_are_named(indices, message):
    model = timm.create_model("test_resnet")
    with pytest.raises(ValueError, match=message):
        forward_stages(model, images_for(model), indices)


def test_a_module_that_is_no_timm_model_is_refused():
    with pytest.raises(TypeError, match="Sequential is not a timm model"):
        forward_stages(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 8, 8))


def test_images_that_a_model_does_not_take_are_named():
    model = timm.create_model("vit_tiny_patch16_224").train()
    with pytest.raises(ValueError, match="VisionTransformer does not take images of 32x32: "):
        stage_shapes(model, torch.zeros(1, 3, 32, 32))
    assert model.training


def test_too_little_memory_is_not_called_a_wrong_size(monkeypatch):
    model = create_model("test_resnet")

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "forward_intermediates", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        stage_shapes(model, torch.zeros(1, 3, 32, 32))


def test_stage_shapes_restores_training_mode():
    model = timm.create_model("test_resnet").train()
    shapes = stage_shapes(model, torch.zeros(1, 3, 32, 32))
    assert tuple(shapes[0][1]) == (1, 32, 16, 16)
    assert model.training


# Measured with timm 1.0.31: this class declares its first stage at half its true stride.
WRONG_REDUCTION = {"TResNet"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_registered_architecture_gives_its_declared_stages():
    """All architectures of timm on the meta device, at their own input size."""
    problems, count = {}, 0
    for name in timm.list_models():
        count += 1
        try:
            # gemma4 reads a number out of a tensor, so it needs a real device (and takes smaller images).
            device = "cpu" if name.startswith("gemma4") else "meta"
            with torch.device(device), torch.no_grad():
                model = timm.create_model(name).eval()
                size = model.pretrained_cfg["input_size"] if device == "meta" else (3, 96, 96)
                info = stage_info(model)
                out = forward_stages(model, torch.zeros(2, *size))
            # Valid (unpadded) convolutions lose a few pixels against input / reduction.
            assert len(out.stages) == len(info)
            for stage, entry in zip(out.stages, info, strict=True):
                assert stage.ndim == 4, f"stage {entry.index} has shape {tuple(stage.shape)}"
                assert stage.shape[:2] == (2, entry.channels), f"{tuple(stage.shape)} but {entry}"
                if type(model).__name__ not in WRONG_REDUCTION:
                    assert abs(stage.shape[2] - size[1] / entry.reduction) <= 4, f"{tuple(stage.shape)} but {entry}"
            classes = getattr(model, "num_classes", 0)
            assert (out.logits is None) == (classes == 0)
            assert out.logits is None or out.logits.shape == (2, classes)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"
    print(f"{count} architectures, {len(problems)} exceptions: {problems}")  # noqa: T201
    assert count >= 1371
    assert not problems


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_real_model_of_every_class_gives_the_logits_of_the_plain_forward_pass():
    smallest: dict[type, tuple[float, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"), warnings.catch_warnings():
            model = timm.create_model(name)
        cost = sum(p.numel() for p in model.parameters()) * model.pretrained_cfg["input_size"][1] ** 2
        smallest[type(model)] = min(smallest.get(type(model), (cost, name)), (cost, name))
    different = []
    for kind, (_, name) in smallest.items():
        model = timm.create_model(name).eval()
        with torch.no_grad():
            x = images_for(model, batch=1)
            out = forward_stages(model, x)
            if out.logits is not None and not torch.equal(out.logits, model(x)):
                different.append((kind.__name__, name))
    print(f"{len(smallest)} classes, different logits: {different}")  # noqa: T201
    assert len(smallest) >= 93
    assert not different
