"""Classification loss plus MFD in one forward pass, as a `timm.task` that DDP and Accelerate can wrap."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from .criteria import Reads, fold_classifier, linear_classifier
from .decorrelation import MFDLoss
from .staged import with_stages, without_stages
from .stages import gives_embedding, stage_info


class MFDClassificationTask(ClassificationTask):
    """Train a timm classifier with `criterion(logits, target) + MFD(stages)` (Eq. 7).

    Drop-in for `timm.task.ClassificationTask`. Either let `prepare_distributed` wrap the model, as timm's train script
    does, or pass the whole task through `accelerator.prepare`: everything trainable runs inside one `forward`. Saved
    keys stay those of the plain model.

    Args:
        model: Any timm model with a classifier.
        criterion: `criterion(logits [B, K], target [B]) -> scalar`, or one of `timm_mfd.criteria`. One that reads
            cosines sets the classifier's bias to 0 for good. Default: timm's, softmax cross-entropy unless
            `criterion_kwargs` say otherwise.
        mfd: The decorrelation loss. `MFDLoss(weight=0)` is the baseline on the same code path. Default: `MFDLoss()`.
        stage_indices: Which stages to constrain, see `forward_stages`.
        criterion_kwargs: As for `timm.task.ClassificationTask`, in place of `criterion`: `dict(smoothing=0.1)`.
        device: As for `timm.task.TrainingTask`.
        dtype: As for `timm.task.TrainingTask`.
        verbose: As for `timm.task.TrainingTask`.

    Raises:
        TypeError: If `model` is not a timm model, or is wrapped already: the task is what is to be wrapped.
        ValueError: If `model` has no classifier, or two that a teacher trains, or not the embedding that the criterion
            reads, or a stage index is out of range.

    Example:
        >>> task = MFDClassificationTask(model, nn.CrossEntropyLoss(), MFDLoss(weight=1.0))
        >>> out = task(images, target)
        >>> out["loss"].backward()
        >>> sorted(out)
        ['criterion_loss', 'loss', 'mfd_loss', 'mfd_per_stage', 'output']
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        mfd: MFDLoss | None = None,
        *,
        stage_indices: tuple[int, ...] | None = None,
        criterion_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        stage_info(model, stage_indices)  # refuses what has no stages, or not these
        if getattr(model, "num_classes", 0) == 0:
            raise ValueError(f"{type(model).__name__} has no classifier; build it with num_classes >= 1")
        if getattr(model, "distilled_training", False):
            raise ValueError(
                f"{type(model).__name__} returns two logits while it trains; call its set_distilled_training(False), "
                "which takes their mean"
            )
        reads: Reads = getattr(criterion, "reads", "logits")
        if reads != "logits" and not gives_embedding(model, training=True):
            raise ValueError(
                f"{type(criterion).__name__} needs a model whose classifier is one linear layer on one vector without "
                f"dropout; {type(model).__name__} has none as it is built"
            )
        mfd = MFDLoss() if mfd is None else mfd
        net = with_stages(model, stage_indices, mfd)
        net.cosines = reads == "cosines"
        options = {"criterion_kwargs": dict(criterion_kwargs)} if criterion_kwargs else {}  # of timm >= 1.0.30
        super().__init__(net, criterion, device=device, dtype=dtype, verbose=verbose, **options)
        self.mfd = mfd
        self.reads = reads
        if reads == "cosines" and (bias := linear_classifier(model).bias) is not None:
            # It has no part in a cosine, and DDP would wait for its gradient.
            bias.requires_grad_(False).zero_()

    @property
    def model(self) -> Any:
        """The plain timm model, without any wrapper."""
        return without_stages(unwrap_model(self.trainable_module))

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create the moving average of the weights; DDP is not to wait for gradients of it."""
        return super().setup_ema(*args, **kwargs).requires_grad_(False)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the plain timm model, or its moving average, so that saved keys are the model's own.

        After a criterion that reads cosines it is `fold_classifier` of the model.
        """
        resolved = super().get_eval_model(module=module, ema=ema)
        if resolved is not None and (inner := unwrap_model(resolved)) is not without_stages(inner):
            resolved = without_stages(inner)
        return fold_classifier(resolved) if self.reads == "cosines" and resolved is not None else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """Return what training needs beside the eval model: buffers of the criterion, a classifier before folding."""
        criterion = self.criterion.state_dict() if isinstance(self.criterion, nn.Module) else {}
        state = {f"criterion.{name}": tensor for name, tensor in criterion.items()}
        if self.reads == "cosines":
            state["classifier.weight"] = linear_classifier(self._net(ema)).weight.detach()
        return state

    def load_task_state(
        self,
        state: dict[str, Tensor] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Put back what `get_task_state` returned."""
        state = dict(state or {})
        if self.reads == "cosines" and strict and "classifier.weight" not in state:
            raise KeyError("the state lacks classifier.weight, the classifier of the cosines before it was folded")
        if "classifier.weight" in state and self.reads == "cosines":
            with torch.no_grad():
                linear_classifier(self._net(ema)).weight.copy_(state["classifier.weight"])
        if isinstance(self.criterion, nn.Module):
            prefix = "criterion."
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            self.criterion.load_state_dict(own, strict=strict)

    def _net(self, ema: bool) -> Any:
        return unwrap_model(self.get_trainable_module(ema=ema))

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile training and evaluation entry points, before distributed wrapping; return the compiled eval model."""
        self.eval_model = torch.compile(self.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module: Any = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the joint loss of one batch.

        Args:
            input: Images `[B, in_chans, H, W]`.
            target: Class indices `[B]`, or what the criterion takes.

        Returns:
            `loss` (scalar, Eq. 7), `output` (logits or cosines `[B, K]`, without a margin), and for logging, detached:
            `criterion_loss`, `mfd_loss` (the weighted MFD term) and `mfd_per_stage` `[S]` (NaN with weight 0).

        Raises:
            ValueError: If a class index on the CPU is outside the classes (on a GPU, looking would stall the device).
        """
        _check_labels(target, self.model.num_classes, getattr(self.criterion, "ignore_index", None))
        out = self.trainable_module(input)
        read = (out.logits, target, out.embedding) if self.reads == "embedding" else (out.logits, target)
        criterion_loss = self.criterion(*read)
        return {
            "loss": criterion_loss + out.mfd.loss,
            "output": out.logits,
            "criterion_loss": criterion_loss.detach(),
            "mfd_loss": out.mfd.loss.detach(),
            "mfd_per_stage": out.mfd.per_stage.detach(),
        }


def _check_labels(target: Tensor, num_classes: int, ignored: int | None) -> None:
    if target.device.type != "cpu" or target.ndim != 1 or target.is_floating_point() or torch.compiler.is_compiling():
        return
    inside = (target >= 0) & (target < num_classes)
    if ignored is not None:
        inside |= target == ignored
    if len(outside := target[~inside]):
        raise ValueError(
            f"label {int(outside[0])} is outside the model's {num_classes} classes (0 to {num_classes - 1})"
        )
