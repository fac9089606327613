"""One command from two models to their tables and pictures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import analyze
import pytest
import torch

import timm_mfd
from timm_mfd.data import EvalLoader, load_dataset
from timm_mfd.redundancy import measure_redundancy


@pytest.fixture
def models(tmp_path):
    """Two saved models with different preprocessing, one of them in a run folder."""
    for seed, folder in enumerate(("run/model", "other")):
        torch.manual_seed(seed)
        model = timm_mfd.create_model("test_resnet", num_classes=10)
        mean = (0.1 + 0.2 * seed,) * 3
        timm_mfd.save_pretrained(model, tmp_path / folder, image_size=(8, 8), mean=mean, std=(0.3,) * 3)
    return str(tmp_path / "run"), f"local-dir:{tmp_path}/other"


def test_two_models_are_measured_with_their_own_preprocessing_and_drawn(models, tmp_path, capsys):
    out = tmp_path / "out"
    analyze.main(analyze.Args(model=models[0], compare=models[1], dataset="digits", output_dir=out, images=50))
    found = json.loads((out / "redundancy.json").read_text())
    assert found["data"]["images"] == 50
    data = load_dataset("digits", None)
    for seed, name in enumerate(models):
        model = timm_mfd.create_model(name if seed else f"local-dir:{name}/model", pretrained=True)
        own = replace(data, mean=(0.1 + 0.2 * seed,) * 3, std=(0.3,) * 3)
        loader = EvalLoader(own, 128, device=torch.device("cpu"), limit=50)
        expected = json.loads(json.dumps([s.to_json() for s in measure_redundancy(model, loader, num_classes=10)]))
        for stage, wanted in zip(found["models"][name], expected, strict=True):
            assert stage["mean_abs_r"] == pytest.approx(wanted["mean_abs_r"], abs=1e-6)
            assert stage["dead"] == wanted["dead"]
    pictures = {"correlations", "distribution", "stages", "feature_maps", "feature_maps_compared"}
    assert {path.name for path in out.iterdir()} == {"redundancy.json"} | {
        f"{name}.{ending}" for name in pictures for ending in ("png", "svg")
    }
    assert f"| {models[1]} | 0 |" in capsys.readouterr().out


def test_two_processes_write_the_numbers_of_one(models, tmp_path):
    numbers = []
    script = Path(analyze.__file__)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"][: 5 * (processes - 1)]
        flags = ["--model", models[0], "--dataset", "digits", "--images", "51", "--output-dir", out]
        subprocess.run([sys.executable, *launch, script, *flags], check=True, capture_output=True, timeout=180)
        numbers.append(json.loads((out / "redundancy.json").read_text())["models"][models[0]])
    for one, two in zip(*numbers, strict=True):
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "--tau must be between 0 and 1, not 1.5"),
        ({"images": 0}, "--images must be at least 1, not 0"),
        ({"compare": "SAME"}, "is the model itself; name another one"),
        ({"model": "resnet18_mfd"}, "has no published weights yet"),
        ({"model": "local-dir:nowhere"}, "there is no folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(models, tmp_path, change, message):
    change = {key: models[0] if value == "SAME" else value for key, value in change.items()}
    arguments = {"model": models[0], "dataset": "digits", "output_dir": tmp_path / "out"} | change
    with pytest.raises(SystemExit) as stopped:
        analyze.main(analyze.Args(**arguments))
    assert message in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_kept(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit) as stopped:
        analyze.main(analyze.Args(model=models[0], dataset="digits", output_dir=tmp_path / "out"))
    assert "is there already; choose a new folder" in str(stopped.value)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
