"""MobileNetV2 with stems for small images: timm's `EfficientNet` class and keys."""

from functools import partial
from typing import Any

import timm
from timm.models import register_model
from timm.models.efficientnet import EfficientNet
from torch import nn

from . import _pretrained
from ._build import build
from ._stem import Stem, record_reductions

# The registry reads this when an entry point below is decorated, so it stands above them.
default_cfgs = _pretrained.default_cfgs("mobilenetv2_100_mfd", first_conv="conv_stem", classifier="classifier")


def _mobilenetv2(arch: str, stem: Stem, **kwargs: Any) -> EfficientNet:
    model = timm.create_model(arch, **kwargs)
    if isinstance(model.classifier, nn.Linear):
        # timm's initial weights grow as 1 / sqrt(num_classes): with 10 classes the first loss is 5 in place of log(10),
        # and the first steps at the paper's lr of 0.1, without warm-up, blow up the stages. torchvision's do not.
        nn.init.normal_(model.classifier.weight, std=0.01)
    if stem != "imagenet":
        model.conv_stem.stride = (1, 1)
        if stem == "cifar":
            model.blocks[1][0].conv_dw.stride = (1, 1)
        record_reductions(model, stem)
    return model


@register_model
def mobilenetv2_100_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 with a choice of stem; the paper keeps the ImageNet strides for every data set."""
    return build(partial(_mobilenetv2, "mobilenetv2_100"), "mobilenetv2_100_mfd", pretrained, stem, **kwargs)
