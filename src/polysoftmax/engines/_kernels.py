"""Numba kernels: softmax, log_softmax, the sum of exponentials, and both slopes, each in as few passes as it needs.

Importing this file imports Numba, so nothing does before an input is large enough to repay it. All stands in one
file because Numba's cache on disk notices changes of the file that a kernel stands in, and of no other.

Every kernel takes rows as C-contiguous blocks of shape (rows, n), all of one dtype, and holds no interpreter lock;
``temperature`` is None or one number a row, ``where`` None or a mask of the block's shape. What NaN and inf do is left
to IEEE arithmetic as far as it does what the formulas do: a NaN anywhere makes the sum of the exponentials NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba.extending import overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType

_STRICT = {"error_model": "numpy", "fastmath": {"contract"}}
_SUMMING = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
"""Sums may be taken in any order, that is in vectors. Not so exponentials, whose reduction relies on its order."""

_CHUNK = 1024
"""Sums are taken over so many terms and the sums of these in a tree: the error grows with log2(n)."""


def _kernel(function: Callable[..., None]) -> Callable[..., None]:
    return numba.njit(nogil=True, cache=True, **_STRICT)(function)  # type: ignore[no-any-return]


def _part(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(**_STRICT)(function)  # type: ignore[no-any-return]


def _for_dtypes(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return overload(stub, jit_options=_STRICT)  # type: ignore[no-any-return]


def _sum(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(**_SUMMING)(function)  # type: ignore[no-any-return]


def _exponential(real: DType, whole: DType, degree: int, ln2: tuple[float, float], least: float) -> Callable[..., Any]:
    """Return exp for z ≤ 0 in one dtype, within 1 ulp, in operations that the compiler can do on vectors.

    z = k·ln 2 + r with ln 2 in two parts (Cody and Waite), the Taylor series of exp(r), and 2^k in two factors, so
    that what is subnormal is rounded once. Below ``least`` the answer is 0. NaN passes through.
    """
    info = np.finfo(real)
    series = tuple(real(1.0 / math.factorial(i)) for i in range(degree + 1))
    per_ln2, high, low, least = real(1.0 / math.log(2.0)), real(ln2[0]), real(ln2[1]), real(least)
    rounding = real(1.5 * 2.0**info.nmant)  # what is added to it loses its fraction
    rounding_bits = rounding.view(whole)
    shift, bias, zero = whole(info.nmant), whole(1 - info.minexp), real(0.0)

    def exponential(z: Any) -> Any:
        gone = z < least
        z = zero if gone else z  # a product that underflows costs many times one that does not
        rounded = real(z * per_ln2 + rounding)
        k = whole(rounded.view(whole) - rounding_bits)
        f = rounded - rounding
        r = (z - f * high) - f * low
        p = series[degree]
        for i in range(degree - 1, -1, -1):
            p = p * r + series[i]
        half = whole(k >> 1)
        first = whole(whole(half + bias) << shift)
        second = whole(whole(whole(k - half) + bias) << shift)
        p = p * first.view(real) * second.view(real)
        return zero if gone else p

    return exponential


_EXPONENTIAL = {
    "float32": _exponential(np.float32, np.int32, 7, (0.693359375, -2.1219444005469057e-4), -105.0),
    "float64": _exponential(np.float64, np.int64, 13, (0.6931471803691238, 1.9082149292705877e-10), -746.0),
}


def exp(z: Any) -> Any:
    """Return exp(z) for z ≤ 0, -inf or NaN."""
    raise NotImplementedError


@_for_dtypes(exp)
def _(z: Any) -> Callable[..., Any] | None:
    return _EXPONENTIAL.get(str(z))


def _greatest(real: DType, whole: DType) -> Callable[..., Any]:
    """Return the maximum of a row for one dtype, by the integers that the bits of floats stand in the order of.

    Comparing floats cannot be done on vectors without promising that there is no NaN. Here a NaN is either greater
    than all, or goes unseen and is met in the sum.
    """
    sign, magnitude = whole(8 * np.dtype(real).itemsize - 1), whole(np.iinfo(whole).max)
    least = whole(real(-math.inf).view(whole) ^ magnitude)

    def greatest(x: Any) -> Any:
        top = least
        for j in range(x.size):
            bits = real(x[j]).view(whole)
            ordered = whole(bits ^ whole(whole(bits >> sign) & magnitude))
            top = max(ordered, top)
        return whole(top ^ whole(whole(top >> sign) & magnitude)).view(real)

    return greatest


_GREATEST = {"float32": _greatest(np.float32, np.int32), "float64": _greatest(np.float64, np.int64)}


def greatest(x: Any) -> Any:
    """Return the maximum of a row."""
    raise NotImplementedError


@_for_dtypes(greatest)
def _(x: Any) -> Callable[..., Any] | None:
    return _GREATEST.get(str(x.dtype))


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
def _exponentials(x: Array, top: Any, temperature: Any, out: Array, parts: Array) -> Any:
    """Write exp((x - top) / temperature) and return its sum."""
    count = 0
    for start in range(0, x.size, _CHUNK):
        chunk, space = x[start : start + _CHUNK], out[start : start + _CHUNK]
        total = x.dtype.type(0)
        for j in range(chunk.size):
            z = chunk[j] - top
            if temperature is not None:
                z = z / temperature
            e = exp(z)
            space[j] = e
            total += e
        parts[count] = total
        count += 1
    return _tree(parts, count)


@_sum
def _total(x: Array, top: Any, temperature: Any, parts: Array) -> Any:
    """Return Σ exp((x - top) / temperature)."""
    count = 0
    for start in range(0, x.size, _CHUNK):
        chunk = x[start : start + _CHUNK]
        total = x.dtype.type(0)
        for j in range(chunk.size):
            z = chunk[j] - top
            if temperature is not None:
                z = z / temperature
            total += exp(z)
        parts[count] = total
        count += 1
    return _tree(parts, count)


@_part
def _count(x: Array, value: Any) -> int:
    count = 0
    for j in range(x.size):
        count += x[j] == value
    return count


@_sum
def _rest(x: Array, top: Any, parts: Array) -> Any:
    """Return Σ exp(x - top) over what does not stand at the maximum."""
    count, least = 0, x.dtype.type(-math.inf)
    for start in range(0, x.size, _CHUNK):
        chunk = x[start : start + _CHUNK]
        total = x.dtype.type(0)
        for j in range(chunk.size):
            v = chunk[j]
            total += exp(least if v == top else v - top)
        parts[count] = total
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
def _shift(x: Array, temperature: Any, where: Array | None, z: Array) -> None:
    """Write (x - max) / temperature as the formulas define it, at every temperature and under a mask."""
    least, nan = x.dtype.type(-math.inf), x.dtype.type(math.nan)
    if where is None:
        top = greatest(x)
    else:
        for j in range(x.size):
            v = x[j]
            z[j] = v if where[j] else least
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
def _shifted(x: Array, temperature: Any, where: Array | None, z: Array) -> tuple[Array, Any, Any]:
    """Return a row, its maximum and its temperature such that exp((row - maximum) / temperature) is meant."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    if where is None:
        if temperature is None:
            return x, greatest(x), None
        if _is_regular(temperature):
            return x, greatest(x), temperature
    _shift(x, temperature, where, z)
    if temperature is None:
        return z, zero, None
    return z, zero, one


@_part
def _entry(values: Array | None, i: int) -> Any:
    """Return entry or row i of what may be absent."""
    return None if values is None else values[i]


@_part
def _scratch(x: Array, temperature: Array | None, where: Array | None) -> tuple[Array, Array]:
    """Return space for the sums of a row's chunks, and for a shifted row where one can be needed."""
    n = x.shape[1]
    parts = np.empty(n // _CHUNK + 1, x.dtype)
    return parts, np.empty(0 if temperature is None and where is None else n, x.dtype)


_LANES = 128
"""Short rows are done so many at a time, each on a lane of its own."""


@_part
def _gather(x: Array, first: int, rows: int, tile: Array) -> None:
    for lane in range(rows):
        row = x[first + lane]
        for j in range(row.size):
            tile[j, lane] = row[j]


@_part
def _scatter(tile: Array, first: int, rows: int, out: Array) -> None:
    for lane in range(rows):
        row = out[first + lane]
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
    zero, one, least = tile.dtype.type(0), tile.dtype.type(1), tile.dtype.type(-math.inf)
    most[:] = zero
    total[:] = zero
    for start in range(0, tile.shape[0], 8):
        part[:] = zero
        for j in range(start, min(start + 8, tile.shape[0])):
            line = tile[j]
            if apart:
                for lane in range(_LANES):
                    v, t = line[lane], top[lane]
                    part[lane] += exp(least if v == t else v - t)
                    most[lane] += one if v == t else zero
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
def _lane_scratch(x: Array) -> tuple[Array, Array, Array, Array, Array]:
    lanes = np.zeros((4, _LANES), x.dtype)
    return np.zeros((x.shape[1], _LANES), x.dtype), lanes[0], lanes[1], lanes[2], lanes[3]


@_kernel
def softmax_short(x: Array, out: Array) -> None:
    """Write the softmax of short rows."""
    tile, top, part, most, total = _lane_scratch(x)
    one = x.dtype.type(1)
    for first in range(0, x.shape[0], _LANES):
        rows = min(_LANES, x.shape[0] - first)
        _gather(x, first, rows, tile)
        _lane_tops(tile, top)
        _lane_totals(tile, top, False, True, part, most, total)
        for lane in range(_LANES):
            total[lane] = one / total[lane]
        for j in range(tile.shape[0]):
            line = tile[j]
            for lane in range(_LANES):
                line[lane] *= total[lane]
        _scatter(tile, first, rows, out)


@_kernel
def log_softmax_short(x: Array, out: Array) -> None:
    """Write the logarithm of the softmax of short rows."""
    tile, top, part, most, total = _lane_scratch(x)
    for first in range(0, x.shape[0], _LANES):
        rows = min(_LANES, x.shape[0] - first)
        _gather(x, first, rows, tile)
        _lane_tops(tile, top)
        _lane_totals(tile, top, False, False, part, most, total)
        for lane in range(rows):
            total[lane] = math.log(total[lane])
        for j in range(tile.shape[0]):
            line = tile[j]
            for lane in range(_LANES):
                line[lane] = (line[lane] - top[lane]) - total[lane]
        _scatter(tile, first, rows, out)


@_kernel
def apart_short(x: Array, top: Array, most: Array, rest: Array) -> None:
    """Do for short rows what ``apart`` does."""
    tile, tops, part, count, total = _lane_scratch(x)
    for first in range(0, x.shape[0], _LANES):
        rows = min(_LANES, x.shape[0] - first)
        _gather(x, first, rows, tile)
        _lane_tops(tile, tops)
        _lane_totals(tile, tops, True, False, part, count, total)
        top[first : first + rows] = tops[:rows]
        most[first : first + rows] = count[:rows]
        rest[first : first + rows] = total[:rows]


@_part
def _add_exactly(total: Array, lost: Array, part: Array) -> None:
    """Add to a running sum, and what rounding takes from it to another (Knuth's two-sum)."""
    for c in range(total.size):
        t, p = total[c], part[c]
        s = t + p
        back = s - t
        lost[c] += (t - (s - back)) + (p - back)
        total[c] = s


@_kernel
def softmax_across(x: Array, outer: int, first: int, last: int, logarithm: bool, out: Array) -> None:
    """Write the softmax, or its logarithm, along the middle of three axes, for some of the columns."""
    n, width, one = x.shape[1], last - first, x.dtype.type(1)
    top = x[outer, 0, first:last].copy()
    total, lost, part = np.zeros(width, x.dtype), np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    for j in range(1, n):
        line = x[outer, j, first:last]
        for c in range(line.size):
            v, t = line[c], top[c]
            top[c] = v if v > t else t  # noqa: FURB136  # as above
    for start in range(0, n, 8):
        part[:] = 0
        for j in range(start, min(start + 8, n)):
            line, row = x[outer, j, first:last], out[outer, j, first:last]
            if logarithm:
                for c in range(line.size):
                    part[c] += exp(line[c] - top[c])
            else:
                for c in range(line.size):
                    e = exp(line[c] - top[c])
                    row[c] = e
                    part[c] += e
        _add_exactly(total, lost, part)
    for c in range(width):
        total[c] = math.log(total[c] + lost[c]) if logarithm else one / (total[c] + lost[c])
    for j in range(n):
        line, row = x[outer, j, first:last], out[outer, j, first:last]
        if logarithm:
            for c in range(line.size):
                row[c] = (line[c] - top[c]) - total[c]
        else:
            for c in range(line.size):
                row[c] *= total[c]


@_kernel
def softmax(x: Array, temperature: Array | None, where: Array | None, factor: Array | None, out: Array) -> None:
    """Write the softmax of every row, times its factor."""
    parts, z = _scratch(x, temperature, where)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for i in range(x.shape[0]):
        mask = _entry(where, i)
        y = out[i]
        row, top, t = _shifted(x[i], _entry(temperature, i), mask, z)
        total = _exponentials(row, top, t, y, parts)
        scale = (one if factor is None else factor[i]) / total
        for j in range(y.size):
            if where is None:
                y[j] *= scale
            else:
                p = y[j] * scale
                y[j] = p if mask[j] else zero


@_kernel
def log_softmax(x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    """Write the logarithm of the softmax of every row."""
    parts, z = _scratch(x, temperature, where)
    least = x.dtype.type(-math.inf)
    for i in range(x.shape[0]):
        mask = _entry(where, i)
        y = out[i]
        row, top, t = _shifted(x[i], _entry(temperature, i), mask, z)
        log_total = x.dtype.type(math.log(_total(row, top, t, parts)))
        for j in range(y.size):
            d = row[j] - top
            if temperature is not None:
                d = d / t
            if where is None:
                y[j] = d - log_total
            else:
                d = d - log_total
                y[j] = d if mask[j] else least


@_kernel
def apart(x: Array, where: Array | None, top: Array, most: Array, rest: Array) -> None:
    """Write the maximum of every row, how often it stands there, and Σ exp(x - maximum) over the other entries."""
    parts, z = _scratch(x, None, where)
    least = x.dtype.type(-math.inf)
    for i in range(x.shape[0]):
        row, mask = x[i], _entry(where, i)
        if where is not None:
            for j in range(row.size):
                v = row[j]
                z[j] = v if mask[j] else least
            row = z
        top[i] = greatest(row)
        most[i] = _count(row, top[i])
        rest[i] = _rest(row, top[i], parts)


@_kernel
def softmax_slope(y: Array, g: Array, temperature: Array | None, out: Array) -> None:
    """Write the gradient for the logits from that for the probabilities y."""
    parts, _ = _scratch(y, None, None)
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
    parts, _ = _scratch(y, None, None)
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


# float16 and bfloat16 are taken and given as their bits: Numba has neither, and NumPy converts the one slowly.


@_kernel
def widen_bfloat16(bits: Array, out: Array) -> None:
    """Write the float32 of every bfloat16."""
    for i in range(bits.size):
        out[i] = np.uint32(np.uint32(bits[i]) << 16).view(np.float32)


@_kernel
def narrow_bfloat16(x: Array, bits: Array) -> None:
    """Write every float32 rounded to bfloat16, ties to even."""
    for i in range(x.size):
        b = np.float32(x[i]).view(np.uint32)
        rounded = np.uint32(b + np.uint32(0x7FFF) + np.uint32(np.uint32(b >> 16) & 1)) >> 16
        bits[i] = np.uint16(rounded if x[i] == x[i] else 0x7FC0)  # NaN


@_kernel
def widen_float16(bits: Array, out: Array) -> None:
    """Write the float32 of every float16."""
    scale = np.float32(2.0**112)  # from the exponents of float16 to those of float32, subnormal ones too
    for i in range(bits.size):
        h = np.uint32(bits[i])
        v = np.uint32(np.uint32(h & 0x7FFF) << 13).view(np.float32) * scale
        v = np.float32(math.inf) if v >= np.float32(65536) else v
        v = np.float32(math.nan) if np.uint32(h & 0x7FFF) > 0x7C00 else v
        out[i] = -v if h >= 0x8000 else v


@_kernel
def narrow_float16(x: Array, bits: Array) -> None:
    """Write every float32 rounded to float16, ties to even."""
    half = np.float32(0.5)
    half_bits = np.uint32(half.view(np.uint32))
    for i in range(x.size):
        v = np.float32(x[i])
        b = v.view(np.uint32)
        a = np.uint32(b & np.uint32(0x7FFFFFFF))
        m = a.view(np.float32)
        odd = np.uint32(np.uint32(a >> 13) & 1)
        normal = np.uint32(np.uint32(a + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> 13)
        # Added to 0.5, a float32 has no more digits than a subnormal float16.
        small = np.uint32(np.float32(m + half).view(np.uint32) - half_bits)
        r = normal if m >= np.float32(2.0**-14) else small
        r = np.uint32(0x7C00) if m >= np.float32(65520) else r
        r = r if m == m else np.uint32(0x7E00)  # NaN
        bits[i] = np.uint16(r | np.uint32(np.uint32(b >> 16) & np.uint32(0x8000)))
