"""Threefry-2x32 with 20 rounds in int32 arrays of any library, and the variates made of its words.

Sums of int32 wrap around; a logical right shift is a shift and a mask. Word i of domain d is the first word of
``threefry2x32(key, (i, d))``. Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import cast, namespace

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops

BITS, BLOCKS, TOKENS, KEYS, HIGH, ACCEPTS, RESIDUALS = range(7)
"""The domains: public bits, block variates, token variates, new keys, the high words that are folded into one, and, of
speculation, the uniform numbers that accept a draft and the keys for what replaces one.

They are frozen, as all of this is.
"""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(k0: Array, k1: Array, c0: Array, c1: Array | int) -> tuple[Array, Array]:
    """Return the two words of each block, from int32 arrays that broadcast; one word of the counter may be a number."""
    xp, schedule = namespace(k0), (k0, k1, k0 ^ k1 ^ PARITY)
    a, b = c0 + k0, c1 + k1
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            a = a + b
            b = _rotate(xp, b, by) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + (schedule[(group + 2) % 3] + (group + 1))
    return a, b


def _rotate(xp: Any, x: Array, by: int) -> Array:
    # Not by operators: those of PyTorch's DTensor return x as it is (seen with 2.13).
    return xp.bitwise_left_shift(x, by) | (xp.bitwise_right_shift(x, 32 - by) & ((1 << by) - 1))


def words(k0: Array, k1: Array, index: Array, domain: int) -> Array:
    """Return the random words of an index, int32 arrays that broadcast, in a domain."""
    return threefry(k0, k1, index, domain)[0]


def uniform_of(word: Array) -> Array:
    """Return float32 numbers in (0, 1) with the full resolution of 32 bits near 0."""
    xp = namespace(word)
    high, low = cast(xp.bitwise_right_shift(word, 16) & 0xFFFF, xp.float32), cast(word & 0xFFFF, xp.float32)
    return xp.minimum((high * 65536.0 + low + 0.5) * 2.0**-32, xp.full_like(high, 1.0 - 2.0**-24))


def gumbel_of(word: Array) -> Array:
    """Return float32 standard Gumbel variates; great ones come from numbers near 0, which are resolved best."""
    xp = namespace(word)
    return -xp.log(-xp.log1p(-uniform_of(word)))


def fold(k: Array, index: Array) -> Array:
    """Return new keys from keys and int32 indices of shape (..., 1)."""
    return _fold(k, index, KEYS)


def fold_high(k: Array, high: Array) -> Array:
    """Return the keys that indices of more than one word are then folded into, from their high words (..., 1)."""
    return _fold(k, high, HIGH)


def fold_in_domain(k: Array, domain: int) -> Array:
    """Return new keys that share nothing with what is drawn with the given ones in other domains."""
    return _fold(k, namespace(k).zeros_like(k[..., 0:1]), domain)


def _fold(k: Array, index: Array, domain: int) -> Array:
    xp = namespace(k)
    # Not broadcast_arrays, which NumPy has for 32 dimensions alone; JAX may be set to raise where a rank is promoted.
    ndim = max(k.ndim, index.ndim)
    k, index = (
        one if one.ndim == ndim else xp.reshape(one, (1,) * (ndim - one.ndim) + tuple(one.shape)) for one in (k, index)
    )
    return xp.concat(threefry(k[..., 0:1], k[..., 1:2], index, domain), axis=-1)


def fold_draws(ops: Ops, k: Array, draws: int) -> Array:
    """Return the keys of several draws with each key, side by side: the key itself, then folded with 1, 2 and so on."""
    xp, batch, count = namespace(k), k.shape[:-1], k.shape[-1] // 2
    each = ops.reshape(k, (*batch, count, 1, 2))
    further = fold(each, ops.reshape(1 + ops.arange(draws - 1, xp.int32, k), (-1, 1)))
    return ops.reshape(xp.concat([each, further], axis=each.ndim - 2), (*batch, 2 * count * draws))
