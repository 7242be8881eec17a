"""Dask: no gathers along an axis, and no order without the values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import library, require_known_shape
from polysoftmax._ops import Ops, ops_of

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._formula import Call, RowFormula


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


def words(x: Array, axis: int) -> Ops:
    """Return Dask's words for rows of ``x``."""
    return ops_of(DaskOps, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula as it stands."""
    return call.evaluate(words(operands[0], call.axis), operands)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula, and why."""
    del x, formula
    return "portable", "the array API formula as it stands, in Dask's graph"
