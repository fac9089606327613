"""Optimizers and their learning rate, which is a function of the position in the run alone."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..arguments import Args
from ..errors import named


def create_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    Args:
        args: Arguments of the run: `"paper"` is SGD without Nesterov that decays all parameters; every other name is
            timm's, with timm's groups: no weight decay on biases and norms, and with `layer_decay` a smaller learning
            rate the nearer a layer is to the image.
        model: The plain model, on its device.

    Raises:
        ValueError: If the optimizer needs something that is not installed, or the model has no groups of layers.
    """
    if args.opt == "paper":
        # One kernel for all parameters on a GPU; on a CPU its last bits would differ from those of runs before.
        fused = {"fused": True} if next(model.parameters()).device.type == "cuda" else {}
        return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, **fused)
    with named(f"--opt {args.opt} cannot be used here"):
        return create_optimizer_v2(
            model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9, layer_decay=args.layer_decay
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate; with layer decay it is a part of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
