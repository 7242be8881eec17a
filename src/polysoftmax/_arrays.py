"""What the formulas need to know about arrays: namespace, promotion, axes, parameters, accurate sums.

This file and ``engines/`` are the only places where a library's name may stand.
"""

from __future__ import annotations

import math
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import array_api_compat
from array_api_compat import device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

Array: TypeAlias = Any
"""An array of any supported library."""

DType: TypeAlias = Any
Axis: TypeAlias = int | tuple[int, ...] | None
Number: TypeAlias = int | float


class AxisError(ValueError, IndexError):
    """An axis lies outside ``-ndim … ndim - 1``, or is named twice."""


@dataclass(frozen=True, slots=True)
class Library:
    """The array library that a type belongs to."""

    name: str
    xp: ModuleType


_LIBRARIES: dict[type, Library] = {}


def library(x: Array) -> Library:
    """Return the library of ``x``; ``TypeError`` for anything that is not an array."""
    try:
        return _LIBRARIES[type(x)]
    except KeyError:
        return _identify(x)


def _identify(x: Array) -> Library:
    kind = type(x)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(x, numpy.ma.MaskedArray):
            msg = (
                "got a numpy.ma.MaskedArray, whose mask the formulas would ignore: "
                "pass x.data together with where=~numpy.ma.getmaskarray(x)"
            )
            raise TypeError(msg)
        if isinstance(x, numpy.matrix):
            msg = "got a numpy.matrix, which cannot lose a dimension: pass numpy.asarray(x)"
            raise TypeError(msg)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        # torch.compile cannot follow array-api-compat's way of telling.
        import array_api_compat.torch as xp
    elif array_api_compat.is_array_api_obj(x):
        xp = array_api_compat.array_namespace(x)
    else:
        msg = (
            f"expected an array of NumPy, JAX, PyTorch, CuPy or another array API library, got {kind.__name__}: "
            f"wrap it first, for example numpy.asarray({'x' if not isinstance(x, list | tuple) else '[...]'})"
        )
        raise TypeError(msg)
    found = Library(xp.__name__.removeprefix("array_api_compat.").split(".")[0], xp)
    _LIBRARIES[kind] = found
    return found


def namespace(x: Array) -> Any:
    """Return the array API namespace of ``x``."""
    try:
        return _LIBRARIES[type(x)].xp
    except KeyError:
        return _identify(x).xp


def is_number(value: object) -> bool:
    """Whether ``value`` is a Python or NumPy real scalar, the only kind whose range is checked."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.integer, numpy.floating))


def is_array(value: object) -> bool:
    """Whether ``value`` is an array of some library."""
    return type(value) in _LIBRARIES or array_api_compat.is_array_api_obj(value)


_FLOAT_BITS: dict[tuple[str, DType], int] = {}


def float_bits(xp: Any, dtype: DType) -> int:
    """Width of a real floating dtype in bits; 0 for every other dtype."""
    bits = _FLOAT_BITS.get((xp.__name__, dtype))  # array-api-strict warns when its dtypes meet NumPy's
    if bits is None:
        # NumPy does not count ml_dtypes.bfloat16 as floating, so it is known by its name.
        if str(dtype).endswith("bfloat16"):
            bits = 16
        else:
            bits = xp.finfo(dtype).bits if xp.isdtype(dtype, "real floating") else 0
        _FLOAT_BITS[xp.__name__, dtype] = bits
    return bits


def default_float(xp: Any) -> DType:
    """Return the library's default real floating dtype."""
    return xp.__array_namespace_info__().default_dtypes()["real floating"]


def default_index(xp: Any) -> DType:
    """Return the library's default dtype for indices."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


def promotion(x: Array, xp: Any, dtype: DType | None) -> tuple[DType, DType]:
    """Return the dtypes to compute in and to answer in.

    Everything narrower than float32 is computed in float32. Integers become floating before anything
    is subtracted: the difference of two int8 wraps.
    """
    own_bits = float_bits(xp, x.dtype)
    if not own_bits and not xp.isdtype(x.dtype, "integral"):
        msg = f"expected real numbers, got an array of dtype {x.dtype}: convert it to a real floating dtype"
        raise TypeError(msg)
    inferred = x.dtype if own_bits else default_float(xp)
    result = inferred if dtype is None else _as_dtype(xp, dtype)
    widest, bits = xp.float32, 32
    for candidate in (x.dtype, result):
        if float_bits(xp, candidate) > bits:
            widest, bits = candidate, float_bits(xp, candidate)
    if x.dtype == widest == result:
        _UNCHANGED[library(x).name, x.dtype] = (widest, result)
    return widest, result


_UNCHANGED: dict[tuple[str, DType], tuple[DType, DType]] = {}
"""The dtypes that are computed and answered in as they are; the look-up saves a tiny call a tenth of its time."""


def _as_dtype(xp: Any, dtype: DType) -> DType:
    try:
        found = xp.empty(0, dtype=dtype).dtype
        known = float_bits(xp, found)
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"dtype={dtype!r} is not a dtype of {xp.__name__.removeprefix('array_api_compat.')}"
        raise TypeError(msg) from error
    if not known:
        msg = f"dtype must be real floating, got {dtype!r}"
        raise TypeError(msg)
    return found


def cast(x: Array, dtype: DType) -> Array:
    """Return ``x`` in ``dtype``, itself if it has it."""
    if x.dtype == dtype:
        return x
    found = library(x)
    if found.name != "numpy":
        return found.xp.astype(as_rounded(x), dtype)
    with found.xp.errstate(over="ignore"):  # what is too large for 16 bits is inf
        return x.astype(dtype)


@dataclass(slots=True)
class Rows:
    """An input brought into the form that row formulas take: one axis to reduce, and how to get back."""

    xp: Any
    x: Array
    axis: int
    length: int
    compute: DType
    result: DType
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    flattened: bool

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

    def of(self, x: Array) -> Rows:
        """Return rows like these, of other entries: what a formula answered for each."""
        return replace(self, x=x)

    def elementwise(self, y: Array) -> Array:
        """Give a result with the shape of the rows the shape of the input."""
        if not self.flattened:
            return y
        order = self.kept + self.axes
        inverse = tuple(order.index(i) for i in range(len(order)))
        y = self.xp.reshape(y, tuple(self.shape[i] for i in order))
        return y if inverse == tuple(range(len(order))) else self.xp.permute_dims(y, inverse)

    def with_axes(self, y: Array) -> Array:
        """Give a result of the reduced shape the reduced axes back, with length 1."""
        return self.xp.reshape(y, tuple(1 if i in self.axes else n for i, n in enumerate(self.shape)))

    def nothing(self, answer: float) -> Array:
        """Return the answer for empty rows, known to automatic differentiation."""
        y = self.xp.sum(cast(self.x, self.result), axis=self.axis, keepdims=True) + answer
        return self.xp.squeeze(y, axis=self.axis)

    def from_reduced(self, y: Array) -> Array:
        """Bring an array of the shape of the reduced input into the form of the rows, with length 1 on the axis."""
        if self.flattened:
            return self.xp.reshape(y, (*self.reduced_shape, 1))
        return self.xp.expand_dims(y, axis=self.axis)

    def _flatten(self, y: Array) -> Array:
        """Bring an array with the input's number of dimensions into the form of the rows."""
        if not self.flattened:
            return y
        y = self.xp.permute_dims(y, self.kept + self.axes)
        batch = y.shape[: len(self.kept)]
        return self.xp.reshape(y, (*batch, math.prod(y.shape[len(self.kept) :])))

    def like_input(self, other: Array, name: str) -> Array:
        """Bring an array of the input's shape (a tangent, other logits) into the form of the rows."""
        require_same_library(self.x, other, name)
        if other.shape != self.shape:
            msg = f"{name} must have the shape of the input, {self.shape}, got {tuple(other.shape)}"
            raise ValueError(msg)
        return self._flatten(other if float_bits(self.xp, other.dtype) else self.real(other, name))

    def mask(self, where: Array | None) -> Array | None:
        """Bring a boolean mask that broadcasts against the input into the form of the rows."""
        if where is None:
            return None
        require_same_library(self.x, where, "where")
        if not self.xp.isdtype(where.dtype, "bool"):
            msg = f"where must be a boolean array (True: the entry exists), got dtype {where.dtype}"
            raise TypeError(msg)
        _require_broadcast(where, self.shape, "where")
        if self.flattened:
            return self._flatten(self.xp.broadcast_to(where, self.shape))
        missing = len(self.shape) - where.ndim
        return self.xp.reshape(where, (1,) * missing + where.shape) if missing else where

    def like_row(self, weights: Array | None, name: str) -> Array | None:
        """Bring real weights that broadcast against the input into the form of the rows."""
        if weights is None:
            return None
        require_same_library(self.x, weights, name)
        weights = self.real(weights, name)
        _require_broadcast(weights, self.shape, name)
        return self._flatten(self.xp.broadcast_to(weights, self.shape))

    def parameter(self, value: Array | Number, name: str) -> Array | float:
        """Bring a parameter, a number or an array with one entry a row, into the form of the rows.

        Tried in this order: 0-d; the reduced shape; the input's number of dimensions with length 1 on the
        reduced axes, and 1 or the input's length elsewhere. A number is rounded to what an array of it would hold.
        """
        if is_number(value):
            return self._rounded(float(value))
        if isinstance(value, bool | complex) or not is_array(value):
            msg = f"{name} must be a real number or an array of the logits' library, got {type(value).__name__}"
            raise TypeError(msg)
        require_same_library(self.x, value, name)
        value = self.real(value, name)
        if value.ndim == 0:
            return value
        if value.shape == self.reduced_shape:
            return self.from_reduced(value)
        fits = value.ndim == len(self.shape) and all(
            m == 1 or (m == n and i not in self.axes)
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
        # In arithmetic, which torch.compile follows, and without an array, which costs microseconds. Differences of
        # doubles with 29 bits above the number leave the 24 of float32 (Veltkamp), and fewer below its normal numbers.
        if value < _LEAST_NORMAL:
            return value + _LEAST_SHIFT - _LEAST_SHIFT
        large = value * (2.0**29 + 1)
        return large - (large - value)

    def temperature(self, value: Array | Number) -> Array | float | None:
        """Bring a temperature into the form of the rows; None where it is 1 and nothing is to be divided."""
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

    def real(self, value: Array, name: str) -> Array:
        """Bring an array of real numbers to the compute dtype."""
        if not (float_bits(self.xp, value.dtype) or self.xp.isdtype(value.dtype, "integral")):
            msg = f"{name} must hold real numbers, got dtype {value.dtype}"
            raise TypeError(msg)
        return cast(value, self.compute)


_TOO_LARGE, _LEAST_NORMAL, _LEAST_SHIFT = 2.0**128, 2.0**-126, 1.5 * 2.0**-97
"""Where float32 ends, where its numbers have 24 bits, and a double whose last bit is that of the smaller ones."""


def rows(x: Array, axis: Axis, dtype: DType | None = None) -> Rows:
    """Check an input and bring it into the form that row formulas take."""
    found = library(x)
    xp = found.xp
    if found.name == "numpy" and type(x) is not xp.ndarray:
        x = xp.asarray(x)  # scalars become 0-d; subclasses would return their own kind from every operation
    compute, result = (dtype is None and _UNCHANGED.get((found.name, x.dtype))) or promotion(x, xp, dtype)
    shape = tuple(x.shape)
    ndim = len(shape)
    if type(axis) is int and -ndim <= axis < ndim:
        axis %= ndim
        return Rows(xp, x, axis, shape[axis], compute, result, shape, (axis,), False)
    axes = _normalise_axes(axis, ndim)
    length = math.prod([shape[i] for i in axes])  # torch.compile follows no generator here
    layout = Rows(xp, x, ndim - len(axes), length, compute, result, shape, axes, True)
    return layout.of(xp.reshape(x, (1,)) if ndim == 0 else layout._flatten(x))


def last_rows(x: Array, axis: Axis) -> Rows:
    """Check an input and bring it into the form of rows whose entries stand along the last axis."""
    r = rows(x, axis)
    return r if r.flattened or r.axis == len(r.shape) - 1 else rows(x, (r.axis,))


def _normalise_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for one in axes:
        if not hasattr(one, "__index__") or isinstance(one, bool):
            msg = f"axis must be an int, a tuple of ints, or None, got {axis!r}"
            raise TypeError(msg)
    if ndim == 0 and not isinstance(axis, tuple) and -1 <= axis <= 0:
        return ()
    for one in axes:
        if not -ndim <= one < ndim:
            msg = f"axis {one} is out of bounds for an array of dimension {ndim}"
            raise AxisError(msg)
    normalised = tuple(sorted(one.__index__() % ndim for one in axes))
    if len(set(normalised)) != len(normalised):
        msg = f"axis {axis!r} names an axis twice"
        raise AxisError(msg)
    return normalised


def _require_broadcast(value: Array, shape: tuple[int, ...], name: str) -> None:
    own = tuple(value.shape)
    fits = len(own) <= len(shape) and all(m in (1, n) for m, n in zip(reversed(own), reversed(shape), strict=False))
    if not fits:
        msg = f"{name} has shape {own}, which does not broadcast to the input's shape {shape}"
        raise ValueError(msg)


def require_same_library(x: Array, other: Array, name: str) -> None:
    """Raise ``TypeError`` unless ``other`` is an array of the library and device of ``x``."""
    mine = library(x)
    if type(other) not in _LIBRARIES and not is_array(other):
        msg = f"{name} must be an array of {mine.name}, as the input is, got {type(other).__name__}"
        raise TypeError(msg)
    theirs = library(other)
    if theirs.xp is not mine.xp:
        msg = f"the input is an array of {mine.name} and {name} one of {theirs.name}: convert one of them"
        raise TypeError(msg)
    if mine.name in _ONE_DEVICE or (mine.name == "jax" and (_is_tracer(x) or _is_tracer(other))):
        return
    here, there = (x.device, other.device) if mine.name == "torch" else (device(x), device(other))
    if here != there:
        msg = f"the input is on device {here} and {name} on {there}: move one of them"
        raise TypeError(msg)


_ONE_DEVICE = frozenset({"numpy", "dask", "array_api_strict"})


def _is_tracer(x: Array) -> bool:
    """Whether one of JAX's arrays stands for a value that is not known yet, and has no device."""
    import jax

    return isinstance(x, jax.core.Tracer)


def stop_gradient(x: Array) -> Array:
    """Return ``x`` as a constant for the library's automatic differentiation."""
    name = library(x).name
    if name == "torch":
        return x.detach()
    if name == "jax" and _is_tracer(x):
        from jax import lax

        return lax.stop_gradient(x)
    return x


def device_for(x: Array) -> Any:
    """Return the ``device=`` that creates an array beside ``x``; JAX moves what was made without one."""
    return None if library(x).name == "jax" else _device(x)


def _device(x: Array) -> Any:
    # torch.compile cannot follow array-api-compat's question for the device.
    return x.device if library(x).name == "torch" else device(x)


def formulas_are_differentiated(x: Array) -> bool:
    """Whether the library may differentiate the formulas themselves, where it cannot be given their rules."""
    if library(x).name != "torch":
        return False
    import torch

    return torch.is_grad_enabled()  # type: ignore[no-any-return]


def quotient(x: Array, by: Array) -> Array:
    """Return ``x / by`` for a positive ``by``, so that differentiation never meets x / by², which may overflow.

    The second factor is 1. Its derivative multiplies by the quotient and then divides by ``by``, as the rules do.
    """
    found = library(x)
    if not (found.name == "jax" or formulas_are_differentiated(x)):
        return x / by
    xp, constant = found.xp, stop_gradient(by)
    return x / constant * xp.exp(xp.log(constant) - xp.log(by))


def or_nan(y: Array, answered: Array, row: Array) -> Array:
    """Return ``y`` where it is an answer, and NaN elsewhere; ``row`` is any real array of each row's numbers.

    XLA on the CPU may leave the exponential of a NaN unset that it knows when it compiles (seen with JAX 0.10.2), so
    there the NaN is computed from ``row``.
    """
    found = library(y)
    xp = found.xp
    if found.name != "jax":
        return xp.where(answered, y, math.nan)
    return xp.where(answered, y, cast(xp.sqrt(xp.where(answered, 1.0, -1.0 - stop_gradient(row * row))), y.dtype))


def row_maximum(x: Array, axis: int) -> Array:
    """Return the maximum of every row, kept with length 1, as a constant for automatic differentiation.

    That of 16-bit rows, which JAX alone gives to formulas, is float32, and so is what they make of it.
    """
    found = library(x)
    if found.name == "numpy":
        return found.xp.maximum.reduce(x, axis, None, None, True)  # half the call overhead of max
    if found.name != "jax":
        return stop_gradient(found.xp.max(x, axis=axis, keepdims=True))
    x = stop_gradient(x)
    if _by_columns(x, axis):
        top = _over_columns(found.xp.maximum, x, axis)
    else:
        top = found.xp.max(x, axis=axis, keepdims=True)
    return cast(top, found.xp.float32) if float_bits(found.xp, x.dtype) == 16 else top


def below_maximum(x: Array, axis: int) -> Array:
    """Return ``x`` minus the maximum of every row, in new memory or what was lent."""
    found = library(x)
    if found.name != "numpy":
        return below(x, row_maximum(x, axis))
    if x.ndim == 1:
        return x - found.xp.maximum.reduce(x)  # a scalar, which takes half as long as an array of one
    return found.xp.subtract(x, row_maximum(x, axis), _lent.take(x))


def as_rounded(x: Array) -> Array:
    """Return 16-bit numbers rounded to their dtype: a compiler that computes in 32 bits may leave that out."""
    engine = _engine_that_compiles(x)
    is_narrow = engine is not None and float_bits(namespace(x), x.dtype) == 16
    return engine.as_rounded(x) if is_narrow else x


def below(x: Array, top: Array) -> Array:
    """Return ``x - top`` for a bound ``top`` of every row, and exactly 0 where ``x`` is equal to it.

    A compiler may compute ``x`` anew for each use, and contract a product and the subtraction to one operation, which
    leaves the rounding of the product. It cannot look through a minimum.
    """
    engine = _engine_that_compiles(x)
    return x - top if engine is None else engine.below(x, top)


def _engine_that_compiles(x: Array) -> Any:
    """Return the engine of a library that compiles what is computed from ``x``, and None if none does."""
    name = library(x).name
    if name == "jax" and _is_tracer(x):
        from polysoftmax.engines import jax as engine

        return engine
    if name == "torch":
        import torch

        if torch.compiler.is_compiling():
            from polysoftmax.engines import torch as engine  # type: ignore[no-redef]

            return engine
    return None


class _Lent(threading.local):
    """Memory that NumPy's engine lends a formula on this thread, so that its answer is where it has to be."""

    memory: Array | None = None

    def take(self, like: Array) -> Array | None:
        """Return the memory if it fits, once."""
        memory, self.memory = self.memory, None
        fits = memory is not None and memory.shape == like.shape and memory.dtype == like.dtype
        return memory if fits else None


_lent = _Lent()


@contextmanager
def lent(memory: Array | None) -> Iterator[None]:
    """Lend a formula memory of the shape of its rows, which it may or may not use for its answer."""
    _lent.memory = memory
    try:
        yield
    finally:
        _lent.memory = None


# NumPy's steps are passes through memory. In place of an array that the formula made, and needs no more, they are
# cheaper. Other libraries differentiate or compile the formula, so there the same steps make new arrays.


def exp_in_place(x: Array) -> Array:
    """Return exp(x), written over ``x`` on NumPy."""
    found = library(x)
    return found.xp.exp(x, x) if found.name == "numpy" else found.xp.exp(x)


def divide_in_place(x: Array, by: Array | float) -> Array:
    """Return ``x / by``, written over ``x`` on NumPy."""
    if library(x).name != "numpy":
        return x / by
    x /= by
    return x


def subtract_in_place(x: Array, y: Array) -> Array:
    """Return ``x - y``, written over ``x`` on NumPy."""
    if library(x).name != "numpy":
        return x - y
    x -= y
    return x


_FEW, _FEW_OF_MANY, _MANY = 8, 32, 1 << 14
"""Lengths up to which JAX reduces rows by whole columns: in general, and where that many numbers stand in each.

XLA on the CPU makes vectors of rows then. With columns of 100,000 numbers it takes a tenth of the time, with rows of 3
along the last axis a third; beyond these lengths up to twice as long.
"""


def _by_columns(x: Array, axis: int) -> bool:
    n: int = x.shape[axis]
    return 0 < n <= (_FEW_OF_MANY if math.prod(x.shape[axis + 1 :]) >= _MANY else _FEW)


def _over_columns(function: Callable[[Array, Array], Array], x: Array, axis: int) -> Array:
    """Reduce ``x`` along ``axis``, kept with length 1, in a tree."""
    left = [_slice(x, axis, i, i + 1) for i in range(x.shape[axis])]
    while len(left) > 1:
        pairs = [function(*left[i : i + 2]) for i in range(0, len(left) - 1, 2)]
        left = pairs + left[2 * len(pairs) :]
    return left[0]


_SEQUENTIAL = 16


def accurate_sum(x: Array, axis: int) -> Array:
    """Sum along ``axis``, kept with length 1, with an error that grows with log2(n) on every library.

    PyTorch and JAX add in a tree along any axis, NumPy only along the axis that is contiguous. Elsewhere
    halves are added to each other until a few terms are left.
    """
    found = library(x)
    xp = found.xp
    n = x.shape[axis]
    while n > _SEQUENTIAL and not _adds_in_a_tree(found.name, x, axis):
        half = n // 2
        head = _slice(x, axis, 0, half) + _slice(x, axis, half, 2 * half)
        x = head if n == 2 * half else xp.concat([head, _slice(x, axis, n - 1, n)], axis=axis)
        n = x.shape[axis]
    if found.name == "numpy":
        return xp.add.reduce(x, axis, None, None, True)
    if found.name == "jax" and _by_columns(x, axis):
        return _over_columns(xp.add, x, axis)
    return xp.sum(x, axis=axis, keepdims=True)


def adds_at_once(x: Array, axis: int) -> bool:
    """Whether `sums_at_once` serves: in JAX, for rows so short that their entries are added one by one."""
    return library(x).name == "jax" and 0 < x.shape[axis] <= _SEQUENTIAL


def sums_at_once(arrays: tuple[Array, ...], axis: int) -> tuple[Array, ...]:
    """Sum several arrays of one shape along ``axis``, kept with length 1, in one pass; without a derivative."""
    from jax import lax

    zeros = tuple(one.dtype.type(0) for one in arrays)
    return tuple(lax.expand_dims(one, (axis,)) for one in lax.reduce(arrays, zeros, _add_each, (axis,)))


def _add_each(sums: tuple[Array, ...], entries: tuple[Array, ...]) -> tuple[Array, ...]:
    # In the module: JAX would compile for every new function that it is given.
    return tuple(a + b for a, b in zip(sums, entries, strict=True))


def accurate_total(x: Array) -> Array:
    """Sum all entries as `accurate_sum` does, to an array without axes."""
    found = library(x)
    if found.name in _TREES:
        return x.sum()
    return found.xp.squeeze(accurate_sum(found.xp.reshape(x, (-1,)), 0), axis=0)


def accurate_mean(x: Array) -> Array:
    """Average all entries as `accurate_total` sums them, none to 0."""
    count = math.prod(x.shape)
    if count == 1:
        return namespace(x).reshape(x, ())
    if count == 0:
        return accurate_total(x)
    if library(x).name in _TREES:
        return x.mean()  # one step to differentiate, not two
    total = accurate_total(x)
    total /= count  # in place, or NumPy would answer a scalar
    return total


def extremes(x: Array) -> tuple[int, int] | None:
    """Return the least and the greatest of integers; None where a look at values is synchronisation or tracing."""
    if not values_are_free(x):
        return None
    if library(x).name == "numpy":
        return int(x.min()), int(x.max())
    if x.numel() == 1:
        return (x.item(),) * 2
    least, most = x.aminmax()
    return least.item(), most.item()


_TREES = ("torch", "jax")


def _adds_in_a_tree(name: str, x: Array, axis: int) -> bool:
    return name in _TREES or (name == "numpy" and x.strides[axis] == min(x.strides, key=abs))


def values_are_free(x: Array) -> bool:
    """Whether a look at the values of ``x`` costs no synchronisation, tracing or computation."""
    name = library(x).name
    if name != "torch":
        return name == "numpy"
    import torch

    return x.is_cpu and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # something that traces, perhaps without values
        or torch._C._get_tracing_state() is not None
    )


def where_any(
    condition: Array, function: Callable[..., Array], operands: tuple[Array, ...], axis: int, otherwise: Array
) -> Array:
    """Return ``where(condition, function(*operands, axis), otherwise)``, without the call if no condition holds.

    The call is left out where the library can tell without a wait. The function stands in a module, not in a call.
    """
    found = library(condition)
    if found.name == "jax":
        return _loop_of_jax()(condition, operands, otherwise, function, axis)
    if values_are_free(condition) and not condition.any():
        return otherwise
    return found.xp.where(condition, function(*operands, axis), otherwise)


@cache
def _loop_of_jax() -> Callable[..., Array]:
    import jax
    from jax import lax
    from jax import numpy as jnp

    def where_any(
        condition: Array, operands: tuple[Array, ...], otherwise: Array, function: Callable[..., Array], axis: int
    ) -> Array:
        def once(state: tuple[Array, Array]) -> tuple[Array, Array]:
            # Tied to what changes in the loop, or XLA would compute the answers in front of it, needed or not.
            waiting, y, tied = lax.optimization_barrier((*state, operands))
            return ~waiting, jnp.where(condition, function(*tied, axis), y)

        # Under vmap both branches of a condition are taken, and a loop still runs only if it has to.
        return lax.while_loop(lambda state: state[0], once, (jnp.any(condition), otherwise))[1]

    return jax.jit(where_any, static_argnums=(3, 4))  # type: ignore[no-any-return]


def _slice(x: Array, axis: int, start: int, stop: int) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop), ...)]


def take_along(x: Array, indices: Array, axis: int) -> Array:
    """Return the entry of every row that ``indices``, of length 1 on ``axis``, points at."""
    found = library(x)
    if found.name != "dask":
        return found.xp.take_along_axis(x, indices, axis=axis)
    hit = along_axis(found.xp.arange(x.shape[axis]), x.ndim, axis) == indices
    return found.xp.sum(found.xp.where(hit, x, 0), axis=axis, keepdims=True, dtype=x.dtype)


def block_of(z: Array, block: Array, size: int) -> tuple[Array, Array]:
    """Return a block of ``size`` entries of every row along the last axis, and their indices as int32.

    ``block`` has length 1 there. Entries past the end are -inf. Where the library cannot gather, the rows are returned
    whole, with -inf outside the block.
    """
    found = library(z)
    xp = found.xp
    n = z.shape[-1]
    if found.name == "dask":
        index = xp.arange(n, dtype=xp.int32)
        return xp.where(index // size == block, z, -math.inf), index
    index = xp.astype(block, xp.int32) * size + xp.arange(size, dtype=xp.int32, device=device_for(z))
    inside = xp.astype(xp.minimum(index, xp.full_like(index, n - 1)), default_index(xp))
    return xp.where(index < n, xp.take_along_axis(z, inside, axis=-1), -math.inf), index


def indices(x: Array) -> Array:
    """Return the indices along the last axis as int32."""
    return namespace(x).arange(x.shape[-1], dtype=namespace(x).int32, device=device_for(x))


def along_axis(vector: Array, ndim: int, axis: int) -> Array:
    """Lay a 1-d array along ``axis`` of an array of ``ndim`` dimensions."""
    return library(vector).xp.reshape(vector, (1,) * axis + (-1,) + (1,) * (ndim - axis - 1))
