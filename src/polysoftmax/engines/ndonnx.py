"""ndonnx: arrays whose operations become a model of ONNX, some of whose lengths may be open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polysoftmax._arrays import is_open
from polysoftmax._ops import Ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polysoftmax._arrays import Array, DType


class NdonnxOps(Ops):
    """The words of ndonnx, where a length that is open is None."""

    def length(self, x: Array) -> int | Array:
        n = x.shape[self.axis]
        return x.dynamic_shape[self.axis % x.ndim] if is_open(n) else n

    def sum(self, x: Array) -> Array:
        if is_open(x.shape[self.axis]):
            return self.xp.sum(x, axis=self.axis, keepdims=True)
        return super().sum(x)

    def total(self, x: Array) -> Array:
        return self.xp.sum(x)

    def mean(self, x: Array) -> Array:
        return self.total(x) / self.xp.maximum(self.total(self.ones_like(x)), 1.0)

    # ndonnx's own forget which lengths are known.

    def ones_like(self, x: Array, dtype: DType = None) -> Array:
        return self.xp.astype((x == x) | True, dtype or x.dtype)

    def zeros_like(self, x: Array) -> Array:
        return self.xp.astype((x != x) & False, x.dtype)

    def broadcast_like(self, x: Array, like: Array) -> Array:
        return self.xp.where(self.ones_like(like, self.xp.bool), x, x)

    def broadcast_to(self, x: Array, shape: Sequence[int | None]) -> Array:
        """Broadcast to a shape; a length that is open there is that of the same dimension of ``x``."""
        # ONNX keeps what is longer than 1.
        return self.xp.broadcast_to(x, tuple(1 if is_open(n) else n for n in shape))

    def reshape(self, x: Array, shape: Sequence[int | None]) -> Array:
        """Reshape; a length that is open is that of the same dimension of ``x``."""
        if sum(map(is_open, shape)) < 2:
            return self.xp.reshape(x, tuple(-1 if is_open(n) else n for n in shape))
        kept = [i for i, n in enumerate(shape) if n != 1]
        least = [1 if is_open(shape[i]) else shape[i] for i in kept]
        lengths = [
            x.dynamic_shape[i : i + 1] if is_open(shape[i]) else self.xp.asarray([n], dtype=self.xp.int64)
            for i, n in zip(kept, least, strict=True)
        ]
        y = self.xp.reshape(x, self.xp.concat(lengths))
        # All lengths of y are open, until it meets an array of those that are known.
        y = self.xp.where(self.xp.ones(tuple(least), dtype=self.xp.bool), y, y)
        for i in range(len(shape)):
            y = y if i in kept else self.xp.expand_dims(y, axis=i)
        return y

    def take(self, x: Array, index: Array) -> Array:
        # ONNX broadcasts neither of them.
        x, index = self._over_rows_of(index, x), self._over_rows_of(x, index)
        return super().take(x, index)

    def _over_rows_of(self, other: Array, x: Array) -> Array:
        """Repeat the rows of ``x`` that another array has more of."""
        one = self.part(other, 0, 1)
        is_less = any(n == 1 and m != 1 for m, n in zip(one.shape, self.part(x, 0, 1).shape, strict=True))
        return self.broadcast_like(x, one) if is_less else x

    def row_numbers(self, x: Array) -> Array:
        if not any(map(is_open, x.shape[:-1])):
            return super().row_numbers(x)
        number = self.xp.zeros((1,) * x.ndim, dtype=self.xp.int32)
        for axis in range(x.ndim - 1):
            ops = self.along(axis)
            count = self.xp.astype(self.xp.asarray(ops.length(x)), self.xp.int32)
            number = number * count + ops.indices(x)
        return number

    # Sorted, rows have an open length.

    def descending(self, x: Array) -> Array:
        return self.reshape(super().descending(x), x.shape)

    def descending_indices(self, x: Array) -> Array:
        return self.reshape(super().descending_indices(x), x.shape)

    def top_k_indices(self, x: Array, k: int) -> Array:
        return self.reshape(super().top_k_indices(x, k), (*x.shape[:-1], k))
