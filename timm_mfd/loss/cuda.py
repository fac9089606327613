"""Products of centred samples on a GPU: bf16 and fp16 as they are, float32 as two bf16, on every tensor core.

Products of bf16 are exact in float32, and their sums are float32, whatever the precision modes say. Nothing is read
back to the host.

A half-precision map is multiplied without a centred copy: the mean is taken out of the Gram matrix afterwards, which
makes its rounding 1 + (mean / std)^2 times as large. A float32 map is centred first and written as high + low, each
bf16: high^T high + high^T low + low^T high has 16 bits of every value.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import cpu
from .samples import Scope, gradient_from_rows, samples

_HALF = (torch.bfloat16, torch.float16)

# A deviation below this part of the mean may be rounding of sums of squares.
_ROUNDING_OF_SUMS = 1 / 300

# Rows whose products are summed in one go: tensor cores cut bits off with every 16 of them. A block has rows in
# proportion to C, as each writes a C x C matrix, and there are about as many tiles of such matrices as a GPU has cores.
_ROWS = 4096
_ROWS_PER_CHANNEL = 8
# Elements of a float32 map that are split at a time.
_CHUNK = 2**26
# Columns beside the samples, of which one is used: rows stay aligned to 16 bytes.
_PADDING = 8
# Of so many positions one serves for a first guess of the mean, which is then off by no more than 8 std.
_GUESS = 64


def rounding(view: Tensor, known: bool) -> float:
    """Part of its mean that the deviation of a constant may seem to be."""
    return _ROUNDING_OF_SUMS if is_raw(view, known) else cpu.rounding(view, known)


def is_raw(x: Tensor, known: bool) -> bool:
    """Whether a map is multiplied as it is: half precision, and one mean per channel."""
    return x.dtype in _HALF and not known


def centered_gram(view: Tensor, mean: Tensor, known: bool) -> Tensor:
    """Return y^T y for y = samples - mean, `[C, C]`.

    Args:
        view: Samples `[B, P, C]`.
        mean: `[C]`, which this writes, or the known map `[P, C]`.
        known: Whether the mean is given.
    """
    if is_raw(view, known):
        rows = view.reshape(-1, view.shape[2])
        torch.mean(rows, 0, dtype=mean.dtype, out=mean)
        return _sum_of_products(rows, rows, _ROWS).addr_(mean, mean, alpha=-len(rows))
    count, channels = view.shape[0] * view.shape[1], view.shape[2]
    guess = mean if known else view[:, ::_GUESS].mean((0, 1), dtype=mean.dtype)
    which = torch.eye(2, device=view.device)
    parts = []
    for chunk in _chunks(view):
        # -low, high and 1, which sums the others in the same product.
        terms = view.new_empty(*chunk.shape[:2], 2 * channels + _PADDING, dtype=torch.bfloat16)
        _split(chunk - guess, terms[..., : 2 * channels].unflatten(-1, (2, channels)), is_low=which[0])
        terms[..., 2 * channels].fill_(1)
        flat = terms.flatten(0, 1)
        # The matrices are twice as wide as those of a map in half precision, so blocks are twice as long.
        parts.append(_sum_of_products(flat[:, channels : 2 * channels + 1], flat[:, : 2 * channels], 2 * _ROWS))
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    cross, gram, sums = total[:channels, :channels], total[:channels, channels:], total[channels].view(2, -1)
    gram = (gram - cross).sub_(cross.T)
    if known:
        return gram
    offset = sums[1] - sums[0]
    torch.add(guess, offset, alpha=1 / count, out=mean)
    return gram.addr_(offset, offset, alpha=-1 / count)


def input_gradients(stages: Sequence[tuple[Tensor, ...]], scope: Scope) -> list[Tensor]:
    """Return (x - mean) A of every stage in its dtype and memory format.

    Args:
        stages: Map x `[B, C, H, W]`, mean `[C]` or `[P, C]`, what does not matter here, and A `[C, C]`.
        scope: Which values are samples.
    """
    raw = [(mean, a.to(x.dtype)) for x, mean, _, a in stages if is_raw(x, mean.ndim == 2)]
    rounded = {dtype: iter(_round([pair for pair in raw if pair[1].dtype == dtype])) for dtype in _HALF}
    gradients = []
    for x, mean, _, a in stages:
        view = samples(x, scope)
        if is_raw(x, mean.ndim == 2):
            matrix, bias = next(rounded[x.dtype])
            rows = torch.addmm(bias, view.reshape(-1, len(a)), matrix, beta=-1)
        else:
            rows = _split_product(view, mean, a)
        gradients.append(gradient_from_rows(rows, x, scope))
    return gradients


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two float32 matrices to 16 bits of every value."""
    return _split_product(a[None], a.new_zeros(1), b)


def _round(stages: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return A and mean A, both in half precision and such that x A - mean A is 0 at the mean.

    The bias, mean A, is that of the rounded A. What it loses where it is rounded itself goes into one row of A, that of
    the channel whose mean is largest; else the error would be (mean / std) times that of rounding the gradient.

    Args:
        stages: Mean `[C]` and A, which this changes, of each stage; all A in one of the half precisions.
    """
    if not stages:
        return []
    mean = pad_sequence([mean for mean, _ in stages], batch_first=True)
    exact = torch.zeros_like(mean)
    for out, (own, a) in zip(exact, stages, strict=True):
        torch.sum(a * own[:, None], 0, out=out[: len(a)])
    bias = exact.to(stages[0][1].dtype)
    largest = mean.abs().argmax(1, keepdim=True)
    lost = ((bias - exact) / mean.gather(1, largest)).nan_to_num_(0, 0, 0).to(bias.dtype)
    for (_, a), row, at in zip(stages, lost, largest, strict=True):
        a.index_add_(0, at, row[None, : len(a)])
    return [(a, row[: len(a)]) for (_, a), row in zip(stages, bias, strict=True)]


def _sum_of_products(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """Return a^T b in float32: sums over blocks of rows, then over blocks.

    Args:
        a: Half precision `[n, K]`.
        b: The same, `[n, L]`.
        rows: The least number of rows in a block.
    """
    rows = max(rows, _ROWS_PER_CHANNEL * b.shape[1])
    blocks = len(a) // rows
    if blocks < 2:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    whole = blocks * rows
    stacked = (x[:whole].unflatten(0, (blocks, rows)) for x in (a, b))
    total = torch.bmm(next(stacked).mT, next(stacked), out_dtype=torch.float32).sum(0)
    return total if whole == len(a) else total.add_(torch.mm(a[whole:].T, b[whole:], out_dtype=torch.float32))


def _split_product(view: Tensor, mean: Tensor, a: Tensor) -> Tensor:
    """Return (samples - mean) A as float32 `[n, C]`: high A_high + high A_low + low A_high in one product."""
    channels, width = a.shape
    weights = a.new_empty(3, channels, width, dtype=torch.bfloat16)
    which = torch.eye(3, device=a.device)
    _split(a, weights[::2].transpose(0, 1), is_low=which[0, ::2])
    torch.neg(weights[2], out=weights[1])
    parts = []
    for chunk in _chunks(view):
        # mean - samples is high + low here; the weights are -A_low, -A_high, A_high.
        terms = view.new_empty(*chunk.shape[:2], 3, channels, dtype=torch.bfloat16)
        _split(mean - chunk, terms, is_low=which[2])
        parts.append(torch.mm(terms.view(-1, 3 * channels), weights.flatten(0, 1), out_dtype=torch.float32))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(x: Tensor, out: Tensor, is_low: Tensor) -> None:
    """Split float32 values into high + low, both bf16, in one pass: the upper half of a float32's bits is high.

    Args:
        x: `[..., C]`.
        out: bf16 `[..., copies, C]`, which this writes.
        is_low: `[copies]`, 1 for -low and 0 for high.
    """
    high = x.flatten().view(torch.bfloat16)[1::2].view(x.shape)
    torch.addcmul(high.unsqueeze(-2), x.unsqueeze(-2), is_low[:, None], value=-1, out=out)


def _chunks(view: Tensor) -> Iterator[Tensor]:
    """Yield all images, some at a time."""
    return iter(view.split(max(_CHUNK // (view.shape[1] * view.shape[2]), 1)))
