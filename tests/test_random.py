"""Random words: Random123's known answers, and the same bits from every backend as from whole numbers in Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest
from scipy import stats

from polysoftmax import _threefry, random
from polysoftmax.testing import Adapter, Backend

if TYPE_CHECKING:
    from collections.abc import Callable

MASK = 0xFFFFFFFF
KNOWN = (
    # key, counter, answer: kat_vectors of Random123, threefry2x32 with 20 rounds
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((MASK, MASK), (MASK, MASK), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)
KEYS = [(0, 7), (0xDEADBEEF, 0x12345678), (MASK, 1)]

words_alone = pytest.mark.backends(lambda can: "func" not in can.how and "autograd" not in can.how)  # nothing floats
# PyTorch compiles the same words for keys with leading dimensions and for `uniform`.
eager_words = pytest.mark.backends(lambda can: not can.traced and "autograd" not in can.how)
untraced = pytest.mark.backends(lambda can: not can.traced)  # nothing is called in the backend's way


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Compute a block in Python's own integers."""
    schedule = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = ((c + k) & MASK for c, k in zip(counter, key, strict=True))
    for i in range(20):
        by = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        a = (a + b) & MASK
        b = (((b << by) | (b >> (32 - by))) & MASK) ^ a
        if i % 4 == 3:
            a = (a + schedule[(i // 4 + 1) % 3]) & MASK
            b = (b + schedule[(i // 4 + 2) % 3] + i // 4 + 1) & MASK
    return a, b


def word(key: tuple[int, int], index: int, domain: int) -> int:
    return threefry(key, (index & MASK, domain))[0]


def ints(lib: Adapter, words: Any) -> Any:
    return lib.asarray(np.asarray(words, np.uint32).view(np.int32), "int32")


def unsigned(lib: Adapter, y: Any) -> list[Any]:
    assert lib.dtype_name(y) == "int32"
    return lib.values(y).view(np.uint32).tolist()


def test_known_answers_of_the_reference() -> None:
    assert [threefry(key, counter) for key, counter, _ in KNOWN] == [answer for _, _, answer in KNOWN]


@eager_words
def test_known_answers(lib: Adapter) -> None:
    key, counter, answer = (ints(lib, column) for column in zip(*KNOWN, strict=True))
    y = lib.call(random.threefry2x32, key, counter)
    lib.require(y, (3, 2), "int32")
    assert unsigned(lib, y) == unsigned(lib, answer)


def test_known_answers_in_uint32() -> None:
    for key, counter, answer in KNOWN:
        y = random.threefry2x32(np.asarray(key, np.uint32), np.asarray(counter, np.uint32))
        assert y.dtype == np.uint32
        assert tuple(y.tolist()) == answer


@eager_words
def test_one_key_and_many_counters(lib: Adapter) -> None:
    counters = [(i, 5) for i in range(4)]
    y = lib.call(random.threefry2x32, ints(lib, KEYS[1]), ints(lib, counters))
    assert unsigned(lib, y) == [list(threefry(KEYS[1], counter)) for counter in counters]


@untraced
@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, (0, 0)),
        (7, (0, 7)),
        (-1, (MASK, MASK)),
        (-7, (MASK, MASK - 6)),
        (2**31, (0, 2**31)),
        (2**63 + 5, (2**31, 5)),
        (2**64 + 3, (0, 3)),
        (-(2**64) - 1, (MASK, MASK)),
        (np.int64(-2), (MASK, MASK - 1)),
        (np.uint64(2**64 - 1), (MASK, MASK)),
    ],
)
def test_seeds(lib: Adapter, seed: int, words: tuple[int, int]) -> None:
    y = random.key(seed, xp=lib.xp)
    lib.require(y, (2,), "int32")
    assert tuple(unsigned(lib, y)) == words


def test_namespaces_whose_functions_take_no_device() -> None:
    class Bare:  # as CuPy's own is
        empty = staticmethod(np.zeros)

    np.testing.assert_array_equal(random.key(7, xp=Bare), [0, 7])
    np.testing.assert_array_equal(random.bits(7, 3, xp=Bare), random.bits(7, 3))


def test_seeds_make_jax_keys() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        for seed in (0, 7, 2**31, 2**40 + 3, -1):
            ours = np.asarray(random.key(seed)).view(np.uint32)
            assert ours.tolist() == np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()


@untraced
@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_arrays_of_seeds(lib: Adapter, kind: str) -> None:
    if kind.endswith("64") and lib.backend.library == "jax" and lib.backend is not Backend.JAX_X64:
        pytest.skip("the backend has no 64-bit integers")
    limits = np.iinfo(kind)
    seeds = [[0, 7, int(limits.min)], [1, int(limits.max), int(limits.max) - 1]]
    y = random.key(lib.asarray(seeds, kind))
    lib.require(y, (2, 3, 2), "int32")
    whole = [[[(seed % 2**64) >> 32, seed & MASK] for seed in row] for row in seeds]
    assert unsigned(lib, y) == whole


def test_keys_without_a_library_are_numpys() -> None:
    assert type(random.key(7)) is np.ndarray
    assert type(random.split(7)) is np.ndarray


@eager_words
def test_bits(lib: Adapter) -> None:
    y = lib.call(random.bits, ints(lib, KEYS[1]), (2, 3))
    lib.require(y, (2, 3), "int32")
    assert unsigned(lib, y) == [[word(KEYS[1], 3 * row + i, 0) for i in range(3)] for row in range(2)]
    y = lib.call(random.bits, ints(lib, KEYS), 4)
    assert unsigned(lib, y) == [[word(key, i, 0) for i in range(4)] for key in KEYS]
    lib.require(lib.call(random.bits, ints(lib, KEYS), ()), (3,), "int32")
    lib.require(lib.call(random.bits, ints(lib, KEYS[0]), 0), (0,), "int32")


@eager_words
def test_split_and_fold_in(lib: Adapter) -> None:
    key = ints(lib, KEYS[1])
    children = [list(threefry(KEYS[1], (i, 3))) for i in range(3)]
    y = lib.call(random.split, key, 3)
    lib.require(y, (3, 2), "int32")
    assert unsigned(lib, y) == children
    for i in lib.some(range(3)):
        assert unsigned(lib, lib.call(random.fold_in, key, i)) == children[i]
    assert unsigned(lib, lib.call(random.fold_in, key, lib.asarray([2, 0], "int32"))) == [children[2], children[0]]
    assert unsigned(lib, lib.call(random.fold_in, key, -1)) == list(threefry(KEYS[1], (MASK, 3)))
    assert unsigned(lib, lib.call(random.split, key)) == children[:2]
    lib.require(lib.call(random.split, key, 0), (0, 2), "int32")


@words_alone
def test_keys_have_leading_dimensions(lib: Adapter) -> None:
    keys = ints(lib, KEYS)
    assert unsigned(lib, lib.call(random.split, keys, 2)) == [[list(threefry(k, (i, 3))) for i in (0, 1)] for k in KEYS]
    folded = lib.call(random.fold_in, keys, lib.asarray([4, 5, 6], "int32"))
    assert unsigned(lib, folded) == [list(threefry(k, (i, 3))) for k, i in zip(KEYS, (4, 5, 6), strict=True)]


EDGES = (0, 1, 127, 128, 255, 65_535, 65_536, 2**24, 2**24 + 1, 2**31 - 1, 2**31, MASK - 256, MASK - 1, MASK)


def exact_uniform(w: int) -> float:
    """Follow the definition, rounding to float32 after each step as it says."""
    whole = np.float32(np.float32(w >> 16) * np.float32(65536) + np.float32(w & 65535))
    return min(float(np.float32(whole + np.float32(0.5))) * 2.0**-32, 1 - 2.0**-24)


@eager_words
def test_uniform_of_edges(lib: Adapter) -> None:
    y = lib.call(random.uniform_of, ints(lib, EDGES))
    lib.require(y, (len(EDGES),), "float32")
    assert lib.values(y).tolist() == [exact_uniform(w) for w in EDGES]
    assert exact_uniform(0) == 2.0**-33
    assert exact_uniform(MASK) == 1 - 2.0**-24


@eager_words
def test_gumbel_of_edges(lib: Adapter) -> None:
    y = lib.call(random.gumbel_of, ints(lib, EDGES))
    lib.require(y, (len(EDGES),), "float32")
    with mpmath.workdps(40):
        expected = [float(-mpmath.log(-mpmath.log1p(-mpmath.mpf(exact_uniform(w))))) for w in EDGES]
    np.testing.assert_allclose(lib.values(y), expected, rtol=2e-6, atol=2e-6)


@words_alone
def test_uniform_and_gumbel_come_from_bits(lib: Adapter) -> None:
    key = ints(lib, KEYS[0])
    w = [word(KEYS[0], i, 0) for i in range(5)]
    assert lib.values(lib.call(random.uniform, key, 5)).tolist() == [exact_uniform(one) for one in w]
    expected = [-math.log(-math.log1p(-exact_uniform(one))) for one in w]
    np.testing.assert_allclose(lib.values(lib.call(random.gumbel, key, 5)), expected, rtol=2e-6, atol=2e-6)


@untraced
@pytest.mark.parametrize("function", [random.bits, random.uniform, random.gumbel])
def test_a_key_moves_to_another_library(lib: Adapter, function: Callable[..., Any]) -> None:
    there = function(random.key(7), 5, xp=lib.xp)
    assert type(there) is type(lib.asarray([0.0], "float32"))
    assert lib.values(there).astype(np.float64).round(5).tolist() == function(7, 5).astype(np.float64).round(5).tolist()


def test_keys_pass_through_jit_and_vmap() -> None:
    jax = pytest.importorskip("jax")
    keys = random.split(random.key(3, xp=jax.numpy), 4)
    expected = random.bits(keys, 6)
    np.testing.assert_array_equal(jax.vmap(lambda key: random.bits(key, 6))(keys), expected)
    np.testing.assert_array_equal(jax.jit(random.bits, static_argnums=1)(keys, 6), expected)


def test_typed_keys_of_jax() -> None:
    jax = pytest.importorskip("jax")
    key = jax.random.key(7)
    np.testing.assert_array_equal(random.bits(key, 4), random.bits(7, 4))
    np.testing.assert_array_equal(jax.jit(lambda key: random.bits(key, 4))(key), random.bits(7, 4))
    np.testing.assert_array_equal(random.bits(jax.random.split(key, 3), 4).shape, (3, 4))
    np.testing.assert_array_equal(random.bits(jax.random.PRNGKey(7), 4), random.bits(7, 4))


def test_four_words_are_folded_into_two() -> None:
    jax = pytest.importorskip("jax")
    key = jax.random.key(7, impl="rbg")
    four = [int(one) for one in jax.random.key_data(key)]
    folded = threefry((four[0], four[1]), (four[2], four[3]))
    y = np.asarray(random.bits(key, 4)).view(np.uint32)
    assert y.tolist() == [word(folded, i, 0) for i in range(4)]


def test_numpy_generator() -> None:
    first, second = (random.bits(np.random.default_rng(5), 4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    generator = np.random.default_rng(5)
    np.testing.assert_array_equal(random.bits(generator, 4), first)
    assert (random.bits(generator, 4) != first).any(), "the generator did not move on"
    drawn = np.random.default_rng(5).integers(0, 2**32, size=2, dtype=np.uint32).tolist()
    assert first.view(np.uint32).tolist() == [word(tuple(drawn), i, 0) for i in range(4)]


def test_torch_generator() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(5)
    first = random.bits(generator, 4)
    assert isinstance(first, torch.Tensor)
    assert (random.bits(generator, 4) != first).any(), "the generator did not move on"
    assert (random.bits(torch.Generator().manual_seed(5), 4) == first).all()


@pytest.mark.gpu
def test_cupy_generator() -> None:
    cupy = pytest.importorskip("cupy")
    generator = cupy.random.default_rng(5)
    first = random.bits(generator, 4)
    assert (random.bits(generator, 4) != first).any(), "the generator did not move on"


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return random.uniform(2026, 1_000_000).astype(np.float64)


def test_uniform_numbers_are_uniform(uniforms: np.ndarray) -> None:
    counts = np.histogram(uniforms, bins=1000, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-4
    lowest = np.histogram(uniforms[uniforms < 1e-3], bins=20, range=(0, 1e-3))[0]
    assert stats.chisquare(lowest).pvalue > 1e-4
    pairs = np.histogram2d(uniforms[0::2], uniforms[1::2], bins=30, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


def test_gumbel_variates_are_gumbel() -> None:
    g = random.gumbel(2027, 1_000_000).astype(np.float64)
    assert np.isfinite(g).all()
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-4


def test_every_bit_is_fair() -> None:
    w = random.bits(2028, 200_000).view(np.uint32)
    ones = np.asarray([int(((w >> bit) & 1).sum()) for bit in range(32)])
    assert (np.abs(ones - 100_000) < 4.5 * math.sqrt(50_000)).all()


def test_successive_keys_are_independent() -> None:
    for keys in (random.split(11, 20_000), random.key(np.arange(20_000))):
        u = random.uniform(keys, 2).astype(np.float64)
        pairs = np.histogram2d(u[:-1, 0], u[1:, 0], bins=10, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
        within = np.histogram2d(u[:, 0], u[:, 1], bins=10, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(within.ravel()).pvalue > 1e-4


@eager_words
def test_domains_are_the_second_word_of_the_counter(lib: Adapter) -> None:
    k0, k1 = (ints(lib, [one]) for one in KEYS[1])
    index = lib.asarray([0, 1, 255, 128_255], "int32")
    for domain, number in ((_threefry.BITS, 0), (_threefry.BLOCKS, 1), (_threefry.TOKENS, 2), (_threefry.KEYS, 3)):
        y = lib.call(_threefry.words, k0, k1, index, domain)
        assert unsigned(lib, y) == [word(KEYS[1], i, number) for i in (0, 1, 255, 128_255)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(1.5), TypeError, "a seed must be an int or an array of ints, got float"),
        (lambda: random.key(True), TypeError, "got bool"),
        (lambda: random.key("7"), TypeError, "got str"),
        (lambda: random.key([1, 2]), TypeError, "got list"),
        (lambda: random.key(np.ones(2)), TypeError, "seeds must be ints, got dtype float64"),
        (lambda: random.split(7, -1), ValueError, "num must be 0 or greater, got -1"),
        (lambda: random.split(7, 1.5), TypeError, "num must be an int, got float"),
        (lambda: random.split(7, True), TypeError, "num must be an int, got bool"),
        (lambda: random.bits(7, (2, -1)), ValueError, "each length of shape must be 0 or greater, got -1"),
        (lambda: random.uniform(7, 2.5), TypeError, "each length of shape must be an int, got float"),
        (lambda: random.gumbel(7, "23"), TypeError, "each length of shape must be an int, got str"),
        (lambda: random.split("7"), TypeError, "a key must be an int seed.*got str"),
        (lambda: random.split(None), TypeError, "got NoneType"),
        (lambda: random.split(True), TypeError, "got bool"),
        (lambda: random.fold_in(7, 1.5), TypeError, "data must be an int or an array of ints, got float"),
        (lambda: random.fold_in(7, np.ones(2)), TypeError, "data must be ints, got dtype float64"),
        (lambda: random.threefry2x32(np.zeros(2, np.int64), np.zeros(2, np.int32)), TypeError, "key_words must hold"),
        (lambda: random.threefry2x32(np.zeros(2, np.int32), np.zeros(3, np.int32)), ValueError, r"got shape \(3,\)"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
