"""The table of pretrained tags: planned ones fit the paper's recipes, and weights may lie inside the package."""

import json

import pytest
import timm
import torch
from processes import run_python
from safetensors.torch import save_file

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
    [("resnet50_mfd.cifar100", "--recipe resnet50/cifar100/softmax"), ("resnet18_mfd", "--model resnet18_mfd")],
)
def test_an_unpublished_model_says_how_to_train_it(create, name, remedy):
    with pytest.raises(ValueError, match=f"no published weights yet.*{remedy}"):
        create(name, pretrained=True)


def test_a_tag_without_weights_is_the_network_for_its_data():
    model = timm_mfd.create_model("mobilenetv2_100_mfd.cifar10")
    assert model.num_classes == 10
    assert model.conv_stem.stride == (2, 2)
    assert timm_mfd.create_model("resnet18_mfd").num_classes == 1000


def test_weights_inside_the_package_load_without_a_network_and_are_checked(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=4, stem="small")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(half, tmp_path / "inside.safetensors")
    code = f"""
import importlib, json, warnings, timm, timm_mfd, torch
from safetensors.torch import load_file
from timm_mfd.models import _pretrained, resnet_mfd
row = dict(arguments=dict(stem="small", num_classes=4), preprocessing=dict(input_size=(3, 64, 64)))
row |= dict(file="{tmp_path}/inside.safetensors", sha256="{sha256_of(tmp_path / "inside.safetensors")}")
_pretrained.PRETRAINED["resnet18_mfd.inside"] = _pretrained.Pretrained(**row)
warnings.simplefilter("ignore")
importlib.reload(resnet_mfd)
model = timm_mfd.create_model("resnet18_mfd", pretrained=True)
stored = load_file("{tmp_path}/inside.safetensors")
found = [all(torch.equal(value.float(), model.state_dict()[key].float()) for key, value in stored.items())]
found += [str(model.fc.weight.dtype), timm.list_pretrained("*_mfd*")]
_pretrained.PRETRAINED["resnet18_mfd.inside"] = _pretrained.Pretrained(**row | dict(sha256="0" * 64))
try:
    timm.create_model("resnet18_mfd.inside", pretrained=True)
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""
    done = run_python("-c", code)
    done.check_returncode()
    same, dtype, listed, error = json.loads(done.stdout.splitlines()[-1])
    assert same
    assert dtype == str(torch.float32)
    assert listed == ["resnet18_mfd", "resnet18_mfd.inside"]
    assert "is not what was saved" in error
