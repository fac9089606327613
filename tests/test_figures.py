"""Pictures show what they are given."""

import matplotlib.image
import pytest

from timm_mfd.figures import training_curves


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
