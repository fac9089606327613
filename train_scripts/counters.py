"""What a computation does, counted and not timed: operations, bytes that move, bytes that are alive together."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive among the tensors made inside, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            key, storage = storage_of(tensor), tensor.untyped_storage()
            if key not in self._seen and key not in inputs:
                self._seen.add(key)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class Operations(FlopCounterMode):
    """Floating-point operations of products and convolutions; torch counts the backward of grouped ones as dense."""

    def __init__(self) -> None:
        own = {torch.ops.aten.convolution_backward: _convolution_backward}
        super().__init__(display=False, custom_mapping=own)

    @property
    def total(self) -> int:
        """Their number; a multiplication and its addition are two."""
        return self.get_total_flops()


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_val: Any = None, **_: Any
) -> int:
    """Each of the two gradients takes as many operations as the convolution itself."""
    output_mask = rest[-1]
    return sum(output_mask[:2]) * 2 * math.prod(grad) * math.prod(weight[1:])


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write if each goes to memory once for every argument and result; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = tensors_in((args, kwargs)), tensors_in(out)
        sources = {storage_of(tensor) for tensor in read}
        is_view = not func._schema.is_mutable and all(storage_of(tensor) in sources for tensor in written)
        if not is_view:
            # An expanded tensor has more elements than memory.
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in read + written)
        return out


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """What tensors with the same memory have in common."""
    return tensor.untyped_storage()._cdata
