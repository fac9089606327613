"""The task: its loss is the sum of its parts, its keys are the model's, and wrappers see everything trainable."""

import math

import pytest
import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_mfd import MFDClassificationTask, MFDLoss, forward_stages, mfd_loss


def build(weight=1.0, **kwargs):
    torch.manual_seed(0)
    return MFDClassificationTask(timm.create_model("test_resnet", num_classes=5), None, MFDLoss(weight), **kwargs)


def batch(count=6):
    torch.manual_seed(1)
    return torch.randn(count, 3, 64, 64), torch.arange(count) % 5


def test_loss_is_criterion_plus_mfd_of_the_stages():
    task = build(weight=0.7).eval()
    assert isinstance(task, TrainingTask)
    x, y = batch()
    out = task(x, y)
    stages = forward_stages(task.model, x)
    parts = torch.stack([mfd_loss(stage) for stage in stages.stages])
    torch.testing.assert_close(out["output"], stages.logits)
    torch.testing.assert_close(out["criterion_loss"], nn.functional.cross_entropy(stages.logits, y))
    torch.testing.assert_close(out["mfd_per_stage"], parts)
    torch.testing.assert_close(out["mfd_loss"], 0.7 * parts.sum())
    torch.testing.assert_close(out["loss"], out["criterion_loss"] + out["mfd_loss"])


def test_weight_zero_trains_bit_for_bit_like_timms_classification_task():
    x, y = batch()
    gradients = []
    for kind in ("mfd", "timm"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=5, drop_rate=0.3)
        task = (
            MFDClassificationTask(model, None, MFDLoss(0))
            if kind == "mfd"
            else ClassificationTask(model, nn.CrossEntropyLoss())
        )
        torch.manual_seed(2)
        task(x, y)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_mfd_reaches_the_weights():
    x, y = batch()
    gradients = []
    for weight in (0, 1):
        task = build(weight)
        task(x, y)["loss"].backward()
        gradients.append(task.model.conv1[0].weight.grad)
    assert not torch.allclose(*gradients)


def test_stage_indices_choose_what_is_constrained():
    out = build(stage_indices=(0, -1))(*batch())
    assert out["mfd_per_stage"].shape == (2,)


def test_saved_keys_are_those_of_the_plain_model():
    task = build()
    task.setup_ema(decay=0.9)
    plain = set(timm.create_model("test_resnet", num_classes=5).state_dict())
    assert set(task.get_checkpoint_state()["state_dict"]) == plain
    assert set(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == plain


def test_moving_average_follows_the_weights():
    task = build()
    task.setup_ema(decay=0.75)
    start = task.model.fc.bias.detach().clone()
    with torch.no_grad():
        task.model.fc.bias += 1
    task.update_ema()
    torch.testing.assert_close(task.get_eval_model(ema=True).fc.bias, start + 0.25)
    assert not any(parameter.requires_grad for parameter in task.trainable_module_ema.parameters())


def test_parts_for_logging_hold_no_graph():
    out = build()(*batch())
    assert [key for key, value in out.items() if value.requires_grad] == ["loss", "output"]


def test_unusable_input_is_named():
    with pytest.raises(ValueError, match="label 5 is outside the model's 5 classes"):
        build()(batch()[0], torch.tensor([0, 1, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="label -1 is outside"):
        build()(batch()[0], torch.tensor([0, 1, 2, 3, 4, -1]))
    build()(batch()[0], torch.tensor([0, 1, 2, 3, 4, -100]))  # what cross-entropy leaves out by default
    with pytest.raises(TypeError, match="Linear is not a timm model"):
        MFDClassificationTask(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="stage index 9 is out of range"):
        build(stage_indices=(9,))
    with pytest.raises(ValueError, match="no classifier"):
        MFDClassificationTask(timm.create_model("test_resnet", num_classes=0))


def test_weight_zero_reports_that_nothing_was_computed():
    out = build(weight=0)(*batch())
    assert out["mfd_loss"].item() == 0
    assert all(math.isnan(value) for value in out["mfd_per_stage"].tolist())


def test_parameters_and_optimizer_exemptions_have_the_models_own_names():
    task = MFDClassificationTask(timm.create_model("test_vit", num_classes=5))
    assert "pos_embed" in task.get_trainable_module().no_weight_decay()
    assert "pos_embed" in dict(task.get_trainable_module().named_parameters())
