"""The registered architectures: plain timm models whose stems are recorded."""

import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_args
from timm.models.resnet import ResNet

import timm_mfd
from timm_mfd.models import arguments_for, paper_stem
from timm_mfd.stages import stage_shapes

# Parameters of timm's architecture with 1,000 classes, and what a stem for small images changes of them: the first
# kernels of 64 channels are 3x3 instead of 7x7, 64 * 3 * (49 - 9) weights fewer.
PARAMETERS = {
    "densenet121_mfd": (7_978_856, -7_680),
    "mobilenetv2_100_mfd": (3_504_872, 0),
    "resnet18_mfd": (11_689_512, -7_680),
    "resnet34_mfd": (21_797_672, -7_680),
    "resnet50_mfd": (25_557_032, -7_680),
    "resnext50_32x4d_mfd": (25_028_904, -7_680),
}
NAMES = tuple(PARAMETERS)
ONE_AND_SLOW = [pytest.param(n, marks=() if "18" in n else pytest.mark.slow) for n in NAMES]
README = Path(timm_mfd.models.__file__).with_name("README.md")
META = torch.device("meta")  # where there are shapes and no numbers
SIDES = {"imagenet": [16, 8, 4, 2, 1], "small": [32, 16, 8, 4, 2], "cifar": [32, 32, 16, 8, 4]}


@pytest.mark.parametrize("stem", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_stems_give_the_documented_map_sizes(name, stem):
    with META:
        model = timm_mfd.create_model(name, num_classes=10, stem=stem).eval()
        out = timm_mfd.forward_stages(model, torch.randn(1, 3, 32, 32))
    assert [stage.shape[2] for stage in out.stages] == SIDES[stem]
    assert [info["reduction"] for info in model.feature_info] == [32 // side for side in SIDES[stem]]
    assert get_model_args(model)["stem"] == stem


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_begins_at_the_loss_of_guessing(name):
    # lr 0.1 without warm-up, as in the paper, needs this: from a first loss of 5 MobileNetV2's stages blew up.
    torch.manual_seed(0)
    model = timm_mfd.create_model(name, num_classes=10)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.arange(32) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)


def readme_rows(heading):
    """The cells of the README's table whose first column has this heading."""
    lines = README.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def test_the_readme_states_the_stages_of_every_model():
    maps = {stem: (at_32, at_64) for stem, _, at_32, at_64 in readme_rows("stem")}
    assert maps.keys() == SIDES.keys()
    models = readme_rows("model")
    assert {name for name, *_ in models} == set(NAMES)
    for name, parameters, channels, stem_at_32, stem_at_64 in models:
        assert parameters == f"{PARAMETERS[name][0] / 1e6:.1f} M"
        assert (stem_at_32, stem_at_64) == (paper_stem(name, 32), paper_stem(name, 64))
        for stem in maps:
            with META:
                model = timm_mfd.create_model(name, stem=stem)
            for side in (32, 64):
                with META:
                    shapes = [tuple(shape[1:]) for _, shape in stage_shapes(model, torch.zeros(1, 3, side, side))]
                stated = zip(channels.split(", "), maps[stem][side == 64].split(", "), strict=True)
                assert shapes == [(int(c), int(s), int(s)) for c, s in stated], (name, stem, side)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_timms_up_to_the_first_kernels(name):
    count, difference = PARAMETERS[name]
    with META:
        assert sum(p.numel() for p in timm.create_model(name.removesuffix("_mfd")).parameters()) == count
        for stem, expected in (("imagenet", count), ("small", count + difference), ("cifar", count + difference)):
            assert sum(p.numel() for p in timm_mfd.create_model(name, stem=stem).parameters()) == expected


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


@pytest.mark.parametrize(
    ("name", "key", "fan"),
    [("resnet50_mfd", "conv1.weight", 64 * 9), ("densenet121_mfd", "features.conv0.weight", 3 * 9)],
)
def test_small_stems_differ_from_timm_in_the_first_kernel_only(name, key, fan):
    plain = timm.create_model(name.removesuffix("_mfd"), num_classes=10).state_dict()
    small = timm_mfd.create_model(name, num_classes=10, stem="cifar").state_dict()
    assert plain.keys() == small.keys()
    assert {k for k in plain if plain[k].shape != small[k].shape} == {key}
    assert small[key].shape == (64, 3, 3, 3)
    # Drawn as timm draws the other kernels of the network: He, fan out in ResNet, fan in in DenseNet.
    assert small[key].std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_timms_options_work(name):
    with META:
        model = timm.create_model(name, stem="cifar", in_chans=1, num_classes=3).eval()
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
        model.reset_classifier(4)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
        features = timm.create_model(name, stem="small", features_only=True, out_indices=(1, 3)).eval()
        assert [tuple(f.shape[1:]) for f in features(torch.randn(1, 3, 64, 64))] == [
            (channels, side, side) for channels, side in zip(features.feature_info.channels(), (32, 8), strict=True)
        ]
        assert features.feature_info.reduction() == [2, 8]
        embedding = timm.create_model(name, stem="small", num_classes=0).eval()
        assert embedding(torch.randn(2, 3, 64, 64)).shape == (2, embedding.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_the_stages_of_forward_stages(name):
    model = timm_mfd.create_model(name, stem="cifar").eval()
    features = timm.create_model(name, stem="cifar", features_only=True).eval()
    assert features.model.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        stages = timm_mfd.forward_stages(model, x).stages
        assert all(torch.equal(a, b) for a, b in zip(features(x), stages, strict=True))


@pytest.mark.parametrize("name", ONE_AND_SLOW)
def test_compiled_models_give_the_same_logits(name):
    model = timm_mfd.create_model(name, num_classes=10, stem="cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ONE_AND_SLOW)
def test_onnx_export_gives_the_same_logits(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm_mfd.create_model(name, num_classes=10, stem="cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


def test_names_are_in_timms_registry():
    assert set(timm_mfd.list_models()) == set(NAMES) <= set(timm.list_models())
    assert timm_mfd.list_models("resnet*") == ["resnet18_mfd", "resnet34_mfd", "resnet50_mfd"]


@pytest.mark.parametrize(
    ("name", "side", "stem"),
    [("densenet121_mfd", 32, "cifar"), ("resnext50_32x4d_mfd", 64, "small"),
     ("resnet50_mfd", 32, "cifar"), ("resnet50_mfd", 64, "small"), ("resnet50_mfd", 224, "imagenet"),
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
        ("resnet50", {"stem": "cifar"}, "'resnet50' takes no stem; models with a stem: densenet121_mfd, "),
        ("resnet50_mfd", {"pretrained": True}, "'resnet50_mfd' has no published weights"),
        ("resnet50_mfd.nope", {}, "'resnet50_mfd' has no tag 'nope'; it has resnet50_mfd.cifar10, "),
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
    [({}, "config.json missing"),
     ({"config.json": '{"architecture": "resnet18", "num_classes": 1}'}, "model.safetensors missing"),
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
    [("resnet50_mfd", (32, 32), None, {"stem": "cifar"}), ("resnet50_mfd.tag", (64, 64), None, {}),
     ("resnet50_mfd", (32, 32), "small", {"stem": "small"}), ("resnet50", (32, 32), None, {}),
     ("vit_tiny_patch16_224", (64, 64), None, {"img_size": (64, 64)}), ("local-dir:/x", (64, 64), None, {})],
)  # fmt: skip
def test_arguments_that_fit_a_model_to_the_images(name, size, stem, expected):
    assert arguments_for(name, size, stem) == expected


def test_resnet_class_is_timms():
    assert type(timm_mfd.create_model("resnet18_mfd", stem="small")) is ResNet
