"""Cards: what the template writes is accepted, and each fault is found without a network."""

from dataclasses import asdict, replace
from email.message import Message

import pytest
import yaml

from timm_mfd import recipes
from timm_mfd.arguments import Args
from timm_mfd.model_card import check_card, render_card

CONFIG = {
    "architecture": "resnet18_mfd",
    "num_classes": 10,
    "model_args": {"stem": "cifar"},
    "pretrained_cfg": {"input_size": [3, 32, 32]},
}
SUMMARY = {
    "top1": 97.5, "top5": 99.0, "count": 360, "split": "test", "stages": [0, 1], "noise_floor": [0.01, 0.04],
    "mean_abs_correlation": {"before": [0.3, 0.2], "after": [0.1, 0.2]}, "device": "1 x cpu", "data": "0",
    "warnings": ["stage 4 has few samples"], "seconds": 3725,
}  # fmt: skip
ARGS = asdict(Args(dataset="cifar10", data_dir="/secret/place", output_dir="/secret/run", lr=0.05, seed=3))
RUN = {"args": ARGS | {"environment": {"git_commit": "c0ffee", "packages": {"timm_mfd": "0.1.0"}}}, "summary": SUMMARY}


def card(**kwargs):
    return render_card(CONFIG, "f" * 64, RUN, repo_id="org/name", **kwargs)


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_what_was_measured_where_and_how():
    text = card()
    check_card(text)
    data = metadata(text)
    assert data["datasets"] == ["uoft-cs/cifar10"]
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 97.5
    assert result["dataset"]["type"] == "uoft-cs/cifar10"
    for part in (
        "97.50 | 99.00 | 360 (test)", "--dataset cifar10", "--lr 0.05", "--seed 3", "--data-dir DIR", "c0ffee",
        "1 h 02 min", "stage 4 has few samples", "f" * 64, "| at the end | 0.100 | 0.200 |", "0.100 | 0.200",
        "| at the start of training (random weights) | 0.300 | 0.200 |", "cifar stem",
    ):  # fmt: skip
        assert part in text, part
    assert "/secret" not in text
    assert "hf-hub:org/name" in text


def test_a_card_says_how_the_package_is_installed(monkeypatch):
    package = Message()
    package["Version"] = "9.9"
    package["Project-URL"] = "Paper, https://example.org/paper"
    monkeypatch.setattr("importlib.metadata.metadata", lambda _: package)
    text = card()
    assert "saved by version 0.1.0, commit `c0ffee`" in text
    assert "```bash\ngit -C timm_mfd checkout c0ffee\npip install ./timm_mfd" in text
    assert "git clone" not in text
    package["Project-URL"] = "Repository, https://example.org/x"
    assert "```bash\ngit clone https://example.org/x timm_mfd\ngit -C timm_mfd checkout c0ffee\n" in card()
    assert "saved by version 9.9:" in render_card(CONFIG, "f" * 64)


def test_a_command_names_what_decides_the_result_also_where_it_is_the_default():
    changed = ARGS | {"deterministic": True, "milestones": [6, 12], "environment": {"processes": 2}}
    text = render_card(CONFIG, "f" * 64, RUN | {"args": changed})
    wanted = "accelerate launch --num_processes 2 train_scripts/train.py --model resnet18_mfd --dataset cifar10 "
    wanted += "--criterion softmax --mfd-weight 1.0 --epochs 20 --batch-size 128 --lr 0.05 --milestones 6 12 "
    assert f"{wanted}--weight-decay 0.0005 --seed 3 --deterministic --data-dir DIR\n" in text


def test_images_of_ones_own_are_called_as_their_folder():
    arguments = ARGS | asdict(Args(dataset="folder", data_dir="pictures/birds/")) | {"environment": {}}
    text = render_card(CONFIG, "f" * 64, RUN | {"args": arguments})
    assert "10 classes of birds" in text
    assert metadata(text)["model-index"][0]["results"][0]["dataset"] == {
        "name": "birds",
        "type": "birds",
        "split": "test",
    }
    assert Args(dataset="folder", data_dir="pictures/birds/").name == "resnet18_mfd-birds-mfd1-seed0"


def test_the_command_of_a_recipe_names_what_differs_from_it_only():
    arguments = recipes.RECIPES["resnet50/cifar100/softmax+mfd"].arguments("paper", 2)
    changed = replace(arguments, recipe="resnet50/cifar100/softmax+mfd", mixed_precision="bf16", data_dir="/secret")
    run = RUN | {"args": asdict(changed) | {"environment": {}}}
    wanted = "train.py --recipe resnet50/cifar100/softmax+mfd --seed 2 --mixed-precision bf16 --data-dir DIR\n"
    assert wanted in render_card(CONFIG, "f" * 64, run)


def test_folders_of_this_machine_are_not_published_and_the_command_is_quoted():
    arguments = replace(Args(), model="local-dir:/secret/my model", dataset="hfds/./secret", criterion="a b")
    run = RUN | {"args": RUN["args"] | asdict(arguments)}
    text = render_card(CONFIG, "f" * 64, run)
    assert "secret" not in text
    assert "datasets" not in metadata(text)
    assert "--model local-dir:DIR --dataset hfds/DIR" in text
    assert "--criterion 'a b'" in text


def test_a_card_without_a_run_claims_nothing():
    text = render_card(CONFIG, "f" * 64)
    check_card(text)
    assert "model-index" not in text
    assert "decorrelation" not in text


def test_a_comparison_stands_beside_the_paper():
    words = {"ours": "49.10 ± 0.20 (n=3)", "baseline": "46.30 ± 0.30 (n=3)", "difference": "+2.80 [+2.00, +3.60]"}
    words |= {"paper": "49.14", "paper_baseline": "46.34", "paper_difference": "+2.80"}
    text = card(comparison=words)
    check_card(text)
    assert "| ours | 49.10 ± 0.20 (n=3) | 46.30 ± 0.30 (n=3) | +2.80 [+2.00, +3.60] |" in text
    assert "| the paper | 49.14 | 46.34 | +2.80 |" in text
    assert "says nothing about what MFD does" not in text


def test_pictures_must_lie_beside_the_card(tmp_path):
    text = card(pictures=("curves.png",))
    with pytest.raises(ValueError, match="shows curves.png, which is not beside it"):
        check_card(text, tmp_path)
    (tmp_path / "curves.png").write_bytes(b"")
    check_card(text, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\n", "", "no metadata"),
        ("library_name: timm", "library_name: transformers", "must have library_name: timm"),
        ("library_name: timm", "libary_name: timm", "unknown key 'libary_name'"),
        ("pipeline_tag: image-classification", "pipeline_tag: text", "must have pipeline_tag"),
        ("license: apache-2.0", "license: apache2", "license: 'apache2'"),
        ("license: apache-2.0\n", "", "names no license"),
        ("license: apache-2.0", "license: other", "needs license_name and license_link"),
        ("- timm_mfd\n", "", "tags lack timm_mfd"),
        ("- uoft-cs/cifar10", "- a b/c", "datasets"),
        ("value: 97.5", "value: .nan", "model-index"),
        ("value: 97.5", "value: '97.5'", "model-index"),
        ("value: 97.5", "value: !!python/object:numpy.float64 {}", "not plain YAML"),
        ("      name: cifar10\n", "", "model-index"),
        ("license: apache-2.0", "license: [mit]", "license"),
        ("license: apache-2.0", "license: apache-2.0\nlicense: mit", "has license twice"),
        ("- uoft-cs/cifar10", "- ../x", "datasets"),
        ("value: 97.5", "value: 1" + 400 * "0", "model-index"),
        ("## Limits", "<img alt='a' src='none.png'>", "shows none.png"),
        ("## Limits", "![a](none.png 'a title')", "shows none.png"),
        ("import timm_mfd", "import timm", "does not import timm_mfd before"),
        ("# org/name", "org/name", "has no title"),
        ("## Limits", "[More Information Needed]", "still holds"),
    ],
)
def test_each_fault_of_a_card_is_named(old, new, message):
    text = card()
    assert old in text
    broken = text.replace(old, new)
    if old.startswith("# "):
        broken = broken.replace("\n## ", "\n### ").replace("\n# ", "\n").replace("import timm\n", "# code\n")
    with pytest.raises(ValueError, match=message):
        check_card(broken)
