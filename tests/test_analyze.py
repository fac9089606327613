"""One command from two models to their tables and pictures."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import analyze
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from processes import start_ranks

import timm_mfd
from timm_mfd.data import EvalLoader, load_dataset
from timm_mfd.pruning import prune_silent
from timm_mfd.redundancy import measure_redundancy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two saved models with different preprocessing, one of them in a run folder, and a transformer."""
    root = tmp_path_factory.mktemp("saved")
    for seed, folder in enumerate(("run/model", "other")):
        torch.manual_seed(seed)
        model = timm_mfd.create_model("test_resnet", num_classes=10)
        mean = (0.1 + 0.2 * seed,) * 3
        timm_mfd.save_pretrained(model, root / folder, image_size=(8, 8), mean=mean, std=(0.3,) * 3)
    timm_mfd.save_pretrained(timm_mfd.create_model("test_vit", num_classes=10), root / "vit")
    return root


@pytest.fixture
def models(saved, tmp_path):
    """Copies of the first two that a test may change."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "run"), f"local-dir:{tmp_path}/other"


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(analyze, "analysis_pictures", lambda *_: {})


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
    pictures = {"correlations", "distribution", "stages", "feature_maps", "feature_maps_second"}
    assert {path.name for path in out.iterdir()} == {"redundancy.json", "report.html"} | {
        f"{name}.{ending}" for name in pictures for ending in ("png", "svg")
    }
    assert f"| {models[1]} | 0 |" in capsys.readouterr().out
    viewer = viewer_of(out)
    assert [model["name"] for model in viewer["models"]] == list(models)
    shown = torch.arange(6) * 360 // 6
    assert [image["label"].split("; ")[0] for image in viewer["images"]] == [
        str(int(data.test.labels[i])) for i in shown
    ]


def viewer_of(folder):
    return json.loads(re.search(r'id="data">(.*)</script>', (folder / "report.html").read_text())[1])


@pytest.mark.usefixtures("without_pictures")
def test_images_are_cropped_as_the_model_was_evaluated_with_them(folder_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, crop_pct in (("first", 0.5), ("second", 1.0)):
        model = timm_mfd.create_model("test_resnet", num_classes=3)
        timm_mfd.save_pretrained(model, tmp_path / name, image_size=(16, 16), crop_pct=crop_pct)
    options = {"dataset": "folder", "data_dir": str(folder_dataset), "image_size": 16, "workers": 0}
    whole = load_dataset("folder", folder_dataset, 16)
    for compare, seen in ((None, whole.cropped(0.5)), (str(tmp_path / "second"), whole)):
        out = tmp_path / f"out{compare is None}"
        analyze.main(analyze.Args(model=str(tmp_path / "first"), compare=compare, output_dir=out, **options))
        assert json.loads((out / "redundancy.json").read_text())["data"]["sha256"] == seen.identity()


def test_a_run_folder_brings_its_curves(models, tmp_path, monkeypatch):
    for others in ("correlation_by_stage", "correlation_distribution", "correlation_heat_maps", "feature_maps"):
        monkeypatch.setattr(f"timm_mfd.figures.analysis.{others}", empty_picture)
    line = {"epoch": 1, "top1": 50, "top5": 90, "criterion_loss": 1.0, "mfd_loss": 0.1, "mfd_per_stage": [0.5, 0.4]}
    (tmp_path / "run" / "args.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "out"
    analyze.main(analyze.Args(model=models[1], compare=models[0], dataset="digits", output_dir=out, images=9))
    (tmp_path / "run" / "summary.json").write_text(
        json.dumps({"top1": 12.5, "count": 8, "split": "val", "stages": [7, 9]})
    )
    shutil.rmtree(out)
    analyze.main(analyze.Args(model=models[1], compare=models[0], dataset="digits", output_dir=out, images=9))
    assert "top-1 12.50 % of 8 val images" in (out / "report.html").read_text()
    assert not (out / "curves_compared.svg").exists()  # the other model has no epochs
    svg = (out / "curves_second.svg").read_text()
    assert "<!-- stage 7 -->" in svg
    assert "<!-- stage 9 -->" in svg
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1')
    with pytest.raises(SystemExit, match=r"run/metrics.jsonl is damaged .*; fix or delete it"):
        analyze.main(analyze.Args(model=models[0], dataset="digits", output_dir=tmp_path / "third", images=9))
    assert f'alt="Training of {models[0]}"' in (out / "report.html").read_text()


def empty_picture(*arguments):
    (path,) = (argument for argument in arguments if isinstance(argument, Path))
    path.write_text("<svg/>")
    return path


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.usefixtures("without_pictures")
def test_an_image_alone_is_measured_at_the_size_of_the_model(models, photo, tmp_path, capsys):
    analyze.main(analyze.Args(model=models[0], image=photo, output_dir=tmp_path / "small"))
    shown = capsys.readouterr().out
    assert re.search(r"\| 2 \| \d+ \|( - \|){9}$", shown, re.MULTILINE)  # one number per channel has no correlation
    assert re.search(r"takes photo.png for .+ \(\d+%\)$", shown, re.MULTILINE)
    timm_mfd.save_pretrained(
        timm_mfd.create_model("test_resnet"), tmp_path / "larger", image_size=(64, 64), mean=(0.1,) * 3, std=(0.3,) * 3
    )
    for name, size, expected in ((f"local-dir:{tmp_path}/larger", None, 64), (models[0], 40, 40)):
        out = tmp_path / str(size)
        analyze.main(analyze.Args(model=name, image=photo, image_size=size, output_dir=out))
        found = json.loads((out / "redundancy.json").read_text())
        assert (found["data"]["name"], found["data"]["split"]) == ("photo.png", "image")
        assert found["data"]["images"] == 1
        source = name if name[:6] == "local-" else f"local-dir:{name}/model"
        model = timm_mfd.create_model(source, pretrained=True).eval()
        whole = ImageOps.fit(Image.open(photo), (expected, expected), method=Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(whole)).permute(2, 0, 1)[None] / 255 - 0.1) / 0.3
        with torch.no_grad():
            stage = timm_mfd.forward_stages(model, pixels).stages[0].double().transpose(0, 1).flatten(1)
        r = torch.nan_to_num(torch.corrcoef(stage)).abs()
        mean = (r.sum() - r.diagonal().sum()) / (len(r) * (len(r) - 1))
        assert found["models"][name][0]["mean_abs_r"] == pytest.approx(float(mean), abs=1e-6)
        assert [image["label"].split("; ")[0] for image in viewer_of(out)["images"]] == ["photo.png"]


@pytest.mark.usefixtures("without_pictures")
def test_an_image_beside_a_data_set_is_shown_and_not_measured(models, photo, tmp_path):
    for number, image in enumerate((None, photo)):
        arguments = {"model": models[0], "dataset": "digits", "images": 20, "output_dir": tmp_path / str(number)}
        analyze.main(analyze.Args(image=image, **arguments))
    one, two = (json.loads((tmp_path / number / "redundancy.json").read_text()) for number in "01")
    assert one == two
    assert [image["label"].split("; ")[0] for image in viewer_of(tmp_path / "1")["images"]] == ["photo.png"]


def with_silent_channels(folder):
    model = timm_mfd.create_model("resnet18_mfd", num_classes=10, stem="cifar")
    with torch.no_grad():
        for norm in (model.layer2[0].bn1, model.layer3[1].bn1):
            norm.weight[:20], norm.bias[:20] = 0, -1
    timm_mfd.save_pretrained(model, folder, image_size=(8, 8), mean=(0.2,) * 3, std=(0.3,) * 3, license="mit")
    return f"local-dir:{folder}"


def analyze_and_prune(name, output_dir, prune):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "analysis_pictures", lambda *_: {})
        arguments = {"model": name, "dataset": "digits", "images": 51}
        analyze.main(analyze.Args(**arguments, output_dir=output_dir, prune=prune))


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory):
    """An analysis of 51 images with `--prune`: model, folder, what it printed."""
    folder = tmp_path_factory.mktemp("pruned")
    name = with_silent_channels(folder / "model")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        analyze_and_prune(name, folder / "1", folder / "pruned1")
    return name, folder, printed.getvalue()


def test_what_is_silent_on_all_held_out_images_is_removed(pruned_run):
    name, folder, out = pruned_run
    found = json.loads((folder / "1" / "redundancy.json").read_text())["removable"][name]
    before, after = (
        timm_mfd.create_model(source, pretrained=True).eval() for source in (name, f"local-dir:{folder}/pruned1")
    )
    count = {model: sum(parameter.numel() for parameter in model.parameters()) for model in (before, after)}
    assert after.layer2[0].conv1.out_channels <= 108
    assert found["channels"] >= 40
    assert found["parameters"][0] == count[before]
    assert found["parameters"][1] <= count[after] < count[before]  # on 51 images as much is silent as on all, or more
    data = replace(load_dataset("digits"), mean=(0.2,) * 3, std=(0.3,) * 3)
    with torch.no_grad():
        for images, _ in EvalLoader(data, 128, device=torch.device("cpu")):
            torch.testing.assert_close(after(images), before(images), atol=1e-5, rtol=1e-5)
    gone = count[before] - count[after]
    record = json.loads((folder / "pruned1" / "pruning.json").read_text())
    assert (record["model"], record["data"], record["images"]) == (name, "digits", 360)
    assert set(range(20)) <= set(record["layers"]["layer2.0.conv1"])
    assert record["parameters"] == [count[before], count[after]]
    assert "license: mit" in (folder / "pruned1" / "README.md").read_text()
    assert "It was pruned" in (folder / "pruned1" / "README.md").read_text()
    assert f"Over all 360 held-out images: {name}: " in out
    assert f"they cost {gone:,} of {count[before]:,} parameters" in out


def test_two_processes_write_the_numbers_of_one_and_prune_the_same(pruned_run):
    name, folder, _ = pruned_run
    for process in start_ranks(analyze_and_prune, 2, name, folder / "2", folder / "pruned2"):
        process.join(120)
        assert process.exitcode == 0
    one, two = (json.loads((folder / number / "redundancy.json").read_text()) for number in "12")
    assert two["removable"] == one["removable"]
    for stage, other in zip(one["models"][name], two["models"][name], strict=True):
        for key, value in stage.items():
            assert other[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key
    weights = [(folder / f"pruned{number}" / "model.safetensors").read_bytes() for number in "12"]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("without_pictures")
def test_without_a_silent_channel_nothing_is_pruned_and_the_analysis_stays(models, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "prune_silent", nothing_silent)
    with pytest.raises(SystemExit) as stopped:
        analyze.main(
            analyze.Args(
                model=models[0], dataset="digits", output_dir=tmp_path / "out", images=9, prune=tmp_path / "pruned"
            )
        )
    assert "none is free to remove" in str(stopped.value)
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "pruned").exists()


def nothing_silent(model, silent, batches, image_size):
    for mask in silent.masks.values():
        mask.fill_(False)
    return prune_silent(model, silent, batches, image_size)


@pytest.mark.usefixtures("without_pictures")
def test_without_torch_pruning_the_analysis_says_what_is_missing(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "CAN_PRUNE", False)
    arguments = {"model": models[0], "dataset": "digits", "output_dir": tmp_path / "out", "images": 9}
    with pytest.raises(SystemExit, match=r"--prune needs Torch-Pruning: pip install"):
        analyze.main(analyze.Args(**arguments, prune=tmp_path / "pruned"))
    analyze.main(analyze.Args(**arguments))
    assert json.loads((tmp_path / "out" / "redundancy.json").read_text())["removable"] == {
        models[0]: {"unknown": "Torch-Pruning is not installed, pip install -e '.[prune]'"}
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "--tau must be between 0 and 1, not 1.5"),
        ({"images": 0}, "--images must be at least 1, not 0"),
        ({"dataset": None}, "give a --dataset, an --image, or both"),
        ({"dataset": None, "image": Path("nowhere.png")}, "cannot decode nowhere.png"),
        ({"dataset": None, "image": Path("nowhere.png"), "data_dir": "data"}, "--data-dir data needs a --dataset"),
        ({"dataset": None, "image": Path("a.png"), "prune": Path("nowhere")}, "--prune needs a --dataset"),
        ({"prune": Path()}, "is there already"),
        ({"prune": "OUT"}, "are in each other"),
        ({"prune": "IN"}, "are in each other"),
        ({"output_dir": "FILE"}, "is a file; choose another place"),
        ({"workers": -1}, "--workers must be at least 0, not -1"),
        ({"compare": "VIT"}, "does not take images of 8x8"),
        ({"model": "runs/nope"}, "there is no run or saved model 'runs/nope'; for a model of the Hub write hf-hub:"),
        ({"model": "RUN2"}, "; did you mean "),
        ({"model": "RUN/unfinished"}, "is a run without a model yet"),
        ({"image_size": 0}, "--image-size must be at least 1, not 0"),
        ({"compare": "SAME"}, "is the model itself; name another one"),
        ({"model": "resnet18_mfd"}, "has no published weights yet"),
        ({"model": "local-dir:nowhere"}, "there is no folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(models, tmp_path, change, message):
    (tmp_path / "run" / "unfinished").mkdir()
    (tmp_path / "run" / "unfinished" / "args.json").write_text("{}")
    (tmp_path / "file").touch()
    places = {
        "IN": tmp_path / "out" / "pruned",
        "FILE": tmp_path / "file" / "out",
        "VIT": str(tmp_path / "vit"),
        "SAME": models[0],
        "OUT": tmp_path / "out",
        "RUN2": f"{models[0]}2",
        "RUN/unfinished": f"{models[0]}/unfinished",
    }
    change = {key: places.get(value, value) for key, value in change.items()}
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


def test_pictures_call_models_by_what_tells_them_apart():
    assert analyze.short_names(["runs/quick/without", "runs/quick/mfd"]) == ["without", "mfd"]
    assert analyze.short_names(["/a/x/model", "/a/y/model"]) == ["x/model", "y/model"]
    assert analyze.short_names(["runs/x", "hf-hub:org/x"]) == ["runs/x", "hf-hub:org/x"]
    assert analyze.short_names(["/far/away/run"]) == ["run"]
    assert analyze.short_names(["runs/a", "runs/a/old"]) == ["a", "a/old"]
