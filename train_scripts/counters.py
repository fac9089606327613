"""What a computation does, counted and not timed: kernels, operations, bytes that move."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from timm_mfd.loss import correlation


@contextmanager
def opened() -> Iterator[None]:
    """Let counters look into MFD, whose operators hide what they do from them."""
    with (
        mock.patch.object(correlation, "_loss_op", correlation.loss_forward),
        mock.patch.object(correlation, "_loss_backward_op", correlation.loss_backward),
    ):
        yield


class Kernels(TorchDispatchMode):
    """Number of kernels that an accelerator starts if each operator that is no view starts one."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "timm_mfd":
            raise ValueError(f"{func} hides its kernels; count inside `opened`")
        out = func(*args, **(kwargs or {}))
        known = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        makes = any(storage_of(tensor) not in known for tensor in tensors_in(out))
        self.started += writes or (makes and "empty" not in func._schema.name)
        return out


class Operations(FlopCounterMode):
    """Floating-point operations of products and convolutions; torch counts the backward of grouped ones as dense."""

    def __init__(self) -> None:
        own = {torch.ops.aten.convolution_backward: _convolution_backward, torch.ops.aten.bmm: _batched_product}
        super().__init__(display=False, custom_mapping=own)

    @property
    def total(self) -> int:
        """Their number; a multiplication and its addition are two."""
        return self.get_total_flops()


def _batched_product(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Two for each multiplication; torch 2.11 stumbles over the dtype of the result."""
    return 2 * math.prod(a) * b[2]


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_val: Any = None, **_: Any
) -> int:
    """Each of the two gradients takes as many operations as the convolution itself."""
    *_, transposed, _output_padding, _groups, output_mask = rest
    return sum(output_mask[:2]) * 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])


# Operators that overwrite their first argument without a look at it.
_OVERWRITE = frozenset(("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"))


class Traffic(TorchDispatchMode):
    """Bytes that operators move if each reads all of its arguments and writes its results, once; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if "empty" in name:  # memory that is not written to
            return out
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if kwargs and a.name in kwargs]
        changed = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        unread = {id(t) for a, value in given if a.is_out or (name in _OVERWRITE and a is given[0][0])
                  for t in tensors_in(value)}  # fmt: skip
        read = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) not in unread]
        known = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        made = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in known]
        if made or changed:
            self.bytes += sum(map(bytes_of, [*read, *tensors_in(changed), *made]))
        return out


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the elements that differ in place: those that an expanded tensor repeats count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """What tensors with the same memory have in common."""
    return tensor.untyped_storage()._cdata
