"""Dask: no gathers along an axis, and no order without the values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import require_known_shape
from polysoftmax._ops import Ops

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class DaskOps(Ops):
    """The words of Dask, which computes nothing before it is asked for values."""

    def total(self, x: Array) -> Array:
        return self.xp.sum(x)

    def mean(self, x: Array) -> Array:
        # The number of entries may be unknown before they are computed.
        return self.total(x) / self.xp.maximum(self.total(self.xp.ones_like(x)), 1.0)

    def take(self, x: Array, index: Array) -> Array:
        hit = self.indices(x) == index
        return self.xp.sum(self.xp.where(hit, x, 0), axis=self.axis, keepdims=True, dtype=x.dtype)

    def block_of(self, x: Array, block: Array, size: int) -> tuple[Array, Array]:
        """Return whole rows, without what is outside the block."""
        index = self.indices(x)
        return self.xp.where(index // size == block, x, -math.inf if self.is_floating(x) else False), index

    def block_sums(self, terms: Array, size: int) -> Array:
        require_known_shape(terms)
        return super().block_sums(terms, size)

    def descending(self, x: Array) -> Array:
        raise _unordered()

    def descending_indices(self, x: Array) -> Array:
        raise _unordered()

    def kth_greatest(self, x: Array, k: int) -> Array:
        raise _unordered()

    def top_k_indices(self, x: Array, k: int) -> Array:
        raise _unordered()


def _unordered() -> NotImplementedError:
    msg = "Dask cannot order rows lazily, as top_k and top_p need: compute the logits first, logits.compute()"
    return NotImplementedError(msg)
