"""ResNets and ResNeXt with stems for small images: timm's `ResNet` class and keys."""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import ResNet
from torch import nn

from ._cfg import imagenet_cfg
from ._stem import Stem, check_stem, record_reductions, small_first_convolution

# The registry reads this when an entry point below is decorated, so it stands above them.
_NAMES = ("resnet18_mfd", "resnet34_mfd", "resnet50_mfd", "resnext50_32x4d_mfd")
default_cfgs = generate_default_cfgs({name: imagenet_cfg(first_conv="conv1", classifier="fc") for name in _NAMES})


def _resnet(arch: str, stem: Stem, **kwargs: Any) -> ResNet:
    check_stem(stem)
    model = timm.create_model(arch, **kwargs)
    if stem != "imagenet":
        model.conv1 = small_first_convolution(model.conv1, stem)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            model.maxpool = nn.Identity()
        record_reductions(model, stem)
    return model


def _create(arch: str, pretrained: bool, stem: Stem, **kwargs: Any) -> ResNet:
    return build_model_with_cfg(
        lambda **args: _resnet(arch, stem, **args),
        f"{arch}_mfd",
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )


@register_model
def resnet18_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> ResNet:
    """ResNet-18 with a choice of stem."""
    return _create("resnet18", pretrained, stem, **kwargs)


@register_model
def resnet34_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> ResNet:
    """ResNet-34 with a choice of stem."""
    return _create("resnet34", pretrained, stem, **kwargs)


@register_model
def resnet50_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> ResNet:
    """ResNet-50 with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px."""
    return _create("resnet50", pretrained, stem, **kwargs)


@register_model
def resnext50_32x4d_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px."""
    return _create("resnext50_32x4d", pretrained, stem, **kwargs)
