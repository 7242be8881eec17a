"""Numba kernels: softmax, log_softmax, the sum of exponentials, and both slopes, each in as few passes as it needs.

Importing this file imports Numba, so nothing does before an input is large enough to repay it. All stands in one
file because Numba's cache on disk notices changes of the file that a kernel stands in, and of no other.

Every kernel takes rows as C-contiguous blocks of shape (rows, n), all of one dtype, and holds no interpreter lock;
``temperature`` is None or one number a row, ``where`` None or a mask of the block's shape. What NaN and inf do is left
to IEEE arithmetic as far as it does what the formulas do: a NaN anywhere makes the sum of the exponentials NaN.
"""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType

_STRICT = {"error_model": "numpy", "fastmath": {"contract"}}
_SUMMING = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
"""Sums may be taken in any order, that is in vectors. Not so exponentials, whose reduction relies on its order."""

_CHUNK = 1024
"""Sums are taken over so many terms and the sums of these in a tree: the error grows with log2(n)."""


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(nogil=True, cache=True, **_STRICT)(function)  # type: ignore[no-any-return]


def _part(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(**_STRICT)(function)  # type: ignore[no-any-return]


def _for_dtypes(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return overload(stub, jit_options=_STRICT, strict=False)  # type: ignore[no-any-return]


def _sum(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(**_SUMMING)(function)  # type: ignore[no-any-return]


def _exponential(
    real: DType, whole: DType, series: tuple[float, ...], ln2: tuple[float, float], least: float
) -> Callable[..., Any]:
    """Return exp for z ≤ 0 in one dtype, within 1 ulp, in operations that the compiler can do on vectors.

    z = k·ln 2 + r with ln 2 in two parts (Cody and Waite), and a series for exp(r), times 2^k. That power is taken with
    k + 64 in its place, which ends above the subnormal numbers, and what is subnormal is rounded once, in the end.
    From ``least`` down the answer is 0. NaN passes through.
    """
    info = np.finfo(real)
    series = tuple(map(real, series))
    per_ln2, high, low, least = real(1.0 / math.log(2.0)), real(ln2[0]), real(ln2[1]), real(least)
    # What is added to it loses its fraction, and ends on k and the exponent of 2^64 in its bits.
    rounding = real(1.5 * 2.0**info.nmant + info.maxexp - 1 + 64)
    shift, down = whole(info.nmant), real(2.0**-64)

    def exponential(z: Any) -> Any:
        z = least if z < least else z  # noqa: FURB136  # max of Numba minds NaN, in branches
        rounded = real(z * per_ln2 + rounding)
        f = rounded - rounding
        r = (z - f * high) - f * low
        p = series[-1]
        for c in series[-2::-1]:
            p = p * r + c
        return p * whole(rounded.view(whole) << shift).view(real) * down

    return exponential


# The series are 1 + r + r²·q(r), with q from the values of (exp(r) - 1 - r) / r² at Chebyshev's points of |r| ≤ ½ ln 2.
_EXPONENTIAL = {
    "float32": _exponential(
        np.float32,
        np.int32,
        (1.0, 1.0, 0.5, 0.1666658, 0.04166655, 0.008363173, 0.001392618),
        (0.693359375, -2.1219444005469057e-4),
        -105.0,
    ),
    "float64": _exponential(
        np.float64,
        np.int64,
        (
            *(1.0, 1.0, 0.5000000000000001, 0.16666666666666669, 0.041666666666624164, 0.008333333333330065),
            *(0.0013888888917196881, 0.0001984126986304067, 2.4801521322116825e-05, 2.7557268480116333e-06),
            *(2.762007599981065e-07, 2.5100375924709717e-08),
        ),
        (0.6931471803691238, 1.9082149292705877e-10),
        -746.0,
    ),
}


def exp(z: Any) -> Any:
    """Return exp(z) for z ≤ 0, -inf or NaN."""
    raise NotImplementedError


@_for_dtypes(exp)
def _(z: Any) -> Callable[..., Any] | None:
    return _EXPONENTIAL.get(str(z))


def _logarithm(real: DType, whole: DType, degree: int, ln2: tuple[float, float]) -> Callable[..., Any]:
    """Return log1p for z ≥ 0 in one dtype, within 3 ulp, in operations that the compiler can do on vectors.

    1 + z = 2^k·m with m from √½ to √2, log m = 2·artanh((m - 1) / (m + 1)) by its series, and what rounding took from
    1 + z is added as a part of it. NaN and inf pass through.
    """
    info = np.finfo(real)
    series = tuple(real(2.0 / (2 * i + 1)) for i in range(degree + 1))
    high, low, one, most = real(ln2[0]), real(ln2[1]), real(1.0), real(math.inf)
    shift, one_bits = whole(info.nmant), real(1.0).view(whole)
    root_bits, exponent_of_one = whole(one_bits - real(math.sqrt(0.5)).view(whole)), whole(one_bits >> shift)

    def logarithm(z: Any) -> Any:
        u = real(one + z)
        lost = z - (u - one) if z < one else one - (u - z)
        k = whole(whole(whole(u.view(whole) + root_bits) >> shift) - exponent_of_one)
        m = whole(u.view(whole) - whole(whole(k) << shift)).view(real)
        s = (m - one) / (m + one)
        square = s * s
        p = series[degree]
        for i in range(degree - 1, -1, -1):
            p = p * square + series[i]
        y = real(k) * high + (real(k) * low + (s * p + lost / u))
        return y if u < most else u

    return logarithm


_LOGARITHM = {
    "float32": _logarithm(np.float32, np.int32, 5, (0.693359375, -2.1219444005469057e-4)),
    "float64": _logarithm(np.float64, np.int64, 11, (0.6931471803691238, 1.9082149292705877e-10)),
}


def log1p(z: Any) -> Any:
    """Return log(1 + z) for z ≥ 0, inf or NaN."""
    raise NotImplementedError


@_for_dtypes(log1p)
def _(z: Any) -> Callable[..., Any] | None:
    return _LOGARITHM.get(str(z))


def _order(real: DType, whole: DType) -> tuple[Callable[..., Any], Callable[..., Any]]:
    sign, magnitude = whole(8 * np.dtype(real).itemsize - 1), whole(np.iinfo(whole).max)

    def place(v: Any) -> Any:
        bits = real(v).view(whole)
        return whole(bits ^ whole(whole(bits >> sign) & magnitude))

    def number(at: Any) -> Any:
        return whole(at ^ whole(whole(at >> sign) & magnitude)).view(real)

    return place, number


_OF_FLOAT32, _OF_FLOAT64 = _order(np.float32, np.int32), _order(np.float64, np.int64)


def place(v: Any) -> Any:
    """Return the integer for a number, so that they stand in order: negative NaN, -inf, the numbers, inf, and NaN."""
    raise NotImplementedError


@_for_dtypes(place)
def _(v: Any) -> Callable[..., Any] | None:
    return {"float32": _OF_FLOAT32[0], "float64": _OF_FLOAT64[0]}.get(str(v))


def number(at: Any) -> Any:
    """Return the number for an integer."""
    raise NotImplementedError


@_for_dtypes(number)
def _(at: Any) -> Callable[..., Any] | None:
    return {"int32": _OF_FLOAT32[1], "int64": _OF_FLOAT64[1]}.get(str(at))


@_part
def greatest(x: Array) -> Any:
    """Return the maximum of a row.

    Comparing floats cannot be done on vectors without promising that there is no NaN. Here a NaN is either greater
    than all, or goes unseen and is met in the sum.
    """
    top = place(x.dtype.type(-math.inf))
    for j in range(x.size):
        top = max(place(x[j]), top)
    return number(top)


# float16 and bfloat16 are taken and given as their bits, uint16 for the one and int16 for the other: Numba has neither,
# and NumPy converts the one slowly.


@_part
def _of_bfloat16(bits: Any) -> Any:
    return np.uint32(np.uint32(np.uint16(bits)) << 16).view(np.float32)


@_part
def _to_bfloat16(x: Any) -> Any:
    """Round to bfloat16, ties to even."""
    b = np.float32(x).view(np.uint32)
    rounded = np.uint32(b + np.uint32(0x7FFF) + np.uint32(np.uint32(b >> 16) & 1)) >> 16
    return np.int16(np.uint16(rounded if x == x else 0x7FC0))  # NaN


@_part
def _of_float16_in_steps(bits: Any) -> Any:
    scale = np.float32(2.0**112)  # from the exponents of float16 to those of float32, subnormal ones too
    h = np.uint32(bits)
    v = np.uint32(np.uint32(h & 0x7FFF) << 13).view(np.float32) * scale
    v = np.float32(math.inf) if v >= np.float32(65536) else v
    v = np.float32(math.nan) if np.uint32(h & 0x7FFF) > 0x7C00 else v
    return -v if h >= 0x8000 else v


@_part
def _to_float16_in_steps(x: Any) -> Any:
    """Round to float16, ties to even."""
    half = np.float32(0.5)
    b = np.float32(x).view(np.uint32)
    a = np.uint32(b & np.uint32(0x7FFFFFFF))
    m = a.view(np.float32)
    odd = np.uint32(np.uint32(a >> 13) & 1)
    normal = np.uint32(np.uint32(a + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> 13)
    # Added to 0.5, a float32 has no more digits than a subnormal float16.
    small = np.uint32(np.float32(m + half).view(np.uint32) - np.uint32(half.view(np.uint32)))
    r = normal if m >= np.float32(2.0**-14) else small
    r = np.uint32(0x7C00) if m >= np.float32(65520) else r
    r = r if m == m else np.uint32(0x7E00)  # NaN
    return np.uint16(r | np.uint32(np.uint32(b >> 16) & np.uint32(0x8000)))


@intrinsic  # type: ignore[untyped-decorator]
def _of_float16_at_once(_: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _to_float16_at_once(_: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


# Elsewhere the compiler would look for a function that is not there.
_HAS_FLOAT16 = platform.machine() in ("aarch64", "arm64") or llvm.get_host_cpu_features().get("f16c", False)
_of_float16 = _of_float16_at_once if _HAS_FLOAT16 else _of_float16_in_steps
_to_float16 = _to_float16_at_once if _HAS_FLOAT16 else _to_float16_in_steps


@_kernel
def widen_bfloat16(bits: Array, out: Array) -> None:
    """Write the float32 of every bfloat16."""
    for i in range(bits.size):
        out[i] = _of_bfloat16(bits[i])


@_kernel
def narrow_bfloat16(x: Array, bits: Array) -> None:
    """Write every float32 rounded to bfloat16, ties to even."""
    for i in range(x.size):
        bits[i] = _to_bfloat16(x[i])


@_kernel
def widen_float16(bits: Array, out: Array) -> None:
    """Write the float32 of every float16."""
    for i in range(bits.size):
        out[i] = _of_float16(bits[i])


@_kernel
def narrow_float16(x: Array, bits: Array) -> None:
    """Write every float32 rounded to float16, ties to even."""
    for i in range(x.size):
        bits[i] = _to_float16(x[i])


def _rounded(y: Any, out: Array) -> Any:
    """Return a float in the form in which ``out`` takes it."""
    raise NotImplementedError


@_for_dtypes(_rounded)
def _(y: Any, out: Any) -> Callable[..., Any]:
    del y
    if isinstance(out.dtype, types.Float):
        return lambda y, out: y
    round_ = _to_float16 if out.dtype == types.uint16 else _to_bfloat16
    return lambda y, out: round_(y)


def _loaded(x: Array, space: Array) -> Array:
    """Return ``x`` as floats: itself, or what its bits mean in ``space``."""
    raise NotImplementedError


@_for_dtypes(_loaded)
def _(x: Any, space: Any) -> Callable[..., Any]:
    del space
    if isinstance(x.dtype, types.Float):
        return lambda x, space: x
    widen = widen_float16 if x.dtype == types.uint16 else widen_bfloat16

    def loaded(x: Array, space: Array) -> Array:
        wide = space[: x.size]
        widen(x.reshape(-1), wide)
        return wide.reshape(x.shape)

    return loaded


def _empty(x: Array, n: int) -> Array:
    """Return space for n entries of the dtype that ``x`` is computed in."""
    raise NotImplementedError


@_for_dtypes(_empty)
def _(x: Any, n: Any) -> Callable[..., Any]:
    del n
    if isinstance(x.dtype, types.Float):
        return lambda x, n: np.empty(n, x.dtype)
    return lambda x, n: np.empty(n, np.float32)


def _wide_space(x: Array, n: int) -> Array:
    """Return space for n entries of ``x`` as floats where they are not."""
    raise NotImplementedError


@_for_dtypes(_wide_space)
def _(x: Any, n: Any) -> Callable[..., Any]:
    del n
    if isinstance(x.dtype, types.Float):
        return lambda x, n: np.empty(0, x.dtype)
    return lambda x, n: np.empty(n, np.float32)


def _space_for(out: Array, space: Array) -> Array:
    """Return where the floats of an answer are to be written: into itself, or into ``space`` first."""
    raise NotImplementedError


@_for_dtypes(_space_for)
def _(out: Any, space: Any) -> Callable[..., Any]:
    del space
    if isinstance(out.dtype, types.Float):
        return lambda out, space: out
    return lambda out, space: space[: out.size].reshape(out.shape)


def _target(y: Array, out: Array) -> Array:
    """Return ``out``, as ``y`` where that is the same: the compiler would not know."""
    raise NotImplementedError


@_for_dtypes(_target)
def _(y: Any, out: Any) -> Callable[..., Any]:
    del y
    if isinstance(out.dtype, types.Float):
        return lambda y, out: y
    return lambda y, out: out


def _store(y: Array, out: Array) -> None:
    """Round what was written into the space for an answer."""
    raise NotImplementedError


@_for_dtypes(_store)
def _(y: Any, out: Any) -> Callable[..., Any]:
    del y
    if isinstance(out.dtype, types.Float):
        return lambda y, out: None
    narrow = narrow_float16 if out.dtype == types.uint16 else narrow_bfloat16
    return lambda y, out: narrow(y.reshape(-1), out.reshape(-1))


@_part
def _tree(parts: Array, count: int) -> Any:
    """Return the sum of the first ``count`` parts, which are overwritten."""
    while count > 1:
        half = count // 2
        for i in range(half):
            parts[i] = parts[2 * i] + parts[2 * i + 1]
        if count % 2:
            parts[half] = parts[count - 1]
        count = half + count % 2
    return parts[0]


# In the sums below a chunk is sliced off and indexed from 0: Numba cannot tell that any other index is not negative,
# and a loop over such does not become vectors.


@_sum
def _exponentials_of_chunk(x: Array, top: Any, temperature: Any, out: Array) -> Any:
    total = x.dtype.type(0)
    for j in range(x.size):
        z = x[j] - top
        if temperature is not None:
            z = z / temperature
        e = exp(z)
        out[j] = e
        total += e
    return total


@_part
def _exponentials(x: Array, top: Any, temperature: Any, out: Array, parts: Array) -> Any:
    """Write exp((x - top) / temperature) and return its sum."""
    count = 0
    for start in range(0, x.size, _CHUNK):
        end = start + _CHUNK
        parts[count] = _exponentials_of_chunk(x[start:end], top, temperature, out[start:end])
        count += 1
    return _tree(parts, count)


@_sum
def _total_of_chunk(x: Array, top: Any, temperature: Any) -> Any:
    total = x.dtype.type(0)
    for j in range(x.size):
        z = x[j] - top
        if temperature is not None:
            z = z / temperature
        total += exp(z)
    return total


@_part
def _total(x: Array, top: Any, temperature: Any, parts: Array) -> Any:
    """Return Σ exp((x - top) / temperature)."""
    count = 0
    for start in range(0, x.size, _CHUNK):
        parts[count] = _total_of_chunk(x[start : start + _CHUNK], top, temperature)
        count += 1
    return _tree(parts, count)


@_sum
def _apart(x: Array, top: Any, parts: Array) -> tuple[int, Any]:
    """Return how many entries stand at the maximum, and Σ exp(x - top) over the others."""
    most, count, zero = 0, 0, x.dtype.type(0)
    for start in range(0, x.size, _CHUNK):
        chunk = x[start : start + _CHUNK]
        total = zero
        for j in range(chunk.size):
            v = chunk[j]
            e = exp(v - top)
            total += zero if v == top else e
        for j in range(chunk.size):  # in one loop, the two would become a branch, and not vectors
            most += chunk[j] == top
        parts[count] = total
        count += 1
    return most, _tree(parts, count)


@_part
def _log_apart(most: Any, rest: Any) -> Any:
    """Return log(most + rest), and all digits of the rest where one entry stands at the maximum."""
    return log1p((most - type(rest)(1)) + rest)


@_sum
def _total_of_others(x: Array, top: Any, place: int) -> Any:
    at, total, zero = np.int32(place), x.dtype.type(0), x.dtype.type(0)
    for j in range(x.size):
        e = exp(x[j] - top)
        total += zero if np.int32(j) == at else e
    return total


@_part
def _total_without(x: Array, top: Any, place: int, parts: Array) -> Any:
    """Return Σ exp(x - top) over all entries but one."""
    count = 0
    for start in range(0, x.size, _CHUNK):
        chunk = x[start : start + _CHUNK]
        if start <= place < start + _CHUNK:
            parts[count] = _total_of_others(chunk, top, place - start)
        else:
            parts[count] = _total_of_chunk(chunk, top, None)
        count += 1
    return _tree(parts, count)


@_sum
def _dot(y: Array, g: Array, parts: Array) -> Any:
    """Return Σ y·g, where y = 0 adds 0 whatever g is."""
    count, zero = 0, y.dtype.type(0)
    for start in range(0, y.size, _CHUNK):
        p, cotangent = y[start : start + _CHUNK], g[start : start + _CHUNK]
        total = zero
        for j in range(p.size):
            q, c = p[j], cotangent[j]
            total += q * (zero if q == zero else c)
        parts[count] = total
        count += 1
    return _tree(parts, count)


@_sum
def _plain_sum(g: Array, where: Array | None, parts: Array) -> Any:
    """Return Σ g over what exists."""
    count, zero = 0, g.dtype.type(0)
    for start in range(0, g.size, _CHUNK):
        chunk = g[start : start + _CHUNK]
        total = zero
        if where is None:
            for j in range(chunk.size):
                total += chunk[j]
        else:
            mask = where[start : start + _CHUNK]
            for j in range(chunk.size):
                c = chunk[j]
                total += c if mask[j] else zero
        parts[count] = total
        count += 1
    return _tree(parts, count)


@_part
def _is_regular(temperature: Any) -> Any:
    return temperature > 0 and temperature < math.inf


@_part
def _mask(x: Array, where: Array, z: Array) -> None:
    """Write -inf for what does not exist."""
    least = x.dtype.type(-math.inf)
    for j in range(x.size):
        v = x[j]
        z[j] = v if where[j] else least


@_part
def _shift(x: Array, temperature: Any, where: Array | None, z: Array) -> None:
    """Write (x - max) / temperature as the formulas define it, at every temperature and under a mask."""
    least, nan = x.dtype.type(-math.inf), x.dtype.type(math.nan)
    if where is None:
        top = greatest(x)
    else:
        _mask(x, where, z)
        top = greatest(z)
    for j in range(x.size):
        d = x[j] - top
        if temperature is not None:
            if _is_regular(temperature):
                d = d / temperature
            elif not temperature >= 0:
                d = nan
            elif d == least or (temperature == 0 and d < 0):
                d = least
            else:
                d = 0 * d
        if where is not None:
            d = d if where[j] else least
        z[j] = d


@_part
def _entry(values: Array | None, i: int) -> Any:
    """Return entry or row i of what may be absent."""
    return None if values is None else values[i]


@_part
def _group(x: Array) -> int:
    """Return how many rows are widened and rounded together: a loop has a cost of its own."""
    return max(1, 8192 // x.shape[1])  # type: ignore[no-any-return]


@_part
def _scratch(x: Array, group: int, temperature: Array | None, where: Array | None) -> tuple[Array, Array, Array, Array]:
    """Return space for the sums of a row's chunks, for two numbers a row, and for rows where they must be changed."""
    n = x.shape[1]
    changed = 0 if temperature is None and where is None else group
    return _empty(x, n // _CHUNK + 1), _empty(x, group), _empty(x, group), _empty(x, changed * n).reshape(-1, n)


_LANES = 128
"""Short rows are done so many at a time, each on a lane of its own."""

_EDGE = 8
"""Edge of the squares that are transposed in registers. A loop of loads and stores takes four times as long."""


@intrinsic  # type: ignore[untyped-decorator]
def _transpose(_: Any, source: Any, i: Any, j: Any, target: Any, k: Any, l: Any) -> Any:  # noqa: E741
    """Write the square that begins at ``source[i, j]``, transposed, to where ``target[k, l]`` begins."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scalar = context.get_data_type(source.dtype)
        size, line = context.get_abi_sizeof(scalar), ir.VectorType(scalar, _EDGE).as_pointer()

        def places(kind: Any, array: Any, row: Any, column: Any) -> list[Any]:
            array = context.make_array(kind)(context, builder, array)
            rows = [builder.add(row, ir.Constant(row.type, r)) for r in range(_EDGE)]
            return [
                builder.bitcast(
                    cgutils.get_item_pointer(context, builder, kind, array, [r, column], wraparound=False), line
                )
                for r in rows
            ]

        lines = [builder.load(place, align=size) for place in places(source, *arguments[:3])]
        index = ir.VectorType(ir.IntType(32), _EDGE)
        step = 1
        while step < _EDGE:  # swap the squares of this edge that stand off the diagonal
            upper = ir.Constant(index, [_EDGE + c - step if c & step else c for c in range(_EDGE)])
            lower = ir.Constant(index, [_EDGE + c if c & step else c + step for c in range(_EDGE)])
            for r in range(_EDGE):
                if not r & step:
                    a, b = lines[r], lines[r + step]
                    lines[r] = builder.shuffle_vector(a, b, upper)
                    lines[r + step] = builder.shuffle_vector(a, b, lower)
            step *= 2
        for one, place in zip(lines, places(target, *arguments[3:]), strict=True):
            builder.store(one, place, align=size)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@_part
def _whole_squares(lines: Array) -> int:
    """Return how many of the rows can be moved by squares.

    In a row that is shorter than a square, what follows it is moved too: it has to belong to the same memory, and what
    is written over has to be written later.
    """
    rows, n = lines.shape
    if n < _EDGE:
        rows = max(0, (lines.size - _EDGE) // n + 1)
    return rows // _EDGE * _EDGE  # type: ignore[no-any-return]


@_part
def _gather(lines: Array, tile: Array) -> None:
    rows, n = lines.shape
    whole = _whole_squares(lines)
    for lane in range(0, whole, _EDGE):
        for start in range(0, n, _EDGE):
            j = max(0, min(start, n - _EDGE))
            _transpose(lines, lane, j, tile, j, lane)
    for lane in range(whole, rows):
        row = lines[lane]
        for j in range(row.size):
            tile[j, lane] = row[j]


@_part
def _scatter(tile: Array, lines: Array) -> None:
    rows, n = lines.shape
    whole = _whole_squares(lines)
    for lane in range(0, whole, _EDGE):
        for start in range(0, n, _EDGE):
            j = max(0, min(start, n - _EDGE))
            _transpose(tile, j, lane, lines, lane, j)
    for lane in range(whole, rows):
        row = lines[lane]
        for j in range(row.size):
            row[j] = tile[j, lane]


@_part
def _lane_tops(tile: Array, top: Array) -> None:
    top[:] = tile[0]
    for j in range(1, tile.shape[0]):
        line = tile[j]
        for lane in range(_LANES):
            v, t = line[lane], top[lane]
            top[lane] = v if v > t else t  # noqa: FURB136  # max of Numba minds NaN, in branches


@_part
def _lane_totals(tile: Array, top: Array, apart: bool, keep: bool, part: Array, most: Array, total: Array) -> None:
    """Write Σ exp(x - top) of each lane, summed by eights; ``apart``: without the terms at the maximum, counted."""
    zero, one = tile.dtype.type(0), tile.dtype.type(1)
    most[:] = zero
    total[:] = zero
    for start in range(0, tile.shape[0], 8):
        part[:] = zero
        for j in range(start, min(start + 8, tile.shape[0])):
            line = tile[j]
            if apart:
                for lane in range(_LANES):
                    v, t = line[lane], top[lane]
                    e = exp(v - t)
                    part[lane] += zero if v == t else e
                for lane in range(_LANES):  # as in _apart
                    most[lane] += one if line[lane] == top[lane] else zero
            elif keep:
                for lane in range(_LANES):
                    e = exp(line[lane] - top[lane])
                    line[lane] = e
                    part[lane] += e
            else:
                for lane in range(_LANES):
                    part[lane] += exp(line[lane] - top[lane])
        for lane in range(_LANES):
            total[lane] += part[lane]


@_part
def _lane_log_totals(tile: Array, top: Array, part: Array, most: Array, total: Array) -> None:
    """Write the maximum of each lane, and log Σ exp(x - maximum), as ``log_total`` does."""
    _lane_tops(tile, top)
    _lane_totals(tile, top, True, False, part, most, total)
    for lane in range(_LANES):
        total[lane] = _log_apart(most[lane], total[lane])


@_part
def _lane_scratch(x: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    n = x.shape[1]
    lanes = _empty(x, 4 * _LANES).reshape(4, _LANES)
    space = _empty(x, max(n, _EDGE) * _LANES).reshape(-1, _LANES)
    space[:] = 0  # lanes without a row are computed with, too
    return space, space[:n], lanes[0], lanes[1], lanes[2], lanes[3]


@_part
def _put(tile: Array, out: Array, space: Array) -> None:
    """Write short rows from their lanes."""
    y = _space_for(out, space)
    _scatter(tile, y)
    _store(y, out)


@_kernel
def softmax_short(x: Array, factor: Array | None, out: Array) -> None:
    """Write the softmax of short rows, times their factors."""
    space, tile, top, part, most, total = _lane_scratch(x)
    wide, fine = _wide_space(x, _LANES * x.shape[1]), _wide_space(out, _LANES * x.shape[1])
    one = top.dtype.type(1)
    for first in range(0, x.shape[0], _LANES):
        lines = _loaded(x[first : first + _LANES], wide)
        _gather(lines, space)
        _lane_tops(tile, top)
        _lane_totals(tile, top, False, True, part, most, total)
        for lane in range(_LANES):
            total[lane] = one / total[lane]
        if factor is not None:
            for lane in range(len(lines)):
                total[lane] *= factor[first + lane]
        for j in range(tile.shape[0]):
            line = tile[j]
            for lane in range(_LANES):
                line[lane] *= total[lane]
        _put(space, out[first : first + _LANES], fine)


@_kernel
def log_softmax_short(x: Array, out: Array) -> None:
    """Write the logarithm of the softmax of short rows."""
    space, tile, top, part, most, total = _lane_scratch(x)
    wide, fine = _wide_space(x, _LANES * x.shape[1]), _wide_space(out, _LANES * x.shape[1])
    one = top.dtype.type(1)
    for first in range(0, x.shape[0], _LANES):
        _gather(_loaded(x[first : first + _LANES], wide), space)
        _lane_tops(tile, top)
        _lane_totals(tile, top, False, False, part, most, total)
        for lane in range(_LANES):
            total[lane] = log1p(total[lane] - one)  # at least 1, and near to it what is subtracted is exact
        for j in range(tile.shape[0]):
            line = tile[j]
            for lane in range(_LANES):
                line[lane] = (line[lane] - top[lane]) - total[lane]
        _put(space, out[first : first + _LANES], fine)


@_kernel
def log_total_short(x: Array, top: Array, log_total: Array) -> None:
    """Do for short rows what ``log_total`` does."""
    space, tile, tops, part, count, total = _lane_scratch(x)
    wide = _wide_space(x, _LANES * x.shape[1])
    for first in range(0, x.shape[0], _LANES):
        lines = _loaded(x[first : first + _LANES], wide)
        _gather(lines, space)
        _lane_log_totals(tile, tops, part, count, total)
        for lane in range(len(lines)):
            top[first + lane] = tops[lane]
            log_total[first + lane] = total[lane]


@_part
def _add_exactly(total: Array, lost: Array, part: Array) -> None:
    """Add to a running sum, and what rounding takes from it to another (Knuth's two-sum)."""
    for c in range(total.size):
        t, p = total[c], part[c]
        s = t + p
        back = s - t
        lost[c] += (t - (s - back)) + (p - back)
        total[c] = s


@_part
def _tops_across(x: Array, first: int, last: int, top: Array) -> None:
    top[:] = x[0, first:last]
    for j in range(1, x.shape[0]):
        line = x[j, first:last]
        for c in range(line.size):
            v, t = line[c], top[c]
            top[c] = v if v > t else t  # noqa: FURB136  # as above


@_kernel
def finish_across(x: Array, first: int, last: int, logarithm: bool, top: Array, scale: Array, out: Array) -> None:
    """Write the softmax along the first of two axes from one over the totals, or its logarithm from theirs."""
    for j in range(x.shape[0]):
        line, row = x[j, first:last], out[j, first:last]
        if logarithm:
            for c in range(line.size):
                row[c] = (line[c] - top[c]) - scale[c]
        else:
            for c in range(line.size):
                row[c] = exp(line[c] - top[c]) * scale[c]


_WIDTH = 1024
"""Columns that are done at a time: what is kept of each fits a first-level cache, and lines are long enough to read."""


@_part
def _softmax_of_columns(x: Array, first: int, last: int, logarithm: bool, space: Array, out: Array) -> None:
    n, width, one = x.shape[0], last - first, x.dtype.type(1)
    top, total, lost, part = space[0][:width], space[1][:width], space[2][:width], space[3][:width]
    _tops_across(x, first, last, top)
    total[:] = 0
    lost[:] = 0
    for start in range(0, n, 8):
        part[:] = 0
        for j in range(start, min(start + 8, n)):
            line, row = x[j, first:last], out[j, first:last]
            if logarithm:
                for c in range(line.size):
                    part[c] += exp(line[c] - top[c])
            else:
                for c in range(line.size):
                    e = exp(line[c] - top[c])
                    row[c] = e
                    part[c] += e
        _add_exactly(total, lost, part)
    if logarithm:
        for c in range(width):
            total[c] = log1p((total[c] - one) + lost[c])
        finish_across(x, first, last, True, top, total, out)
        return
    for c in range(width):
        total[c] = one / (total[c] + lost[c])
    for j in range(n):
        row = out[j, first:last]
        for c in range(row.size):
            row[c] *= total[c]


@_kernel
def softmax_across(x: Array, first: int, last: int, logarithm: bool, out: Array) -> None:
    """Write the softmax, or its logarithm, along the second of three axes, for some of all columns."""
    columns = x.shape[2]
    space = np.empty((4, _WIDTH), x.dtype)
    while first < last:
        i, start = first // columns, first % columns
        end = min(start + _WIDTH, columns, start + last - first)
        _softmax_of_columns(x[i], start, end, logarithm, space, out[i])
        first += end - start


@_kernel
def total_across(x: Array, first: int, last: int, top: Array, total: Array) -> None:
    """Do what ``totals_of_pieces`` does, along the first of two axes, for some of the columns."""
    width, zero = last - first, x.dtype.type(0)
    lost, part, finite = np.zeros(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    _tops_across(x, first, last, top)
    for c in range(width):
        finite[c] = zero if top[c] == -math.inf else top[c]
    total[:] = zero
    for start in range(0, x.shape[0], 8):
        part[:] = zero
        for j in range(start, min(start + 8, x.shape[0])):
            line = x[j, first:last]
            for c in range(line.size):
                part[c] += exp(line[c] - finite[c])
        _add_exactly(total, lost, part)
    for c in range(total.size):
        total[c] += lost[c]


@_kernel
def scales_across(tops: Array, totals: Array, logarithm: bool, top: Array, scale: Array) -> None:
    """Write the maximum of each column, and what ``finish_across`` takes, from those of its pieces."""
    width, one = top.size, top.dtype.type(1)
    lost, part = np.zeros(width, top.dtype), np.empty(width, top.dtype)
    _tops_across(tops, 0, width, top)
    scale[:] = 0
    for j in range(tops.shape[0]):
        line, total = tops[j], totals[j]
        for c in range(width):
            part[c] = total[c] * exp(line[c] - top[c])
        _add_exactly(scale, lost, part)
    for c in range(width):
        total_of_all = scale[c] + lost[c]
        scale[c] = log1p((scale[c] - one) + lost[c]) if logarithm else one / total_of_all


@_kernel
def apart_across(x: Array, first: int, last: int, top: Array, most: Array, rest: Array) -> None:
    """Do what ``apart_of_pieces`` does, along the first of two axes, for some of the columns."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    lost, part = np.zeros(last - first, x.dtype), np.zeros(last - first, x.dtype)
    _tops_across(x, first, last, top)
    most[:] = zero
    rest[:] = zero
    for start in range(0, x.shape[0], 8):
        part[:] = zero
        for j in range(start, min(start + 8, x.shape[0])):
            line = x[j, first:last]
            for c in range(line.size):
                v, t = line[c], top[c]
                e = exp(v - t)
                part[c] += zero if v == t else e
            for c in range(line.size):  # as in _apart
                most[c] += one if line[c] == top[c] else zero
        _add_exactly(rest, lost, part)
    for c in range(rest.size):
        rest[c] += lost[c]


@_kernel
def logsumexp_apart(top: Array, most: Array, rest: Array, out: Array) -> None:
    """Write the logsumexp of columns from what ``apart_across`` found of them."""
    for c in range(top.size):
        out[c] = top[c] + _log_apart(most[c], rest[c])


# Every step is done for some rows before the next: what it waits for at a row's end does not hold up the next row.


@_part
def _tops(lines: Array, top: Array) -> None:
    for i in range(len(lines)):
        top[i] = greatest(lines[i])


# A row that is one chunk is not sliced, and what is done with it has one place only: else Numba counts the references
# to it, which takes as long as a hundred terms.


@_part
def _write_exponentials(rows: Array, top: Array, out: Array, parts: Array, total: Array) -> None:
    """Write exp(row - top) and its sum for some rows."""
    if rows.shape[1] <= _CHUNK:
        for i in range(len(rows)):
            total[i] = _exponentials_of_chunk(rows[i], top[i], None, out[i])
    else:
        for i in range(len(rows)):
            total[i] = _exponentials(rows[i], top[i], None, out[i], parts)


@_part
def _write_totals(rows: Array, top: Array, parts: Array, total: Array) -> None:
    """Write Σ exp(row - top) for some rows."""
    if rows.shape[1] <= _CHUNK:
        for i in range(len(rows)):
            total[i] = _total_of_chunk(rows[i], top[i], None)
    else:
        for i in range(len(rows)):
            total[i] = _total(rows[i], top[i], None, parts)


@_part
def _write_totals_without(rows: Array, top: Array, place: Array, parts: Array, total: Array) -> None:
    """Write Σ exp(row - top) over all entries but one for some rows."""
    if rows.shape[1] <= _CHUNK:
        for i in range(len(rows)):
            total[i] = _total_of_others(rows[i], top[i], place[i])
    else:
        for i in range(len(rows)):
            total[i] = _total_without(rows[i], top[i], place[i], parts)


@_part
def _rows_shifted(
    lines: Array, first: int, temperature: Array | None, where: Array | None, top: Array, z: Array
) -> Array:
    """Return rows, the first of which is ``first``, and write their maxima, such that exp(row - maximum) is meant."""
    if temperature is None and where is None:
        _tops(lines, top)
        return lines
    for i in range(len(lines)):
        _shift(lines[i], _entry(temperature, first + i), _entry(where, first + i), z[i])
    top[:] = 0
    return z[: len(lines)]


@_kernel
def softmax(x: Array, temperature: Array | None, where: Array | None, factor: Array | None, out: Array) -> None:
    """Write the softmax of every row, times its factor."""
    group = _group(x)
    parts, top, total, z = _scratch(x, group, temperature, where)
    wide, fine = _wide_space(x, group * x.shape[1]), _wide_space(out, group * x.shape[1])
    zero, one = parts.dtype.type(0), parts.dtype.type(1)
    for first in range(0, x.shape[0], group):
        answers = _space_for(out[first : first + group], fine)
        target = _target(answers, out[first : first + group])
        rows = _rows_shifted(_loaded(x[first : first + group], wide), first, temperature, where, top, z)
        _write_exponentials(rows, top, answers, parts, total)
        for i in range(len(rows)):
            e, y, scale = answers[i], target[i], (one if factor is None else factor[first + i]) / total[i]
            if where is None:
                for j in range(e.size):
                    y[j] = _rounded(e[j] * scale, y)
            else:
                mask = where[first + i]
                for j in range(e.size):
                    p = e[j] * scale
                    y[j] = _rounded(p if mask[j] else zero, y)


@_kernel
def log_softmax(x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    """Write the logarithm of the softmax of every row."""
    group = _group(x)
    parts, top, total, z = _scratch(x, group, temperature, where)
    wide, least = _wide_space(x, group * x.shape[1]), parts.dtype.type(-math.inf)
    for first in range(0, x.shape[0], group):
        rows = _rows_shifted(_loaded(x[first : first + group], wide), first, temperature, where, top, z)
        _write_totals(rows, top, parts, total)
        for i in range(len(rows)):
            row, y, highest, log_total = rows[i], out[first + i], top[i], parts.dtype.type(math.log(total[i]))
            if where is None:
                for j in range(y.size):
                    y[j] = _rounded((row[j] - highest) - log_total, y)
            else:
                mask = where[first + i]
                for j in range(y.size):
                    d = (row[j] - highest) - log_total
                    y[j] = _rounded(d if mask[j] else least, y)


@_kernel
def log_total(x: Array, where: Array | None, top: Array, log_total: Array) -> None:
    """Write the maximum of every row, and log Σ exp(x - maximum); NaN for a row with NaN.

    As in the formula, the terms at the maximum enter apart, but only where it matters: where the two add up to what is
    close to 0, or where the maximum is infinite. There are none where it is NaN.
    """
    group = _group(x)
    parts, _, total, z = _scratch(x, group, None, where)
    wide = _wide_space(x, group * x.shape[1])
    one, two = parts.dtype.type(1), parts.dtype.type(2)
    for first in range(0, x.shape[0], group):
        lines, tops, logs = _loaded(x[first : first + group], wide), top[first:], log_total[first:]
        if where is not None:
            for i in range(len(lines)):
                _mask(lines[i], where[first + i], z[i])
            lines = z[: len(lines)]
        _tops(lines, tops)
        _write_totals(lines, tops, parts, total)
        for i in range(len(lines)):
            logs[i] = log1p(total[i] - one)
            if not (total[i] >= two or abs(tops[i] + logs[i]) >= one):
                most, rest = _apart(lines[i], tops[i], parts)
                logs[i] = _log_apart(parts.dtype.type(most), rest)


# Long rows are cut into pieces that fit the cache, numbered row by row; a thread is given some of them. What is said of
# each, in arrays with a line for each row, is brought together by the caller.


@_kernel
def totals_of_pieces(
    x: Array, size: int, first: int, last: int, temperature: Any, out: Array | None, top: Array, total: Array
) -> None:
    """Write the maximum of pieces, and Σ exp((x - maximum) / temperature); the terms are written to ``out``."""
    parts, wide = _empty(x, size // _CHUNK + 1), _wide_space(x, size)
    count, zero = total.shape[1], parts.dtype.type(0)
    for k in range(first, last):
        i, j = k // count, k % count
        start, end = j * size, (j + 1) * size
        row = _loaded(x[i][start:end], wide)
        top[i, j] = greatest(row)
        finite = zero if top[i, j] == -math.inf else top[i, j]  # there may be more in other pieces
        if out is None:
            total[i, j] = _total(row, finite, temperature, parts)
        else:
            total[i, j] = _exponentials(row, finite, temperature, out[i][start:end], parts)


@_kernel
def apart_of_pieces(x: Array, size: int, first: int, last: int, top: Array, most: Array, rest: Array) -> None:
    """Write the maximum of pieces, how often it stands there, and Σ exp(x - maximum) over the rest."""
    parts, wide = _empty(x, size // _CHUNK + 1), _wide_space(x, size)
    for k in range(first, last):
        i, j = k // top.shape[1], k % top.shape[1]
        row = _loaded(x[i][j * size : (j + 1) * size], wide)
        top[i, j] = greatest(row)
        most[i, j], rest[i, j] = _apart(row, top[i, j], parts)


@_kernel
def scale_pieces(factor: Array, size: int, first: int, last: int, out: Array) -> None:
    """Multiply what ``totals_of_pieces`` wrote."""
    for k in range(first, last):
        i, j = k // factor.shape[1], k % factor.shape[1]
        y, scale = out[i][j * size : (j + 1) * size], factor[i, j]
        for c in range(y.size):
            y[c] *= scale


@_kernel
def softmax_of_pieces(
    x: Array, size: int, first: int, last: int, temperature: Any, top: Array, total: Array, out: Array
) -> None:
    """Write the softmax of pieces from the maximum and the total of each row."""
    parts, wide, fine = _empty(x, size // _CHUNK + 1), _wide_space(x, size), _wide_space(out, size)
    count, one = (x.shape[1] + size - 1) // size, parts.dtype.type(1)
    for k in range(first, last):
        i, start = k // count, k % count * size
        piece = out[i][start : start + size]
        e = _space_for(piece, fine)
        y = _target(e, piece)
        _exponentials(_loaded(x[i][start : start + size], wide), top[i], temperature, e, parts)
        scale = one / total[i]
        for c in range(e.size):
            y[c] = _rounded(e[c] * scale, y)


@_kernel
def log_softmax_of_pieces(
    x: Array, size: int, first: int, last: int, temperature: Any, top: Array, log_total: Array, out: Array
) -> None:
    """Write the logarithm of the softmax of pieces from the maximum and the log-total of each row."""
    wide, count = _wide_space(x, size), (x.shape[1] + size - 1) // size
    for k in range(first, last):
        i, start = k // count, k % count * size
        row, y = _loaded(x[i][start : start + size], wide), out[i][start : start + size]
        highest, log_of_row = top[i], log_total[i]
        for c in range(y.size):
            d = row[c] - highest
            if temperature is not None:
                d = d / temperature
            y[c] = _rounded(d - log_of_row, y)


@_part
def _is_counted(target: int, ignored: int | None) -> bool:
    return ignored is None or target != ignored


@_part
def _loss(target: int, logit: Any, weight: Array | None, z_loss: Any, top: Any, log_total: Any) -> Any:
    """Return the loss of a row from its target's logit, its maximum and its log Σ exp(x - maximum)."""
    zero = z_loss * 0
    if not abs(top) < math.inf:
        return zero + math.nan
    y = log_total + (top - logit)
    if weight is not None:
        w = weight[target]
        y = zero if w == zero and y == math.inf else w * y
    value = top + log_total
    return y + z_loss * value * value if z_loss > zero else y


@_kernel
def cross_entropy(x: Array, targets: Array, weight: Array | None, ignored: int | None, z_loss: Any, out: Array) -> None:
    """Write the loss of every row."""
    group = _group(x)
    parts, top, total, _ = _scratch(x, group, None, None)
    wide, logit = _wide_space(x, group * x.shape[1]), _empty(x, group)
    zero, one, nan = parts.dtype.type(0), parts.dtype.type(1), parts.dtype.type(math.nan)
    for first in range(0, x.shape[0], group):
        lines, target, loss = _loaded(x[first : first + group], wide), targets[first:], out[first:]
        _tops(lines, top)
        # Without the target an answer close to 0 keeps its digits. A target out of range leaves nothing out.
        _write_totals_without(lines, top, target, parts, total)
        for i in range(len(lines)):
            logit[i] = lines[i, target[i]] if 0 <= target[i] < x.shape[1] else top[i]
        for i in range(len(lines)):
            all_terms = (total[i] - one) + exp(logit[i] - top[i])
            total[i] = log1p(total[i] if logit[i] == top[i] else all_terms)
        for i in range(len(lines)):
            if not _is_counted(target[i], ignored):
                loss[i] = zero
            elif 0 <= target[i] < x.shape[1]:
                loss[i] = _loss(target[i], logit[i], weight, z_loss, top[i], total[i])
            else:
                loss[i] = nan


@_kernel
def cross_entropy_short(
    x: Array, targets: Array, weight: Array | None, ignored: int | None, z_loss: Any, out: Array
) -> None:
    """Do for short rows what ``cross_entropy`` does."""
    space, tile, tops, part, count, total = _lane_scratch(x)
    wide = _wide_space(x, _LANES * x.shape[1])
    zero, nan = tops.dtype.type(0), tops.dtype.type(math.nan)
    for first in range(0, x.shape[0], _LANES):
        lines = _loaded(x[first : first + _LANES], wide)
        _gather(lines, space)
        _lane_log_totals(tile, tops, part, count, total)
        for lane in range(len(lines)):
            target = targets[first + lane]
            if not _is_counted(target, ignored):
                out[first + lane] = zero
            elif target < 0 or target >= x.shape[1]:
                out[first + lane] = nan
            else:
                out[first + lane] = _loss(target, lines[lane, target], weight, z_loss, tops[lane], total[lane])


@_kernel
def cross_entropy_from_totals(
    x: Array,
    targets: Array,
    weight: Array | None,
    ignored: int | None,
    z_loss: Any,
    top: Array,
    log_total: Array,
    out: Array,
) -> None:
    """Write the loss of every row from its maximum and its log Σ exp(x - maximum)."""
    space = _wide_space(x, 1)
    zero, nan = top.dtype.type(0), top.dtype.type(math.nan)
    for i in range(x.shape[0]):
        target = targets[i]
        if not _is_counted(target, ignored):
            out[i] = zero
        elif target < 0 or target >= x.shape[1]:
            out[i] = nan
        else:
            logit = _loaded(x[i, target : target + 1], space)[0]
            out[i] = _loss(target, logit, weight, z_loss, top[i], log_total[i])


@_kernel
def slopes_of_loss(
    targets: Array,
    weight: Array | None,
    z_loss: Any,
    value: Array | None,
    g: Array,
    at_target: Array,
    factor: Array,
) -> None:
    """Write the factors that the indicator of the target and the softmax have in the gradient of every row.

    ``value`` is the row's logsumexp, which only ``z_loss`` asks for.
    """
    two = g.dtype.type(2)
    for i in range(g.size):
        target = targets[i]
        w = g[i]
        if weight is not None and 0 <= target < weight.size:
            w *= weight[target]
        at_target[i] = w
        factor[i] = w if value is None else w + two * z_loss * value[i] * g[i]


@_kernel
def subtract_at_targets(targets: Array, at_target: Array, ignored: int | None, out: Array) -> None:
    """Turn the softmax of every row, times its factor, into the gradient of its loss."""
    zero, nan = out.dtype.type(0), out.dtype.type(math.nan)
    for i in range(out.shape[0]):
        target = targets[i]
        if ignored is not None and target == ignored:
            out[i] = zero
        elif 0 <= target < out.shape[1]:
            out[i, target] -= at_target[i]
        else:
            out[i] = nan


@_kernel
def softmax_slope(y: Array, g: Array, temperature: Array | None, out: Array) -> None:
    """Write the gradient for the logits from that for the probabilities y."""
    parts = _empty(y, y.shape[1] // _CHUNK + 1)
    zero = y.dtype.type(0)
    for i in range(y.shape[0]):
        p, cotangent, row = y[i], g[i], out[i]
        mean = _dot(p, cotangent, parts)
        t = _entry(temperature, i)
        alive = temperature is None or _is_regular(t)
        for j in range(row.size):
            q, c = p[j], cotangent[j]
            d = q * ((zero if q == zero else c) - mean)
            if temperature is not None:
                d = d / t if alive else zero
            row[j] = d


@_kernel
def log_softmax_slope(y: Array, g: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    """Write the gradient for the logits from that for the log-probabilities y."""
    parts = _empty(y, y.shape[1] // _CHUNK + 1)
    zero = y.dtype.type(0)
    for i in range(y.shape[0]):
        log_p, cotangent, row, mask = y[i], g[i], out[i], _entry(where, i)
        total = _plain_sum(cotangent, mask, parts)
        t = _entry(temperature, i)
        alive = temperature is None or _is_regular(t)
        for j in range(row.size):
            c = cotangent[j]
            if where is not None:
                c = c if mask[j] else zero
            d = c - exp(log_p[j]) * total
            if temperature is not None:
                d = d / t if alive else zero
            row[j] = d
