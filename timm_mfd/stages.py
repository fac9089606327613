"""Logits and stage outputs of any timm model from one forward pass of the unmodified model."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import first_words


class StageOutput(NamedTuple):
    """What `forward_stages` returns.

    Attributes:
        logits: `[B, num_classes]`, equal to `model(images)`; None for a model without a classifier.
        stages: Feature maps `[B, C_s, H_s, W_s]`, from the input to the output of the network.
        embedding: `[B, D]`, what the final linear classifier reads; None where a model has no such single vector
            (classifiers that are averaged, are convolutions or hold a norm layer, and while dropout is active).
    """

    logits: Tensor
    stages: tuple[Tensor, ...]
    embedding: Tensor | None


@dataclass(frozen=True)
class StageInfo:
    """One stage of a model, as timm's `feature_info` describes it."""

    index: int
    module: str
    channels: int
    reduction: int


def stage_info(model: nn.Module, indices: Sequence[int] | None = None) -> list[StageInfo]:
    """Describe the stages that `forward_stages` returns.

    Args:
        model: Any timm model.
        indices: As for `forward_stages`.

    Returns:
        One entry per stage; `reduction` is the input side divided by the side of the map.

    Raises:
        TypeError: If `model` is not a timm model.
        ValueError: If an index is out of range.

    Example:
        >>> [stage.channels for stage in stage_info(timm.create_model("resnet18"))]
        [64, 64, 128, 256, 512]
    """
    info: Any = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        inner = getattr(model, "timm_model", None)
        remedy = "build it with timm_mfd.create_model, or give feature maps of another network to MFDLoss itself"
        if inner is not None and hasattr(inner, "forward_intermediates"):
            remedy = "pass the timm model inside it, its attribute timm_model"
        raise TypeError(
            f"{type(model).__name__} is not a timm model with forward_intermediates and feature_info; {remedy}"
        )
    stages = [
        StageInfo(index, str(entry["module"]), int(entry["num_chs"]), int(entry["reduction"]))
        for index, entry in enumerate(getattr(info, "info", info))
    ]
    return [stages[index] for index in _take(stages, indices)]


def forward_stages(model: nn.Module, images: Tensor, indices: Sequence[int] | None = None) -> StageOutput:
    """Run a timm model once and return its logits together with its stage outputs.

    Without hooks and without changing the model. It runs past whatever wraps the model, so it is for models that
    nothing wraps: for analysis, and for a loop of one process. For DDP, `torch.compile`, Accelerate and trainers there
    is `with_stages`.

    Args:
        model: Any timm model; none of its weights or keys change.
        images: Input `[B, in_chans, H, W]`.
        indices: Which entries of `model.feature_info` to return; negative ones count from the end. Default: all of them
            for a pyramid (ResNet, DenseNet, MobileNetV2: the paper's Stage 0-4), four evenly spaced blocks for an
            isotropic transformer or MLP.

    Returns:
        `StageOutput(logits, stages, embedding)`; the stages agree with `stage_info(model, indices)`.

    Raises:
        TypeError: If `model` is not a timm model, is wrapped or compiled, or returns several logits, as distilled ones
            can.
        ValueError: If an index is out of range.

    Example:
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> out = forward_stages(model, torch.randn(2, 3, 64, 64))
        >>> out.logits.shape, out.stages[0].shape
        (torch.Size([2, 10]), torch.Size([2, 64, 32, 32]))
    """
    if not torch.compiler.is_compiling():  # a compiled function has this model inside, not around
        check_unwrapped(model, "forward_stages")
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        inside_ddp = DistributedDataParallel._active_ddp_module is not None
        if processes > 1 and torch.is_grad_enabled() and model.training and not inside_ddp:
            _warn_of_gradients(processes)
    return read_stages(model, images, tuple(stage.index for stage in stage_info(model, indices)))


def read_stages(model: Any, images: Tensor, taken: Sequence[int]) -> StageOutput:
    """Do what `forward_stages` does, without asking what wraps the model.

    Args:
        model: Any timm model.
        images: Input `[B, in_chans, H, W]`.
        taken: Indices of the stages, increasing, from 0.
    """
    features, stages = model.forward_intermediates(images, indices=list(taken), output_fmt="NCHW")
    logits, embedding = _forward_head(model, features)
    if logits is not None and not isinstance(logits, Tensor):
        raise TypeError(
            f"{type(model).__name__} returns {len(logits)} logits for an image while it trains; call its "
            "set_distilled_training(False), which takes their mean"
        )
    # None where there is no classifier; almost everybody has one, and puts the logits into a loss.
    return StageOutput(cast(Tensor, logits), tuple(stages), embedding)


def check_unwrapped(model: nn.Module, caller: str) -> None:
    """Refuse a model behind a wrapper whose work would be left out.

    Args:
        model: What was given.
        caller: The function that it was given to.

    Raises:
        TypeError: Naming the wrapper and what to write.
    """
    attributes = getattr(model, "__dict__", {})
    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in _WRAPPERS), None)
    if attributes.get("_compiled_call_impl") is not None:
        kind = "OptimizedModule"
    elif "_original_forward" in attributes:
        kind = "Accelerate"
    if kind is not None:
        wrapper, remedy = _WRAPPERS[kind]
        raise TypeError(
            f"{caller} would run past {wrapper}; put it around the other way: net = {remedy}, then net(images)"
        )


_WRAPPERS = {
    "OptimizedModule": ("torch.compile", "torch.compile(timm_mfd.with_stages(model))"),
    "Accelerate": ("accelerator.prepare", "accelerator.prepare(timm_mfd.with_stages(model))"),
    "DistributedDataParallel": ("DistributedDataParallel", "DistributedDataParallel(timm_mfd.with_stages(model))"),
    "DataParallel": ("DataParallel", "DataParallel(timm_mfd.with_stages(model))"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", "FullyShardedDataParallel(timm_mfd.with_stages(model))"),
    "FSDPModule": ("fully_shard", "fully_shard(timm_mfd.with_stages(model))"),
}


@functools.cache
def _warn_of_gradients(processes: int) -> None:
    warnings.warn(
        f"forward_stages runs outside of DistributedDataParallel in a run of {processes} processes: gradients are "
        "averaged only if you do it; use net = DistributedDataParallel(timm_mfd.with_stages(model)), then net(images)",
        stacklevel=3,
    )


def _take(stages: Sequence[StageInfo], indices: Sequence[int] | None) -> list[int]:
    count = len(stages)
    if isinstance(indices, int):
        raise TypeError(f"stage indices are a sequence, not {indices}; write ({indices},) for one stage")
    if indices is None:
        isotropic = len({stage.reduction for stage in stages}) == 1
        if isotropic and count > 4:
            return [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        return list(range(count))
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"stage index {index} is out of range: the model has stages 0 to {count - 1}")
    taken = [index % count for index in indices]
    if not taken or taken != sorted(set(taken)):
        raise ValueError(f"stage indices must be increasing and at least one, got {list(indices)}")
    return taken


def gives_embedding(model: nn.Module, training: bool = False) -> bool:
    """Tell whether `forward_stages` returns the embedding of a model.

    Args:
        model: Any timm model.
        training: Whether the question is about training mode.
    """
    timm_model: Any = model
    return hasattr(model, "get_classifier") and _reads_pre_logits(timm_model, timm_model.get_classifier(), training)


def _forward_head(model: Any, features: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if not hasattr(model, "get_classifier"):
        return None, None
    classifier = model.get_classifier()
    if getattr(model, "num_classes", 0) == 0:
        pooled = model.forward_head(features)
        return None, pooled if pooled.ndim == 2 else None
    if _reads_pre_logits(model, classifier, model.training):
        # The head runs once: twice would draw dropout twice and update batch norms twice.
        embedding = model.forward_head(features, pre_logits=True)
        return classifier(embedding), embedding
    return model.forward_head(features), None


def _reads_pre_logits(model: Any, classifier: nn.Module, training: bool) -> bool:
    """Whether logits are exactly `classifier(forward_head(pre_logits=True))`."""
    if not isinstance(classifier, nn.Linear):
        return False
    if training and bool(getattr(model, "drop_rate", 0)):
        return False  # some heads drop out after the point where pre_logits returns
    for module in model.modules():
        # A norm or an activation precedes the classifier inside a Sequential, and pre_logits leaves it out.
        if isinstance(module, nn.Sequential) and any(child is classifier for child in module.children()):
            return False
        # A second classifier: the logits are a combination of both.
        if module is not classifier and getattr(module, "out_features", None) == classifier.out_features:
            return False
    return True


@torch.no_grad()
def stage_shapes(
    model: nn.Module, images: Tensor, indices: Sequence[int] | None = None
) -> list[tuple[StageInfo, torch.Size]]:
    """Measure the size of every stage for the given input, in evaluation mode.

    Args:
        model: Any timm model; its training mode is restored.
        images: Input `[B, in_chans, H, W]`.
        indices: As for `forward_stages`.

    Returns:
        `(stage, shape [B, C, H, W])` for each stage.

    Raises:
        ValueError: If the model does not take images of this size, or an index is out of range.

    Example:
        >>> stage_shapes(model, torch.zeros(1, 3, 32, 32))[0][1]
        torch.Size([1, 64, 16, 16])
    """
    was_training = model.training
    model.eval()
    try:
        stages = forward_stages(model, images, indices).stages
    except (torch.OutOfMemoryError, MemoryError, ValueError):  # say nothing about the size of images
        raise
    except Exception as error:
        size = f"{images.shape[2]}x{images.shape[3]}"
        raise ValueError(f"{type(model).__name__} does not take images of {size}: {first_words(error)}") from None
    finally:
        model.train(was_training)
    return list(zip(stage_info(model, indices), (stage.shape for stage in stages), strict=True))
