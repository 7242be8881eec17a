"""Counter-based random numbers that are the same on every backend: Threefry-2x32 with 20 rounds.

Words are 32 bits in int32 arrays, whose sums wrap around; a logical right shift is a shift and a mask. Word i of
domain d is the first word of ``threefry2x32(key, (i, d))``. Source: Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax import _formula
from polysoftmax._arrays import (
    cast,
    device_for,
    in_native_order,
    is_array,
    is_kind,
    is_number,
    is_whole,
    library,
    namespace,
    standard_numpy,
)
from polysoftmax._threefry import BITS, KEYS, fold, fold_high, gumbel_of, threefry, uniform_of, words
from polysoftmax.engines._keys import drawn_words, jitted, key_data, to_library_of, words_of

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops

__all__ = ["bits", "fold_in", "gumbel", "key", "split", "threefry2x32", "uniform"]


def threefry2x32(key_words: Array, counter_words: Array, /) -> Array:
    """One block of Threefry-2x32 with 20 rounds, for those who check the generator.

    Parameters
    ----------
    key_words, counter_words : array
        32-bit words, of shapes (..., 2) that broadcast: uint32 NumPy arrays, or int32 of any library.

    Returns
    -------
    array
        The words of the block, of the broadcast shape and the dtype of ``counter_words``.

    Raises
    ------
    TypeError
        If the words are not 32-bit integers of one library.
    ValueError
        If the last axis does not have two entries.

    Notes
    -----
    Source: Salmon, Moraes, Dror and Shaw, SC 2011; the known answers of their Random123 library are tests.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import random
    >>> zeros = np.zeros(2, np.uint32)
    >>> [hex(word) for word in random.threefry2x32(zeros, zeros)]
    ['0x6b200159', '0x99ba4efe']
    """
    xp, counter_words = namespace(counter_words), in_native_order(counter_words)
    k, c = _int32(key_words, "key_words"), _int32(counter_words, "counter_words")
    a, b = jitted(threefry, k[..., 0:1], k[..., 1:2], c[..., 0:1], c[..., 1:2])
    return cast(xp.concat([a, b], axis=-1), counter_words.dtype)


def _int32(value: Array, name: str) -> Array:
    """Return 32-bit words as int32, their bits unchanged."""
    xp, value = library(value).xp, in_native_order(value)
    if str(value.dtype).rpartition(".")[2] not in ("int32", "uint32"):
        msg = f"{name} must hold 32-bit words, int32 or uint32, got dtype {value.dtype}"
        raise TypeError(msg)
    if value.ndim < 1 or value.shape[-1] != 2:
        msg = f"{name} must have two words along the last axis, got shape {tuple(value.shape)}"
        raise ValueError(msg)
    return cast(value, xp.int32)


def key(seed: int | Array, *, xp: Any = None, device: Any = None) -> Array:
    """Make a key from a seed, or keys from an array of seeds.

    Parameters
    ----------
    seed : int or array of ints
        Any integer; it counts modulo 2**64.
    xp : namespace, optional
        The library of the key; by default that of an array of seeds, else NumPy, which is then imported.
    device : optional
        Where the key is put.

    Returns
    -------
    array
        int32, of shape (..., 2): the high and the low word of each seed.

    Raises
    ------
    TypeError
        If ``seed`` is neither an int nor an array of ints.

    Notes
    -----
    The words are those of ``jax.random.key(seed)`` for every seed from 0 to 2**32 - 1; for negative and greater ones
    too if JAX has its 64-bit types, without which it sets the high word to 0. Keys are plain arrays: stack them, index
    them, pass them through ``jax.jit``.

    Examples
    --------
    >>> from polysoftmax import random
    >>> random.key(7)
    array([0, 7], dtype=int32)
    """
    if not is_number(seed) and is_array(seed):
        return _key_of_array(seed, xp, device)
    if not is_whole(seed):
        msg = f"a seed must be an int or an array of ints, got {type(seed).__name__}"
        raise TypeError(msg)
    whole = int(seed) % (1 << 64)
    xp = standard_numpy() if xp is None else _standard(xp)
    return words_of([_signed(whole >> 32), _signed(whole & 0xFFFFFFFF)], xp, device)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _key_of_array(seed: Array, xp: Any, device: Any) -> Array:
    own, seed = namespace(seed), in_native_order(seed)
    if not is_kind(own, seed.dtype, "integral"):
        msg = f"seeds must be ints, got dtype {seed.dtype}"
        raise TypeError(msg)
    made = own.stack(_high_and_low(seed), axis=-1)
    return made if xp is None else to_library_of(made, _standard(xp).empty(0, device=device))


def _high_and_low(whole: Array) -> tuple[Array, Array]:
    """Return the words of integers of any width, of which the high one continues the sign."""
    xp = namespace(whole)
    if xp.iinfo(whole.dtype).bits == 64:
        whole = cast(whole, xp.int64)  # the same bits; PyTorch cannot shift uint64
        return cast(whole >> 32, xp.int32), cast(whole, xp.int32)
    low = cast(whole, xp.int32)
    return low >> 31 if xp.isdtype(whole.dtype, "signed integer") else xp.zeros_like(low), low


def _standard(xp: Any) -> Any:
    """Return the namespace of the standard for a library's own, whose functions may not take a device."""
    return namespace(xp.empty(0))


def _count(value: int, name: str) -> int:
    if not is_whole(value):
        msg = f"{name} must be an int, got {type(value).__name__}"
        raise TypeError(msg)
    count = int(value)
    if count < 0:
        msg = f"{name} must be 0 or greater, got {count}"
        raise ValueError(msg)
    return count


def split(key: Array | int, num: int = 2) -> Array:
    """Make new, independent keys from one.

    Parameters
    ----------
    key : array, int or generator
        A key, or keys of shape (..., 2), or whatever `sample` takes as one.
    num : int
        How many.

    Returns
    -------
    array
        int32, of shape (..., num, 2).

    Raises
    ------
    TypeError
        If ``key`` is no key, or ``num`` no int.
    ValueError
        If ``num`` is negative.

    Examples
    --------
    >>> from polysoftmax import random
    >>> random.split(random.key(7), 3).shape
    (3, 2)
    """
    num = _count(num, "num")
    k = as_key(key)
    xp = namespace(k)
    index = _along_last(k, xp.arange(num, dtype=xp.int32, device=device_for(k)))
    return xp.stack(jitted(threefry, k[..., 0:1], k[..., 1:2], index, xp.full_like(index, KEYS)), axis=-1)


def _along_last(k: Array, index: Array) -> Array:
    """Give indices as many dimensions as keys have: JAX may be set to raise where a rank is promoted."""
    return namespace(k).reshape(index, (1,) * (k.ndim - 1) + (-1,))


def fold_in(key: Array | int, data: int | Array) -> Array:
    """Make a new key from a key and an integer, such as the number of a row or of a step.

    Parameters
    ----------
    key : array, int or generator
        A key, or keys of shape (..., 2), or whatever `sample` takes as one.
    data : int or array of ints
        It counts modulo 2**64; from -2**32 to -1, modulo 2**32. An array broadcasts against the keys' leading
        dimensions.

    Returns
    -------
    array
        int32, of shape (..., 2).

    Raises
    ------
    TypeError
        If ``key`` is no key, or ``data`` neither an int nor an array of ints.

    Notes
    -----
    ``fold_in(key, i)`` is entry i of ``split(key, n)`` for every n above i. From 2**32 on the high word of the data is
    folded in as well, so no bit of a 64-bit hash is lost.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import random
    >>> bool((random.fold_in(7, 2) == random.split(7, 5)[2]).all())
    True
    """
    k = as_key(key)
    if not is_number(data) and is_array(data):
        return _fold_in_array(k, to_library_of(in_native_order(data), k))
    if not is_whole(data):
        msg = f"data must be an int or an array of ints, got {type(data).__name__}"
        raise TypeError(msg)
    whole = int(data)
    high = _counted(whole >> 32)
    if high:
        k = jitted(fold_high, k, _word(high, k))
    return jitted(fold, k, _word(whole & 0xFFFFFFFF, k))


def _counted(high: int) -> int:
    """Return the high word that is folded in; -1, the sign of a small negative number, is not."""
    return 0 if high == -1 else high & 0xFFFFFFFF


def _word(word: int, k: Array) -> Array:
    return words_of([_signed(word)], namespace(k), device_for(k))


def _fold_in_array(k: Array, data: Array) -> Array:
    xp = namespace(k)
    if not xp.isdtype(data.dtype, "integral"):
        msg = f"data must be ints, got dtype {data.dtype}"
        raise TypeError(msg)
    data = xp.expand_dims(data, axis=-1)
    if xp.iinfo(data.dtype).bits < 64:
        return jitted(fold, k, cast(data, xp.int32))
    return jitted(_fold_64_bits, k, data)


def _fold_64_bits(k: Array, data: Array) -> Array:
    xp = namespace(k)
    high, low = _high_and_low(data)
    counts = high != 0
    if xp.isdtype(data.dtype, "signed integer"):
        counts = counts & (high != -1)
    k = xp.broadcast_arrays(k, low)[0]
    return fold(_formula.words(k).apply_where(counts, _fold_high, (k, high), k), low)


def _fold_high(ops: Ops, k: Array, high: Array) -> Array:
    del ops
    return fold_high(k, high)


def bits(key: Array | int, shape: int | tuple[int, ...], *, xp: Any = None, device: Any = None) -> Array:
    """Random bits, the same on every backend.

    Parameters
    ----------
    key : array, int or generator
        A key, or keys of shape (..., 2): each then gives an array of its own.
    shape : int or tuple of ints
        Shape of the words of one key.
    xp : namespace, optional
        The library of the result; by default that of the key.
    device : optional
        Where the result is put.

    Returns
    -------
    array
        int32 words of 32 random bits, of the keys' leading shape and then ``shape``: word i, counted in C order,
        belongs to the key and i alone.

    Raises
    ------
    TypeError
        If ``key`` is no key, or a length no int.
    ValueError
        If a length is negative.

    Examples
    --------
    >>> from polysoftmax import random
    >>> bool((random.bits(7, 6)[:3] == random.bits(7, 3)).all())
    True
    """
    k = as_key(key)
    if xp is not None:
        k = to_library_of(k, _standard(xp).empty(0, device=device))
    own = namespace(k)
    lengths = shape if isinstance(shape, tuple | list) else (shape,)
    shape = tuple(_count(one, "each length of shape") for one in lengths)
    count = math.prod(shape)
    index = _along_last(k, own.arange(count, dtype=own.int32, device=device_for(k)))
    word = jitted(_public_words, k[..., 0:1], k[..., 1:2], index)
    return own.reshape(word, (*k.shape[:-1], *shape))


def _public_words(k0: Array, k1: Array, index: Array) -> Array:
    return words(k0, k1, index, BITS)


def uniform(key: Array | int, shape: int | tuple[int, ...], *, xp: Any = None, device: Any = None) -> Array:
    """Uniform numbers in (0, 1), the same on every backend.

    Parameters
    ----------
    key, shape, xp, device
        As for `bits`.

    Returns
    -------
    array
        float32, min((w + 1/2)·2^-32, 1 - 2^-24) for a word w: neither 0 nor 1, and finest near 0.

    Raises
    ------
    TypeError
        If ``key`` is no key.

    Examples
    --------
    >>> from polysoftmax import random
    >>> random.uniform(7, 1000).mean().round(1)
    np.float32(0.5)
    """
    return uniform_of(bits(key, shape, xp=xp, device=device))


def gumbel(key: Array | int, shape: int | tuple[int, ...], *, xp: Any = None, device: Any = None) -> Array:
    """Return standard Gumbel variates from the same bits on every backend.

    Parameters
    ----------
    key, shape, xp, device
        As for `bits`.

    Returns
    -------
    array
        float32, -log(-log(1 - u)) for `uniform` numbers u; always finite.

    Raises
    ------
    TypeError
        If ``key`` is no key.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import random
    >>> bool(np.isfinite(random.gumbel(7, 1000)).all())
    True
    """
    return gumbel_of(bits(key, shape, xp=xp, device=device))


def as_key(value: Any, like: Array | None = None) -> Array:
    """Return keys as an int32 array of shape (..., 2), in the library of ``like`` if that is given."""
    if like is not None and type(value) is type(like) and _is_key(value):
        return to_library_of(value, like)
    if is_number(value) and is_whole(value):
        if like is None:
            return key(value)
        return key(value, xp=namespace(like), device=device_for(like))
    found = drawn_words(value)
    if found is None:
        if not is_array(value):
            raise _no_key(type(value).__name__)
        found = jitted(_words_of, value)
    return found if like is None else to_library_of(found, like)


def _no_key(got: str) -> TypeError:
    msg = (
        "a key must be an int seed, a polysoftmax.random.key, a jax.random.key, a generator of NumPy, PyTorch or CuPy, "
        f"or keys of two 32-bit words along the last axis, got {got}; for one key a seed, polysoftmax.random.key(seeds)"
    )
    return TypeError(msg)


def _is_key(value: Array) -> bool:
    """Whether an array is a key, or keys, as they are computed with."""
    return bool(value.dtype == namespace(value).int32 and value.ndim > 0 and value.shape[-1] == 2)


def _words_of(keys: Array) -> Array:
    """Return the words of a seed without axes, or of keys, which are told from seeds by dtype and last axis alone."""
    found = in_native_order(key_data(keys))
    xp = namespace(found)
    if found.ndim == 0 and xp.isdtype(found.dtype, "integral"):
        return _key_of_array(found, None, None)
    kind, count = str(found.dtype).rpartition(".")[2], found.shape[-1] if found.ndim else 0
    if kind == "uint32" and count == 4:  # JAX's, raw; int32 are what seeds may be
        return two_words_of_four(found)
    if kind not in ("int32", "uint32") or count != 2:
        raise _no_key(f"an array of dtype {found.dtype} and shape {tuple(found.shape)}")
    return cast(found, xp.int32)


def two_words_of_four(four: Array) -> Array:
    """Return one key of two words for each of JAX's keys of four."""
    xp = namespace(four)
    k = xp.astype(four, xp.int32)
    return xp.concat(jitted(threefry, k[..., 0:1], k[..., 1:2], k[..., 2:3], k[..., 3:4]), axis=-1)
