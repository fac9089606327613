"""The registered architectures: plain timm models whose stems are recorded."""

import pytest
import timm
import torch
from timm.models import get_model_args
from timm.models.resnet import ResNet

import timm_mfd
from timm_mfd.models import arguments_for, paper_stem

NAMES = ("resnet18_mfd", "resnet50_mfd", "mobilenetv2_100_mfd")
SIDES = {"imagenet": [16, 8, 4, 2, 1], "small": [32, 16, 8, 4, 2], "cifar": [32, 32, 16, 8, 4]}


@pytest.mark.parametrize("stem", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_stems_give_the_documented_map_sizes(name, stem):
    model = timm_mfd.create_model(name, num_classes=10, stem=stem).eval()
    out = timm_mfd.forward_stages(model, torch.randn(1, 3, 32, 32))
    assert [stage.shape[2] for stage in out.stages] == SIDES[stem]
    assert [info["reduction"] for info in model.feature_info] == [32 // side for side in SIDES[stem]]
    assert get_model_args(model)["stem"] == stem


@pytest.mark.parametrize("name", NAMES)
def test_models_are_plain_timm_models(name):
    plain = timm.create_model(name.removesuffix("_mfd"))
    model = timm.create_model(name)
    assert type(model) is type(plain)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))


def test_small_resnet_stems_differ_from_timm_in_the_first_kernel_only():
    plain = timm.create_model("resnet50", num_classes=10).state_dict()
    small = timm_mfd.create_model("resnet50_mfd", num_classes=10, stem="cifar").state_dict()
    assert {key for key in plain if plain[key].shape != small[key].shape} == {"conv1.weight"}
    assert small["conv1.weight"].shape == (64, 3, 3, 3)
    assert small["conv1.weight"].std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He, fan out


@pytest.mark.parametrize("name", NAMES)
def test_timms_options_work(name):
    model = timm.create_model(name, stem="cifar", in_chans=1, num_classes=3).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    model.reset_classifier(4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    features = timm.create_model(name, stem="small", features_only=True, out_indices=(1, 3)).eval()
    assert [tuple(f.shape[1:]) for f in features(torch.randn(1, 3, 64, 64))] == [
        (channels, side, side) for channels, side in zip(features.feature_info.channels(), (32, 8), strict=True)
    ]
    assert features.feature_info.reduction() == [2, 8]


def test_names_are_in_timms_registry_and_nothing_unpublished_counts_as_pretrained():
    assert set(timm_mfd.list_models()) == set(NAMES) <= set(timm.list_models())
    assert timm_mfd.list_models("resnet*") == ["resnet18_mfd", "resnet50_mfd"]
    assert timm_mfd.list_models(pretrained=True) == timm.list_pretrained("*_mfd*") == []


@pytest.mark.parametrize(
    ("name", "side", "stem"),
    [("resnet50_mfd", 32, "cifar"), ("resnet50_mfd", 64, "small"), ("resnet50_mfd", 224, "imagenet"),
     ("mobilenetv2_100_mfd", 32, "imagenet"), ("mobilenetv2_100_mfd", 64, "imagenet")],
)  # fmt: skip
def test_stems_of_the_paper(name, side, stem):
    assert paper_stem(name, side) == stem


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnt50_mfd", {}, "unknown model 'resnt50_mfd'; did you mean resnet50_mfd"),
        ("zzzz", {}, r"unknown model 'zzzz'; see timm_mfd.list_models\(\)"),
        ("resnet50_mfd", {"stem": "cifr"}, "unknown stem 'cifr'; choose one of imagenet, small, cifar"),
        ("resnet50", {"stem": "cifar"}, "'resnet50' takes no stem; models with a stem: mobilenetv2_100_mfd"),
        ("resnet50_mfd", {"pretrained": True}, "'resnet50_mfd' has no published weights"),
        ("resnet50_mfd.nope", {}, "'resnet50_mfd' has no tag 'nope'; it has none"),
        ("resnet18.nope", {}, "'resnet18' has no tag 'nope'; it has resnet18.a1_in1k"),
        ("resnet50_mfd", {"stem": "cifar", "stem_type": "deep"}, "stem 'cifar' .* cannot be combined with stem_type"),
        ("hub:org/name", {}, "hub"),
        ("org/name", {}, "hf-hub:org/name"),
    ],
)
def test_wrong_names_are_named_with_a_remedy(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm_mfd.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "config.json and model.safetensors missing"), ({"config.json": "{}"}, "model.safetensors missing"),
     ({"config.json": "{", "model.safetensors": ""}, "config.json' is not a model configuration"),
     ({"config.json": '{"architecture": "no_net"}', "model.safetensors": ""}, "unknown architecture: 'no_net'")],
)  # fmt: skip
def test_a_damaged_export_folder_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        timm_mfd.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("name", "size", "stem", "expected"),
    [("resnet50_mfd", (32, 32), None, {"stem": "cifar"}), ("resnet50_mfd.tag", (64, 64), None, {"stem": "small"}),
     ("resnet50_mfd", (32, 32), "small", {"stem": "small"}), ("resnet50", (32, 32), None, {}),
     ("vit_tiny_patch16_224", (64, 64), None, {"img_size": (64, 64)}), ("local-dir:/x", (64, 64), None, {})],
)  # fmt: skip
def test_arguments_that_fit_a_model_to_the_images(name, size, stem, expected):
    assert arguments_for(name, size, stem) == expected


def test_resnet_class_is_timms():
    assert type(timm_mfd.create_model("resnet18_mfd", stem="small")) is ResNet
