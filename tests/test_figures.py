"""Pictures show what they are given."""

import re

import matplotlib.image
import numpy as np
import pytest
import torch
from test_report import WITH, WITHOUT, results_of

from timm_mfd.figures import (
    accuracy_against_weight,
    compared_curves,
    correlation_by_stage,
    correlation_distribution,
    correlation_heat_maps,
    feature_maps,
    ours_against_paper,
    training_curves,
)
from timm_mfd.figures.correlations import by_group
from timm_mfd.figures.feature_maps import contact_sheet, frames_of, letter
from timm_mfd.moments import ChannelMoments, ClassMeans
from timm_mfd.redundancy import StageRedundancy
from timm_mfd.report import rows_of
from timm_mfd.stages import StageInfo


def line(epoch, per_stage=(0.2, 0.1)):
    return {
        "epoch": epoch, "top1": 10.0 * epoch, "top5": 20.0 * epoch, "loss": 2.0 / epoch, "criterion_loss": 1.5 / epoch,
        "mfd_loss": 0.0 if per_stage[0] is None else 0.5, "mfd_per_stage": list(per_stage),
    }  # fmt: skip


def colored(image):
    """The share of pixels that are neither grey nor black nor white, as titles and axes are."""
    return (np.ptp(image[..., :3], axis=2) > 0.2).mean()


@pytest.mark.parametrize("per_stage", [(0.2, 0.1), (None, None)])
def test_curves_are_drawn_as_png_and_svg(tmp_path, per_stage):
    metrics = [line(epoch, per_stage) for epoch in (1, 2, 3)]
    image = matplotlib.image.imread(training_curves(metrics, tmp_path / "curves.png", "model on data"))
    assert image.shape[1] == (1200 if per_stage[0] is None else 1800)
    assert colored(image) > 0.0005
    svg = training_curves(metrics, tmp_path / "curves.svg", "model on data").read_text()
    assert "<svg" in svg


def test_a_logarithmic_axis_has_plain_numbers(tmp_path):
    metrics = [line(epoch) | {"criterion_loss": 2 / epoch, "mfd_loss": 0.3 / epoch} for epoch in (1, 2, 3, 4)]
    svg = training_curves(metrics, tmp_path / "curves.svg", "model on data").read_text()
    written = re.findall(r"<!-- (.*?) -->", svg)
    assert {"1", "0.1"} < set(written)
    assert not [text for text in written if "$" in text or "e-" in text or "e\u2212" in text]


def test_stages_carry_their_own_numbers(tmp_path):
    svg = training_curves([line(1)], tmp_path / "curves.svg", "one epoch", stages=(2, 5)).read_text()
    assert "<!-- stage 5 -->" in svg
    assert "<!-- stage 0 -->" not in svg


def test_two_runs_are_drawn_over_each_other(tmp_path):
    runs = {
        name: [line(epoch, (None, None)) | {"mean_abs_correlation": [0.3, r]} for epoch in (1, 2, 3)]
        for name, r in (("without MFD", 0.2), ("with MFD", 0.1))
    }
    svg = compared_curves(runs, tmp_path / "both.svg", "two runs", stages=(2, 5)).read_text()
    for text in ("without MFD", "with MFD", "mean |r|, stage 2", "mean |r|, stage 5"):
        assert f"<!-- {text} -->" in svg
    image = matplotlib.image.imread(compared_curves(runs, tmp_path / "both.png", "two runs"))
    assert colored(image) > 0.0005
    earlier = {name: [line(1)] for name in runs}  # metrics of before it was measured
    assert "mean |r|" not in compared_curves(earlier, tmp_path / "earlier.svg", "two runs").read_text()
    with pytest.raises(ValueError, match="no epochs"):
        compared_curves({"a": [line(1)], "b": []}, tmp_path / "none.svg", "nothing")


def test_mean_r_of_held_out_images_is_drawn_for_runs_without_mfd_too(tmp_path):
    metrics = [line(epoch, (None, None)) | {"mean_abs_correlation": [0.3, 0.2]} for epoch in (1, 2)]
    svg = training_curves(metrics, tmp_path / "curves.svg", "model on data").read_text()
    assert "<!-- Mean |r|, held-out images -->" in svg
    assert "(Eq. 5)" not in svg


def test_a_run_that_an_earlier_version_began_is_drawn_without_what_it_did_not_measure(tmp_path):
    metrics = [line(1), line(2) | {"mean_abs_correlation": [0.3, 0.2]}]
    assert "held-out images" not in training_curves(metrics, tmp_path / "curves.svg", "resumed").read_text()


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
    assert colored(image) > 0.0005


def test_axes_speak_of_spread_and_of_chance_only_where_they_are_drawn(tmp_path):
    one_pair = [*results_of("resnet50/cifar100/softmax", 70.0), *results_of("resnet50/cifar100/softmax+mfd", 71.0)]
    several, one, none = (
        ours_against_paper(rows_of("4", results), tmp_path / "a.svg", "Table IV").read_text()
        for results in ([*WITHOUT, *WITH], one_pair, WITHOUT[:1])
    )
    for words, drawn_in in (
        ("bars: standard deviation", [several]),
        ("95 % interval", [several]),
        ("in black: may be chance", [one]),
    ):
        assert [svg for svg in (several, one, none) if words in svg] == drawn_in, words


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


def measured(seed=0, stages=2, channels=12):
    """Stages of noise in which channel 4 is a copy of 1, and channel 6 is dead."""
    torch.manual_seed(seed)
    found, maps = [], []
    for index in range(stages):
        x = torch.randn(20, channels, 4, 4)
        x[:, 4], x[:, 6] = x[:, 1], 0.5
        moments = ChannelMoments()
        moments.update(x)
        found.append(
            StageRedundancy.of(StageInfo(index, f"layer{index}", channels, 2), (4, 4), moments, ClassMeans(0), 0.95)
        )
        maps.append(x[0])
    return found, maps


def test_feature_maps_frame_copies_alike_and_cross_out_what_is_dead(tmp_path):
    found, maps = measured(stages=1)
    svg = feature_maps(torch.rand(3, 8, 8), maps, found, tmp_path / "a.svg", "noise").read_text()
    assert "<!-- stage 0, channels 0-11: 2 in groups with |r| &gt; 0.95, 1 dead -->" in svg
    assert svg.count("<!-- a -->") == 2
    assert svg.count("stroke: #0072b2") == 2
    assert len(re.findall('<path d="[^"]*" clip-path="[^"]*" style="fill: none; stroke: #999999', svg)) == 2
    image = matplotlib.image.imread(feature_maps(torch.rand(3, 8, 8), maps, found, tmp_path / "a.png", "noise"))
    assert colored(image) > 0.0005


def test_a_map_stands_in_the_cell_of_its_channel():
    maps = torch.rand(11, 32, 64)
    maps[:, 0, 0], maps[:, 0, 1] = 0, 1
    sheet = contact_sheet(maps, 2)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 8
    for channel, values in enumerate(maps):
        row, column = divmod(channel, 8)
        cell = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        gap = (height - 32) // 2
        np.testing.assert_allclose(cell[gap:-gap, gap:-gap], values.numpy(), atol=1e-6)
    assert (sheet[height:, 3 * width :] == 1).all()


def test_names_are_no_formulas_and_may_begin_with_an_underscore(tmp_path):
    values = {"_run": [0.2], "bad$\\x{$": [0.1]}
    svg = correlation_by_stage(values, [0], tmp_path / "a.svg", "$\\x{$ and \u732b").read_text()
    assert "<!--  _run -->" in svg
    assert "<!-- bad$\\x{$ -->" in svg


def test_only_groups_of_which_two_are_shown_get_a_frame():
    assert frames_of([(0, 70, 80), (1, 2)], 64) == {1: ("#D55E00", "b"), 2: ("#D55E00", "b")}
    assert [letter(number) for number in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]


def test_a_heat_map_starts_with_the_groups_and_ends_with_the_dead(tmp_path):
    found, _ = measured()
    order = by_group(found[0].correlation, found[0].groups, found[0].dead)
    assert order[:2] == [1, 4]
    assert order[-1] == 6
    assert sorted(order) == list(range(12))
    models = {"without": found, "with": measured(1)[0]}
    svg = correlation_heat_maps(models, tmp_path / "a.svg", "noise").read_text()
    assert svg.count("<image ") >= 4
    assert svg.count(f"<!-- stage 1: mean |r| {found[1].mean_abs_r:.3f} -->") == 1
    assert "<!-- 12 channels, 1 dead -->" in svg


def test_correlations_of_two_models_stand_side_by_side(tmp_path):
    models = {"without": measured()[0], "with": measured(1)[0]}
    svg = correlation_distribution(models, tmp_path / "a.svg", "noise").read_text()
    assert "<!-- without -->" in svg
    assert "<!-- with -->" in svg
    values = {"before": [0.4, 0.25], "after": [0.125, 0.5]}
    svg = correlation_by_stage(values, [1, 3], tmp_path / "b.svg", "noise").read_text()
    for text in ("0.400", "0.250", "0.125", "0.500", "stage 1", "stage 3", "before", "after"):
        assert f"<!-- {text} -->" in svg


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no stages"):
        feature_maps(torch.rand(3, 8, 8), [], [], tmp_path / "a.png", "nothing")
    for draw in (correlation_heat_maps, correlation_distribution):
        with pytest.raises(ValueError, match="no correlations"):
            draw({}, tmp_path / "a.png", "nothing")
    with pytest.raises(ValueError, match="no correlations"):
        correlation_by_stage({}, [], tmp_path / "a.png", "nothing")
