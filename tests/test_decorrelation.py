"""The loss against a float64 transcription of Eq. 5-7 with plain loops, and its invariances."""

import ast
import math
from pathlib import Path

import pytest
import torch

import timm_mfd.decorrelation
import timm_mfd.loss
from timm_mfd import MFDLoss, channel_correlation, mfd_loss

CENTERS = ("channel", "position")


def reference_correlation(x, center):
    """Direct transcription of Eq. 6, one number at a time."""
    b, d, h, w = x.shape
    x = x.double().tolist()
    r = [[0.0] * d for _ in range(d)]

    def mean(i, y, z):
        if center == "position":
            return sum(x[k][i][y][z] for k in range(b)) / b
        return sum(x[k][i][p][q] for k in range(b) for p in range(h) for q in range(w)) / (b * h * w)

    means = [[[mean(i, y, z) for z in range(w)] for y in range(h)] for i in range(d)]

    def inner(i, j):
        return sum(
            (x[k][i][y][z] - means[i][y][z]) * (x[k][j][y][z] - means[j][y][z])
            for k in range(b)
            for y in range(h)
            for z in range(w)
        )

    norms = [math.sqrt(inner(i, i)) for i in range(d)]
    for i in range(d):
        for j in range(d):
            r[i][j] = inner(i, j) / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0
    return torch.tensor(r, dtype=torch.float64)


def reference_loss(x, center):
    """Direct transcription of Eq. 5."""
    r = reference_correlation(x, center)
    d = len(r)
    return sum(float(r[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / (d * (d - 1))


def correlated_map(b=4, d=5, h=3, w=2, dtype=torch.float32):
    mixing = torch.randn(d, d)
    return torch.einsum("ij,bjhw->bihw", mixing, torch.randn(b, d, h, w)).to(dtype)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("shape", [(4, 5, 3, 2), (2, 7, 1, 1), (9, 3, 1, 4)])
def test_correlation_and_loss_match_loops_over_the_equations(center, shape):
    x = correlated_map(*shape)
    torch.testing.assert_close(
        channel_correlation(x, center).double(), reference_correlation(x, center), atol=1e-6, rtol=0
    )
    assert mfd_loss(x, center).item() == pytest.approx(reference_loss(x, center), abs=1e-6)


def test_hand_computed_value():
    # Channel 0 is (1, 2, 3), channel 1 is (1, 3, 2): r = 0.5 by hand, so Eq. 5 gives 0.25.
    x = torch.tensor([[1.0, 2, 3], [1, 3, 2]]).view(1, 2, 1, 3)
    assert channel_correlation(x)[0, 1].item() == pytest.approx(0.5)
    assert mfd_loss(x).item() == pytest.approx(0.25)


@pytest.mark.parametrize("center", CENTERS)
def test_loss_is_invariant_to_order_and_to_scale_and_shift(center):
    x = correlated_map(6, 5, 3, 4, torch.float64)
    loss = mfd_loss(x, center)
    torch.testing.assert_close(mfd_loss(x[:, torch.randperm(5)], center), loss)
    torch.testing.assert_close(mfd_loss(x[torch.randperm(6)], center), loss)
    scale, shift = torch.rand(2, 5, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(mfd_loss(x * scale + shift, center), loss)


def test_the_two_centers_differ_where_the_mean_map_is_not_flat():
    x = correlated_map()
    x = x + torch.randn(1, 5, 3, 2) * 3
    assert abs(mfd_loss(x, "channel") - mfd_loss(x, "position")) > 0.01


def test_loss_is_zero_for_orthogonal_and_one_for_identical_channels():
    hadamard = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).view(1, 3, 2, 2)
    assert mfd_loss(hadamard).item() == pytest.approx(0, abs=1e-12)
    same = torch.randn(4, 1, 3, 3).expand(4, 6, 3, 3)
    assert mfd_loss(same).item() == pytest.approx(1, abs=1e-6)
    assert mfd_loss(same * torch.tensor([1, -2, 3, -4, 5, -6]).view(1, 6, 1, 1)).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("center", CENTERS)
def test_gradient_matches_finite_differences(center):
    x = correlated_map(3, 4, 2, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: mfd_loss(t, center), x)
    assert torch.autograd.gradcheck(lambda t: channel_correlation(t, center)[0, 1], x)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e-30])
def test_constant_channels_correlate_with_nothing_and_get_no_gradient(value):
    x = correlated_map(4, 4, 5, 5)
    x[:, 2] = value
    x.requires_grad_()
    r = channel_correlation(x)
    assert torch.equal(r[2], torch.zeros(4))
    mfd_loss(x).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[:, 2], torch.zeros(4, 5, 5))
    assert x.grad[:, 0].abs().sum() > 0


def test_all_channels_constant_gives_zero_loss_and_gradient():
    x = torch.full((4, 3, 2, 2), 0.3, requires_grad=True)
    loss = mfd_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_single_channel_has_no_pairs():
    assert mfd_loss(torch.randn(4, 1, 2, 2)).item() == 0


def test_a_large_mean_does_not_decide_the_correlation():
    x = correlated_map(16, 4, 8, 8)
    shifted = x + 1000
    expected = reference_correlation(shifted, "channel")
    torch.testing.assert_close(channel_correlation(shifted).double(), expected, atol=1e-4, rtol=0)


def test_autocast_does_not_lower_the_precision():
    x = correlated_map(8, 6, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mfd_loss(x), channel_correlation(x)
    assert torch.equal(inside[0], mfd_loss(x))
    assert torch.equal(inside[1], channel_correlation(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_measured_in_float32(dtype):
    x = correlated_map(8, 6, 4, 4).to(dtype)
    assert mfd_loss(x).dtype == torch.float32
    torch.testing.assert_close(mfd_loss(x), mfd_loss(x.float()))


def test_module_returns_the_weighted_sum_of_its_parts():
    stages = [correlated_map(4, 5, 3, 3), correlated_map(4, 6, 2, 2)]
    out = MFDLoss(weight=2.5)(stages)
    assert out.per_stage.tolist() == [mfd_loss(stages[0]).item(), mfd_loss(stages[1]).item()]
    torch.testing.assert_close(out.loss, 2.5 * out.per_stage.sum())


def test_weight_zero_computes_no_statistics(monkeypatch):
    monkeypatch.setattr(
        timm_mfd.decorrelation, "mean_squared_correlations", lambda *_: pytest.fail("computed a statistic")
    )
    out = MFDLoss(weight=0)([torch.randn(4, 5, 3, 3)] * 2)
    assert out.loss.item() == 0
    assert out.per_stage.isnan().tolist() == [True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mfd_loss(torch.randn(4, 5)), r"4-D \[B, C, H, W\], got shape \(4, 5\)"),
        (lambda: mfd_loss(torch.randn(1, 5, 1, 1)), "at least 2 samples, got 1"),
        (lambda: mfd_loss(torch.randn(1, 5, 4, 4), "position"), "at least 2 samples, got 1"),
        (lambda: mfd_loss(torch.randn(0, 5, 4, 4)), "at least 2 samples, got 0"),
        (lambda: mfd_loss(torch.ones(4, 5, 2, 2, dtype=torch.long)), "floating dtype, got torch.int64"),
        (lambda: mfd_loss(torch.randn(4, 5, 2, 2), "pixel"), "channel, position, not 'pixel'"),
        (lambda: MFDLoss(weight=-1), "weight must be a finite number >= 0, not -1"),
        (lambda: MFDLoss(weight=math.nan), "not nan"),
        (lambda: MFDLoss(center="pixel"), "not 'pixel'"),
        (lambda: MFDLoss(sync="yes"), "'auto', True or False, not 'yes'"),
        (lambda: MFDLoss(sync=True)([torch.randn(4, 5, 2, 2)]), "initialised torch.distributed process group"),
        (lambda: MFDLoss(max_samples=1), "max_samples must be at least 2 or None, not 1"),
        (lambda: MFDLoss(center="position", max_samples=9), "max_samples=9 needs center='channel'"),
        (lambda: MFDLoss(weight=0)([torch.randn(4, 5)]), r"stage 0: .*got shape \(4, 5\)"),
        (lambda: MFDLoss()([]), "at least one stage"),
        (lambda: MFDLoss()(torch.randn(4, 5, 2, 2)), r"not one tensor \[4, 5, 2, 2\]; pass \[stage\]"),
        (lambda: MFDLoss()([torch.randn(4, 5, 2, 2), torch.randn(4, 5)]), r"stage 1: .*got shape \(4, 5\)"),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


METHOD = [Path(timm_mfd.decorrelation.__file__), *Path(timm_mfd.loss.__file__).parent.glob("*.py")]


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.name)
def test_the_method_imports_torch_only(path):
    standard = {"math", "collections", "functools", "types", "typing"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + str(node.module or "").split(".")[0])
    own = {".", ".loss", *(f".{path.stem}" for path in METHOD[1:])}
    assert imported - standard <= own | {"torch"}


def test_the_method_is_found():
    assert {"decorrelation.py", "correlation.py", "cpu.py", "cuda.py"} <= {path.name for path in METHOD}
