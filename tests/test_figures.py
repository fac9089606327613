"""Pictures show what they are given."""

import re

import matplotlib.image
import pytest
from test_report import WITH, WITHOUT, results_of

from timm_mfd.figures import accuracy_against_weight, ours_against_paper, training_curves
from timm_mfd.report import rows_of


def line(epoch, per_stage=(0.2, 0.1)):
    return {
        "epoch": epoch, "top1": 10.0 * epoch, "top5": 20.0 * epoch, "loss": 2.0 / epoch, "criterion_loss": 1.5 / epoch,
        "mfd_loss": 0.0 if per_stage[0] is None else 0.5, "mfd_per_stage": list(per_stage),
    }  # fmt: skip


@pytest.mark.parametrize("per_stage", [(0.2, 0.1), (None, None)])
def test_curves_are_drawn_as_png_and_svg(tmp_path, per_stage):
    metrics = [line(epoch, per_stage) for epoch in (1, 2, 3)]
    image = matplotlib.image.imread(training_curves(metrics, tmp_path / "curves.png", "model on data"))
    assert image.shape[1] == (1200 if per_stage[0] is None else 1800)
    assert image[..., :3].std() > 0.01
    svg = training_curves(metrics, tmp_path / "curves.svg", "model on data").read_text()
    assert "<svg" in svg


def test_stages_carry_their_own_numbers(tmp_path):
    svg = training_curves([line(1)], tmp_path / "curves.svg", "one epoch", stages=(2, 5)).read_text()
    assert "<!-- stage 5 -->" in svg
    assert "<!-- stage 0 -->" not in svg


def test_no_epochs_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no epochs"):
        training_curves([], tmp_path / "curves.png", "nothing")


def test_ours_and_the_papers_are_drawn_with_a_colour_only_where_significant(tmp_path):
    gain, loss = "#0072b2", "#d55e00"
    rows = rows_of("4", [*WITHOUT, *WITH])
    assert rows[0].difference.sign == 1
    svg = ours_against_paper(rows, tmp_path / "a.svg", "Table IV").read_text()
    without_any = ours_against_paper(rows_of("4", WITHOUT), tmp_path / "b.svg", "Table IV").read_text()
    assert gain in svg
    assert "<!-- significant gain -->" in svg
    assert gain not in without_any
    assert loss not in svg + without_any
    assert "<!-- resnet50, cifar100, softmax -->" in svg
    assert "<!-- paper, without -->" in svg
    digits = rows_of("digits", results_of("resnet18/digits/softmax", 90.0, 91.0))
    assert "<!-- paper, without -->" not in ours_against_paper(digits, tmp_path / "c.svg", "digits").read_text()
    image = matplotlib.image.imread(ours_against_paper(rows, tmp_path / "a.png", "Table IV"))
    assert image[..., :3].std() > 0.01


def test_table_2_is_a_curve_over_lg_lambda(tmp_path):
    results = [*WITHOUT, *WITH, *results_of("resnet50/cifar100/softmax+mfd100", 70.0)]
    svg = accuracy_against_weight(rows_of("2", results), tmp_path / "a.svg", "ResNet50 on CIFAR-100").read_text()
    assert re.findall("<!-- ((?:ours|paper), .*) -->", svg) == [
        "ours, without MFD", "paper, without MFD", "ours, with MFD", "paper, with MFD",
    ]  # fmt: skip
    assert "<!-- \N{MINUS SIGN}2 -->" in svg
    assert "<!-- 2 -->" in svg


def test_no_rows_are_an_error(tmp_path):
    for draw in (ours_against_paper, accuracy_against_weight):
        with pytest.raises(ValueError, match="no rows"):
            draw([], tmp_path / "rows.png", "nothing")
