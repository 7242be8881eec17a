"""A linear layer as it is given: its arrays, and the rows of logits that it will make."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import (
    as_float,
    as_int,
    float_bits,
    in_native_order,
    is_number,
    require_same_library,
)
from polysoftmax._formula import runner
from polysoftmax._linear import Head
from polysoftmax._rows import may_be_equal, rows

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Rows


class Layer:
    """The arrays of a linear layer, checked, and the rows of logits that it will make."""

    def __init__(
        self, hidden: Array, weight: Array, bias: Array | None, softcap: float | None, chunk_size: int | None
    ) -> None:
        r = rows(hidden, -1)
        xp = r.xp
        require_same_library(hidden, weight, "weight")
        if not hidden.ndim:
            msg = "hidden must have the shape (..., d), got an array without axes"
            raise ValueError(msg)
        if not float_bits(xp, hidden.dtype):
            msg = f"hidden must be floating, got dtype {hidden.dtype}"
            raise TypeError(msg)
        if weight.ndim != 2 or not may_be_equal(weight.shape[1:], hidden.shape[-1:]):
            msg = (
                f"weight must have the shape (v, {hidden.shape[-1]}) for hidden states of shape {tuple(hidden.shape)}, "
                f"got {tuple(weight.shape)}"
            )
            raise ValueError(msg)
        self.weight, self.bias = _of_dtype(hidden, weight, "weight"), None
        length = weight.shape[0]
        if length == 0:
            msg = f"a head needs at least one class, got a weight of shape {tuple(weight.shape)}"
            raise ValueError(msg)
        if bias is not None:
            require_same_library(hidden, bias, "bias")
            if tuple(bias.shape) != (length,):
                msg = f"bias must have one entry a class, shape ({length},), got {tuple(bias.shape)}"
                raise ValueError(msg)
            self.bias = xp.reshape(_of_dtype(hidden, bias, "bias"), (1, -1))
        self.softcap = _positive(softcap)
        self.batch = tuple(hidden.shape[:-1])
        self.hidden = hidden if hidden.ndim == 2 else xp.reshape(hidden, (math.prod(self.batch), hidden.shape[-1]))
        self.size = _chunk_size(chunk_size, self.hidden.shape, length)
        self.rows: Rows = replace(r, shape=(*self.batch, length))  # their x has another length, which is not asked for

    def head(self, formula: Any, *, squeeze: bool, **options: Any) -> Head:
        """Return the head of a formula."""
        return Head(formula, tuple(options.items()), self.softcap, squeeze, self.size)

    def answers(self, head: Head, operands: tuple[Any, ...]) -> Array:
        """Return what the formula answers for each row, side by side."""
        return runner(self.hidden).heads.answers(head, *self.arrays(operands))

    def as_given(self, y: Array) -> Array:
        """Give what has an entry for each row the axes that the rows were given in."""
        return y if len(self.batch) == 1 else self.rows.xp.reshape(y, (*self.batch, *y.shape[1:]))

    def arrays(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the layer's arrays, and operands with an entry for each row along the first axis, or with one."""
        return (self.hidden, self.weight, self.bias, *map(self._laid_out, operands))

    def _laid_out(self, operand: Any) -> Any:
        if operand is None or is_number(operand) or operand.ndim == 0 or operand.ndim == len(self.batch) + 1 == 2:
            return operand
        xp, last = self.rows.xp, operand.shape[-1]
        if math.prod(operand.shape[:-1]) == 1:
            return xp.reshape(operand, (1, last))
        return xp.reshape(xp.broadcast_to(operand, (*self.batch, last)), (math.prod(self.batch), last))


def _of_dtype(hidden: Array, one: Array, name: str) -> Array:
    one = in_native_order(one)
    if one.dtype != hidden.dtype:
        msg = f"{name} must have the dtype of the hidden states, {hidden.dtype}, got {one.dtype}: cast one of them"
        raise TypeError(msg)
    return one


def _positive(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if not is_number(softcap):
        msg = f"softcap must be a number or None, got {type(softcap).__name__}"
        raise TypeError(msg)
    if not 0.0 < softcap < math.inf:
        msg = f"softcap must be above 0 and finite, got {as_float(softcap)}"
        raise ValueError(msg)
    return as_float(softcap)


_LEAST, _STEP = 192, 64
"""Rows below which a product takes longer to read the weight than to multiply, and what their number is whole in."""


def _chunk_size(given: int | None, shape: tuple[int, ...], length: int) -> int:
    """Return how many rows have logits at once: of twice as many numbers as the hidden states, if that is enough."""
    if given is not None:
        given = as_int(given, "chunk_size", "an int or None")
        if given < 1:
            msg = f"chunk_size must be 1 or greater, got {given}"
            raise ValueError(msg)
        return given
    n, d = shape
    return max(_LEAST, 2 * n * d // length // _STEP * _STEP) if type(n) is int else _LEAST
