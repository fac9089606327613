"""ResNets with stems for small images: timm's `ResNet` class and keys."""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import ResNet
from torch import nn

from ._cfg import imagenet_cfg
from ._stem import Stem, check_stem, record_reductions

# The registry reads this when an entry point below is decorated, so it stands above them.
default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(first_conv="conv1", classifier="fc") for name in ("resnet18_mfd", "resnet50_mfd")}
)


def _resnet(arch: str, stem: Stem, **kwargs: Any) -> ResNet:
    check_stem(stem)
    model = timm.create_model(arch, **kwargs)
    if stem != "imagenet":
        if not isinstance(model.conv1, nn.Conv2d):
            raise ValueError(f"stem {stem!r} replaces the first convolution and cannot be combined with stem_type")
        # The paper: the first convolution becomes 3x3 with stride 1 (Section IV).
        old = model.conv1
        model.conv1 = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
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
def resnet50_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> ResNet:
    """ResNet-50 with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px."""
    return _create("resnet50", pretrained, stem, **kwargs)
