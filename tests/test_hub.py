"""Export folders: values survive, wrappers do not, nothing is overwritten."""

import json
import re
from dataclasses import asdict

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from processes import run_python
from safetensors.torch import load_file, save_file

import timm_mfd
from timm_mfd.arguments import Args
from timm_mfd.models.download import hub_errors

NAMES = [f"class {i}" for i in range(6)]
RUN = {
    "args": asdict(Args(mfd_weight=2.0)) | {"environment": {}},
    "summary": {
        "top1": 97.5, "top5": 99.0, "count": 360, "split": "test", "stages": [0, 1], "noise_floor": [0.01, 0.04],
        "mean_abs_correlation": {"before": [0.3, 0.2], "after": [0.1, 0.2]}, "device": "cpu", "warnings": [],
        "data": "0", "seconds": 1,
    },
}  # fmt: skip
BASELINE = RUN | {"args": RUN["args"] | {"mfd_weight": 0.0}}


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet18_mfd", "cifar"), ("resnet18_mfd", "small"), ("mobilenetv2_100_mfd", "cifar")]
)
def test_a_saved_model_rebuilds_itself_in_a_new_process(tmp_path, arch, stem):
    model = timm_mfd.create_model(arch, num_classes=6, stem=stem).to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    folder = timm_mfd.save_pretrained(
        model, tmp_path / "model", label_names=NAMES, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_size=(32, 32)
    )
    code = (
        "import sys, timm, timm_mfd, torch\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        f"torch.save(model(torch.load('{tmp_path}/x.pt')), '{tmp_path}/y.pt')\n"
    )
    run_python("-c", code).check_returncode()
    plain = timm_mfd.create_model(arch, num_classes=6, stem=stem).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(torch.load(tmp_path / "y.pt"), plain(x))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == NAMES
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_wrappers_are_undone_and_the_model_is_left_alone(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6, stem="cifar").to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="eager")
    folder = timm_mfd.save_pretrained(compiled, tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_same_model_is_the_same_file_every_time(tmp_path):
    model = timm_mfd.create_model("test_resnet", num_classes=6)
    folders = [timm_mfd.save_pretrained(model, tmp_path / str(i), label_names=NAMES) for i in range(6)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_card_states_the_result_as_metadata(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    timm_mfd.save_pretrained(model, tmp_path / "model", run=RUN)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.eval_results[0].metric_value == 97.5
    assert "import timm_mfd" in card.text
    assert "weight 2" in card.text
    assert "mfd" in card.data.tags
    assert "[More Information Needed]" not in card.text


def test_a_model_that_was_not_trained_with_mfd_is_not_said_to_be(tmp_path):
    folder = timm_mfd.save_pretrained(timm.create_model("resnet18"), tmp_path / "model")
    assert "decorrelation" not in (folder / "README.md").read_text()
    assert "mfd" not in ModelCard.load(folder / "README.md").data.tags
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert config["crop_pct"] == timm.get_pretrained_cfg("resnet18").crop_pct
    assert not config["tag"]  # whose default would claim ImageNet weights
    baseline = timm_mfd.save_pretrained(timm.create_model("resnet18"), tmp_path / "baseline", run=BASELINE)
    assert "a baseline" in (baseline / "README.md").read_text()


def test_nothing_is_overwritten_and_mistakes_are_named(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is there already"):
        timm_mfd.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="2 label names for a model of 6 classes"):
        timm_mfd.save_pretrained(model, tmp_path / "new", label_names=["a", "b"])
    with pytest.raises(ValueError, match="Linear is not a classifier from create_model"):
        timm_mfd.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 64}, "image_size must be (H, W), not 64"),
        ({"mean": 0.5}, "mean must be 3 numbers, one per channel, not 0.5"),
        ({"std": [0.5]}, "std must be 3 numbers, one per channel, not [0.5]"),
        ({"std": (0, 0.2, 0.2)}, "std must be finite and above 0, not (0, 0.2, 0.2)"),
        ({"mean": (0, float("nan"), 0)}, "mean must be finite, not (0, nan, 0)"),
        ({"label_names": ["a"]}, "1 label names for a model of 6 classes"),
    ],
)
def test_arguments_that_describe_no_such_model_are_refused_and_nothing_is_written(tmp_path, arguments, message):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    with pytest.raises(ValueError, match=re.escape(message)):
        timm_mfd.save_pretrained(model, tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_create_model_could_not_build_again_is_refused_and_nothing_is_written(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    with pytest.raises(ValueError, match=r"not a classifier from create_model; give its \.model"):
        timm_mfd.save_pretrained(timm_mfd.MFDClassificationTask(model, None, timm_mfd.MFDLoss()), tmp_path / "model")
    with pytest.raises(ValueError, match="not a classifier from create_model"):
        features = timm_mfd.create_model("resnet18_mfd", features_only=True)
        timm_mfd.save_pretrained(features, tmp_path / "model")
    model.fc = torch.nn.Linear(512, 7)
    with pytest.raises(ValueError, match=r"7 outputs.*reset_classifier\(7\)"):
        timm_mfd.save_pretrained(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    model.reset_classifier(7)
    timm_mfd.save_pretrained(model, tmp_path / "model")
    assert timm_mfd.create_model(f"local-dir:{tmp_path}/model", pretrained=True).num_classes == 7


def test_numbers_may_come_as_tensors_and_label_names_survive_a_second_saving(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    mean = torch.tensor([0.25, 0.5, 0.75])
    first = timm_mfd.save_pretrained(model, tmp_path / "first", mean=mean, std=mean.numpy(), label_names=NAMES)
    loaded = timm_mfd.create_model(f"local-dir:{first}", pretrained=True)
    assert loaded.pretrained_cfg["mean"] == loaded.pretrained_cfg["std"] == [0.25, 0.5, 0.75]
    second = timm_mfd.save_pretrained(loaded, tmp_path / "second")
    assert json.loads((second / "config.json").read_text())["label_names"] == NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": None}, "must say num_classes as a number, not None"),
        ({"num_classes": "6"}, "must say num_classes as a number, not '6'"),
        ({"label_names": 5}, "label_names that are not a list"),
        ({"pretrained_cfg": {"classifier": 5}}, "has classifier: 5, which is not the name of a layer"),
    ],
)
@pytest.mark.parametrize("create", [timm_mfd.create_model, timm.create_model])
def test_a_configuration_that_hides_the_classifier_loads_nothing(tmp_path, create, change, message):
    folder = timm_mfd.save_pretrained(timm_mfd.create_model("resnet18_mfd", num_classes=6), tmp_path / "model")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # weights that say nothing
    config = json.loads((folder / "config.json").read_text())
    del config["timm_mfd"], config["pretrained_cfg"]["num_classes"]
    config = {key: value for key, value in (config | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        create(f"local-dir:{folder}", pretrained=True)


def test_other_classes_by_way_of_an_overlay_are_refused(tmp_path):
    folder = timm_mfd.save_pretrained(timm_mfd.create_model("resnet18_mfd", num_classes=6), tmp_path / "model")
    with pytest.raises(ValueError, match="give num_classes itself"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay={"num_classes": 3})
    with pytest.raises(ValueError, match="takes no pretrained_cfg"):
        timm_mfd.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg="cifar10")


def test_a_message_never_holds_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ConnectionError, match="<token> is bad") as caught, hub_errors("org/name"):
        raise ConnectionError("hf_secret is bad")
    assert "hf_secret" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_published(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    model.fc.weight.data[0, 0] = float("nan")
    folder = timm_mfd.save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"not all finite: fc\.weight"):
        timm_mfd.push_to_hub(folder, "org/name")


def test_the_card_alone_names_the_licence(tmp_path):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=6)
    folder = timm_mfd.save_pretrained(model, tmp_path / "model", license="cc-by-4.0", repo_id="me/mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "hf-hub:me/mine" in card.text
    assert "apache" not in (folder / "config.json").read_text()
