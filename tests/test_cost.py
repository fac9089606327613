"""What a reproduction costs, against layers counted one by one."""

import math
import re

import cost
import pytest
import torch
from torch import nn

import timm_mfd
from timm_mfd import recipes


def operations_by_hand(model, side):
    """Two operations for each product of a weight, three times: output, gradient of the input, gradient of the weights.

    The first convolution needs no gradient of its input.
    """
    layers = []

    def note(layer, args, out):
        layers.append(2 * out.numel() * math.prod(layer.weight.shape[1:]))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    model.eval()(torch.zeros(1, 3, side, side))
    return 3 * sum(layers) - layers[0]


@pytest.mark.parametrize("row", ["mobilenetv2/tiny_imagenet/softmax", "resnet50/cifar100/softmax+mfd"])
def test_operations_are_those_of_its_layers(row):
    (recipe,) = (recipe for recipe in recipes.PAPER_RECIPES if recipe.id == row)
    args = recipe.arguments()
    size = recipes.DATA_SIZES[recipe.dataset]
    model = timm_mfd.create_model(args.model, num_classes=size.classes, stem=args.stem)
    assert cost.operations_of(recipe, "paper") == operations_by_hand(model, size.side)


def test_a_run_takes_whole_batches_only():
    (recipe,) = (recipe for recipe in recipes.PAPER_RECIPES if recipe.id == "resnet50/cifar10/softmax")
    assert cost.images_of(recipe, "paper") == 100 * (50_000 - 50_000 % 128)
    assert cost.images_of(recipe, "quick") == 10 * (50_000 - 50_000 % 128)


def test_the_whole_reproduction_is_the_sum_of_its_rows(capsys, monkeypatch):
    def operations(recipe, _):
        return 1.2345e7 * len(recipe.backbone) * recipes.DATA_SIZES[recipe.dataset].side

    monkeypatch.setattr(cost, "operations_of", operations)
    cost.cost(tflops=0.5)
    *rows, _, total = capsys.readouterr().out.splitlines()[1:]
    runs, images, work = 0, 0.0, 0.0
    for row in rows:
        _, count, millions, _, _, peta, time, *_ = row.split()
        runs, images, work = runs + int(count), images + int(count) * float(millions), work + int(count) * float(peta)
        unit = {"hours": 3600, "days": 86400}[row.split()[7]]
        assert float(time) * unit == pytest.approx(float(peta) * 1e15 / 0.5e12, abs=0.051 * unit, rel=1e-3)
    assert runs == 126
    assert total.startswith("126 runs: ")
    said = [float(number.replace(",", "")) for number in re.findall(r"[\d,.]+(?= (?:million|PFLOP|days))", total)]
    assert said == pytest.approx([images, work, work * 1e15 / 0.5e12 / 86400], rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tflops": 0.0}, "--tflops must be a number above 0, not 0"),
        ({"tflops": math.nan}, "--tflops must be a number above 0, not nan"),
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"rows": ("resnet51",)}, "no row 'resnet51'"),
    ],
)
def test_mistakes_end_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cost.cost(**options)
    assert message in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
    assert not capsys.readouterr().out
