"""What is put into the package are the run's weights, rounded, with the accuracy that they have."""

import json
import re
from dataclasses import replace

import embed
import evaluate
import pytest
import torch
import train
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import timm_mfd
from timm_mfd import recipes, results
from timm_mfd.model_card import check_card
from timm_mfd.models import _pretrained

NAME = "resnet18_mfd.digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a recipe on digits, in a protocol of one epoch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("embed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        short = replace(recipes.PROTOCOLS["quick"], epochs=1, milestones=(1,), lr=0.02)
        patch.setattr(recipes, "PROTOCOLS", {**recipes.PROTOCOLS, "quick": short})
        train.main(train.parse(["--recipe", "resnet18/digits/softmax+mfd@quick", "--output-dir", str(folder)]))
        result = results.collect(folder)
    return folder, replace(result, protocol="paper")


@pytest.fixture
def places(run, tmp_path, monkeypatch):
    folder, result = run
    monkeypatch.setattr(results, "collect", lambda _: result)
    arguments = {"package": tmp_path / "package", "cards": tmp_path / "cards", "results": tmp_path / "results"}
    return embed.Args(folder, **arguments)


def coarse(tensors):
    """Rounded so far that other answers are right."""
    return {key: value.half().mul(4).round().div(4) if value.dim() > 1 else value for key, value in tensors.items()}


@pytest.mark.parametrize("rounded", [embed.rounded, coarse])
def test_the_rounded_weights_are_written_measured_and_made_known(rounded, run, places, capsys, monkeypatch):
    folder, result = run
    monkeypatch.setattr(embed, "rounded", rounded)
    monkeypatch.setattr(embed, "FARTHEST", 100)
    embed.main(places)
    shown = capsys.readouterr().out
    weights = load_file(places.package / "weights" / f"{NAME}.safetensors")
    original = load_file(folder / "model" / "model.safetensors")
    assert weights.keys() == original.keys()
    for key, value in rounded(original).items():
        assert torch.equal(weights[key], value), key
        assert value.dtype == (torch.float16 if value.dim() > 1 else original[key].dtype), key
    measured = json.loads((places.results / f"{NAME}.json").read_text())
    assert f"top-1 {measured['top1']:.2f} % of 360 images; {result.top1:.2f} % before the rounding" in shown

    # By hand: the network with the rounded numbers, in float32.
    model = timm_mfd.create_model("resnet18_mfd", num_classes=10, stem="cifar")
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    data = evaluate.load_dataset("digits", None)
    pixels = torch.as_tensor(data.test.pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        answers = model.eval()((pixels - data.mean[0]) / data.std[0]).argmax(1)
    right = (answers == torch.as_tensor(data.test.labels)).sum().item()
    assert measured["top1"] == pytest.approx(100 * right / 360)
    assert measured["top1"] != result.top1 or rounded is embed.rounded  # else the card could show either

    card = (places.cards / f"{NAME}.md").read_text()
    check_card(card)
    assert f"| {measured['top1']:.2f} | {measured['top5']:.2f} | 360 (test) |" in card
    assert f'"{NAME}", pretrained=True' in card
    assert measured["sha256"] in card
    assert "label_names" not in card
    lines = shown[shown.index(f'    "{NAME}"') :].splitlines()
    assert all(len(line) <= 120 for line in lines)

    monkeypatch.setattr(_pretrained, "_PACKAGE", places.package)
    entry = eval("{" + shown[shown.index(f'    "{NAME}"') :] + "}", vars(_pretrained))[NAME]
    assert entry.weights() == places.package / "weights" / f"{NAME}.safetensors"
    assert entry.arguments == {"stem": "cifar", "num_classes": 10}
    assert (entry.preprocessing["input_size"], entry.preprocessing["mean"]) == ((3, 8, 8), data.mean)


def test_what_cannot_be_embedded_is_said_and_nothing_is_written(run, places, tmp_path, monkeypatch):
    result = run[1]
    (tmp_path / "unfinished").mkdir()
    somebodys = places.package / "weights" / f"{NAME}.safetensors"
    somebodys.parent.mkdir(parents=True)
    somebodys.write_text("somebody's")
    with pytest.raises(SystemExit) as error:
        embed.main(places)
    assert f"{somebodys} is there already; give --replace to put others in its place" in error.value.code
    assert somebodys.read_text() == "somebody's"
    (tmp_path / "blocked").write_text("")
    places = replace(places, replace=True)
    cases = [
        (replace(places, run_dir=tmp_path / "unfinished"), {}, "is not a finished run: summary.json is missing"),
        (replace(places, cards=tmp_path / "blocked"), {}, "File exists: .*blocked"),
        (places, {"LARGEST": 1000}, "take .* bytes, more than 1,000: too much to install"),
        (places, {"rounded": lambda _: {"conv1.weight": torch.zeros(1)}}, "does not fit resnet18_mfd"),
    ]
    for args, changes, message in cases:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
            for name, value in changes.items():
                patch.setattr(embed, name, value)
            embed.main(args)
        assert re.search(message, error.value.code)
    for change, message in (
        ({"data": "other"}, "holds other images than those that the run was measured on"),
        ({"top1": result.top1 - 1}, r"the rounded weights have a top-1 of .* is not its model, or float16 does not do"),
        ({"top1": float("nan")}, "the run says nan %"),
        ({"protocol": "strong"}, r"stands for resnet18/digits/softmax\+mfd under the protocol paper, and .*@strong"),
        ({"recipe": "resnet18/digits/softmax"}, "and --run-dir .* is resnet18/digits/softmax$"),
    ):
        monkeypatch.setattr(results, "collect", lambda _, change=change: replace(result, **change))
        with pytest.raises(SystemExit) as error:
            embed.main(places)
        assert re.search(message, error.value.code)
    assert somebodys.read_text() == "somebody's"
    assert not list(places.cards.iterdir())
    assert not list(places.results.iterdir())


def test_numbers_that_float16_cannot_hold_are_named():
    with pytest.raises(ValueError, match="fc.weight has numbers that float16 cannot hold"):
        embed.rounded({"fc.bias": torch.full((2,), 1e5), "fc.weight": torch.full((2, 2), 1e5)})
    kept = embed.rounded({"fc.bias": torch.full((2,), 1e5), "steps": torch.tensor(3)})
    assert (kept["fc.bias"].dtype, kept["steps"].dtype) == (torch.float32, torch.int64)
