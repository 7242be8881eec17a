"""Random words in whole numbers, and what polysoftmax.random is to answer: Threefry-2x32 as it is published."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np

from polysoftmax.testing._reference import BITS, Given, Reference, exactly, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from polysoftmax.testing._reference import Floats

    Words = NDArray[np.uint32]

PUBLIC, BLOCKS, TOKENS, KEYS, HIGH, ACCEPTS, RESIDUALS = range(7)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: Any, counter: Any) -> Words:
    """Return blocks of Threefry-2x32 with 20 rounds, from arrays of two words each."""
    k, c = (np.asarray(one).astype(np.int64).astype(np.uint32) for one in (key, counter))
    schedule = k[..., 0], k[..., 1], k[..., 0] ^ k[..., 1] ^ np.uint32(0x1BD11BDA)
    a, b = c[..., 0] + schedule[0], c[..., 1] + schedule[1]
    for group in range(5):
        for by in _ROTATIONS[group % 2]:
            a = a + b
            b = ((b << np.uint32(by)) | (b >> np.uint32(32 - by))) ^ a
        a, b = a + schedule[(group + 1) % 3], b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return np.stack(np.broadcast_arrays(a, b), axis=-1)


def words(key: Any, index: Any, domain: int) -> Words:
    """Return the word of each index in a domain."""
    index = np.asarray(index)
    with np.errstate(over="ignore"):
        found = threefry(np.asarray(key)[..., None, :], np.stack([index, np.full_like(index, domain)], axis=-1))
    return np.asarray(found[..., 0])


def folded(key: Any, number: int, domain: int = KEYS) -> Words:
    """Return a key folded with a number of 64 bits."""
    high, low = (number >> 32) & 0xFFFFFFFF, number & 0xFFFFFFFF
    with np.errstate(over="ignore"):
        if high not in (0, 0xFFFFFFFF):
            key = threefry(key, np.asarray([high, HIGH]))
        return threefry(key, np.asarray([low, domain]))


def uniform_of(word: Words) -> Floats:
    """Return the uniform number of each word: its upper half and its lower half are added in float32."""
    high, low = (word >> np.uint32(16)).astype(np.float32), (word & np.uint32(65535)).astype(np.float32)
    sum_of_both = (high * np.float32(65536) + low + np.float32(0.5)).astype(np.float64)
    return np.minimum(sum_of_both * 2.0**-32, 1 - 2.0**-24)


def gumbel_variates(key: Any, index: Any, domain: int) -> Floats:
    """Return the Gumbel variate of each index in a domain, in double precision."""
    return np.asarray(-np.log(-np.log1p(-uniform_of(words(key, index, domain)))))


def block_length(n: int) -> int:
    """Return the length of the draw's blocks."""
    return int(max(2, min(256, 2 ** (((n - 1).bit_length() + 1) // 2))))


# polysoftmax.random


def _int32(word: Any) -> Reference:
    return exactly(np.asarray(word).astype(np.uint32).view(np.int32), "int32")


def key(given: Given) -> tuple[Reference, ...]:
    """Return the high and the low words of seeds."""
    seeds = np.asarray(given["seed"]).astype(np.int64)
    return (_int32(np.stack([seeds >> 32, seeds], axis=-1).astype(np.int64) & 0xFFFFFFFF),)


def keys_split(given: Given) -> tuple[Reference, ...]:
    """Return new keys of a key."""
    return (_int32(np.stack([folded(given["key"], j) for j in range(given["num"])], axis=-2)),)


def folded_in(given: Given) -> tuple[Reference, ...]:
    """Return keys folded with numbers."""
    data = np.broadcast_to(np.asarray(given["data"]).astype(np.int64), given["key"].shape[:-1])
    return (_int32([folded(k, int(d)) for k, d in zip(given["key"], data, strict=True)]),)


def blocks(given: Given) -> tuple[Reference, ...]:
    """Return the words of blocks."""
    with np.errstate(over="ignore"):
        return (_int32(threefry(given["key_words"], given["counter_words"])),)


def _public(given: Given) -> Words:
    shape = given["shape"]
    count = math.prod(shape)
    return words(given["key"], np.arange(count), PUBLIC).reshape(*given["key"].shape[:-1], *shape)


def bits(given: Given) -> tuple[Reference, ...]:
    """Return public words."""
    return (_int32(_public(given)),)


def uniform(given: Given) -> tuple[Reference, ...]:
    """Return uniform numbers, whose definition leaves no rounding open."""
    return (exactly(uniform_of(_public(given)), "float32"),)


def gumbel(given: Given) -> tuple[Reference, ...]:
    """Return Gumbel variates, with an error of the two logarithms."""
    with mpmath.workprec(BITS):
        u = uniform_of(_public(given))
        g = [-mpmath.log(-mpmath.log1p(-mpmath.mpf(one))) for one in u.reshape(-1).tolist()]
        high, low, units = (one.reshape(u.shape) for one in split((one, 8 + 2 * abs(one)) for one in g))
    return (Reference(high, low, units, "float32", "float32"),)


def mask_bits(given: Given) -> tuple[Reference, ...]:
    """Return the bits of words, the lowest first."""
    word = given["words"].astype(np.int64).astype(np.uint32)
    each = (word[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (exactly(each.reshape(*word.shape[:-1], -1)[..., : given["n"]], "bool"),)


def flags(*names: str) -> Callable[[Given], tuple[Reference, ...]]:
    """Return an expectation of True, once for each name."""
    return functools.partial(_true, len(names))


def _true(count: int, given: Given) -> tuple[Reference, ...]:
    del given
    return (exactly(np.ones(count), "bool"),)
