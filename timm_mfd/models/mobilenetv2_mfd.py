"""MobileNetV2 with stems for small images: timm's `EfficientNet` class and keys."""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet

from ._cfg import imagenet_cfg
from ._stem import Stem, check_stem, record_reductions

# The registry reads this when an entry point below is decorated, so it stands above them.
default_cfgs = generate_default_cfgs(
    {"mobilenetv2_100_mfd": imagenet_cfg(first_conv="conv_stem", classifier="classifier")}
)


def _mobilenetv2(arch: str, stem: Stem, **kwargs: Any) -> EfficientNet:
    check_stem(stem)
    model = timm.create_model(arch, **kwargs)
    if stem != "imagenet":
        model.conv_stem.stride = (1, 1)
        if stem == "cifar":
            model.blocks[1][0].conv_dw.stride = (1, 1)
        record_reductions(model, stem)
    return model


@register_model
def mobilenetv2_100_mfd(pretrained: bool = False, stem: Stem = "imagenet", **kwargs: Any) -> EfficientNet:
    """MobileNetV2 with a choice of stem; the paper keeps the ImageNet strides for every data set."""
    return build_model_with_cfg(
        lambda **args: _mobilenetv2("mobilenetv2_100", stem, **args),
        "mobilenetv2_100_mfd",
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **kwargs,
    )
