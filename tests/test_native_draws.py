"""The kernels of the native library that truncate rows and draw from them, called through its C interface."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random

if TYPE_CHECKING:
    from collections.abc import Sequence

NATIVE = Path(polysoftmax.__file__).parent / "native"
LIBRARY = Path(os.environ.get("POLYSOFTMAX_LIBRARY", NATIVE / "libpolysoftmax.so"))
TRUNCATE, SAMPLE, WORDS = 14, 15, 16
CODES = ["bool", *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u"))]
CODES += ["float16", "bfloat16", "float32", "float64"]

LENGTHS = (1, 2, 3, 10, 64, 65, 255, 256, 257, 1000, 50257)
SOME = (1, 2, 10, 65, 257, 1000)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        pytest.skip("the native library is not built")
    return ctypes.CDLL(str(LIBRARY))


def run(
    library: ctypes.CDLL,
    kernel: int,
    batch: tuple[int, ...],
    n: int,
    dtype: Any,
    options: tuple[int, ...],
    operands: Sequence[tuple[np.ndarray | None, bool]],
) -> None:
    """Run a kernel on arrays of the batch's dimensions and, where it is said, one more along the row."""
    words = [kernel, len(batch), n, len(operands), CODES.index(str(np.dtype(dtype)))]
    words += [*options, *(0,) * (8 - len(options)), *batch]
    addresses = []
    for array, has_row in operands:
        addresses.append(0 if array is None else array.ctypes.data)
        if array is None:
            words += [0] * (3 + len(batch))
            continue
        of_row, of_batch = (array.strides[-1], array.strides[:-1]) if has_row else (0, array.strides)
        words += [1, CODES.index(str(array.dtype)), of_row, *of_batch]
    packed = [(ctypes.c_int64 * len(some))(*some) for some in (words, addresses)]
    assert library.polysoftmax_run(*packed) == 0


def parameters(batch: tuple[int, ...], compute: Any, options: dict[str, Any]) -> list[tuple[np.ndarray | None, bool]]:
    """Return temperature, k, p and min_p as operands; each is a number or an array with one entry a row."""
    found: list[tuple[np.ndarray | None, bool]] = []
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = options.get(name)
        dtype = np.int64 if name == "top_k" else compute
        whole = value is None or (name == "top_k" and np.ndim(value) == 0)
        found.append((None if whole else np.broadcast_to(np.asarray(value, dtype), batch), False))
    return found


def common_top_k(options: dict[str, Any]) -> int:
    top_k = options.get("top_k")
    return top_k if top_k is not None and np.ndim(top_k) == 0 else 0


def truncate(library: ctypes.CDLL, x: np.ndarray, where: np.ndarray | None = None, **options: Any) -> np.ndarray:
    batch, compute = x.shape[:-1], np.float64 if x.dtype == np.float64 else np.float32
    y = np.empty(x.shape, x.dtype)
    temperature, k, p, min_p = parameters(batch, compute, options)
    mask = None if where is None else np.broadcast_to(where, x.shape)
    operands = [(x, True), temperature, (mask, True), k, p, min_p, (y, True)]
    run(library, TRUNCATE, batch, x.shape[-1], compute, (common_top_k(options),), operands)
    return y


def sample(
    library: ctypes.CDLL, x: np.ndarray, keys: np.ndarray, where: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """Draw from every row: with keys of shape (2,) folded with the row's number, or of shape (*batch, 2 * draws)."""
    batch, compute = x.shape[:-1], np.float64 if x.dtype == np.float64 else np.float32
    one_key = keys.ndim == 1 and batch != ()
    draws = 1 if one_key else keys.shape[-1] // 2
    tokens = np.empty((*batch, draws), np.int64)
    temperature, k, p, min_p = parameters(batch, compute, options)
    mask = None if where is None else np.broadcast_to(where, x.shape)
    spread = np.broadcast_to(keys, (*batch, keys.shape[-1]))
    operands = [(x, True), (spread, True), temperature, (mask, True), k, p, min_p, (tokens, True)]
    run(library, SAMPLE, batch, x.shape[-1], compute, (common_top_k(options), draws, int(one_key), 1), operands)
    return tokens[..., 0] if draws == 1 else tokens


def threefry(library: ctypes.CDLL, *words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.empty_like(words[0]), np.empty_like(words[0])
    operands = [(one, True) for one in (*words, a, b)]
    run(library, WORDS, words[0].shape[:-1], words[0].shape[-1], np.float32, (), operands)
    return a, b


def seeded(*given: Any) -> np.random.Generator:
    return np.random.default_rng(list(repr(given).encode()))


def plain(generator: np.random.Generator, rows: int, n: int, dtype: Any) -> np.ndarray:
    return (generator.standard_normal((rows, n)) * 3).astype(dtype)


def tied(generator: np.random.Generator, rows: int, n: int, dtype: Any) -> np.ndarray:
    """Return rows of many equal entries, of both zeros among others."""
    x = np.round(plain(generator, rows, n, np.float32) / 2).astype(dtype)
    x[::3] *= -1
    return x


def odd(generator: np.random.Generator, rows: int, n: int, dtype: Any) -> np.ndarray:
    x = plain(generator, rows, n, dtype)
    for start, value in ((0, np.nan), (2, np.inf), (4, -np.nan), (9, -np.inf)):
        x[start::11, (start * n) // 11] = value
    x[1::11] = -np.inf
    x[3::11] = 0.0
    x[5::11] = -np.inf
    x[5::11, n // 2] = -6e4
    x[6::11, : n // 2] = -np.inf
    x[7::11] *= np.asarray(1e-6 if x.dtype.itemsize == 2 else 1e-30, dtype)
    return x


MAKERS = {make.__name__: make for make in (plain, tied, odd)}


def each(values: list[float], rows: int) -> np.ndarray:
    return seeded(values).choice(values, rows)


def settings(rows: int) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "temperatures": {"temperature": each([0, 0.5, 1, 2, np.inf, np.nan, -1], rows)},
        "one token": {"top_k": 1},
        "top_k": {"top_k": 50},
        "top_k of most": {"top_k": 290},
        "top_ks": {"top_k": each([0, 1, 2, 7, 40, 1000, -1], rows).astype(int)},
        "top_p": {"top_p": 0.9},
        "top_p of equals": {"top_p": 0.6, "temperature": np.inf},
        "top_ps": {"top_p": each([0, 0.1, 0.5, 0.99, 1, np.nan, 2], rows), "temperature": 0.8},
        "min_p": {"min_p": 0.05},
        "min_ps": {"min_p": each([0, 0.01, 0.5, 1, -1], rows)},
        "all": {"temperature": 1.3, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
        "greedy": {"temperature": 0, "top_k": 3},
    }


def test_words_are_those_of_random123(library: ctypes.CDLL) -> None:
    zero, one = 0, 0xFFFFFFFF
    known = [
        ((zero, zero, zero, zero), (0x6B200159, 0x99BA4EFE)),
        ((one, one, one, one), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    given = np.asarray([words for words, _ in known], np.uint32).view(np.int32)
    answer = np.stack(threefry(library, *np.ascontiguousarray(given.T)), axis=-1)
    np.testing.assert_array_equal(answer.view(np.uint32), [words for _, words in known])


def test_words_are_those_of_the_generator(library: ctypes.CDLL) -> None:
    k0, k1, c0, c1 = seeded("words").integers(-(2**31), 2**31, (4, 7, 1001)).astype(np.int32)
    expected = random.threefry2x32(np.stack([k0, k1], axis=-1), np.stack([c0, c1], axis=-1))
    np.testing.assert_array_equal(np.stack(threefry(library, k0, k1, c0, c1), axis=-1), expected)
    backwards = threefry(library, *(one[::-1, ::-2] for one in (k0, k1, c0, c1)))
    np.testing.assert_array_equal(np.stack(backwards, axis=-1), expected[::-1, ::-2])


def order_of(row: np.ndarray) -> np.ndarray:
    """Return the tokens of a row in order."""
    return np.argsort(-row.astype(np.float64), kind="stable")[: int((row > -np.inf).sum())]


def exact_count(row: np.ndarray, options: dict[str, float], slack: float = 0.0) -> int:
    """Return how many tokens are left of a row; ``slack`` loosens top_p and min_p by a relative amount."""
    real = np.float64 if row.dtype == np.float64 else np.float32
    t, p, min_p = (
        float(real(options.get(name, off))) for name, off in (("temperature", 1), ("top_p", 1), ("min_p", 0))
    )
    order = order_of(row)
    order = order[: int(options.get("top_k", 0)) or None]
    x = row[order].astype(np.longdouble)
    mass = np.exp((x - x[0]) / np.longdouble(t)) if t else (x == x[0]).astype(np.longdouble)
    if p < 1:
        share = p * float(mass.sum()) * (1 + slack)
        kept = int((np.cumsum(mass) < share).sum()) + 1
        mass = mass[:kept]
    return int((mass >= min_p * (1 - slack)).sum())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_what_is_left_is_what_exact_arithmetic_leaves(library: ctypes.CDLL, n: int, dtype: Any) -> None:
    """Masses are exact to about 1e-13 of their sum, so rows of random logits lie far from the edge."""
    rows = 2 if n > 20_000 else 20
    several: tuple[dict[str, Any], ...] = (
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 2.5},
        {"top_p": 0.0},
        {"top_p": 0.5, "temperature": 0.0},
        {"top_p": 0.5, "temperature": math.inf},
        {"min_p": 0.03},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": max(1, n // 2), "top_p": 0.95, "min_p": 0.001, "temperature": 0.6},
    )
    for make in (plain, tied):
        x = make(seeded(make.__name__, n), rows, n, dtype)
        for options in several:
            left = truncate(library, x, **options)
            slack = 1e-11 if 0 < options.get("temperature", 1) < math.inf and options.get("min_p") != 1 else 0
            for row, kept in zip(x, left, strict=True):
                least, most = (exact_count(row, options, sign * slack) for sign in (-1, 1))
                assert least == most
                expected = np.full_like(row, -np.inf)
                expected[order_of(row)[:most]] = row[order_of(row)[:most]]
                np.testing.assert_array_equal(kept.view(np.uint8), expected.view(np.uint8))  # -0 stays -0


def test_counts_are_exact_among_many_ties(library: ctypes.CDLL) -> None:
    n = 200_001
    x = np.zeros((2, n), np.float32)
    x[1, ::2] = -1
    for k in (1, 77, 12_345, 100_001, n - 1):
        left = truncate(library, x, top_k=k)
        assert ((left > -np.inf).sum(axis=1) == k).all()
        assert (left[0, :k] == 0).all()
    left = truncate(library, x, top_p=0.5, temperature=np.inf)
    assert ((left > -np.inf).sum(axis=1) == 100_001).all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (n, dtype)
        for dtype in ("float32", "float64", "bfloat16", "float16")
        for n in (LENGTHS if "32" in dtype else SOME)
    ],
)
def test_same_tokens_as_the_formula(library: ctypes.CDLL, n: int, dtype: str, make: str) -> None:
    real = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rows = 11 if n > 20_000 else 44
    generator = seeded(make, n, dtype)
    x = MAKERS[make](generator, rows, n, real)
    mask = generator.random(x.shape) < 0.3
    keys = random.split(n, rows)
    edges = lost = 0
    for name, options in settings(rows).items():
        for where in (None, mask):
            held = x if where is None else np.where(where, x, np.asarray(-np.inf, x.dtype))
            with np.errstate(all="ignore"), polysoftmax.engine("portable"):
                left = polysoftmax.truncate(held, **options)
                tokens = polysoftmax.sample(x, keys, where=where, **options)
            kept = truncate(library, x, where, **options)
            drawn = sample(library, x, keys, where, **options)
            removed = np.isneginf(left.astype(np.float64)) & ~np.isneginf(held.astype(np.float64))
            gone = np.isneginf(kept.astype(np.float64)) & ~np.isneginf(held.astype(np.float64))
            same = (removed == gone).all(axis=1)
            np.testing.assert_array_equal(kept[same].astype(np.float64), left[same].astype(np.float64), err_msg=name)
            alike = same & (drawn == tokens)
            np.testing.assert_array_equal((drawn == -1)[same], (tokens == -1)[same], err_msg=name)
            edges, lost = edges + (~same).sum(), lost + (same & ~alike).sum()
    # The formula's masses are off by 1e-8 of their sum as a rule, by 1e-7 at worst, and a token at the edge weighs 1e-4
    # in a row of 20,000: one row in a thousand may end at another token. A score is within rounding of another once in
    # a million draws.
    assert edges <= 3
    assert lost <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_a_draw_is_one_from_what_is_left(library: ctypes.CDLL, n: int, dtype: Any) -> None:
    rows = 12 if n > 20_000 else 33
    for make in MAKERS.values():
        x = make(seeded("left", n), rows, n, dtype)
        keys = random.split(n + 1, rows)
        for name, options in settings(rows).items():
            left = truncate(library, x, **options)
            t = {one: options[one] for one in options if one == "temperature"}
            at_once, in_two = sample(library, x, keys, **options), sample(library, left, keys, **t)
            np.testing.assert_array_equal(at_once, in_two, err_msg=name)
            again = truncate(library, left, **{**options, "top_p": 1.0, "min_p": 0.0})
            np.testing.assert_array_equal(again, left)


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return rows of the same values in several layouts of memory."""
    rows, n = x.shape
    wide = np.zeros((rows, 3 * n + 1), x.dtype)
    wide[:, 1::3] = x
    reversed_rows = np.ascontiguousarray(x[::-1, ::-1])
    moved = np.zeros(x.nbytes + 1, np.uint8)
    moved[1:] = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    return {
        "columns": np.asfortranarray(x),
        "steps": wide[:, 1::3],
        "backwards": reversed_rows[::-1, ::-1],
        "misaligned": moved[1:].view(x.dtype).reshape(x.shape),
    }


@pytest.mark.parametrize("n", [1, 2, 10, 64, 65, 300, 5000, 140_000])
def test_bits_are_those_of_the_row(library: ctypes.CDLL, n: int) -> None:
    """In any batch, at any place in it, in any layout, with any number of threads."""
    rows = 3 if n > 10_000 else 70
    several: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_k": 7, "top_p": 0.9},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 2.0},
    )
    for dtype in (np.float32, np.float64):
        x = plain(seeded("bits", n), rows, n, dtype)
        keys = random.split(n, rows)
        for options in several:
            library.polysoftmax_set_threads(1)
            left = truncate(library, x, **options)
            expected = sample(library, x, keys, **options)
            for i in range(0, rows, 4):
                alone = sample(library, x[i : i + 1], keys[i : i + 1], **options)
                assert alone[0] == expected[i]
                np.testing.assert_array_equal(truncate(library, x[i], **options), left[i])
            for threads in (1, 2, 5):
                library.polysoftmax_set_threads(threads)
                for name, rows_there in layouts(x).items():
                    np.testing.assert_array_equal(truncate(library, rows_there, **options), left, err_msg=name)
                    drawn = sample(library, rows_there, keys, **options)
                    np.testing.assert_array_equal(drawn, expected, err_msg=name)
                last = sample(library, x[-1:], keys[-1:], **options)
                assert last[0] == expected[-1]
    library.polysoftmax_set_threads(0)


@pytest.mark.parametrize("n", [2, 10, 300, 3000])
def test_keys(library: ctypes.CDLL, n: int) -> None:
    """One key is folded with the number of each row; several keys of a row draw what they would one by one."""
    x = plain(seeded("keys", n), 60, n, np.float32).reshape(4, 5, 3, n)
    key = random.key(11)
    folded = random.fold_in(key, np.arange(60)).reshape(4, 5, 3, 2)
    for options in ({}, {"top_k": 5}, {"temperature": 0.0}):
        expected = sample(library, x, folded, **options)
        np.testing.assert_array_equal(sample(library, x, key, **options), expected)
        by_column = np.asarray(x.transpose(3, 1, 0, 2), order="C").transpose(2, 1, 3, 0)
        np.testing.assert_array_equal(sample(library, by_column, key, **options), expected)
        with polysoftmax.engine("portable"):
            np.testing.assert_array_equal(polysoftmax.sample(x, key, **options), expected)
        for draws in (2, 9, 700):
            keys = random.split(n, 60 * draws).reshape(4, 5, 3, draws, 2)
            tokens = sample(library, x, keys.reshape(4, 5, 3, 2 * draws), **options)
            for i in (0, draws // 2, draws - 1):
                one = sample(library, x, np.ascontiguousarray(keys[..., i, :]), **options)
                np.testing.assert_array_equal(tokens[..., i], one)


@pytest.mark.parametrize("n", [10, 1000])
def test_everything_above_minus_inf_is_alike_at_infinite_temperature(library: ctypes.CDLL, n: int) -> None:
    x = np.full((50, n), -3e38, np.float32)
    x[:, 3] = 3e38  # x - max overflows
    x[:, 5] = -np.inf
    for options in ({}, {"top_k": n - 1}, {"top_p": 0.9999}):
        assert len(set(sample(library, x, random.key(3), temperature=np.inf, **options))) > 5
    assert (sample(library, x, random.key(3), temperature=0.0) == 3).all()


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    """Return by how many standard deviations Pearson's statistic exceeds its mean, over tokens expected 5 times."""
    expected = p * len(tokens)
    often = expected >= 5
    seen = np.bincount(tokens, minlength=len(p))[often]
    freedom = max(1, int(often.sum()) - 1)
    return float((((seen - expected[often]) ** 2 / expected[often]).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [2, 3, 10, 100, 1000])
def test_frequencies(library: ctypes.CDLL, n: int) -> None:
    x = plain(seeded("frequencies", n), 1, n, np.float32)
    keys = random.split(n, 100_000).reshape(1, -1)
    for options in ({}, {"temperature": 2.0}, {"top_k": 7}, {"top_p": 0.8}):
        tokens = sample(library, x, keys, **options)
        z = truncate(library, x, **options)[0].astype(np.float64) / options.get("temperature", 1.0)
        p = np.exp(z - z.max())
        p /= p.sum()
        assert (p[tokens[0]] > 0).all()
        assert chi_square(tokens[0], p) < 4
