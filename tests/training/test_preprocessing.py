"""A run that starts from weights prepares its images as theirs were."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import train
from accelerate.state import AcceleratorState
from PIL import Image

import timm_mfd
from timm_mfd.arguments import Args
from timm_mfd.training.preprocessing import load_data

pytestmark = pytest.mark.usefixtures("runs_here")


@pytest.fixture
def half(tmp_path):
    """A saved model that was trained with 0.5 and 0.25, for images of 32 px."""
    model = timm.create_model("test_resnet", num_classes=3)
    timm_mfd.save_pretrained(model, tmp_path / "half", mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(32, 32))
    return f"local-dir:{tmp_path / 'half'}"


def test_mean_deviation_and_size_are_the_models_own_unless_a_size_is_given(half, folder_dataset):
    args = Args(model=half, pretrained=True, dataset="folder", data_dir=str(folder_dataset))
    taken, data, words = load_data(args)
    assert (taken.image_size, data.image_size, data.mean, data.std) == (32, (32, 32), (0.5,) * 3, (0.25,) * 3)
    assert words == f"as {half} takes them: images of 32x32, mean 0.5 0.5 0.5, std 0.25 0.25 0.25"
    own = load_data(Args(model=half, image_size=16, dataset="folder", data_dir=str(folder_dataset)))
    assert (own[1].image_size, own[1].mean) == ((16, 16), (0.5,) * 3)
    scratch, data, words = load_data(Args(model="test_resnet", dataset="folder", data_dir=str(folder_dataset)))
    assert (scratch.image_size, data.mean, words) == (None, (0.485, 0.456, 0.406), "")


def test_what_is_trained_further_is_evaluated_and_saved_so(half, folder_dataset, capsys):
    """The saved model and timm's own transform agree with the run about every held-out image."""
    train.main(
        Args(
            model=half, pretrained=True, dataset="folder", data_dir=str(folder_dataset), epochs=1, batch_size=8,
            lr=0.01, workers=0, output_dir="run",
        )
    )  # fmt: skip
    assert "mean 0.5 0.5 0.5" in capsys.readouterr().out
    model = timm.create_model("local-dir:run/model", pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    assert (config["mean"], config["std"], config["input_size"]) == ([0.5] * 3, [0.25] * 3, (3, 32, 32))
    transform = timm.data.create_transform(**config)
    hits = 0
    for label, name in enumerate(("ant", "bee", "cat")):
        for path in (folder_dataset / "val" / name).iterdir():
            hits += int(model(transform(Image.open(path).convert("RGB"))[None]).argmax() == label)
    assert json.loads(Path("run/summary.json").read_text())["top1"] == pytest.approx(100 * hits / 12)


def test_a_transformer_is_built_for_the_images_and_says_when_they_are_a_handful_of_patches(folder_dataset, capsys):
    timm_mfd.save_pretrained(timm.create_model("test_vit", num_classes=3), "vit", image_size=(160, 160))
    options = {"dataset": "folder", "data_dir": str(folder_dataset), "epochs": 1, "batch_size": 8, "lr": 0.01}
    for model, size, said in (("local-dir:vit", 96, False), ("local-dir:vit", 32, True), ("test_vit", 32, True)):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = f"{model[-3:]}{size}{said}"
        train.main(Args(model=model, pretrained=":" in model, image_size=size, workers=0, output_dir=folder, **options))
        assert ("sees an image as 2x2 patches only; give it a larger --image-size" in capsys.readouterr().out) == said
        loaded = timm.create_model(f"local-dir:{folder}/model", pretrained=True)
        assert loaded(torch.zeros(1, 3, size, size)).shape == (1, 3)
        shutil.rmtree(folder)
