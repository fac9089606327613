"""A timm model whose `forward` returns logits and stages, or logits and the MFD loss: wrap it like any other model."""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .criteria import cosines_of, linear_classifier
from .decorrelation import MFDLoss, MFDOutput
from .stages import StageOutput, check_unwrapped, read_stages, stage_info


class LossOutput(NamedTuple):
    """What `with_stages(model, mfd=...)` returns from `forward`.

    Attributes:
        logits: `[B, num_classes]`, equal to `model(images)`.
        mfd: `MFDOutput(loss, per_stage)`.
        embedding: As in `StageOutput`.
    """

    logits: Tensor
    mfd: MFDOutput
    embedding: Tensor | None


def with_stages(model: nn.Module, indices: Sequence[int] | None = None, mfd: MFDLoss | None = None) -> Any:
    """Return the model with a `forward` that also gives its stages, or their MFD loss, from one pass.

    What it returns shares every layer, parameter and buffer with `model`, under the same names, and is an instance of
    its class: optimizers, EMA, checkpoints, layer decay and wrappers (DDP, FSDP2, `torch.compile`, Accelerate, Trainer,
    Lightning) see the plain model. Wrap it, and call what you have wrapped: everything runs inside its `forward`.
    `model` itself still returns logits, for evaluation and export. Switch modes and set options (`train`, `eval`,
    `set_grad_checkpointing`, `reset_classifier`) on what is returned, or before: of the model itself only layers are
    shared, not its own attributes.

    Args:
        model: Any timm model with a classifier, not wrapped yet.
        indices: Which stages, see `forward_stages`.
        mfd: Compute this loss of the stages in `forward`, so that no feature map leaves it: the way for compiled models
            and for mixed precision under Accelerate, which would convert every map to float32.

    Returns:
        The module. Without `mfd` its output is `StageOutput(logits, stages, embedding)`, with it
        `LossOutput(logits, mfd, embedding)`.

    Raises:
        TypeError: If `model` is not a timm model, or is wrapped already.
        ValueError: If an index is out of range.

    Example:
        >>> net = with_stages(timm.create_model("resnet18", num_classes=10), mfd=MFDLoss(weight=1.0))
        >>> out = net(torch.randn(2, 3, 64, 64))
        >>> out.logits.shape, out.mfd.loss.shape
        (torch.Size([2, 10]), torch.Size([]))
    """
    check_unwrapped(model, "with_stages")
    taken = tuple(stage.index for stage in stage_info(model, indices))
    if isinstance(model, _WithStages):
        model = model.__dict__["plain_model"]
    net = copy.copy(model)
    kind: Any = type(model)
    net.__class__ = _class_with_stages(kind)
    # Not through `nn.Module`, which would make them layers of the model.
    net.__dict__.update(stage_indices=taken, mfd=mfd, cosines=False, plain_model=model)
    return net


class _WithStages:
    stage_indices: tuple[int, ...]
    mfd: MFDLoss | None
    cosines: bool  # in place of logits, for the criteria of `MFDClassificationTask` that read them
    plain_model: nn.Module
    training: bool

    def forward(self, images: Tensor) -> StageOutput | LossOutput:
        out = read_stages(self, images, self.stage_indices)
        if self.cosines:
            assert out.embedding is not None  # the task has refused what gives none
            out = out._replace(logits=cosines_of(out.embedding, linear_classifier(self.plain_model).weight))
        if self.mfd is None:
            return out
        return LossOutput(out.logits, self.mfd(out.stages), out.embedding)

    def train(self, mode: bool = True) -> Any:
        # The layers are the same; the flags of the model itself and of the loss are not.
        self.plain_model.training = mode
        if self.mfd is not None:
            self.mfd.train(mode)
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so it is pickled as the class that it derives from.
        return _empty, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _class_with_stages(base: Any) -> Any:
    return type(f"{base.__name__}WithStages", (_WithStages, base), {"__module__": __name__, "__doc__": base.__doc__})


def _empty(base: Any) -> nn.Module:
    made = _class_with_stages(base)
    return made.__new__(made)


def without_stages(model: nn.Module) -> Any:
    """Return the model that `with_stages` was given, or `model` itself."""
    return model.__dict__.get("plain_model", model)
