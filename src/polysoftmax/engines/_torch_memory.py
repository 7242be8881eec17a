"""Which of PyTorch's tensors have memory that a kernel can be given, and how the native kernels see it."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from polysoftmax.engines import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose memory can be given to a kernel: a subclass may have none."""

_STRIDED = torch.strided


def is_plain(x: Array) -> bool:
    """Whether a tensor has memory of its own, on whatever device; negative views are for their user to exclude."""
    return type(x) in _PLAIN and x.layout is _STRIDED


def is_in_memory(x: Array) -> bool:
    """Whether a native kernel can be given the memory of ``x``."""
    return type(x) in _PLAIN and x.is_cpu and x.layout is _STRIDED and not x.is_neg()


def is_on_gpu(x: Array) -> bool:
    """Whether a CUDA kernel can be given the memory of ``x``."""
    return x.is_cuda and is_plain(x) and not x.is_neg()


def is_sharded(x: Array) -> bool:
    """Whether ``x`` is a DTensor, a part of which is on each of several devices."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


class _Memory:
    address_is = native.DATA

    def kind(self, x: Array) -> Any:
        return (x.dtype, x.shape, x.stride()) if is_in_memory(x) else NotImplemented

    def strides(self, x: Array) -> tuple[int, ...]:
        size = x.itemsize
        return tuple([size * stride for stride in x.stride()])

    address = staticmethod(torch.Tensor.data_ptr)

    def maker(self, shape: tuple[int, ...], dtype: DType | str) -> Callable[[], Array]:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        # Like a tensor of one entry in memory: every other way of making one takes twice as long.
        return partial(torch.empty_like, torch.empty((), dtype=dtype, device="cpu").expand(shape))


MEMORY = _Memory()
