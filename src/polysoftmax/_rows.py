"""How an input becomes rows, and an answer gets back: axes, parameters, masks."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from polysoftmax._arrays import (
    Array,
    DType,
    as_float,
    cast,
    device_for,
    float_bits,
    in_native_order,
    is_array,
    is_kind,
    is_number,
    is_open,
    is_unknown,
    is_whole,
    library,
    may_keep,
    promotion,
    require_known_shape,
    require_same_library,
    with_axis,
)
from polysoftmax._refused import require_dense

Axis: TypeAlias = int | tuple[int, ...] | None
Number: TypeAlias = int | float


class AxisError(ValueError, IndexError):
    """An axis lies outside ``-ndim … ndim - 1``, or is named twice."""


@dataclass(slots=True)
class Rows:
    """An input in the layout that row formulas take, with one axis to reduce, and the way back."""

    xp: Any
    x: Array
    axis: int
    compute: DType
    result: DType
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    flattened: bool

    @property
    def length(self) -> int:
        """The number of entries of a row; NaN in Dask where it is not computed, None in ONNX where it is open."""
        return (self.x.shape if self.flattened else self.shape)[self.axis]

    def require_entries(self, function: str, entry: str, *, may_be_open: bool = False) -> None:
        """Raise ``ValueError`` unless rows have entries, and their number is known, or ``may_be_open``."""
        n = self.length
        if is_open(n):
            if not may_be_open:
                self.require_length()
            return
        if n >= 1:
            return
        axis = self.axes[0] if len(self.axes) == 1 else self.axes
        reason = "" if n == 0 else ": Dask does not know how many before logits.compute_chunk_sizes()"
        msg = f"{function} needs at least one {entry}, got logits of shape {self.shape} with axis={axis}{reason}"
        raise ValueError(msg)

    def require_length(self) -> None:
        """Raise ``ValueError`` where a model of ONNX leaves the number of entries open, and an answer depends on it."""
        if is_open(self.length):
            msg = (
                f"how many entries a row has must be known here, got shape {self.shape}: fix that length in the model, "
                "as in ndonnx.argument(shape=('rows', 50257), dtype=ndonnx.float32)"
            )
            raise ValueError(msg)

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are not reduced, in order."""
        return tuple(i for i in range(len(self.shape)) if i not in self.axes)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """Shape of the input without the reduced axes."""
        if not self.flattened:
            return self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return tuple(self.shape[i] for i in self.kept)

    def floats(self) -> Array:
        """Return the rows as floats, integers being widened; a filter tells entries apart as they are then."""
        return self.x if float_bits(self.xp, self.x.dtype) else cast(self.x, self.compute)

    def replacing(self, x: Array) -> Rows:
        """Return these rows with other entries."""
        return replace(self, x=x)

    def elementwise(self, y: Array) -> Array:
        """Reshape a result of the rows' shape to the shape of the input."""
        if not self.flattened:
            return y
        order = self.kept + self.axes
        inverse = tuple(order.index(i) for i in range(len(order)))
        y = self.xp.reshape(y, tuple(self.shape[i] for i in order))
        return y if inverse == tuple(range(len(order))) else self.xp.permute_dims(y, inverse)

    def keepdims(self, y: Array) -> Array:
        """Insert the reduced axes into a result, with length 1."""
        if not self.flattened:
            return with_axis(y, self.axis)
        return self.xp.reshape(y, tuple(1 if i in self.axes else n for i, n in enumerate(self.shape)))

    def empty_result(self, answer: float) -> Array:
        """Return the result for rows of length 0, connected to the input for automatic differentiation."""
        y = self.xp.sum(cast(self.x, self.compute), axis=self.axis, keepdims=True) + answer
        return cast(self.xp.squeeze(y, axis=self.axis), self.result)

    def from_reduced(self, y: Array) -> Array:
        """Reshape an array of the reduced shape to the rows' layout, with length 1 on the axis."""
        return self.xp.reshape(y, (*y.shape, 1)) if self.flattened else with_axis(y, self.axis)

    def _flatten(self, y: Array) -> Array:
        """Bring an array of the input's number of dimensions into the rows' layout."""
        if not self.flattened:
            return y
        require_dense(y)
        require_known_shape(y)
        y = self.xp.permute_dims(y, self.kept + self.axes)
        batch = y.shape[: len(self.kept)]
        return self.xp.reshape(y, (*batch, math.prod(y.shape[len(self.kept) :])))

    def like_input(self, other: Array, name: str) -> Array:
        """Bring an array of the input's shape (a tangent, other logits) into the rows' layout."""
        require_same_library(self.x, other, name)
        if other.shape != self.shape and not may_be_equal(other.shape, self.shape):
            msg = f"{name} must have the shape of the input, {self.shape}, got {tuple(other.shape)}"
            raise ValueError(msg)
        return self._flatten(self.real(other, name))

    def mask(self, where: Array | None) -> Array | None:
        """Bring a boolean mask that broadcasts against the input into the rows' layout."""
        if where is None:
            return None
        require_same_library(self.x, where, "where")
        if where.dtype != self.xp.bool:
            msg = f"where must be a boolean array (True: the entry exists), got dtype {where.dtype}"
            raise TypeError(msg)
        _require_broadcast(where, self.shape, "where")
        if self.flattened:
            return self._flatten(self.xp.broadcast_to(where, self.shape))
        for _ in range(len(self.shape) - where.ndim):
            where = with_axis(where, 0)
        return where

    def parameter(self, value: Array | Number, name: str, *, counts: bool = False) -> Array | float:
        """Bring a parameter, a number or an array with one entry a row, into the rows' layout.

        Tried in this order: 0-d; the reduced shape; the input's number of dimensions with length 1 on the
        reduced axes, and 1 or the input's length elsewhere. A number is rounded to what an array of it would hold.
        """
        if is_number(value):
            return self._rounded(as_float(value))
        if isinstance(value, bool | complex) or not is_array(value):
            msg = f"{name} must be an int, a float or an array of the logits' library, got {type(value).__name__}"
            raise TypeError(msg)
        require_same_library(self.x, value, name)
        value = self.real(value, name, counts=counts)
        if value.ndim == 0:
            return value
        if value.shape == self.reduced_shape or may_be_equal(value.shape, self.reduced_shape):
            return self.from_reduced(value)
        fits = value.ndim == len(self.shape) and all(
            m == 1 or (i not in self.axes and (m == n or is_unknown(m) or is_unknown(n)))
            for i, (m, n) in enumerate(zip(value.shape, self.shape, strict=True))
        )
        if not fits:
            kept = tuple(1 if i in self.axes else n for i, n in enumerate(self.shape))
            msg = (
                f"{name} has shape {tuple(value.shape)}; for an input of shape {self.shape} it must be a number, "
                f"or an array of shape (), {self.reduced_shape} or {kept}"
            )
            raise ValueError(msg)
        return self._flatten(value)

    def _rounded(self, value: float) -> float:
        """Round a number to the compute dtype; what is out of range for every parameter, or for float32, stays."""
        if not 0.0 < value < _TOO_LARGE or float_bits(self.xp, self.compute) != 32:
            return value
        # torch.compile may hold a symbol, and simplifies what follows to that. There the operations round.
        if not may_keep():
            return value
        # In arithmetic, because an array costs microseconds. Differences of doubles with 29 bits above the number
        # leave the 24 of float32 (Veltkamp), and fewer below its normal numbers.
        if value < _LEAST_NORMAL:
            return value + _LEAST_SHIFT - _LEAST_SHIFT
        large = value * (2.0**29 + 1)
        return large - (large - value)

    def temperature(self, value: Array | Number) -> Array | float | None:
        """Bring a temperature into the rows' layout; None where it is 1 and nothing is divided."""
        if isinstance(value, float) and value == 1.0:
            return None
        value = self.parameter(value, "temperature")
        if not isinstance(value, float):
            return value
        if value == 1.0:
            return None
        if not value >= 0.0:
            msg = f"temperature must be 0 or greater, got {value}"
            raise ValueError(msg)
        range_ = self.xp.finfo(self.compute)
        if float(range_.smallest_normal) <= value <= float(range_.max):
            return value
        # 0 and inf, and what the compute dtype cannot tell from them, have a rule of their own.
        limit = 0.0 if value < 1.0 else math.inf
        # Not asarray, which copies from the host: a CUDA graph that is being captured takes no such copy.
        return self.xp.full((), limit, dtype=self.compute, device=device_for(self.x))

    def real(self, value: Array, name: str, *, counts: bool = False) -> Array:
        """Return an array of real numbers in a floating dtype; the formula's call brings it to the compute dtype.

        Integers that are ``counts`` of a row's entries stay integers where float32 could not tell them apart.
        """
        if float_bits(self.xp, value.dtype):
            return value
        value = in_native_order(value)
        if float_bits(self.xp, value.dtype):
            return value
        if not is_kind(self.xp, value.dtype, "integral"):
            msg = f"{name} must hold real numbers, integers or floats of 16 bits or more, got dtype {value.dtype}"
            raise TypeError(msg)
        return value if counts and self.length > _COUNTABLE else cast(value, self.compute)


_COUNTABLE = 1 << 24
"""Numbers up to which float32 has every integer."""

_TOO_LARGE, _LEAST_NORMAL, _LEAST_SHIFT = 2.0**128, 2.0**-126, 1.5 * 2.0**-97
"""Where float32 ends, where its numbers have 24 bits, and a double whose last bit is that of the smaller ones."""


def rows(x: Array, axis: Axis, dtype: DType | None = None) -> Rows:
    """Check an input and bring it into the layout that row formulas take."""
    found = library(x)
    xp = found.xp
    if found.converts:
        x = xp.asarray(x)
    known = found.promoted.get(x.dtype) if dtype is None else None
    if known is None:
        x = in_native_order(x)
        known = promotion(x, found, dtype)
    compute, result = known
    try:
        shape = tuple(x.shape)
    except RuntimeError:  # PyTorch's nested tensors have none
        require_dense(x)
        raise
    ndim = len(shape)
    if type(axis) is int and -ndim <= axis < ndim:
        axis %= ndim
        return Rows(xp, x, axis, compute, result, shape, (axis,), False)
    axes = _normalise_axes(axis, ndim)
    layout = Rows(xp, x, ndim - len(axes), compute, result, shape, axes, True)
    return layout.replacing(xp.reshape(x, (1,)) if ndim == 0 else layout._flatten(x))


def weighted_rows(x: Array, weights: Array | None, axis: Axis, dtype: DType | None = None) -> tuple[Rows, Array | None]:
    """Return rows and their weights, in the shape that an input and its weights broadcast to."""
    if weights is None:
        return rows(x, axis, dtype), None
    require_same_library(x, weights, "weights")
    shape = _broadcast_shape(tuple(x.shape), tuple(weights.shape))
    x, weights = (
        one if may_be_equal(one.shape, shape) else library(one).xp.broadcast_to(one, shape) for one in (x, weights)
    )
    r = rows(x, axis, dtype)
    return r, r.like_input(weights, "weights")


def _broadcast_shape(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    ndim = max(len(shape), len(other))
    pairs = list(zip((1,) * (ndim - len(shape)) + shape, (1,) * (ndim - len(other)) + other, strict=True))
    if not all(1 in pair or may_be_equal(pair[:1], pair[1:]) for pair in pairs):
        msg = f"weights has shape {other}, which does not broadcast against the input's shape {shape}"
        raise ValueError(msg)
    return tuple(m if n == 1 else n for m, n in pairs)


def last_rows(x: Array, axis: Axis, dtype: DType | None = None) -> Rows:
    """Check an input and bring it into rows along the last axis."""
    r = rows(x, axis, dtype)
    return r if r.flattened or r.axis == len(r.shape) - 1 else rows(x, (r.axis,), dtype)


def _normalise_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for one in axes:
        if not (type(one) is int or (is_whole(one) and not getattr(one, "shape", None))):
            msg = f"axis must be an int, a tuple of ints, or None, got {axis!r}"
            raise TypeError(msg)
    if ndim == 0 and not isinstance(axis, tuple) and -1 <= axis <= 0:
        return ()
    for one in axes:
        if not -ndim <= one < ndim:
            msg = f"axis {one} is out of bounds for an array of dimension {ndim}"
            raise AxisError(msg)
    normalised = tuple(sorted(operator.index(one) % ndim for one in axes))
    if len(set(normalised)) != len(normalised):
        msg = f"axis {axis!r} names an axis twice"
        raise AxisError(msg)
    return normalised


def _require_broadcast(value: Array, shape: tuple[int, ...], name: str) -> None:
    own = tuple(value.shape)
    pairs = zip(reversed(own), reversed(shape), strict=False)
    # Not `m in (1, n)`, which torch.compile does not follow where lengths are symbols.
    fits = len(own) <= len(shape) and all(m == 1 or m == n or is_unknown(m) or is_unknown(n) for m, n in pairs)
    if not fits:
        msg = f"{name} has shape {own}, which does not broadcast to the input's shape {shape}"
        raise ValueError(msg)


def may_be_equal(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are equal, as far as is known."""
    same = len(shape) == len(other)
    return same and all(m == n or is_unknown(m) or is_unknown(n) for m, n in zip(shape, other, strict=True))
