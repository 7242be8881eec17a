"""Numba kernels of the draw: the filters and both levels, row by row, in one or two passes over the logits.

Importing this file imports Numba. Where the answers are defined: `polysoftmax._truncation`, `polysoftmax._sampling` and
`polysoftmax.random`. Numbers are compared by integers that stand in their order, so that loops become vectors.

Numba's cache on disk does not notice changes of the functions that this file takes from `_kernels`: who changes those
empties the caches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.engines._kernels import (
    _CHUNK,
    _entry,
    _for_dtypes,
    _is_regular,
    _kernel,
    _part,
    _shift,
    _sum,
    exp,
    greatest,
    number,
    place,
)
from polysoftmax.random import BLOCKS, KEYS, PARITY, ROTATIONS, TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

# Random words, uniform numbers and Gumbel variates


@_part
def _threefry(k0: Any, k1: Any, index: Any, domain: int) -> tuple[Any, Any]:
    """Return both words of the block of an index in a domain, as uint32."""
    first, second = np.uint32(k0), np.uint32(k1)
    third = np.uint32(first ^ second ^ np.uint32(PARITY))
    a, b = np.uint32(np.uint32(index) + first), np.uint32(np.uint32(domain) + second)
    a, b = _four_rounds(a, b, ROTATIONS[0])
    a, b = np.uint32(a + second), np.uint32(b + third + np.uint32(1))
    a, b = _four_rounds(a, b, ROTATIONS[1])
    a, b = np.uint32(a + third), np.uint32(b + first + np.uint32(2))
    a, b = _four_rounds(a, b, ROTATIONS[0])
    a, b = np.uint32(a + first), np.uint32(b + second + np.uint32(3))
    a, b = _four_rounds(a, b, ROTATIONS[1])
    a, b = np.uint32(a + second), np.uint32(b + third + np.uint32(4))
    a, b = _four_rounds(a, b, ROTATIONS[0])
    return np.uint32(a + third), np.uint32(b + first + np.uint32(5))


@_part
def _four_rounds(a: Any, b: Any, rotations: tuple[int, int, int, int]) -> tuple[Any, Any]:
    for by in rotations:
        a = np.uint32(a + b)
        b = np.uint32(np.uint32(b << np.uint32(by)) | np.uint32(b >> np.uint32(32 - by))) ^ a
    return a, b


def _log_float32(v: Any) -> Any:
    """Return log(v) for v ≥ 0, in operations that the compiler can do on vectors.

    v = 2^k·(1 + f) with 1 + f between √½ and √2, and log(1 + f) = f - f²/2 + s·(f²/2 + R), where s = f / (2 + f), and
    R = 2s²/3 + 2s⁴/5 + … is what the series of 2·artanh(s) / s has after its first term.
    """
    small = v < np.float32(2.0**-100)
    bits = np.float32(v * np.float32(2.0**64) if small else v).view(np.int32)
    k = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = np.int32(bits - np.int32(k << np.int32(23))).view(np.float32) - np.float32(1)
    s = f / (np.float32(2) + f)
    square = s * s
    rest = np.float32(2 / 11)
    for odd in (9, 7, 5, 3):
        rest = np.float32(2 / odd) + square * rest
    rest *= square
    half = np.float32(0.5) * f * f
    power = np.float32(k - np.int32(64) if small else k)
    low = s * (half + rest) + power * np.float32(-2.1219444005469057e-4)
    y = (f - (half - low)) + power * np.float32(0.693359375)
    return np.float32(-math.inf) if v == np.float32(0) else y


def _log_float64(v: Any) -> Any:
    return math.log(v)


def log(v: Any) -> Any:
    """Return log(v) for v ≥ 0."""
    raise NotImplementedError


@_for_dtypes(log)
def _(v: Any) -> Callable[..., Any] | None:
    return {"float32": _log_float32, "float64": _log_float64}.get(str(v))


@_kernel
def fold(key: Array, out: Array) -> None:
    """Write the key of each row that a single key is folded with the number of."""
    for i in range(out.shape[0]):
        a, b = _threefry(key[0], key[1], i, KEYS)
        out[i, 0], out[i, 1] = np.int32(a), np.int32(b)


@_part
def _gumbels(k0: Any, k1: Any, index: Array, domain: int, count: int, words: Array, out: Array) -> None:
    """Write the Gumbel variates of ``count`` indices in a domain, as float32."""
    one, half = np.float32(1), np.float32(0.5)
    most, step = np.float32(1.0 - 2.0**-24), np.float32(2.0**-32)
    for i in range(count):
        words[i], _ = _threefry(k0, k1, index[i], domain)
    for i in range(count):
        high = np.float32(np.int32(words[i] >> np.uint32(16)))
        low = np.float32(np.int32(words[i] & np.uint32(0xFFFF)))
        u = np.float32(np.float32(np.float32(high * np.float32(65536) + low) + half) * step)
        u = most if u > most else u  # noqa: FURB136  # min of Numba minds NaN, in branches
        left = one - u
        lost = (one - left) - u
        out[i] = -log(-(log(left) + lost / left))


@_part
def _place(v: Any) -> Any:
    """Return the integer for a number, where -0 stands with 0."""
    return place(v + np.float32(0))


# The filters: each keeps a prefix of the entries in order, that is those above an end, and the first few at it


@_sum
def _weight_from(places: Array, weights: Array | None, least: Any) -> float:
    """Return the weight of all entries at ``least`` or above; each weighs 1 where there are no weights."""
    whole = 0.0
    for start in range(0, places.size, _CHUNK):
        chunk = places[start : start + _CHUNK]
        if weights is None:
            count = np.int32(0)
            for j in range(chunk.size):
                count = np.int32(count + np.int32(chunk[j] >= least))
            whole += count
        else:
            each = weights[start : start + _CHUNK]
            total = weights.dtype.type(0)
            for j in range(chunk.size):
                total += each[j] if chunk[j] >= least else weights.dtype.type(0)
            whole += total
    return whole


@_part
def _middle(low: Any, high: Any, whole: Any, of_numbers: bool) -> Any:
    """Return a place above ``low``, and not above ``high``, halfway between the numbers or the places.

    The one is reached soon where the numbers are alike, the other in a bounded number of steps always.
    """
    if of_numbers:
        middle = _place((number(low) + number(high)) / 2)
        if low < middle <= high:
            return middle
    distance = np.uint64(high) - np.uint64(low)
    return whole(np.uint64(low) + ((distance + np.uint64(1)) >> np.uint64(1)))


_STEPS = 12
_WORTH = 4096
"""Halvings of the range of ends after which what lies outside of it is left behind, where it is longer than this."""


@_part
def _end_of_prefix(places: Array, weights: Any, target: float, space: Array, heavy: Any) -> tuple[Any, int]:
    """Return the end of the shortest prefix that weighs at least the target, and how many entries at the end it has."""
    whole = places.dtype.type
    low, high = places[0], places[0]
    for j in range(places.size):
        low, high = min(low, places[j]), max(high, places[j])
    left, weight_left, above, step = places, weights, 0.0, 0
    while low < high:
        middle = _middle(low, high, whole, step % 2 == 0)
        weight = above + _weight_from(left, weight_left, middle)
        if weight >= target:
            low = middle
            if weights is None and weight == target:  # what is left is the prefix
                for j in range(left.size):
                    high = left[j] if middle <= left[j] < high else high
                low = high
        else:
            high = whole(middle - 1)
        step += 1
        if step == _STEPS and places.size > _WORTH:
            above = _weight_from(places, weights, whole(high + 1))
            count = _copy_between(places, weights, low, high, space, heavy)
            left = space[:count]
            if weights is not None:
                weight_left = heavy[:count]
    room = target - above - _weight_from(left, weight_left, whole(low + 1))
    there = int(_weight_from(left, None, low) - _weight_from(left, None, whole(low + 1)))
    if weights is not None:
        for j in range(left.size):
            if left[j] == low:
                room = room / weight_left[j]
                break
    return low, max(1, math.ceil(room)) if room < there else there


@_part
def _copy_between(places: Array, weights: Any, low: Any, high: Any, space: Array, heavy: Any) -> int:
    """Copy the entries from ``low`` to ``high``, and return their number."""
    count = 0
    for start in range(0, places.size, _GROUP):
        chunk = places[start : start + _GROUP]
        found = False
        for j in range(chunk.size):
            found |= low <= chunk[j] <= high
        if found:
            for j in range(chunk.size):
                if weights is not None:
                    heavy[count] = weights[start + j]
                space[count] = chunk[j]
                count += low <= chunk[j] <= high
    return count


_GROUP = 64
"""Entries that are looked at together: they are passed over unless their maximum may be among the greatest."""


@_part
def _maxima(x: Array, out: Array) -> Any:
    """Write the greatest place in each group of entries, and return the least of all."""
    least = _place(x[0])
    for group in range(out.size):
        chunk = x[group * _GROUP : (group + 1) * _GROUP]
        most = _place(chunk[0])
        for j in range(_GROUP):
            at = _place(chunk[j])
            most, least = max(most, at), min(least, at)
        out[group] = most
    return least


@_part
def _candidates(x: Array, k: int, maxima: Array, places: Array, index: Array, space: Array) -> tuple[int, Any]:
    """Write places and indices of entries that the k greatest are among; return their number, and the least place."""
    n = x.size
    groups = n // _GROUP
    if k == 0 or groups < 2 * k:
        least = _place(x[0])
        for j in range(n):
            places[j] = _place(x[j])
            least = min(least, places[j])
            index[j] = j
        return n, least
    least = _maxima(x, maxima[:groups])
    # As many entries reach the k-th greatest maximum of groups as there are groups that do.
    bound, _ = _end_of_prefix(maxima[:groups], None, float(k), space, None)
    count = 0
    for group in range(groups):
        if maxima[group] >= bound:
            for j in range(group * _GROUP, (group + 1) * _GROUP):
                places[count] = _place(x[j])
                index[count] = j
                count += places[count] >= bound
    for j in range(groups * _GROUP, n):
        at = _place(x[j])
        least = min(least, at)
        places[count] = at
        index[count] = j
        count += at >= bound
    return count, least


@_part
def _keep(count: int, end: Any, room: int, places: Array, index: Array) -> Any:
    """Move what belongs to a prefix to the front, in order of the indices, and return its number."""
    kept, seen = np.int64(0), np.int64(0)
    for start in range(0, count, _GROUP):
        chunk, number_of = places[start : min(start + _GROUP, count)], index[start : min(start + _GROUP, count)]
        if _reaches(chunk, end):
            for j in range(chunk.size):
                at = chunk[j]
                places[kept], index[kept] = at, number_of[j]
                seen += np.int64(at == end)
                kept += np.int64(at > end) | (np.int64(at == end) & np.int64(seen <= room))  # no branch to mispredict
    return kept


@_part
def _reaches(chunk: Array, end: Any) -> Any:
    found = np.int32(0)
    for j in range(chunk.size):
        found |= np.int32(chunk[j] >= end)
    return found > 0


@_part
def _distances(places: Array, top: Any, temperature: Any, z: Array, terms: Array) -> None:
    """Write (x - top) / temperature, with its limits at temperatures 0 and inf, and its exponentials."""
    least = z.dtype.type(-math.inf)
    if temperature > 0 and temperature < math.inf:
        for j in range(places.size):
            z[j] = (number(places[j]) - top) / temperature
    else:
        for j in range(places.size):
            d = number(places[j]) - top
            z[j] = least if d == least or (temperature == 0 and d < 0) else z.dtype.type(0)
    for j in range(places.size):
        terms[j] = exp(z[j])


# The draw, from the scaled logits z of tokens in order of their indices, which stand in runs of one block each


@_part
def _runs(index: Array, terms: Array, shift: int, block: Array, start: Array, mass: Array) -> int:
    """Write number, start and mass of each block that tokens are left in, and return how many there are."""
    count = 0
    for j in range(index.size):
        of = index[j] >> shift
        if count == 0 or block[count - 1] != of:
            block[count], start[count], mass[count] = of, j, terms.dtype.type(0)
            count += 1
        mass[count - 1] += terms[j]
    start[count] = index.size
    return count


@_part
def _draw(
    key: Array, greedy: bool, z: Array, index: Array, runs: int, block: Array, start: Array, score: Array, space: Any
) -> int:
    """Return the position of the token that wins."""
    words, noise = space
    _gumbels(key[0], key[1], block, BLOCKS, runs, words, noise)
    run = _first_best(score, noise, greedy, runs)
    first, last = start[run], start[run + 1]
    _gumbels(key[0], key[1], index[first:last], TOKENS, last - first, words, noise)
    at: int = first + _first_best(z[first:last], noise, greedy, last - first)
    return at


@_part
def _write_draws(
    keys: Array,
    greedy: bool,
    total: float,
    z: Array,
    index: Array,
    runs: int,
    block: Array,
    start: Array,
    score: Array,
    space: Any,
    tokens: Array,
    logprobs: Array,
) -> None:
    for i in range(tokens.size):
        if total > 0:
            at = _draw(keys[2 * i : 2 * i + 2], greedy, z, index, runs, block, start, score, space)
            tokens[i], logprobs[i] = index[at], z[at] - math.log(total)
        else:
            tokens[i], logprobs[i] = -1, math.nan


@_part
def _first_best(score: Array, noise: Array, greedy: bool, count: int) -> int:
    best, at = score.dtype.type(-math.inf), 0
    for i in range(count):
        s = score[i] if greedy else score[i] + noise[i]
        if s > best:
            best, at = s, i
    return at


@_part
def _scores(mass: Array, greedy: bool, count: int, score: Array) -> Any:
    """Write the logarithm of each mass, for a greedy draw 0 where there is any, and return the sum of the masses."""
    total, zero = 0.0, mass.dtype.type(0)
    for i in range(count):
        total += mass[i]
    for i in range(count):
        score[i] = log(mass[i])
    if greedy:
        for i in range(count):
            score[i] = zero if mass[i] > 0 else score[i]
    return total


@_part
def _shifted(x: Array, temperature: Any, z: Array) -> tuple[Array, Any, Any]:
    """Return a row, its maximum and its temperature such that exp((row - maximum) / temperature) is meant."""
    if temperature is None:
        return x, greatest(x), None
    if _is_regular(temperature):
        return x, greatest(x), temperature
    _shift(x, temperature, None, z)
    return z, x.dtype.type(0), x.dtype.type(1)


@_sum
def _masses(row: Array, top: Any, temperature: Any, size: int, z: Array, mass: Array) -> None:
    """Write (row - top) / temperature, and the mass of each block."""
    for block in range(mass.size):
        chunk, space = row[block * size : (block + 1) * size], z[block * size : (block + 1) * size]
        total = row.dtype.type(0)
        for j in range(chunk.size):
            d = chunk[j] - top
            if temperature is not None:
                d = d / temperature
            space[j] = d
            total += exp(d)
        mass[block] = total


@_kernel
def draw(x: Array, keys: Array, temperature: Array | None, size: int, tokens: Array, logprobs: Array) -> None:
    """Draw from every row as often as it has keys, pairs of words side by side; write tokens and log-probabilities."""
    n = x.shape[1]
    blocks = (n + size - 1) // size
    index, block = np.arange(n, dtype=np.int32), np.arange(blocks, dtype=np.int32)
    start = np.minimum(np.arange(blocks + 1) * size, n)
    z, mass, score = np.empty(n, x.dtype), np.empty(blocks, x.dtype), np.empty(blocks, x.dtype)
    longest = max(blocks, size)
    space = np.empty(longest, np.uint32), np.empty(longest, np.float32)
    for i in range(x.shape[0]):
        t = _entry(temperature, i)
        greedy = temperature is not None and t == 0
        row, top, divisor = _shifted(x[i], t, z)
        _masses(row, top, divisor, size, z, mass)
        total = _scores(mass, greedy, blocks, score)
        _write_draws(keys[i], greedy, total, z, index, blocks, block, start, score, space, tokens[i], logprobs[i])


@_part
def _write_left(row: Array, index: Array, answered: bool, out: Array) -> None:
    """Write the row with -inf for all but what is left, whose indices are given; NaN where it has no answer."""
    out[:] = -math.inf if answered else math.nan
    if answered:
        for at in index:
            out[at] = row[at]


@_kernel
def filter_and_draw(
    x: Array,
    keys: Array,
    temperature: Array,
    count: Array,
    share: Array,
    least_share: Array,
    size: int,
    tokens: Array,
    logprobs: Array,
    out: Array,
) -> None:
    """Do what ``draw`` does with what the filters leave of each row: a count of 0, and shares of 1 and 0, are off.

    What is left is written to ``out``, unless that has rows without entries; without keys nothing is drawn. It is one
    kernel for both, since another copy of the sums could be compiled to other vectors, and end at another token.
    """
    n, draws, writes = x.shape[1], tokens.shape[1] > 0, out.shape[1] > 0
    # Two arrays and not five: what a few large ones give back is kept for the next call, many small ones would be
    # returned to the system, which takes several times longer to give the pages anew than the draw takes.
    whole, real = np.empty((3, n + 1), np.full(1, _place(x[0, 0])).dtype), np.empty((2, n + 1), x.dtype)
    places, index, space, z, terms = whole[0], whole[1], whole[2], real[0], real[1]
    maxima = np.empty(n // _GROUP, whole.dtype)
    blocks, shift = (n + size - 1) // size, int(math.log2(size))
    block, start = np.empty(blocks, np.int32), np.empty(blocks + 1, np.int64)
    mass, score = np.empty(blocks, x.dtype), np.empty(blocks, x.dtype)
    longest = max(blocks, size)
    random = np.empty(longest, np.uint32), np.empty(longest, np.float32)
    bottom, ceiling = _place(x.dtype.type(-math.inf)), _place(x.dtype.type(math.inf))
    for i in range(x.shape[0]):
        t, k, p, least_p = temperature[i], count[i], share[i], least_share[i]
        greedy, runs, total, left, answered = t == 0, 0, math.nan, 0, False
        if k >= 0 and 0 <= p <= 1 and 0 <= least_p <= 1 and t >= 0:
            most_kept = math.ceil(k) if k < n else 0
            left, lowest = _candidates(x[i], most_kept, maxima, places, index, space)
            if 0 < most_kept < left:
                end, room = _end_of_prefix(places[:left], None, float(most_kept), space, None)
                left = _keep(left, end, room, places, index)
            most = bottom
            for j in range(left):
                most = max(most, places[j])
            answered = lowest >= bottom and most < ceiling
            if answered and most > bottom:
                top = number(most)
                if p < 1 or least_p > 0 or draws:
                    _distances(places[:left], top, t, z, terms)
                if p < 1:
                    target = p * _weight_from(places[:left], terms, bottom)
                    end, room = _end_of_prefix(places[:left], terms[:left], target, space, z)
                    left = _keep(left, end, room, places, index)
                    if least_p > 0 or draws:
                        _distances(places[:left], top, t, z, terms)
                if least_p > 0:
                    kept = 0
                    for j in range(left):
                        term = terms[j]
                        z[kept], terms[kept], index[kept] = z[j], term, index[j]
                        kept += term >= least_p
                    left = kept
                if draws:
                    runs = _runs(index[:left], terms, shift, block, start, mass)
                    total = _scores(mass, greedy, runs, score)
        if writes:
            _write_left(x[i], index[:left], answered, out[i])
        _write_draws(keys[i], greedy, total, z, index, runs, block, start, score, random, tokens[i], logprobs[i])
