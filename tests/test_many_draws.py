"""Several draws from a row: which keys they use, what is distinct, and the law of both."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

import polysoftmax
from polysoftmax import random
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polysoftmax.testing import Adapter

INF = math.inf

# Shapes, keys and options of all kinds: not where each is a compilation.
eager = pytest.mark.backends(lambda can: not (can.traced or can.compiles or can.lazy))
compiled = pytest.mark.backends(lambda can: can.traced and "func" not in can.how and "64" not in can.how)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3, "temperature": 2.0},
    "top_p": {"top_p": 0.8},
    "limits": {"temperature": np.asarray([0.0, INF, 1.0])},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = _library.num_threads()
    yield
    polysoftmax.set_num_threads(before)


def logits(*shape: int) -> np.ndarray:
    return (np.random.default_rng(shape).standard_normal(shape) * 3).astype(np.float32)


def folded(row_keys: np.ndarray, draws: int) -> np.ndarray:
    """Return the keys of several draws, shape (draws, ..., 2): the key of the row, then that folded with 1, 2, ...."""
    return np.stack([row_keys, *(random.fold_in(row_keys, j) for j in range(1, draws))])


def sample(lib: Adapter, x: np.ndarray, key: Any, **options: Any) -> np.ndarray:
    given = {name: one if np.ndim(one) == 0 else lib.asarray(one, "float32") for name, one in options.items()}
    key = key if np.ndim(key) == 0 else lib.asarray(key, "int32")
    return np.asarray(lib.values(lib.call(polysoftmax.sample, lib.asarray(x, "float32"), key, **given))).astype(int)


@eager
@each_option
@pytest.mark.parametrize("n", [1, 2, 10, 100, 700])
def test_each_draw_uses_the_key_folded_with_its_number(lib: Adapter, n: int, options: dict[str, Any]) -> None:
    x, draws = logits(3, n), 5
    keys = folded(random.fold_in(7, np.arange(3)), draws)
    expected = np.stack([sample(lib, x, key, **options) for key in keys], axis=-1)
    np.testing.assert_array_equal(sample(lib, x, 7, draws=draws, **options), expected)
    several = random.split(11, 6).reshape(2, 3, 2)
    expected = np.stack([sample(lib, x, key, **options) for key in folded(several, draws)], axis=-1)
    np.testing.assert_array_equal(sample(lib, x, several, draws=draws, **options), expected)


@compiled
def test_each_draw_uses_the_key_folded_with_its_number_when_compiled(lib: Adapter) -> None:
    x = logits(3, 40)
    keys = folded(random.fold_in(7, np.arange(3)), 4)
    one_by_one = np.stack([sample(lib, x, key) for key in keys], axis=-1)
    np.testing.assert_array_equal(sample(lib, x, 7, draws=4), one_by_one)
    distinct = sample(lib, x, 7, draws=4, replace=False)
    np.testing.assert_array_equal(distinct, one_after_another(lib, x, keys))


def one_after_another(lib: Adapter, x: np.ndarray, keys: np.ndarray, **options: Any) -> np.ndarray:
    """Draw with each of the keys from what the draws before have left of each row."""
    left, rows, tokens = x.copy(), np.arange(len(x)), []
    for key in keys:
        token = sample(lib, left, key, **options)
        left[rows[token >= 0], token[token >= 0]] = -INF
        tokens.append(token)
    return np.stack(tokens, axis=-1)


@eager
@pytest.mark.parametrize("n", [2, 5, 40, 700])
def test_distinct_draws_are_from_what_the_ones_before_have_left(lib: Adapter, n: int) -> None:
    x, draws = logits(3, n), min(n + 1, 12)
    x[1, : n // 2] = -INF
    x[2] = np.round(x[2] / 4)  # ties
    keys = folded(random.fold_in(5, np.arange(3)), draws)
    for options in ({}, {"temperature": 0.5}, {"temperature": INF}):
        found = sample(lib, x, 5, draws=draws, replace=False, **options)
        np.testing.assert_array_equal(found, one_after_another(lib, x, keys, **options))
        for row, support in zip(found, np.isfinite(x).sum(axis=1), strict=True):
            count = min(draws, int(support))
            assert len(set(row[:count])) == count
            assert (row[:count] >= 0).all()
            assert (row[count:] == -1).all()


@eager
def test_distinct_draws_stay_inside_what_filters_leave(lib: Adapter) -> None:
    x = logits(2, 50)
    top = np.argsort(-x, axis=1)[:, :3]
    found = sample(lib, x, 3, draws=5, replace=False, top_k=3)
    np.testing.assert_array_equal(np.sort(found[:, :3]), np.sort(top))
    assert (found[:, 3:] == -1).all()


@eager
def test_distinct_draws_at_temperature_0_are_the_tied_maxima(lib: Adapter) -> None:
    x = np.asarray([[1, 5, 5, 0, 5], [3, 2, 1, 0, -1]], np.float32)
    found = sample(lib, x, 3, draws=4, replace=False, temperature=0.0)
    assert found.tolist() == [[1, 2, 4, -1], [0, -1, -1, -1]]


@eager
@pytest.mark.parametrize("n", [4, 20])
def test_ordered_pairs_without_replacement_follow_the_sequential_law(lib: Adapter, n: int) -> None:
    x, rows = logits(n) / 3, 20_000
    p = np.exp(x.astype(np.float64))
    p /= p.sum()
    pairs = list(itertools.permutations(range(n), 2))
    expected = rows * np.asarray([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    found = sample(lib, x, random.split(n, rows), draws=2, replace=False)
    counts = np.zeros((n, n))
    np.add.at(counts, (found[:, 0], found[:, 1]), 1)
    assert counts.trace() == 0
    seen = np.asarray([counts[pair] for pair in pairs])
    often = expected >= 5
    assert stats.chisquare(seen[often], expected[often] / expected[often].sum() * seen[often].sum()).pvalue > 1e-4


@eager
@pytest.mark.parametrize("n", [2, 10, 64, 999, 1001])
def test_many_draws_follow_the_softmax(lib: Adapter, n: int) -> None:
    x = logits(n)
    p = np.exp(x.astype(np.float64) - x.max())
    expected = 20_000 * p / p.sum()
    counts = np.bincount(sample(lib, x, n, draws=20_000), minlength=n)
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    kept = expected > 0
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-4


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [3, 64, 65, 3000])
def test_many_draws_are_those_of_few_on_any_number_of_threads(n: int) -> None:
    x = logits(n)
    polysoftmax.set_num_threads(1)
    expected = polysoftmax.sample(x, 9, draws=30_000)
    for count in (1, 2, 63, 64, 65, 1000):
        np.testing.assert_array_equal(polysoftmax.sample(x, 9, draws=count), expected[:count])
    polysoftmax.set_num_threads(3)
    np.testing.assert_array_equal(polysoftmax.sample(x, 9, draws=30_000), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_close_races_and_tiny_weights_end_as_the_sums_say(dtype: Any) -> None:
    """Weights that are subnormal or 0, one token that is all but certain, equal tokens: the formula draws the same."""
    base = np.full((5, 600), -INF)
    base[0, ::7] = -np.linspace(0, 700, 86)
    base[1] = -103.5  # the exponential is subnormal in float32
    base[1, 5] = 0
    base[2, [3, 500]] = [0, -95]
    base[3] = 0
    base[4, 2:4] = -1e30
    rows = np.repeat(base, 2000, axis=0).astype(dtype)
    for x in (rows, np.ascontiguousarray(rows[:, :10])):
        found = polysoftmax.sample(x, 21)
        with polysoftmax.engine("portable"):
            np.testing.assert_array_equal(found, polysoftmax.sample(x, 21))
