"""Batch norm over the images of all processes, so that N processes with b images train as one with N*b."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def synchronize_batch_norm(task: nn.Module) -> None:
    """Let the batch norms of a task take their statistics over all processes while it trains; alone, do nothing.

    torch has kernels for this on accelerators only; there, the layers are replaced by their SyncBatchNorm counterparts,
    with the same parameters and keys. On a CPU the layers stay as they are, and the task runs in a mode that takes over
    what they call.

    Args:
        task: On its device, before it is wrapped or compiled, and before a copy of it is made for an average.

    Example:
        >>> task = MFDClassificationTask(model)
        >>> synchronize_batch_norm(task)
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if next(task.parameters()).device.type != "cpu":
        convert_sync_batchnorm(task)
        return
    # Around the whole task, of which the module that is compiled is a part.
    mode = _SynchronizedBatchNorm()

    def enter(*_: object) -> None:
        mode.__enter__()

    def leave(*_: object) -> None:
        mode.__exit__(None, None, None)

    task.register_forward_pre_hook(enter)
    task.register_forward_hook(leave, always_call=True)


class _SynchronizedBatchNorm(TorchFunctionMode):
    """Takes over every `F.batch_norm` that is to use the statistics of its batch."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


@torch.compiler.disable
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` with the statistics of all processes."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    output, mean, variance, count = _Normalize.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return output


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [dim for dim in range(x.ndim) if dim != 1]
        variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, over, correction=0)
        mine = torch.cat([mean.new_full((1,), x.numel() / x.shape[1]), mean, variance]).double()
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        counts, means, variances = torch.stack(everyones).split([1, len(mean), len(mean)], dim=1)
        count = counts.sum()
        all_mean = (counts * means).sum(0) / count
        all_variance = (counts * (variances + (means - all_mean).square())).sum(0) / count
        mean, variance = all_mean.to(mean.dtype), all_variance.to(mean.dtype)
        ctx.save_for_backward(x, weight, mean, (all_variance + eps).rsqrt().to(mean.dtype))
        ctx.count, ctx.has_bias = float(count), bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        over, shape = [dim for dim in range(x.ndim) if dim != 1], [1, -1, *[1] * (x.ndim - 2)]
        grad = grads[0].to(mean.dtype)
        normalized = (x - mean.view(shape)) * inverse_std.view(shape)
        sums = torch.stack([grad.sum(over), (grad * normalized).sum(over)])
        # The weights' gradients stay this process's own: DDP averages them.
        grad_bias, grad_weight = sums.unbind()
        totals = sums.to(torch.float64, copy=True)
        dist.all_reduce(totals)
        mean_grad, mean_product = (totals / ctx.count).to(mean.dtype).unbind()
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = (grad - mean_grad.view(shape) - normalized * mean_product.view(shape)) * scale.view(shape)
        return grad_x.to(x.dtype), None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None
