"""How the correlations of Eq. 6 are computed: one Gram product forward, one matrix product backward.

With y = x - mean, s_i = 1 / |y_i| and G = y^T y, the correlation is r_ij = s_i s_j G_ij. For a loss with dL/dr = W
(symmetric), dL/dx = y A with A_ij = 2 s_i W_ij s_j - [i = j] s_i^2 c_i and c_i = 2 sum_j W_ij r_ij. The columns of y A
have mean 0, so the mean needs no gradient of its own; beside the input only the mean and the C x C matrix are kept.

With fewer samples than channels, Eq. 5 follows from the n x n matrix K = z z^T, z_i = s_i y_i, because
|z^T z|^2 = |z z^T|^2: dL/dx_i = 4 s_i^2 (K y_i - (z_i^T K z_i) y_i) / (d (d - 1)).

`cpu.py` and `cuda.py` know how a device multiplies; all else is here. Forward and backward are operators of torch, so
that a compiled graph holds them whole. Numbers of all stages that belong to channels are rows of one matrix, padded
with 0: what is done to them takes one kernel, not one a stage.

Imports torch only.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import cpu, cuda
from .processes import average_maps, sum_moments
from .samples import Center, Scope, empty_gradient, gradient_from_rows, has_few_samples, positions_of, samples


@torch.compiler.disable
def correlation(x: Tensor, scope: Scope) -> Tensor:
    """Return Eq. 6 as `[C, C]`, differentiable once."""
    return _Correlation.apply(scope, x)


def mean_squared_correlations(stages: Sequence[Tensor], scope: Scope) -> Tensor:
    """Return Eq. 5 of every stage as `[S]`, differentiable once. All stages share the collectives."""
    return _MeanSquaredCorrelations.apply(*scope, *stages)


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scope: Scope, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            vectors, (gram,), maps = _statistics([x], scope, [1.0], [False])
            inverse_norm = vectors[0, 0]
            r = gram.mul_(inverse_norm).mul_(inverse_norm[:, None])
        ctx.scope = scope
        ctx.save_for_backward(x, r, vectors, *maps)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, r, vectors, *maps = ctx.saved_tensors
        (inverse_norm,), _, means, offsets = vectors
        with torch.autocast(x.device.type, enabled=False):
            both = grads[0] + grads[0].T
            a = both * inverse_norm * inverse_norm[:, None]
            a.diagonal().sub_((both * r).sum(1) * inverse_norm.square())
            return None, _backend([x]).input_gradients([(x, (maps or means)[0], offsets[0], a)], ctx.scope)[0]


class _MeanSquaredCorrelations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Center, max_samples: int | None, synced: bool, *stages: Tensor) -> Tensor:
        out = _loss_op(stages, center, max_samples, synced)
        losses, *kept = out
        ctx.scope, ctx.count = (center, max_samples, synced), len(stages)
        ctx.save_for_backward(*stages, *kept)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        stages, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[3:]) if wanted]
        found = _loss_backward_op(grads[0], stages, kept, needed, *ctx.scope)
        gradients: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(needed, found, strict=True):
            gradients[i] = gradient
        return None, None, None, *gradients


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the MFD loss has no second derivative; call backward without create_graph=True")


# ---- the operators ----


def loss_forward(stages: Sequence[Tensor], center: Center, max_samples: int | None, synced: bool) -> list[Tensor]:
    """Return Eq. 5 `[S]` and what else the backward needs of `_statistics`, with G_ij s_j in the place of G.

    The inverse norms there are s_i / (d (d - 1))^(1/4): so the squares of s_i s_j G_ij add up to Eq. 5.
    """
    scope = Scope(center, max_samples, synced)
    with torch.autocast(stages[0].device.type, enabled=False):
        few = [has_few_samples(x, scope) for x in stages]
        vectors, matrices, maps = _statistics(stages, scope, [_pairs(x) ** 0.5 for x in stages], few)
        inverse_norms, row_sums, *_ = vectors
        for i, matrix in enumerate(matrices):
            if not few[i]:
                matrix.diagonal().zero_()
                matrix.mul_(inverse_norms[i, : len(matrix)])
                torch.linalg.vector_norm(matrix, dim=1, out=row_sums[i, : len(matrix)])
        row_sums.mul_(inverse_norms).square_()
        for i, matrix in enumerate(matrices):
            if few[i]:
                # Eq. 5 leaves out the diagonal of z^T z, which is 1 for every channel that varies.
                off_diagonal = matrix.square().sum() - (inverse_norms[i] > 0).sum()
                torch.div(off_diagonal.clamp_min(0), _pairs(stages[i]), out=row_sums[i, 0])
        return [row_sums.sum(1), vectors, *matrices, *maps]


def loss_backward(
    grad: Tensor,
    stages: Sequence[Tensor],
    kept: Sequence[Tensor],
    needed: Sequence[int],
    center: Center,
    max_samples: int | None,
    synced: bool,
) -> list[Tensor]:
    """Return dL/dx of Eq. 5 for the needed stages."""
    scope = Scope(center, max_samples, synced)
    vectors, matrices, maps = kept[0], kept[1 : len(stages) + 1], kept[len(stages) + 1 :]
    inverse_norms, row_sums, means, offsets = vectors
    # Every process holds the loss of all samples, and DDP averages over processes what belongs to their sum.
    scale = grad[:, None] * (4 * dist.get_world_size() if synced else 4)
    with torch.autocast(grad.device.type, enabled=False):
        columns, squares = inverse_norms * scale, inverse_norms.square()
        diagonals = row_sums * squares * scale
        where = maps or [row[: x.shape[1]] for row, x in zip(means, stages, strict=True)]
        gradients, many = {}, {}
        for i in needed:
            x, channels = stages[i], stages[i].shape[1]
            if has_few_samples(x, scope):
                gradients[i] = _gradient_from_few(x, where[i], matrices[i], inverse_norms[i], scale[i], scope)
            else:
                a = (matrices[i] * columns[i, :channels]).mul_(squares[i, :channels, None])
                torch.mul(diagonals[i, :channels], -(_pairs(x) ** 0.5), out=a.diagonal())
                many[i] = x, where[i], offsets[i], a
        gradients |= zip(many, _backend(stages).input_gradients(list(many.values()), scope), strict=True)
        return [gradients[i] for i in needed]


def _statistics(
    stages: Sequence[Tensor], scope: Scope, scales: Sequence[float], few: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Measure every stage over all of its samples.

    Args:
        stages: Maps `[B, C, H, W]`.
        scope: Which values are samples.
        scales: By what the squared norms of each stage are multiplied.
        few: Which stages have fewer samples than channels.

    Returns:
        Vectors `[4, S, C]`: inverse norms, a row to fill, means (where they are numbers), mean / std in units of 1 /
        the backend's rounding. Then G of each stage, or K where samples are few. Then the means where they are maps.
    """
    backend = _backend(stages)
    views = [samples(x, scope) for x in stages]
    known = scope.center == "position"
    dtype = reduce(torch.promote_types, (x.dtype for x in stages), torch.float32)
    vectors = torch.zeros(4, len(stages), max(x.shape[1] for x in stages), dtype=dtype, device=stages[0].device)
    inverse_norms, _, rows, offsets = vectors
    maps = [view.mean(0, dtype=dtype) for view in views] if known else []
    if known and scope.synced:
        average_maps(views, maps)
    means = maps or [row[: view.shape[2]] for row, view in zip(rows, views, strict=True)]
    matrices = [
        _centered(view, mean, known) if is_few else backend.centered_gram(view, mean, known)
        for view, mean, is_few in zip(views, means, few, strict=True)
    ]
    counts: Sequence[Any] = [view.shape[0] * view.shape[1] for view in views]
    if scope.synced:
        counts, matrices = sum_moments(counts, means, matrices, same_means=known)
    squared_norms, roundings = torch.zeros_like(vectors[:2])
    for i, (matrix, mean, count) in enumerate(zip(matrices, means, counts, strict=True)):
        channels = mean.shape[-1]
        norms = matrix.square().sum(0) if few[i] else matrix.diagonal()
        torch.mul(norms, scales[i], out=squared_norms[i, :channels])
        size = mean if mean.ndim == 1 else mean.square().mean(0).sqrt()
        factor = (count * scales[i]) ** 0.5 * (cpu if few[i] else backend).rounding(views[i], known)
        torch.mul(size, factor, out=roundings[i, :channels])
    _inverse_norms(squared_norms, roundings.square(), out=inverse_norms)
    torch.mul(roundings, inverse_norms, out=offsets)
    for i, y in enumerate(matrices):
        if few[i]:
            z = y * (inverse_norms[i, : y.shape[1]] * scales[i] ** 0.5)
            matrices[i] = backend.product(z, z.T)
    return vectors, matrices, maps


def _inverse_norms(squared_norms: Tensor, rounding: Tensor, out: Tensor) -> None:
    """Write 1 / |y| for each channel, 0 where it is constant, given the part of |y|^2 that may be rounding."""
    info = torch.finfo(squared_norms.dtype)
    # A constant is left with the rounding of its mean. A channel a million times weaker than the strongest one carries
    # nothing, but its gradient, which grows as 1 / std, would be noise of any size. Squares below tiny underflow.
    floor = squared_norms.amax(1, keepdim=True).mul_(1e-12).clamp_min_(info.tiny / info.eps)
    is_constant = squared_norms <= torch.maximum(rounding, floor)
    torch.rsqrt(squared_norms.masked_fill(is_constant, torch.inf), out=out)


def _centered(view: Tensor, mean: Tensor, known: bool) -> Tensor:
    """Return samples - mean as `[n, C]`; the mean `[C]` is written, or it is a known map."""
    if not known:
        torch.mean(view, (0, 1), dtype=mean.dtype, out=mean)
    return (view - mean).flatten(0, 1)


def _gradient_from_few(x: Tensor, mean: Tensor, k: Tensor, inverse_norm: Tensor, scale: Tensor, scope: Scope) -> Tensor:
    y = _centered(samples(x, scope), mean, known=True)
    weight = inverse_norm[: x.shape[1]].square() * _pairs(x) ** 0.5
    rows = _backend([x]).product(k, y)
    quadratic = (rows * y).sum(0) * weight
    rows = (rows - y * quadratic) * (weight * (scale / _pairs(x)))
    return gradient_from_rows(rows, x, scope)


def _pairs(x: Tensor) -> int:
    """Count the pairs of different channels, in both orders."""
    return max(x.shape[1] * (x.shape[1] - 1), 1)


def _backend(stages: Sequence[Tensor]) -> ModuleType:
    on_gpu = all(x.is_cuda and x.dtype != torch.float64 for x in stages)
    return cuda if on_gpu else cpu


# ---- how torch knows them ----


def _fake_loss(stages: Sequence[Tensor], center: Center, max_samples: int | None, synced: bool) -> list[Tensor]:
    scope = Scope(center, max_samples, synced)
    dtype = reduce(torch.promote_types, (x.dtype for x in stages), torch.float32)
    vectors = stages[0].new_empty(4, len(stages), max(x.shape[1] for x in stages), dtype=dtype)
    sizes = [x.shape[0] * positions_of(x.shape, scope) if has_few_samples(x, scope) else x.shape[1] for x in stages]
    matrices = [vectors.new_empty(size, size) for size in sizes]
    maps = [vectors.new_empty(x.shape[2] * x.shape[3], x.shape[1]) for x in stages if center == "position"]
    return [vectors.new_empty(len(stages)), vectors, *matrices, *maps]


def _fake_loss_backward(
    grad: Tensor, stages: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[int], *scope: Any
) -> list[Tensor]:
    return [empty_gradient(stages[i], Scope()) for i in needed]


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name, _, signature = schema.partition("(")
    torch.library.define(f"timm_mfd::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"timm_mfd::{name}", "default", implementation)
    torch.library.register_fake(f"timm_mfd::{name}", fake)
    return getattr(torch.ops.timm_mfd, name).default


_SCOPE = "str center, int? max_samples, bool synced"
_loss_op = _register(f"loss(Tensor[] stages, {_SCOPE}) -> Tensor[]", loss_forward, _fake_loss)
_loss_backward_op = _register(
    f"loss_backward(Tensor grad, Tensor[] stages, Tensor[] kept, int[] needed, {_SCOPE}) -> Tensor[]",
    loss_backward,
    _fake_loss_backward,
)
