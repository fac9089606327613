"""How the correlations of Eq. 6 are computed: one Gram product forward, one matrix product backward.

With y = x - mean, s_i = 1 / |y_i| and G = y^T y, the correlation is r_ij = s_i s_j G_ij. For a loss with dL/dr = W
(symmetric), dL/dx = y A with A_ij = 2 s_i W_ij s_j - [i = j] s_i^2 c_i and c_i = 2 sum_j W_ij r_ij. The columns of y A
have mean 0, so the mean needs no gradient of its own; beside the input only the mean and the C x C matrix A are kept.

With fewer samples than channels, Eq. 5 follows from the n x n matrix K = z z^T, z_i = s_i y_i, because
|z^T z|^2 = |z z^T|^2: dL/dx_i = 4 s_i^2 (K y_i - (z_i^T K z_i) y_i) / (d (d - 1)).

On a CPU the float32 products run as 1x1 convolutions where oneDNN is there: twice as fast as the BLAS products where
this was measured.

Imports torch only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Center = Literal["channel", "position"]

# Centred samples held at a time, in elements: what a core's cache holds, or enough to fill a GPU.
_CPU_CHUNK = 2**19
_GPU_CHUNK = 2**24
# Each chunk also adds to a C x C matrix, so it has rows in proportion to C.
_ROWS_PER_CHANNEL = 4


class Scope(NamedTuple):
    """Which samples make up a correlation.

    Attributes:
        center: The mean in Eq. 6: one number or one map per channel.
        max_samples: Upper bound on the samples of a stage, met by leaving out positions; None takes all.
        group: Processes whose samples count together; None takes this process alone.
    """

    center: Center = "channel"
    max_samples: int | None = None
    group: "dist.ProcessGroup | None" = None


@torch.compiler.disable
def correlation(x: Tensor, scope: Scope) -> Tensor:
    """Return Eq. 6 as `[C, C]`, differentiable once."""
    return _Correlation.apply(scope, x)


@torch.compiler.disable
def mean_squared_correlations(stages: Sequence[Tensor], scope: Scope) -> Tensor:
    """Return Eq. 5 of every stage as `[S]`, differentiable once. All stages share the collectives."""
    return _MeanSquaredCorrelations.apply(scope, *stages)


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scope: Scope, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ((mean, gram, inverse_norm, ctx.far),) = _statistics([_samples(x, scope)], scope)
            r = gram.mul_(inverse_norm).mul_(inverse_norm[:, None])
        ctx.scope = scope
        ctx.save_for_backward(x, mean, inverse_norm, r)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, mean, inverse_norm, r = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            both = grads[0] + grads[0].T
            a = both * inverse_norm * inverse_norm[:, None]
            a.diagonal().sub_((both * r).sum(1) * inverse_norm.square())
            return None, _input_gradient(x, mean, a, ctx.scope, ctx.far)


class _MeanSquaredCorrelations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scope: Scope, *stages: Tensor) -> Tensor:
        with torch.autocast(stages[0].device.type, enabled=False):
            views = [_samples(x, scope) for x in stages]
            few = [scope.group is None and view.shape[0] * view.shape[1] < view.shape[2] for view in views]
            statistics = iter(_statistics([v for v, is_few in zip(views, few, strict=True) if not is_few], scope))
            losses, kept, far = [], [], []
            for view, is_few in zip(views, few, strict=True):
                if is_few:
                    loss, *tensors = _from_samples(view, scope)
                    far.append(False)
                else:
                    *moments, is_far = next(statistics)
                    loss, *tensors = _from_gram(*moments)
                    far.append(is_far)
                losses.append(loss)
                kept += tensors
            ctx.scope, ctx.few, ctx.far = scope, few, far
            ctx.save_for_backward(*stages, *kept)
            return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        scope, few = ctx.scope, ctx.few
        stages, kept = ctx.saved_tensors[: len(few)], iter(ctx.saved_tensors[len(few) :])
        # Every process holds the loss of all samples, and DDP averages over processes what belongs to their sum.
        scale = dist.get_world_size(scope.group) if scope.group is not None else 1
        wanted = zip(stages, few, ctx.far, grads[0] * scale, ctx.needs_input_grad[1:], strict=True)
        gradients: list[Tensor | None] = []
        with torch.autocast(stages[0].device.type, enabled=False):
            for x, is_few, is_far, grad, needed in wanted:
                if is_few:
                    mean, k, inverse_norm = (next(kept) for _ in range(3))
                    gradient = _input_gradient_from_few(x, mean, k, inverse_norm, grad, scope) if needed else None
                else:
                    mean, a = next(kept), next(kept)
                    gradient = _input_gradient(x, mean, a * grad, scope, is_far) if needed else None
                gradients.append(gradient)
        return None, *gradients


def _samples(x: Tensor, scope: Scope) -> Tensor:
    """View a map `[B, C, H, W]` as `[B, P, C]`: P positions of each image, without a copy for either memory format."""
    view = x.detach().permute(0, 2, 3, 1).flatten(1, 2)
    step = _stride(x.shape, scope.max_samples)
    return view if step == 1 else view[:, ::step]


def _stride(shape: Sequence[int], max_samples: int | None) -> int:
    """Of how many positions of a map `[B, C, H, W]` one is a sample."""
    batch, _, height, width = shape
    positions = height * width
    if max_samples is None or batch * positions <= max_samples:
        return 1
    step = min(math.ceil(batch * positions / max_samples), positions)
    while math.gcd(step, width) != 1 and step < positions:
        step += 1  # a step that shares a factor with the width would see some columns only
    return step


def effective_samples(shape: Sequence[int], scope: Scope, processes: int = 1) -> int:
    """Count the samples that a correlation of a stage rests on: one more than its degrees of freedom.

    So channels that have nothing to do with each other have a mean r^2 of 1 / (n - 1), the noise floor. Neighbouring
    positions of real maps resemble each other, which lifts it further.

    Args:
        shape: Shape `[B, C, H, W]` of the stage in one process.
        scope: Its `group` does not matter here.
        processes: Processes whose samples count together.

    Returns:
        n, at least 1: images times positions, less one mean per position for `center="position"`.
    """
    batch, _, height, width = shape
    positions = len(range(0, height * width, _stride(shape, scope.max_samples)))
    total = batch * processes * positions
    return total if scope.center == "channel" else max(total - positions + 1, 1)


def _gradient_like(x: Tensor, whole: bool) -> Tensor:
    """Allocate a gradient in the memory format of x, or channels_last: one that `_samples` can view."""
    nchw = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if nchw else torch.channels_last
    return (torch.empty_like if whole else torch.zeros_like)(x, memory_format=memory_format)


def _statistics(views: Sequence[Tensor], scope: Scope) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Return mean, Gram matrix and inverse norms of every stage over all processes, and whether a mean is far off 0."""
    means, counts = _means(views, scope)
    grams = [_gram(view, mean) for view, mean in zip(views, means, strict=True)]
    if scope.group is not None and grams:
        packed = torch.cat([gram.flatten() for gram in grams])
        dist.all_reduce(packed, group=scope.group)
        grams = [p.view_as(gram) for p, gram in zip(packed.split([g.numel() for g in grams]), grams, strict=True)]
    statistics = []
    for mean, gram, count in zip(means, grams, counts, strict=True):
        inverse_norm = _inverse_norm(gram.diagonal(), mean, count)
        # (x - mean) A may be x A - mean A only while |mean| < 30 std; asking a GPU would stall it, so there it centres.
        far = mean.is_cuda or bool((mean.square() * (inverse_norm.square() * count) > 900).any())
        statistics.append((mean, gram, inverse_norm, far))
    return statistics


def _means(views: Sequence[Tensor], scope: Scope) -> tuple[list[Tensor], list[Tensor | float]]:
    """Return the mean, `[C]` or `[P, C]`, and the number of samples of every stage, over all processes."""
    over = (0, 1) if scope.center == "channel" else (0,)
    if scope.group is None or not views:
        means = [view.mean(over, dtype=_statistics_dtype(view)) for view in views]
        return means, [view.shape[0] * view.shape[1] for view in views]
    sums = [view.sum(over, dtype=_statistics_dtype(view)).double() for view in views]
    counts = [sums[0].new_full((1,), view.shape[0] * view.shape[1]) for view in views]
    packed = torch.cat([*counts, *(total.flatten() for total in sums)])
    dist.all_reduce(packed, group=scope.group)
    samples, *totals = packed.split([len(views), *(total.numel() for total in sums)])
    means = []
    for view, local, total, count in zip(views, sums, totals, samples, strict=True):
        per_mean = count if scope.center == "channel" else count / view.shape[1]
        means.append((total.view_as(local) / per_mean).to(_statistics_dtype(view)))
    return means, list(samples)


def _gram(view: Tensor, mean: Tensor) -> Tensor:
    """Return y^T y for y = samples - mean, adding up chunks; centring before the product keeps |mean| >> std exact."""
    channels = view.shape[2]
    gram = torch.zeros(channels, channels, dtype=_product_dtype(view), device=view.device)
    for _, y in _centred_chunks(view, mean):
        _add_gram(gram, y)
    return gram.to(mean.dtype)


def _inverse_norm(squared_norm: Tensor, mean: Tensor, count: Tensor | float) -> Tensor:
    """Return 1 / |y| for each channel, 0 where the channel is constant."""
    info = torch.finfo(squared_norm.dtype)
    mean_square = mean.square() if mean.ndim == 1 else mean.square().mean(0)
    variance = squared_norm / count
    # A constant is left with the rounding of its mean. A channel a million times weaker than the strongest one carries
    # nothing, but its gradient, which grows as 1 / std, would be noise of any size. Squares below tiny underflow.
    floor = torch.maximum(mean_square * (16 * info.eps) ** 2, variance.max() * 1e-12).clamp_min(info.tiny / info.eps)
    varies = variance > floor
    return torch.where(varies, squared_norm, torch.inf).rsqrt()


def _from_gram(mean: Tensor, gram: Tensor, inverse_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Eq. 5, the mean and the matrix A, in the memory of the Gram matrix."""
    pairs = max(gram.shape[0] * (gram.shape[0] - 1), 1)
    r = gram.mul_(inverse_norm).mul_(inverse_norm[:, None]).fill_diagonal_(0)
    row = torch.linalg.vector_norm(r, dim=1).square()
    a = r.mul_(inverse_norm * (4 / pairs)).mul_(inverse_norm[:, None])
    a.diagonal().sub_(row * inverse_norm.square() * (4 / pairs))
    return row.sum() / pairs, mean, a


def _from_samples(view: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Eq. 5, the mean, K and the inverse norms, where samples are fewer than channels."""
    samples, channels = view.shape[0] * view.shape[1], view.shape[2]
    ((mean,), _) = _means([view], scope)
    y = (view.to(mean.dtype) - mean).flatten(0, 1)
    inverse_norm = _inverse_norm(y.square().sum(0), mean, samples)
    z = y * inverse_norm
    k = _product(z, z.T)
    # Eq. 5 leaves out the diagonal of z^T z, which is 1 for every channel that varies.
    loss = (k.square().sum() - (inverse_norm > 0).sum()) / max(channels * (channels - 1), 1)
    return loss.clamp_min(0), mean, k, inverse_norm


def _input_gradient(x: Tensor, mean: Tensor, a: Tensor, scope: Scope, far: bool) -> Tensor:
    """Return dL/dx = (x - mean) A in the dtype and memory format of x."""
    source = _samples(x, scope)
    positions, channels = source.shape[1:]
    whole = positions == x.shape[2] * x.shape[3]
    if mean.ndim == 1 and whole and x.dtype == _product_dtype(x) and not far:
        # (x - mean) A without the centred copy.
        shift = -(mean @ a)
        if _has_onednn(x):
            return F.conv2d(x, a[:, :, None, None], shift)
        if source.is_contiguous():
            rows = torch.addmm(shift, source.view(-1, channels), a)
            return rows.view(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)
    gradient = _gradient_like(x, whole)
    target = _samples(gradient, scope)
    for (images, places), y in _centred_chunks(source, mean):
        chunk = target[images, places]
        chunk.copy_(_gradient_product(y, a, x.dtype).view(chunk.shape))
    return gradient


def _input_gradient_from_few(
    x: Tensor, mean: Tensor, k: Tensor, inverse_norm: Tensor, grad: Tensor, scope: Scope
) -> Tensor:
    view = _samples(x, scope)
    channels = view.shape[2]
    y = (view.to(mean.dtype) - mean).flatten(0, 1)
    rows = _product(k, y)
    quadratic = (rows * y).sum(0) * inverse_norm.square()
    weight = inverse_norm.square() * (4 * grad / max(channels * (channels - 1), 1))
    rows = (rows - y * quadratic) * weight
    gradient = _gradient_like(x, view.shape[1] == x.shape[2] * x.shape[3])
    _samples(gradient, scope).copy_(rows.view(view.shape))
    return gradient


def _centred_chunks(view: Tensor, mean: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield `(images, positions)` and the centred samples `[rows, C]` there, all in one reused buffer."""
    batch, positions, channels = view.shape
    rows = max((_GPU_CHUNK if view.is_cuda else _CPU_CHUNK) // channels, _ROWS_PER_CHANNEL * channels, 1)
    places_at_once, images_at_once = min(rows, positions), max(rows // positions, 1)
    buffer = view.new_empty(min(images_at_once, batch) * places_at_once * channels, dtype=_product_dtype(view))
    for first in range(0, batch, images_at_once):
        for place in range(0, positions, places_at_once):
            at = slice(first, first + images_at_once), slice(place, place + places_at_once)
            chunk = view[at]
            y = buffer[: chunk.numel()].view(chunk.shape)
            torch.sub(chunk, mean if mean.ndim == 1 else mean[at[1]], out=y)
            yield at, y.view(-1, channels)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Float32, or float64 on a CPU whose float32 products the user has told to round to TF32 or bf16."""
    dtype = _statistics_dtype(x)
    if x.device.type == "cpu" and dtype == torch.float32 and _float32_products_are_rounded():
        return torch.float64
    return dtype


def _float32_products_are_rounded() -> bool:
    onednn = torch.backends.mkldnn
    backends: list[Any] = [torch.backends, onednn, getattr(onednn, "matmul", None), getattr(onednn, "conv", None)]
    modes = {getattr(backend, "fp32_precision", "none") for backend in backends}
    if modes == {"none"}:  # a torch without these, or nothing set
        return torch.get_float32_matmul_precision() != "highest"
    return bool(modes & {"tf32", "bf16"})


def _has_onednn(x: Tensor) -> bool:
    onednn: Any = torch.backends.mkldnn
    return x.device.type == "cpu" and x.dtype == torch.float32 and onednn.is_available() and onednn.enabled


def _as_map(rows: Tensor) -> Tensor:
    """View `[rows, C]` as a channels_last map `[1, C, rows, 1]`."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _add_gram(gram: Tensor, y: Tensor) -> None:
    """Add y^T y."""
    if y.is_cuda and y.dtype == torch.float32:
        _add_gram_of_bf16_products(gram, y)
    elif _has_onednn(y):
        channels = y.shape[1]
        # The gradient of a 1x1 convolution with respect to its weights is the product of its output and input.
        product = conv2d_weight(_as_map(y), (channels, channels, 1, 1), _as_map(y))
        gram += product.view(channels, channels)
    else:
        gram.addmm_(y.T, y)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply float32 matrices exactly whatever the precision modes say."""
    if a.is_cuda and a.dtype == torch.float32:
        return _sum_of_bf16_products(_split(a), _split(b))
    dtype = _product_dtype(a)
    if dtype == a.dtype and _has_onednn(a):
        return F.conv2d(_as_map(a), b.T[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(a), -1)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _gradient_product(y: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y A; on CUDA with fewer of the split products where the gradient itself is half precision."""
    if y.is_cuda and y.dtype == torch.float32 and dtype != torch.float32:
        return _sum_of_bf16_products(_split(y), _split(a), products=3)
    return _product(y, a.to(y.dtype))


def _add_gram_of_bf16_products(gram: Tensor, y: Tensor) -> None:
    high, middle, low = _split(y)
    gram += torch.mm(high.T, high, out_dtype=torch.float32)
    for a, b in ((high, middle), (high, low)):
        cross = torch.mm(a.T, b, out_dtype=torch.float32)
        gram += cross
        gram += cross.T
    gram += torch.mm(middle.T, middle, out_dtype=torch.float32)


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write float32 as a sum of three bf16: products of bf16 are exact in float32 on every tensor core."""
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


def _sum_of_bf16_products(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor], products: int = 6
) -> Tensor:
    """Add the products that matter in float32, smallest first; three are good to 16 bits, six to all 24."""
    terms = ((a[1], b[1]), (a[0], b[2]), (a[2], b[0]), (a[0], b[1]), (a[1], b[0]), (a[0], b[0]))
    return sum(torch.mm(p, q, out_dtype=torch.float32) for p, q in terms[-products:])  # type: ignore[return-value]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("the MFD loss has no second derivative; call backward without create_graph=True")
