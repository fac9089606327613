"""Channels that are zero on every image: what they cost, and the same model without them."""

import math
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .gathering import from_all_processes
from .models.pruned import note_widths

TOLERANCE = 1e-5  # of a logit, as a share of the largest one or of 1: a sum without its zeros is rounded differently

# Layers whose answer is a sum over input channels, to which a channel of zeros adds nothing; a weight-standardised
# convolution, for one, is not: there the other channels' weights change when one goes.
_SUMS = (nn.Conv2d, Conv2dSame, nn.Linear)
_CHANNELWISE = (nn.BatchNorm2d, BatchNormAct2d)
_PRODUCTS = {"aten.convolution", "aten.addmm", "aten.mm"}  # of activations with weights
_OPERATIONS = ("_ElementWiseOp", "_ConcatOp", "_ReshapeOp", "_OutputOp")


class SilentInputs:
    """Notes which input channels of every convolution and linear layer are exactly 0 while it is open.

    Args:
        model: The model that images are shown to.

    Attributes:
        masks: For each layer by name, `[in_channels]`: True where every input so far was 0.

    Example:
        >>> with SilentInputs(model) as silent:
        ...     for images, _ in batches:
        ...         model(images)
    """

    def __init__(self, model: nn.Module):
        self.masks: dict[str, Tensor] = {}
        self._model = model
        self._hooks: list[Any] = []

    def __enter__(self) -> "SilentInputs":
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def gather(self) -> None:
        """Take in what the other processes saw, if there are any."""
        everywhere = from_all_processes({name: mask.cpu() for name, mask in self.masks.items()})
        names = {name for masks in everywhere for name in masks}
        self.masks = {
            name: torch.stack([masks[name] for masks in everywhere if name in masks]).all(0) for name in names
        }

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            dim = 1 if isinstance(module, nn.Conv2d) else x.ndim - 1
            mask = self.masks.setdefault(name, torch.ones(x.shape[dim], dtype=torch.bool, device=x.device))
            still = mask.nonzero().flatten()
            if len(still):  # few after the first batch
                others = [axis for axis in range(x.ndim) if axis != dim]
                mask[still] = ~(x.index_select(dim, still) != 0).any(others)

        return note


@dataclass(frozen=True)
class Pruned:
    """A model without some of its channels.

    Attributes:
        model: The pruned model.
        layers: Which output channels are gone, by the first layer that made them.
        parameters: Number of parameters, before and after.
        multiply_adds: Multiply-adds of convolutions and linear layers for one image, before and after.
        difference: Largest absolute difference of a logit from the model's.
        largest_logit: Largest absolute logit of the model.
    """

    model: nn.Module
    layers: dict[str, list[int]]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    difference: float
    largest_logit: float

    @property
    def channels(self) -> int:
        """How many channels are gone; one that shortcuts take to several layers counts once."""
        return sum(map(len, self.layers.values()))

    def to_json(self) -> dict[str, Any]:
        """Return all but the model, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return {"channels": self.channels, **values}


def prune_silent(
    model: nn.Module,
    silent: SilentInputs,
    batches: Iterable[tuple[Tensor, Any]],
    image_size: tuple[int, int],
) -> Pruned:
    """Remove the channels that no layer ever got anything from; the answers stay those of the model.

    A channel can go if every layer that sums over it got only zeros from it, wherever shortcuts and concatenations
    take it (Torch-Pruning's dependency graph, Fang et al., 2023). Channels that pass a layer norm or a grouped
    convolution stay, and so do constant ones that are not 0: at a padded border they matter.

    Args:
        model: A timm model; left as it is.
        silent: What it saw of the images on which the answers are to stay.
        batches: Those images `[B, 3, H, W]`, or some of them, with anything beside them: on these the logits are
            compared. Under torch.distributed every process brings its own.
        image_size: `(H, W)` of the images.

    Returns:
        A pruned copy, and what it saves.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If the model has attention, Torch-Pruning cannot follow it, or a logit differs by more than
            `TOLERANCE`.

    Example:
        >>> prune_silent(model, silent, batches, (64, 64)).parameters
        (23520842, 21839410)
    """
    import torch_pruning  # an extra

    image = next(model.parameters()).new_zeros(1, getattr(model, "in_chans", 3), *image_size)
    pruned: Any = deepcopy(model).eval().requires_grad_(True)
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"{type(model).__name__} has no classifier whose answers could be compared")
    before = _size(pruned, image)
    names = {module: name for name, module in pruned.named_modules()}
    layers: dict[str, list[int]] = {}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # about parameters outside of layers, which stay as they are
            graph = torch_pruning.DependencyGraph().build_dependency(pruned, image)
            groups = list(graph.get_all_groups(ignored_layers=[pruned.get_classifier()]))
            chosen = [
                (group[0].dep.target.module, group[0].dep.handler, _silent(group, silent, names)) for group in groups
            ]
            for layer, function, indices in chosen:
                if indices:
                    graph.get_pruning_group(layer, function, indices).prune()
                    layers[names[layer]] = indices
        if layers:
            note_widths(pruned)
        after = _size(pruned, image)
    except Exception as error:  # whatever it meets in a model that it was not made for
        raise ValueError(
            f"Torch-Pruning cannot follow {type(model).__name__}: {type(error).__name__}: {error}"
        ) from None
    for parameter, original in zip(pruned.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
        parameter.grad = None
    was_training = model.training
    difference, largest = largest_difference(model.eval(), pruned, batches)
    model.train(was_training)
    if not difference <= TOLERANCE * max(largest, 1):
        raise ValueError(
            f"without its silent channels a logit of {type(model).__name__} is {difference:.1e} off (the largest is "
            f"{largest:.3g}): Torch-Pruning does not understand it"
        )
    return Pruned(pruned, layers, (before[0], after[0]), (before[1], after[1]), difference, largest)


@torch.no_grad()
def largest_difference(
    model: nn.Module, other: nn.Module, batches: Iterable[tuple[Tensor, Any]]
) -> tuple[float, float]:
    """Compare the logits of two models on the images of all processes.

    Args:
        model: A classifier in evaluation mode.
        other: Another one.
        batches: Pairs of images `[B, 3, H, W]` and anything; every process brings its own.

    Returns:
        The largest absolute difference of a logit, infinite if one is not finite, and the largest absolute logit of
        the first.
    """
    difference = largest = 0.0
    for images, _ in batches:
        logits, others = model(images), other(images)
        if logits.shape != others.shape or not (logits.isfinite().all() and others.isfinite().all()):
            difference = math.inf  # to which nothing is equal
        else:
            difference = max(difference, float((logits - others).abs().max()))
            largest = max(largest, float(logits.abs().max()))
    differences, magnitudes = zip(*from_all_processes((difference, largest)), strict=True)
    return max(differences), max(magnitudes)


def _silent(group: Any, silent: SilentInputs, names: dict[nn.Module, str]) -> list[int]:
    """Return which channels of a group's first layer can go."""
    channels = len(group[0].idxs)
    heard, asked = torch.zeros(channels, dtype=torch.bool), False
    for item in group:
        layer = item.dep.target.module
        if type(layer).__name__ in _OPERATIONS or type(layer) in _CHANNELWISE:
            continue
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        depthwise = groups > 1 and groups == layer.in_channels == layer.out_channels
        if type(layer) not in _SUMS or (groups > 1 and not depthwise):
            return []
        if depthwise or "in_channels" not in item.dep.handler.__name__:
            continue
        mask = silent.masks.get(names[layer])
        if mask is None:  # it got no image
            return []
        heard[torch.tensor(item.root_idxs)[~mask.cpu()[torch.tensor(item.idxs)]]] = True
        asked = True
    gone = (~heard).nonzero().flatten().tolist() if asked else []
    return gone[: channels - 1]  # a layer without channels would be none


def _size(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Return the number of parameters, and of multiply-adds for one image."""
    # Attention as plain products: fused ones are not counted on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    # Torch-Pruning would take minutes and gigabytes to follow the reshapes around these.
    products = {str(operation) for operation in counter.get_flop_counts()["Global"]}
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has convolutions over channels")
    if products - _PRODUCTS:
        raise ValueError(f"{type(model).__name__} multiplies activations with each other, as attention does")
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2
