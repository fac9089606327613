"""ResNets and ResNeXt with stems for small images: timm's `ResNet` class and keys."""

from functools import partial
from typing import Any

import timm
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import nn

from . import _pretrained
from ._build import build
from ._stem import Stem, record_reductions, small_first_convolution

# The registry reads this when an entry point below is decorated, so it stands above them.
_NAMES = ("resnet18_mfd", "resnet34_mfd", "resnet50_mfd", "resnext50_32x4d_mfd")
default_cfgs = _pretrained.default_cfgs(*_NAMES, first_conv="conv1", classifier="fc")


def _resnet(arch: str, stem: Stem, **kwargs: Any) -> ResNet:
    model = timm.create_model(arch, **kwargs)
    if stem != "imagenet":
        model.conv1 = small_first_convolution(model.conv1, stem)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            model.maxpool = nn.Identity()
        record_reductions(model, stem)
    return model


def _create(arch: str, pretrained: bool, stem: Stem | None, **kwargs: Any) -> ResNet:
    return build(partial(_resnet, arch), f"{arch}_mfd", pretrained, stem, **kwargs)


@register_model
def resnet18_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> ResNet:
    """ResNet-18 with a choice of stem."""
    return _create("resnet18", pretrained, stem, **kwargs)


@register_model
def resnet34_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> ResNet:
    """ResNet-34 with a choice of stem."""
    return _create("resnet34", pretrained, stem, **kwargs)


@register_model
def resnet50_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> ResNet:
    """ResNet-50 with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px."""
    return _create("resnet50", pretrained, stem, **kwargs)


@register_model
def resnext50_32x4d_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px."""
    return _create("resnext50_32x4d", pretrained, stem, **kwargs)
