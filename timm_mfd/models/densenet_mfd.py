"""DenseNet with stems for small images: timm's `DenseNet` class and keys."""

from functools import partial
from typing import Any

import timm
from timm.models import register_model
from timm.models.densenet import DenseNet
from torch import nn

from . import _pretrained
from ._build import build
from ._stem import Stem, record_reductions, small_first_convolution

# The registry reads this when an entry point below is decorated, so it stands above them.
default_cfgs = _pretrained.default_cfgs("densenet121_mfd", first_conv="features.conv0", classifier="classifier")


def _densenet(arch: str, stem: Stem, **kwargs: Any) -> DenseNet:
    model = timm.create_model(arch, **kwargs)
    if stem != "imagenet":
        model.features.conv0 = small_first_convolution(model.features.conv0, stem)
        nn.init.kaiming_normal_(model.features.conv0.weight)
        if stem == "cifar":
            model.features.pool0 = nn.Identity()
        record_reductions(model, stem)
    return model


@register_model
def densenet121_mfd(pretrained: bool = False, stem: Stem | None = None, **kwargs: Any) -> DenseNet:
    """DenseNet-121 with a choice of stem; the paper uses `"cifar"` at 32 px and `"small"` at 64 px.

    Stages 1 to 3 are the outputs of the dense blocks before their transitions, so they hold the channels of the stages
    before them (halved by each transition) beside new ones.
    """
    return build(partial(_densenet, "densenet121"), "densenet121_mfd", pretrained, stem, **kwargs)
