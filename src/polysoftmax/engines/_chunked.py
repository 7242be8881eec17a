"""Words for arrays in chunks, which libraries plan with and compute later: no gathers along an axis, and no order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from polysoftmax._ops import Ops

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class ChunkedOps(Ops):
    """The words of a library whose rows may be spread over chunks."""

    def total(self, x: Array) -> Array:
        return self.xp.sum(x)

    def take(self, x: Array, index: Array) -> Array:
        places, taken = self.indices(x), []
        for k in range(index.shape[self.axis]):
            entry = self.xp.where(places == self.part(index, k, k + 1), x, 0)
            taken.append(self.xp.sum(entry, axis=self.axis, keepdims=True, dtype=x.dtype))
        return self.side_by_side(taken)

    def block_of(self, x: Array, block: Array, size: int) -> tuple[Array, Array]:
        """Return whole rows, without what is outside the block."""
        index = self.indices(x)
        return self.xp.where(index // size == block, x, -math.inf if self.is_floating(x) else False), index

    no_order: ClassVar[str]
    """Why a row cannot be ordered, and what to do."""

    def descending(self, x: Array) -> Array:
        raise NotImplementedError(self.no_order)

    def descending_indices(self, x: Array) -> Array:
        raise NotImplementedError(self.no_order)

    def kth_greatest(self, x: Array, k: int) -> Array:
        raise NotImplementedError(self.no_order)

    def top_k_indices(self, x: Array, k: int) -> Array:
        raise NotImplementedError(self.no_order)
