"""Reports say what the results say: means, spreads, intervals, and a colour only where it is due."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from timm_mfd import recipes
from timm_mfd.report import (
    Difference,
    accuracy_tables,
    markdown,
    paired_difference,
    rows_of,
    short,
    spread,
    to_csv,
    with_sign,
)
from timm_mfd.results import Result

BASE = Result(
    recipe="", protocol="paper", seed=0, top1=0.0, top5=99.0, images=10000, split="test",
    curve={"top1": [10.0, 50.0, 0.0]}, stages=[0, 1, 2, 3, 4], correlation_before=[0.3] * 5,
    correlation_after=[0.1, 0.2, 0.3, 0.4, 0.5], wall_seconds=3600.0, images_per_second=1000.0, device="1 x gpu",
    arithmetic={"mixed_precision": "bf16"}, environment={"git_commit": "0123456789abcdef", "git_modified": False},
    data="0", warnings=[],
)  # fmt: skip


def results_of(recipe, *accuracies, **change):
    return [
        replace(BASE, recipe=recipe, seed=seed, top1=top1, curve={"top1": [10.0, 50.0, top1]}, **change)
        for seed, top1 in enumerate(accuracies)
    ]


WITHOUT = results_of("resnet50/cifar100/softmax", 76.0, 76.4, 76.2)
WITH = results_of("resnet50/cifar100/softmax+mfd", 78.0, 78.2, 78.4)


def test_the_interval_is_that_of_scipys_paired_test():
    rng = np.random.default_rng(0)
    with_mfd, without = rng.normal(51, 1, 6), rng.normal(50, 1, 6)
    found = paired_difference(dict(enumerate(with_mfd)), dict(enumerate(without)))
    expected = stats.ttest_rel(with_mfd, without).confidence_interval(0.95)
    assert (found.n, found.mean) == (6, pytest.approx((with_mfd - without).mean()))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_only_runs_with_the_same_seed_are_paired():
    found = paired_difference({0: 50.0, 1: 52.0, 5: 99.0}, {1: 49.0, 0: 48.0, 2: 0.0})
    assert (found.n, found.mean) == (2, 2.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_a_single_pair_and_equal_differences_have_no_interval_and_no_significance():
    for n in (1, 3):
        found = paired_difference(dict.fromkeys(range(n), 51.0), dict.fromkeys(range(n), 50.0))
        assert found == Difference(n, 1.0, None, None)
        assert found.sign == 0
        assert str(found) == f"+1.00 (n={n})"


def test_equal_differences_of_image_counts_are_no_certainty():
    with_mfd, without = ([100 * count / 360 for count in counts] for counts in ((355, 354), (354, 353)))
    found = paired_difference(dict(enumerate(with_mfd)), dict(enumerate(without)))
    assert (found.low, found.sign) == (None, 0)


def test_runs_on_other_images_or_in_another_precision_are_not_paired():
    other = [replace(r, data="1") for r in WITH[:1]] + [
        replace(r, arithmetic={"mixed_precision": "no"}) for r in WITH[1:2]
    ]
    (row,) = rows_of("4", [*WITHOUT, *other, WITH[2]])
    assert (row.ours.n, row.difference.n) == (3, 1)


def test_significance_is_an_interval_on_one_side_of_0():
    assert [Difference(3, m, m - 1, m + 1).sign for m in (2.0, 0.5, -0.5, -2.0)] == [1, 0, 0, -1]


def test_spread_is_the_sample_standard_deviation():
    assert str(spread([50.0, 52.0])) == f"51.00 ± {math.sqrt(2):.2f} (n=2)"
    assert str(spread([50.0])) == "50.00 (n=1)"
    assert spread([]) is None


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_ours_beside_the_papers_and_a_colour_only_where_significant():
    chance = results_of("resnet50/cifar10/softmax", 93.0, 94.0, 93.5) + results_of(
        "resnet50/cifar10/softmax+mfd", 93.6, 93.4, 93.7
    )
    loss = results_of("resnet50/facescrub/softmax", 90.0, 91.0) + results_of(
        "resnet50/facescrub/softmax+mfd", 80.0, 81.01
    )
    lines = accuracy_tables([*WITHOUT, *WITH, *chance, *loss], with_sign).splitlines()
    rows = {tuple(cells_of(line)[:3]): cells_of(line)[3:] for line in lines if line.startswith("| resnet50")}
    interval = stats.ttest_rel([78.0, 78.2, 78.4], [76.0, 76.4, 76.2]).confidence_interval(0.95)
    assert rows["resnet50", "cifar100", "softmax"] == [
        "76.42", "79.18", "+2.76", "76.20 ± 0.20 (n=3)", "78.20 ± 0.20 (n=3)",
        f"+2.00 [{interval.low:+.2f}, {interval.high:+.2f}] 🟢 ▲", "in part: smaller",
    ]  # fmt: skip
    assert rows["resnet50", "cifar10", "softmax"][-2].startswith("+0.07 [-1.")
    assert rows["resnet50", "cifar10", "softmax"][-2].endswith("]")
    assert rows["resnet50", "facescrub", "softmax"][-2].endswith("🔴 ▼")
    assert sum(line.startswith("###") for line in lines) == 2  # Tables II and IV: rows without results are left out


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([2.6, 2.8, 3.0], "yes"),  # the paper: 2.76
        ([2.0, 2.8, 3.4], "yes"),
        ([1.8, 2.0, 2.2], "in part: smaller"),  # [1.50, 2.50]
        ([2.1, 2.3, 2.5], "yes"),  # its mean is smaller, but [1.80, 2.80] holds the paper's
        ([2.7, 3.0, 3.3], "yes"),
        ([2.9, 3.2, 3.5], "yes"),  # [2.45, 3.95]
        ([4.0, 4.1, 4.2], "in part: larger"),
        ([-1.0, 3.0, 6.0], "cannot tell"),
        ([3.0, 5.8], "cannot tell"),
        ([-0.4, 0.0, 0.3], "no"),  # [-0.90, 0.84] leaves out the paper's
        ([-3.0, -2.0, -2.5], "no: the opposite"),
        ([2.76], "-"),
        ([2.0, 2.0], "-"),
        ([], "-"),
    ],
)
def test_the_papers_effect_is_found_if_the_interval_holds_it_and_leaves_out_0(gains, verdict):
    with_mfd = results_of("resnet50/cifar100/softmax+mfd", *(70 + gain for gain in gains))
    without = results_of("resnet50/cifar100/softmax", *[70.0] * max(1, len(gains)))
    (row,) = rows_of("4", [*with_mfd, *without])
    assert row.verdict == verdict


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [([4.0, 4.2, 4.4], "yes"), ([1.0, 1.1, 1.2], "in part: smaller"), ([8.0, 8.1], "in part: larger"),
     ([-2.0, -2.1, -2.2], "no: the opposite"), ([-9.0, 8.0], "cannot tell")],
)  # fmt: skip
def test_a_loss_of_the_paper_is_an_effect_too(losses, verdict):
    heavy = results_of("resnet50/cifar100/softmax+mfd100", *(70 - loss for loss in losses))  # the paper: -4.22
    without = results_of("resnet50/cifar100/softmax", *[70.0] * len(losses))
    assert {row.recipe.mfd_weight: row.verdict for row in rows_of("2", [*heavy, *without])}[100] == verdict


def test_what_the_paper_has_not_has_no_verdict_and_another_reading_that_nobody_ran_no_row():
    ours = results_of("resnet18/digits/softmax+mfd", 99.0, 99.2) + results_of("resnet18/digits/softmax", 98.0, 98.3)
    assert [row.verdict for row in rows_of("digits", ours)] == ["-"]
    baseline = results_of("mobilenetv2/tiny_imagenet/softmax", 46.0)
    assert [row.recipe.id for row in rows_of("5", baseline)] == ["mobilenetv2/tiny_imagenet/softmax+mfd"]
    assert rows_of("eq6", baseline) == []
    assert [row.recipe.mfd_weight for row in rows_of("2", WITHOUT)] == [0.01, 0.1, 1, 10, 100]


def test_the_short_report_is_the_tables_and_what_they_stand_on():
    text = short([*WITHOUT, *WITH])
    assert accuracy_tables([*WITHOUT, *WITH], with_sign) in text
    assert text.startswith("Protocol `paper` (Section IV of the paper, 100 epochs). 2 of the paper's 42 recipes have")
    assert "All runs" not in text


def test_a_row_with_one_side_only_is_shown_without_a_difference():
    (row,) = rows_of("4", WITHOUT)
    assert (row.ours, row.difference) == (None, None)
    assert cells_of(accuracy_tables(WITHOUT).splitlines()[-1])[-4:] == ["76.20 ± 0.20 (n=3)", "-", "-", "-"]


def test_the_report_keeps_protocols_apart_and_says_what_it_stands_on():
    strong = results_of("resnet50/cifar100/softmax", 79.9, protocol="strong", wall_seconds=7200.0)
    first = replace(WITHOUT[0], curve={"top1": [10.0, 80.0, 76.0]})
    text = markdown([first, *WITHOUT[1:], *WITH, *strong], {"paper": {"A title": "picture.png"}})
    paper, rest = text.split("## Protocol `strong`")
    assert "2 of the paper's 42 recipes have a result. 6 runs in 6.00 hours: 6 on 1 x gpu." in paper
    assert "1 of the paper's 42 recipes have a result. 1 run in 2.00 hours" in rest
    assert "![A title](picture.png)" in paper
    assert "79.90" not in paper
    # Correlations: the mean over seeds, and the paper's Table III below.
    assert "| resnet50/cifar100/softmax+mfd | ours (n=3) | 0.100   | 0.200   | 0.300   | 0.400   | 0.500   |" in paper
    assert "| resnet50/cifar100/softmax+mfd | paper      | 0.007   | 0.015   | 0.034   | 0.031   | 0.013   |" in paper
    assert "80.00 (2)" in paper  # the best epoch, beside the last one that counts
    assert "0123456789 " in paper
    assert all(question in rest for question in recipes.OPEN_CHOICES)


def test_warnings_of_runs_are_in_the_report_and_open_choices_only_where_the_paper_is_concerned():
    text = markdown(results_of("resnet18/digits/softmax", 9.7, warnings=["the model is constant"]), {})
    assert "- resnet18/digits/softmax, seed 0: the model is constant" in text
    assert "leaves open" not in text
    assert "Warnings" not in markdown(WITHOUT, {})


def test_no_speed_is_quoted_of_a_run_that_shared_its_machine():
    shared = [replace(WITHOUT[0], shared_machine=True, images_per_second=4321.0), *WITH]
    text = markdown(shared, {})
    row = next(
        line for line in text.splitlines() if line.startswith("| resnet50/cifar100/softmax ") and "76.00" in line
    )
    assert [cell.strip() for cell in row.split("|")[5:7]] == ["-", "-"]
    assert "4,321" not in text
    assert " hours" not in text
    assert "1 on 1 x gpu, shared with other work" in text


def test_a_table_of_ours_does_not_repeat_rows_of_the_papers_alone():
    base = "mobilenetv2/cifar100/softmax"
    paper = [*results_of(base, 54.0), *results_of(f"{base}+mfd", 57.0)]
    assert rows_of("weights", paper) == []
    rows = rows_of("weights", [*paper, *results_of(f"{base}+mfd10", 55.0)])
    assert [(row.recipe.id, row.difference and row.difference.mean) for row in rows] == [
        (f"{base}+mfd", 3.0), (f"{base}+mfd10", 1.0),
    ]  # fmt: skip


def test_the_csv_holds_the_same_numbers():
    rows = list(csv.DictReader(io.StringIO(to_csv([*WITHOUT, *WITH, *results_of("resnet18/digits/softmax", 90.0)]))))
    assert [(row["table"], row["recipe"]) for row in rows[-2:]] == [
        ("4", "resnet50/cifar100/softmax+mfd"),
        ("digits", "resnet18/digits/softmax+mfd"),
    ]
    full, half = rows[-2:]
    interval = stats.ttest_rel([78.0, 78.2, 78.4], [76.0, 76.4, 76.2]).confidence_interval(0.95)
    numbers = [float(value) for value in list(full.values())[3:]]
    expected = [76.42, 79.18, 2.76, 3, 76.2, 0.2, 3, 78.2, 0.2, 3, 2, interval.low, interval.high, 1]
    assert numbers == pytest.approx(expected, abs=1e-4)
    assert list(half.values())[3:] == ["", "", "", "1", "90.0", "", "0", "", "", "0", "", "", "", ""]
