"""The paper's runs as data: its numbers, its protocol, and that every one of them trains."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import train
from accelerate.state import AcceleratorState
from torch import nn

from timm_mfd import create_model, recipes, results
from timm_mfd.arguments import Args
from timm_mfd.criteria import AMSoftmaxLoss, ArcFaceLoss, CenterLoss
from timm_mfd.models import paper_stem
from timm_mfd.recipes import PAPER_RECIPES, find, select
from timm_mfd.redundancy import CORRELATION_IMAGES
from timm_mfd.stages import stage_shapes
from timm_mfd.training.run import Run

PAPER = Path(__file__).parents[2] / "shared" / "paper.txt"
OWN_RECIPES = [recipe for table in ("eq6", "weights") for recipe in select(table)]
OWN_RECIPES = [recipe for recipe in OWN_RECIPES if recipe not in PAPER_RECIPES]
# Side of the maps of stages 0 to 4, from the paper's description of the stems.
SIDES = {
    ("other", 32): [32, 32, 16, 8, 4], ("other", 64): [64, 32, 16, 8, 4],
    ("mobilenetv2", 32): [16, 8, 4, 2, 1], ("mobilenetv2", 64): [32, 16, 8, 4, 2],
}  # fmt: skip
CHANNELS = {
    "resnet50": [64, 256, 512, 1024, 2048], "resnext50": [64, 256, 512, 1024, 2048],
    "densenet121": [64, 256, 512, 1024, 1024], "mobilenetv2": [16, 24, 32, 96, 320],
}  # fmt: skip
CRITERIA = {"softmax": nn.CrossEntropyLoss, "center": CenterLoss, "am_softmax": AMSoftmaxLoss, "arcface": ArcFaceLoss}
# One of each backbone, data set, criterion and reading of Eq. 6, with MFD and without.
TRAINED = [
    find(name)[0]
    for name in (
        "resnet50/facescrub/center+mfd", "resnet50/facescrub/am_softmax", "resnet50/facescrub/arcface+mfd",
        "resnext50/cifar10/softmax+mfd", "densenet121/cifar100/softmax", "mobilenetv2/cifar100/softmax+mfd0.1",
        "mobilenetv2/tiny_imagenet/softmax+mfd_position",
    )
]  # fmt: skip


def test_there_are_the_42_runs_of_four_tables():
    assert len(PAPER_RECIPES) == len({recipe.id for recipe in PAPER_RECIPES}) == 42
    assert Counter(table for recipe in PAPER_RECIPES for table in recipe.tables) == {
        "2": 6, "4": 8, "5": 24, "6": 6, "weights": 2,
    }  # fmt: skip
    assert all(recipe.baseline in recipes.RECIPES for recipe in PAPER_RECIPES)
    for recipe in PAPER_RECIPES:
        assert find(recipe.id) == (recipe, "paper")
        assert find(f"{recipe.id}@strong") == (recipe, "strong")


@pytest.mark.skipif(not PAPER.exists(), reason="the text of the paper is not here")
def test_accuracies_are_those_that_the_paper_prints():
    text = PAPER.read_text()
    tables = {number: text[text.index(f"TABLE {roman}\n") :] for number, roman in
              {"2": "II", "4": "IV", "5": "V", "6": "VI"}.items()}  # fmt: skip
    names = {"resnext50": "ResNeXt50", "densenet121": "DenseNet121", "mobilenetv2": "MobileNetV2"}
    columns = ["cifar10", "cifar100", "tiny_imagenet", "facescrub"]

    def numbers(line):
        return [float(number) for number in re.findall(r"\d\d\.\d\d", line)]

    for recipe in PAPER_RECIPES:
        for table in set(recipe.tables) - {"weights"}:  # which is ours
            lines = tables[table].splitlines()
            if table == "2":
                line = next(line for line in lines if line.startswith("Accuracy"))
                position = [0, 0.01, 0.1, 1, 10, 100].index(recipe.mfd_weight)
                printed = numbers(line)[position]
            elif table == "4":
                start = "Softmax Loss +MFD" if recipe.mfd_weight else "Softmax Loss\t"
                printed = numbers(next(li for li in lines if li.startswith(start)))[columns.index(recipe.dataset)]
            elif table == "5":
                first = next(i for i, line in enumerate(lines) if line.startswith(names[recipe.backbone]))
                printed = numbers(lines[first + columns.index(recipe.dataset)])[bool(recipe.mfd_weight)]
            else:
                name = {
                    "center": "Center Loss",
                    "am_softmax": "AM-Softmax($m = 0.35$)",
                    "arcface": "ArcFace($m = 0.5$)",
                }
                start = name[recipe.criterion] + ("+MFD Loss" if recipe.mfd_weight else "") + "\t"
                printed = numbers(next(li for li in lines if li.startswith(start)))[0]
            assert recipe.accuracy == printed, recipe.id


def test_the_other_reading_of_eq_6_differs_in_nothing_else():
    for row in ("mobilenetv2/tiny_imagenet/softmax+mfd", "mobilenetv2/cifar100/softmax+mfd"):
        usual, other = find(row)[0], find(f"{row}_position")[0]
        assert other.accuracy == usual.accuracy
        assert other.arguments() == replace(usual.arguments(), recipe=other.id, mfd_center="position")


def test_own_recipes_are_not_the_papers():
    own = [recipe for recipe in recipes.RECIPES.values() if recipe not in PAPER_RECIPES]
    assert {table for recipe in own for table in recipe.tables} == {"eq6", "weights", "resnet18", "digits"}
    assert all(recipe.baseline in recipes.RECIPES for recipe in own)
    assert [recipe.variant for recipe in own if recipe.variant] == [
        ", mean per position", ", MFD x 0.1", ", MFD x 10", ", mean per position",
    ]  # fmt: skip
    assert {recipe.variant for recipe in PAPER_RECIPES} == {"", *(f", MFD x {w}" for w in (0.01, 0.1, 10, 100))}


def test_the_protocol_is_that_of_section_4():
    for recipe in PAPER_RECIPES:
        args = recipe.arguments("paper", seed=3).checked()
        assert (args.epochs, args.milestones, args.lr, args.lr_decay) == (100, (30, 60, 90), 0.1, 0.1)
        assert (args.weight_decay, args.batch_size, args.seed) == (5e-4, 128, 3)
        assert (args.mfd_center, args.mfd_max_samples, args.stages) == ("channel", None, None)
        assert args.stem == paper_stem(args.model, recipes.DATA_SIZES[recipe.dataset].side)
        rates = [round(args.learning_rate(epoch), 9) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
        assert rates == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]


def test_the_strong_protocol_is_of_today_in_half_the_epochs_with_the_papers_stems():
    args = find("mobilenetv2/cifar100/softmax+mfd@strong")[0].arguments("strong").checked()
    assert (args.epochs, args.stem, args.opt, args.weight_decay) == (50, "imagenet", "paper", 5e-4)
    assert (args.label_smoothing, args.cutmix, args.augment) == (0.1, 1.0, "paper")
    assert [round(args.learning_rate(epoch), 6) for epoch in (0, 5, 25, 50)] == [1e-5, 0.097553, 0.05, 0.0]
    for recipe in PAPER_RECIPES:
        args = recipe.arguments("strong").checked()  # softmax alone takes smoothed and mixed labels
        assert (args.cutmix > 0) == (args.label_smoothing > 0) == (recipe.criterion == "softmax")


@pytest.mark.parametrize("recipe", [*PAPER_RECIPES, *OWN_RECIPES], ids=lambda recipe: recipe.id)
def test_every_recipe_has_the_stages_of_its_network_at_the_size_of_its_images(recipe):
    size = recipes.DATA_SIZES[recipe.dataset]
    args = train.parse(["--recipe", recipe.id]).checked()
    assert args == recipe.arguments().checked()
    with torch.device("meta"):  # shapes are computed, numbers are not
        model = create_model(args.model, num_classes=size.classes, stem=args.stem)
        task = train.build_task(args, model, torch.device("meta"))
        stages = stage_shapes(model, torch.zeros(1, 3, size.side, size.side), args.stages)
    assert [shape[1] for _, shape in stages] == CHANNELS[recipe.backbone]
    side = SIDES[recipe.backbone if "mobile" in recipe.backbone else "other", size.side]
    assert [tuple(shape[2:]) for _, shape in stages] == [(s, s) for s in side]
    assert (task.mfd.weight, task.mfd.center) == (recipe.mfd_weight, recipe.mfd_center)
    assert type(task.criterion) is CRITERIA[recipe.criterion]


def test_the_recipes_that_are_trained_here_have_everything_that_the_others_have():
    def parts(recipes):
        return [
            {getattr(recipe, part) for recipe in recipes} for part in ("backbone", "dataset", "criterion", "mfd_center")
        ]

    assert parts(TRAINED) == parts([*PAPER_RECIPES, *OWN_RECIPES])
    assert {recipe.mfd_weight > 0 for recipe in TRAINED} == {True, False}


@pytest.mark.parametrize("recipe", TRAINED, ids=lambda recipe: recipe.id)
def test_every_recipe_trains_on_its_data_set(recipe, official_datasets, tmp_path, monkeypatch, capsys):
    """`train.py --recipe ID --epochs 1` on two tiny batches, to a finished run that is no result: it is too short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    # A checkpoint and an export of 100 MB each, 42 times, and correlations, are another test's matter.
    monkeypatch.setattr("timm_mfd.checkpoint.write", lambda *_: None)
    monkeypatch.setattr(Run, "finish", lambda *_: None)
    monkeypatch.setattr(Run, "correlations", lambda *_: [0.0] * 5)
    words = ["--recipe", recipe.id, "--epochs", "1", "--batch-size", "6", "--workers", "0"]
    args = train.parse([*words, "--data-dir", str(official_datasets), "--output-dir", str(tmp_path / "run")])
    assert args == replace(
        recipe.arguments(), epochs=1, batch_size=6, workers=0, data_dir=str(official_datasets),
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train.main(args)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(line["criterion_loss"] + line["mfd_loss"], abs=1e-4)
    assert (line["mfd_loss"] > 0) == (recipe.mfd_weight > 0)
    table = re.findall(r"^ +(\d)  (\S+) +(\d+)  (\d+)x\d+ ", capsys.readouterr().out, re.MULTILINE)
    side = recipes.DATA_SIZES[recipe.dataset].side
    assert [int(size) for *_, size in table] == SIDES[recipe.backbone if "mobile" in recipe.backbone else "other", side]
    assert [int(channels) for _, _, channels, _ in table] == CHANNELS[recipe.backbone]


def test_what_is_given_beside_a_recipe_goes_first():
    args = train.parse(["--recipe", "resnet50/cifar100/softmax+mfd@strong", "--epochs", "7", "--lr", "0.2"])
    expected = find("resnet50/cifar100/softmax+mfd")[0].arguments("strong")
    assert args == replace(expected, epochs=7, lr=0.2)
    assert asdict(args)["recipe"] == "resnet50/cifar100/softmax+mfd@strong"


def test_recipes_are_selected_by_table_and_rows():
    assert len(select()) == 42
    assert [r.mfd_weight for r in select("2")] == [0, 0.01, 0.1, 1, 10, 100]
    assert [r.id for r in select("5", ["mobilenetv2/tiny_imagenet"])] == [
        "mobilenetv2/tiny_imagenet/softmax", "mobilenetv2/tiny_imagenet/softmax+mfd",
    ]  # fmt: skip
    chosen = select("5", ["mobilenetv2/cifar10", "densenet121", "densenet121/cifar10"])  # and not cifar100
    assert [r.backbone for r in chosen] == ["mobilenetv2"] * 2 + ["densenet121"] * 8
    base = "mobilenetv2/cifar100/softmax"
    assert [r.id for r in select("weights")] == [base, f"{base}+mfd", f"{base}+mfd0.1", f"{base}+mfd10"]
    # Without a table the rows find everything, and a whole id finds itself alone.
    everything = {r.id for r in recipes.RECIPES.values() if r.baseline == base}
    assert {r.id for r in select(None, ["mobilenetv2/cifar100"])} == everything
    for one in everything:
        assert [r.id for r in select(None, [one])] == [one]
    assert [r.id for r in select("digits")] == ["resnet18/digits/softmax", "resnet18/digits/softmax+mfd"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("resnet50/cifar100/softmx"), "unknown recipe .*; did you mean resnet50/cifar100/softmax"),
        (lambda: find("nothing"), "unknown recipe 'nothing'; reproduce.py list names all"),
        (
            lambda: find("resnet50/cifar100/softmax@fast"),
            "unknown protocol 'fast' .*; choose one of paper, strong, quick",
        ),
        (lambda: select("7"), "unknown table '7'; choose one of 2, 4, 5, 6, eq6, weights, resnet18, digits"),
        (lambda: select("5", ["resnet50"]), "no row 'resnet50' in Table V.*; there are resnext50/cifar10"),
        (lambda: select(None, ["resnet50/cifar"]), "no row 'resnet50/cifar' in the tables"),
    ],
)
def test_unknown_names_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_open_choices_name_the_values_that_are_used():
    from timm_mfd.data.facescrub import IDENTITIES

    choices = recipes.OPEN_CHOICES
    assert f"{ArcFaceLoss().scale:g}" in choices["Scale s of AM-Softmax and ArcFace"]
    center = CenterLoss(2, 2)
    assert f"lambda {center.weight:g} and alpha {center.rate:g}" in choices["Center Loss"]
    assert f"first {IDENTITIES} of" in choices["FaceScrub"]
    assert f"on {CORRELATION_IMAGES:,} held-out" in choices["Tables I and III"]


def test_files_of_results_have_names_of_their_own():
    paths = {results.path_of(Path("r"), r, p, s) for r in PAPER_RECIPES for p in recipes.PROTOCOLS for s in (0, 1)}
    assert len(paths) == 42 * 3 * 2


def test_defaults_of_the_training_script_are_the_papers_too():
    assert Args(epochs=100).checked().milestones == (30, 60, 90)
