"""The public names as people use them, for the type checker: `.ci/lint` reads this file, and nothing runs it."""

import timm
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_type

import timm_mfd

model = timm.create_model("resnet18")
mfd = timm_mfd.MFDLoss(weight=1.0)


def own_losses(images: Tensor, target: Tensor) -> Tensor:
    out = timm_mfd.forward_stages(model, images, indices=(1, 3))
    assert_type(out, timm_mfd.StageOutput)
    found = mfd(out.stages)
    assert_type(found, timm_mfd.MFDOutput)
    return F.cross_entropy(out.logits, target) + found.loss + timm_mfd.mfd_loss(out.stages[0])


def in_forward(images: Tensor, target: Tensor) -> Tensor:
    net = timm_mfd.with_stages(model, mfd=mfd)
    out: timm_mfd.LossOutput = net(images)
    assert_type(out.mfd.per_stage, Tensor)
    return F.cross_entropy(out.logits, target) + out.mfd.loss


def as_a_task(images: Tensor, target: Tensor) -> Tensor:
    task = timm_mfd.MFDClassificationTask(model, mfd=mfd)
    return task(images, target)["loss"]


def correlations(x: Tensor) -> None:
    assert_type(timm_mfd.channel_correlation(x, center="position"), Tensor)
    timm_mfd.channel_correlation(x, center="pixel")  # type: ignore[arg-type]
    timm_mfd.MFDLoss(sync="yes")  # type: ignore[arg-type]
