"""Products of centred samples on a CPU: in chunks that fit its cache, exact whatever the precision modes say.

Float32 products run as 1x1 convolutions where oneDNN is there: twice as fast as the BLAS products where this was
measured. Float64 maps of any device come here too.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .samples import Scope, channels_last, empty_gradient, gradient_from_rows, memory_format, samples

# Centred samples held at a time, in elements: what a core's cache holds.
_CHUNK = 2**19
# Each chunk also adds to a C x C matrix, so it has rows in proportion to C.
_ROWS_PER_CHANNEL = 4
# (x - mean) A may be x A - mean A while |mean| is below 30 std.
_FAR = 30


def rounding(view: Tensor, known: bool) -> float:
    """Part of its mean that the deviation of a constant may seem to be."""
    return 16 * torch.finfo(torch.promote_types(view.dtype, torch.float32)).eps


def centered_gram(view: Tensor, mean: Tensor, known: bool) -> Tensor:
    """Return y^T y for y = samples - mean, `[C, C]`; centring before the product keeps |mean| >> std exact.

    Args:
        view: Samples `[B, P, C]`.
        mean: `[C]`, which this writes, or the known map `[P, C]`.
        known: Whether the mean is given.
    """
    if not known:
        torch.mean(view, (0, 1), dtype=mean.dtype, out=mean)
    channels = view.shape[2]
    gram = torch.zeros(channels, channels, dtype=_product_dtype(view), device=view.device)
    for _, y in _centered_chunks(view, mean):
        _add_gram(gram, y)
    return gram.to(mean.dtype)


def input_gradients(stages: Sequence[tuple[Tensor, ...]], scope: Scope) -> list[Tensor]:
    """Return (x - mean) A of every stage in its dtype and memory format.

    Args:
        stages: Map x `[B, C, H, W]`, mean `[C]` or `[P, C]`, `rounding` mean / std `[C]`, A `[C, C]`.
        scope: Which values are samples.
    """
    return [
        _input_gradient(x, mean, a, scope, far=bool((offset.abs() > _FAR * rounding(x, mean.ndim == 2)).any()))
        for x, mean, offset, a in stages
    ]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices exactly whatever the precision modes say."""
    dtype = _product_dtype(a)
    if dtype == a.dtype and _has_onednn(a):
        return F.conv2d(_as_map(a), b.T[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(a), -1)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _input_gradient(x: Tensor, mean: Tensor, a: Tensor, scope: Scope, far: bool) -> Tensor:
    source = samples(x, scope)
    positions, channels = source.shape[1:]
    whole = positions == x.shape[2] * x.shape[3]
    if mean.ndim == 1 and whole and x.dtype == a.dtype == _product_dtype(x) and not far:
        # (x - mean) A without the centred copy.
        shift = -(mean @ a)
        if _has_onednn(x):
            return F.conv2d(x, a[:, :, None, None], shift).contiguous(memory_format=memory_format(x))
        if channels_last(x):
            return gradient_from_rows(torch.addmm(shift, source.reshape(-1, channels), a), x, scope)
    gradient = empty_gradient(x, scope)
    target = samples(gradient, scope)
    for (images, places), y in _centered_chunks(source, mean):
        chunk = target[images, places]
        chunk.copy_(product(y, a.to(y.dtype)).view(chunk.shape))
    return gradient


def _centered_chunks(view: Tensor, mean: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield `(images, positions)` and the centred samples `[rows, C]` there, all in one reused buffer."""
    batch, positions, channels = view.shape
    rows = max(_CHUNK // channels, _ROWS_PER_CHANNEL * channels, 1)
    places_at_once, images_at_once = min(rows, positions), max(rows // positions, 1)
    buffer = view.new_empty(min(images_at_once, batch) * places_at_once * channels, dtype=_product_dtype(view))
    for first in range(0, batch, images_at_once):
        for place in range(0, positions, places_at_once):
            at = slice(first, first + images_at_once), slice(place, place + places_at_once)
            chunk = view[at]
            y = buffer[: chunk.numel()].view(chunk.shape)
            torch.sub(chunk, mean if mean.ndim == 1 else mean[at[1]], out=y)
            yield at, y.view(-1, channels)


def _add_gram(gram: Tensor, y: Tensor) -> None:
    """Add y^T y."""
    if _has_onednn(y):
        channels = y.shape[1]
        # The gradient of a 1x1 convolution with respect to its weights is the product of its output and input.
        product = conv2d_weight(_as_map(y), (channels, channels, 1, 1), _as_map(y))
        gram += product.view(channels, channels)
    else:
        gram.addmm_(y.T, y)


def _as_map(rows: Tensor) -> Tensor:
    """View `[rows, C]` as a channels_last map `[1, C, rows, 1]`."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Float32, or float64 on a CPU whose float32 products the user has told to round to TF32 or bf16."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.float64 if dtype == torch.float32 and _float32_products_are_rounded() else dtype


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
