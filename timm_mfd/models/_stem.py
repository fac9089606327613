"""What the three stems mean: how far each stage of a five-stage network is reduced."""

from typing import Any, Literal, get_args

from torch import nn

Stem = Literal["imagenet", "small", "cifar"]

# Input side over map side for the stages 0 to 4.
REDUCTIONS: dict[Stem, tuple[int, int, int, int, int]] = {
    "imagenet": (2, 4, 8, 16, 32),
    "small": (1, 2, 4, 8, 16),
    "cifar": (1, 1, 2, 4, 8),
}

# Side of the images that a stem is made for, where that is not ImageNet's.
SIDES = {"small": 64, "cifar": 32}

# The paper changed the stems of its ResNets, ResNeXt and DenseNet, and left MobileNetV2 as it is for ImageNet.
_UNCHANGED_IN_THE_PAPER = ("mobilenetv2_100_mfd",)


def paper_stem(architecture: str, image_size: int) -> Stem:
    """Return the stem that the paper uses for an architecture on images of this side (Section IV)."""
    if architecture in _UNCHANGED_IN_THE_PAPER or image_size > 64:
        return "imagenet"
    return "cifar" if image_size <= 32 else "small"


def check_stem(stem: str) -> None:
    """Refuse an unknown stem.

    Raises:
        ValueError: If `stem` is not one of the three.
    """
    if stem not in get_args(Stem):
        raise ValueError(f"unknown stem {stem!r}; choose one of {', '.join(get_args(Stem))}")


def small_first_convolution(old: nn.Module, stem: Stem) -> nn.Conv2d:
    """Return what replaces a first convolution of 7x7 and stride 2: 3x3 and stride 1 (Section IV), not initialised.

    Raises:
        ValueError: If the model begins with several convolutions.
    """
    if not isinstance(old, nn.Conv2d) or old.kernel_size != (7, 7):
        raise ValueError(f"stem {stem!r} replaces the first convolution and cannot be combined with stem_type")
    like: Any = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, padding=1, bias=False, **like)


def record_reductions(model: Any, stem: Stem) -> None:
    """Write the strides that the stem gives into the model's `feature_info`."""
    info = model.feature_info
    entries = getattr(info, "info", info)
    for entry, reduction in zip(entries, REDUCTIONS[stem], strict=True):
        entry["reduction"] = reduction
