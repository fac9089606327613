"""The default configuration that every architecture here starts from."""

from typing import Any


def imagenet_cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    """Return timm's preprocessing defaults for a model without weights.

    Args:
        first_conv: Key of the convolution that reads the image; timm adapts it to other numbers of channels.
        classifier: Key of the classifier; timm adapts it to other numbers of classes.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }
