"""The table of pretrained tags: planned ones fit the paper's recipes, and weights may lie inside the package."""

import json
from pathlib import Path

import pytest
import timm
import torch
from processes import run_python
from safetensors.torch import load_file, save_file

import timm_mfd
from timm_mfd import recipes
from timm_mfd.models import arguments_for
from timm_mfd.models._pretrained import PRETRAINED
from timm_mfd.models.saved import sha256_of


@pytest.mark.parametrize("name", [name for name, entry in PRETRAINED.items() if entry.recipe])
def test_a_tag_builds_the_network_of_its_recipe(name):
    entry = PRETRAINED[name]
    arguments = recipes.RECIPES[entry.recipe].arguments("paper")
    side = entry.preprocessing["input_size"][1:]
    stem = arguments_for(arguments.model, side)["stem"] if arguments.stem == "auto" else arguments.stem
    assert name == f"{arguments.model}.{arguments.dataset}"
    assert entry.arguments["stem"] == stem
    size = recipes.DATA_SIZES[arguments.dataset]
    assert timm.get_pretrained_cfg(name).num_classes == entry.arguments["num_classes"] == size.classes
    assert side == (size.side, size.side)


def test_only_what_is_published_counts_as_pretrained():
    published = {name for name, entry in PRETRAINED.items() if entry.published}
    names = published | {name.partition(".")[0] for name in published}
    assert set(timm.list_pretrained("*_mfd*")) == set(timm_mfd.list_models(pretrained=True)) == names


@pytest.mark.parametrize("create", [timm.create_model, timm_mfd.create_model])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("resnet50_mfd.tiny_imagenet", r"--recipe resnet50/tiny_imagenet/softmax\+mfd --data-dir DIR$"),
        ("resnet50_mfd", r"--recipe resnet50/cifar100/softmax\+mfd --data-dir DIR$"),
        ("resnet18_mfd", "--model resnet18_mfd$"),
    ],
)
def test_an_unpublished_model_says_what_is_there_and_how_to_train_its_own(create, name, remedy):
    pattern = f"{name}' has no published weights yet; there are those of .*mobilenetv2_100_mfd.cifar100.*{remedy}"
    with pytest.raises(ValueError, match=pattern) as error:
        create(name, pretrained=True)
    assert ".py" not in str(error.value)  # a wheel holds no scripts


def test_a_tag_without_weights_is_the_network_for_its_data():
    model = timm_mfd.create_model("mobilenetv2_100_mfd.cifar10")
    assert model.num_classes == 10
    assert model.conv_stem.stride == (2, 2)
    assert timm_mfd.create_model("resnet18_mfd").num_classes == 1000


SEVERAL = """
import importlib, json, warnings, timm, timm_mfd, torch
from safetensors.torch import load_file
from timm_mfd.models import _pretrained, resnet_mfd

def embed(tag, file, sha256, num_classes):
    row = dict(arguments=dict(stem="small", num_classes=num_classes), preprocessing=dict(input_size=(3, 64, 64)))
    _pretrained.PRETRAINED[f"resnet18_mfd.{tag}"] = _pretrained.Pretrained(**row, file=file, sha256=sha256)
    importlib.reload(resnet_mfd)

def refused(name):
    try:
        timm.create_model(name, pretrained=True)
    except ValueError as error:
        return str(error)

warnings.simplefilter("ignore")
"""


def test_weights_inside_the_package_load_without_a_network_and_the_bare_name_is_cifar100s(tmp_path):
    """Several are embedded one after the other; another process, because they change timm's registry."""
    for tag, classes in (("cifar10", 4), ("cifar100", 7)):
        model = timm_mfd.create_model("resnet18_mfd", num_classes=classes, stem="small")
        half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(half, tmp_path / f"{tag}.safetensors")
    rows = {tag: f'"{tag}", "{tmp_path}/{tag}.safetensors"' for tag in ("cifar10", "cifar100")}
    sums = {tag: sha256_of(tmp_path / f"{tag}.safetensors") for tag in rows}
    code = f"""{SEVERAL}
embed({rows["cifar10"]}, "{sums["cifar10"]}", 4)
found = [refused("resnet18_mfd"), "resnet18_mfd" in timm_mfd.list_models(pretrained=True)]
embed({rows["cifar100"]}, "{sums["cifar100"]}", 7)
for create in (timm.create_model, timm_mfd.create_model):
    for name, tag in (("resnet18_mfd", "cifar100"), ("resnet18_mfd.cifar10", "cifar10")):
        model, stored = create(name, pretrained=True), load_file(f"{tmp_path}/{{tag}}.safetensors")
        same = all(torch.equal(value.float(), model.state_dict()[key].float()) for key, value in stored.items())
        found.append([same, model.num_classes, str(model.fc.weight.dtype), model.pretrained_cfg["input_size"]])
found.append(timm.list_pretrained("resnet*_mfd*"))
embed({rows["cifar10"]}, "{"0" * 64}", 4)
found.append(refused("resnet18_mfd.cifar10"))
print(json.dumps(found))
"""
    done = run_python("-c", code)
    done.check_returncode()
    only_cifar10, listed, *loaded, all_listed, damaged = json.loads(done.stdout.splitlines()[-1])
    assert "'resnet18_mfd' has no published weights yet; there are those of resnet18_mfd.cifar10;" in only_cifar10
    assert not listed
    assert loaded == [[True, classes, "torch.float32", [3, 64, 64]] for classes in (7, 4)] * 2
    assert all_listed == ["resnet18_mfd", "resnet18_mfd.cifar10", "resnet18_mfd.cifar100"]
    assert "is not what was saved" in damaged


@pytest.mark.parametrize("name", [name for name, entry in PRETRAINED.items() if entry.file])
def test_embedded_weights_are_small_checked_and_have_a_card_and_a_measurement(name):
    root = Path(timm_mfd.__file__).parents[1]
    weights = PRETRAINED[name].weights()
    assert weights.stat().st_size <= 6_000_000
    assert {value.dtype for value in load_file(weights).values() if value.dim() > 1} == {torch.float16}
    card, measured = root / "model_cards" / f"{name}.md", json.loads((root / "results" / f"{name}.json").read_text())
    assert f"| {measured['top1']:.2f} | {measured['top5']:.2f} | {measured['count']:,} (test) |" in card.read_text()
    assert measured["sha256"] == PRETRAINED[name].sha256
    model = timm.create_model(name, pretrained=True)
    assert model.num_classes == PRETRAINED[name].arguments["num_classes"]
