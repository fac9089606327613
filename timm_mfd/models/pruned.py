"""Networks with fewer channels than their architecture: pruned ones, and those that are to take pruned weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

_WIDTHS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)  # the layers that may be narrower


def saved_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a safetensors file."""
    with safe_open(path, framework="pt") as tensors:
        return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118


def check_arguments(name: str, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would replace layers of a pruned model while it is loaded.

    Args:
        name: What it is called in the message.
        config: What `check_config` returned.
        arguments: Of `create_model`.

    Raises:
        ValueError: Naming the argument.
    """
    own = {
        "num_classes": config["num_classes"],
        "in_chans": config["pretrained_cfg"].get("input_size", [3])[0],
        **config.get("model_args", {}),
    }
    for key, value in arguments.items():
        if value is not None and value != own.get(key) and not key.startswith("drop"):
            raise ValueError(f"{name} is pruned and takes no {key}={value}; load it as it is")


def fit_widths(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Give the layers of a new network the widths of pruned weights; their values are random.

    Args:
        model: A timm model; changed in place.
        shapes: Of the weights, by key.

    Returns:
        The model.

    Raises:
        ValueError: If the weights lack a layer or are wider than the network.

    Example:
        >>> fit_widths(timm.create_model("resnet18"), saved_shapes(Path("pruned/model.safetensors")))
    """
    for name, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        changed = False
        for key, tensor in own.items():
            wanted = tuple(shapes.get(f"{name}.{key}", ()))
            if wanted == tuple(tensor.shape):
                continue
            narrower = len(wanted) == tensor.ndim and all(
                0 < new <= old for new, old in zip(wanted, tensor.shape, strict=False)
            )
            if not isinstance(module, _WIDTHS) or not narrower:
                raise ValueError(f"{name}.{key} is {list(tensor.shape)} in the network, {list(wanted)} in the weights")
            empty = tensor.new_empty(wanted)
            setattr(module, key, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
            changed = True
        if not changed:
            continue
        assert isinstance(module, _WIDTHS)
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = module.weight.shape[0]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        else:
            if module.groups > 1:  # depthwise: a channel has a group of its own
                module.groups = module.weight.shape[0]
            module.out_channels = module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * module.groups
        module.reset_parameters()
    return note_widths(model)


@torch.no_grad()
def note_widths(model: Any) -> nn.Module:
    """Mark a model as pruned, and write its widths where timm's functions and ours look for them.

    Args:
        model: A timm model; changed in place.

    Returns:
        The model.
    """
    model.pruned = True  # for `save_pretrained`
    training, weight = model.training, next(model.parameters())
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    image = weight.new_zeros(1, model.in_chans, *size)
    stages = model.eval().forward_intermediates(image, output_fmt="NCHW", intermediates_only=True)
    model.num_features = model.forward_features(image).shape[1]
    model.train(training)
    infos = getattr(model.feature_info, "info", model.feature_info)
    for info, stage in zip(infos, stages, strict=True):
        info["num_chs"] = stage.shape[1]
    return model
