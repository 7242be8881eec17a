"""The draw: token for token as defined, with the right frequencies, and never what was removed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

import polysoftmax
from polysoftmax import random
from polysoftmax._sampling import block_length
from tests.sampling_cases import INF, NAN, compiled, draws, eager, logits, once, ordered, reference, shares, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing import Adapter

__all__ = ["compiled"]  # a fixture


def test_block_lengths_are_frozen() -> None:
    lengths = {1: 2, 2: 2, 3: 2, 4: 2, 5: 4, 16: 4, 17: 8, 1000: 32, 4096: 64, 32_000: 256, 50_257: 256, 10**6: 256}
    assert {n: block_length(n) for n in lengths} == lengths


@eager
@pytest.mark.usefixtures("compiled")
def test_the_draw_as_it_is_defined(lib: Adapter) -> None:
    for n in (1, 2, 3, 5, 19, 300):
        keys = random.split(n, 100)
        for temperature in (0.5, 1.0):
            y = tokens(lib, lib.asarray(logits(n), "float32"), lib.asarray(keys, "int32"), temperature=temperature)
            assert y == reference(logits(n), keys, temperature)


PINNED = [542, 102, 511, 580, 32, 227, 283, 278, 127, 398, 598, 379]
PINNED += [327, 83, 90, 303, 448, 535, 233, 128, 397, 115, 599, 315]


@draws
def test_tokens_are_frozen(lib: Adapter) -> None:
    x = lib.asarray(np.sin(np.arange(600.0)) * 4, "float32")
    assert tokens(lib, x, lib.asarray(random.split(2026, 24), "int32")) == PINNED


MANY = 20_000


def fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts have their probabilities, by chi-square; tokens that are expected rarely are put together."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    rare = expected < 10
    observed, expected = (np.append(one[~rare], one[rare].sum()) for one in (counts, expected))
    if expected[-1] < 10:
        observed, expected = (np.append(one[:-2], one[-2] + one[-1]) for one in (observed, expected))
    return len(expected) == 1 or stats.chisquare(observed, expected).pvalue > 1e-4


# What is left of logits(40) by each filter follows from their probabilities in order, which are well apart.
FREQUENCIES = (
    ({"temperature": 0.3}, lambda p: p > 0),
    ({}, lambda p: p > 0),
    ({"temperature": 2.0}, lambda p: p > 0),
    ({"top_k": 5}, lambda p: p >= np.sort(p)[-5]),
    ({"top_k": 12, "temperature": 1.3}, lambda p: p >= np.sort(p)[-12]),
    ({"top_p": 0.8}, lambda p: p >= np.sort(p)[::-1][(np.cumsum(np.sort(p)[::-1]) < 0.8).sum()]),
    ({"min_p": 0.05, "temperature": 0.7}, lambda p: p >= 0.05 * p.max()),
)


@eager
@pytest.mark.parametrize(
    ("options", "survives"), FREQUENCIES, ids=lambda one: str(one) if isinstance(one, dict) else ""
)
def test_frequencies(lib: Adapter, options: dict[str, float], survives: Callable[[np.ndarray], np.ndarray]) -> None:
    if lib.can.compiles and len(options) < 2:
        pytest.skip("two filters show it where each is a compilation")
    row = logits(40)
    keys = lib.asarray(random.split(100, MANY), "int32")
    y = lib.call(polysoftmax.sample, lib.asarray(row, "float32"), keys, **options)
    lib.require(y, (MANY,), lib.can.default_index)
    p = shares(row, options.get("temperature", 1.0))
    p = np.where(survives(p), p, 0.0)
    assert fits(np.bincount(lib.values(y), minlength=40), p / p.sum())


def test_three_equal_tokens_over_two_blocks() -> None:
    """Without domains of their own for the two levels the shares are .499, .167 and .335."""
    y = polysoftmax.sample(np.zeros(3, np.float32), random.split(5, 300_000))
    assert fits(np.bincount(y, minlength=3), np.full(3, 1 / 3))


def test_rare_tokens_come_at_their_rate() -> None:
    p = np.asarray([1 - 1e-4 - 1e-5, 1e-4, 1e-5])
    count = 2_000_000
    y = polysoftmax.sample(np.log(p).astype(np.float32), random.split(6, count))
    for token in (1, 2):
        assert abs((y == token).sum() - count * p[token]) < 4 * math.sqrt(count * p[token])


def test_the_two_levels_are_independent() -> None:
    row = np.add.outer(logits(4, 1), logits(4, 2)).reshape(16)
    assert block_length(16) == 4
    y = polysoftmax.sample(row, random.split(7, 100_000))
    table = np.bincount(y, minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_rows_are_independent() -> None:
    """Neighbouring rows of one key, the same row of successive keys, and successive rows."""
    row = logits(6)
    y = polysoftmax.sample(np.broadcast_to(row, (50_000, 2, 6)), 8)
    for pairs in (y, y.T.reshape(-1, 2), np.stack([y[:-1, 1], y[1:, 0]], axis=-1)):
        table = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=6, range=((0, 6), (0, 6)))[0]
        assert fits(table.ravel(), np.outer(shares(row), shares(row)).ravel())
    keys = random.key(np.arange(50_000))
    y = polysoftmax.sample(row, keys)
    table = np.histogram2d(y[:-1], y[1:], bins=6, range=((0, 6), (0, 6)))[0]
    assert fits(table.ravel(), np.outer(shares(row), shares(row)).ravel())


@draws
def test_what_is_gone_is_never_drawn(lib: Adapter) -> None:
    rows = np.full((4, 70), -INF)
    rows[0, 37] = -5.0
    rows[1, 10:13] = 0.0
    rows[2, ::2] = -69.0  # probability 1e-30 beside the other entries
    rows[2, 1::2] = 0.0
    rows[3, 69] = -1e30
    keys = lib.asarray(random.split(9, 2000 * 4).reshape(2000, 4, 2), "int32")
    y = lib.values(lib.call(polysoftmax.sample, lib.asarray(rows, "float32"), keys))
    assert y.shape == (2000, 4)
    assert set(y[:, 0]) == {37}
    assert set(y[:, 1]) == {10, 11, 12}
    assert (y[:, 2] % 2 == 1).all()
    assert set(y[:, 3]) == {69}


@eager
@pytest.mark.usefixtures("compiled")
def test_where_is_the_same_as_minus_infinity(lib: Adapter) -> None:
    x = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    mask = np.random.default_rng(2).random((5, 70)) < 0.3
    garbage = lib.asarray(np.where(mask, x, NAN), "float32")
    gone = lib.asarray(np.where(mask, x, -INF), "float32")
    for options in lib.some(({}, {"top_k": 4}, {"temperature": 0.0}, {"top_p": 0.7})):
        masked = tokens(lib, garbage, 3, where=lib.asarray(mask, "bool"), **options)
        assert masked == tokens(lib, gone, 3, **options)
        assert mask[np.arange(5), masked].all()


@once
def test_rows_without_a_token(lib: Adapter) -> None:
    x = lib.asarray(
        [[0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [0.0, 1.0, 2.0], [-INF, 0.0, -INF]], "float32"
    )
    where = lib.asarray([[True], [True], [True], [False], [True]], "bool")
    choices = [{}, {"temperature": 0.0}, {"temperature": INF}, {"min_p": 0.1}]
    if not lib.can.lazy:
        choices += [{"top_k": 2}, {"top_k": 2, "top_p": 0.9}, {"top_p": 0.9}]
    for options in lib.some(choices):
        y, logprobs = lib.call(polysoftmax.sample, x, 0, where=where, return_logprobs=True, **options)
        assert lib.values(y).tolist() == [-1, -1, -1, -1, 1], options
        np.testing.assert_array_equal(lib.values(logprobs), [NAN, NAN, NAN, NAN, 0.0])


@ordered
def test_long_rows_without_a_token(lib: Adapter) -> None:
    """Few survivors of long rows are found in a way of their own."""
    rows = np.full((5, 600), 0.5)
    rows[0, 433] = NAN
    rows[1, 433] = INF
    rows[2] = -INF
    rows[3] = NAN
    x = lib.asarray(rows, "float32")
    every = ({"top_k": 3}, {"top_k": 3, "temperature": 0.0}, {"top_k": 3, "top_p": 0.5})
    for options in every[-1 if lib.can.compiles else 0 :]:
        y = tokens(lib, x, 0, **options)
        assert y[:4] == [-1] * 4
        assert 0 <= y[4] < 3


BAD = {"temperature": [-1.0, NAN], "top_k": [-1.0, NAN], "top_p": [-0.1, 1.5], "min_p": [2.0, NAN]}


@ordered
@pytest.mark.enough(lambda can: not can.compiles)  # the next test takes all of them in one program
@pytest.mark.parametrize("name", BAD)
def test_a_bad_element_of_a_parameter(lib: Adapter, name: str) -> None:
    x = lib.asarray([[0.0, -INF, -INF]] * 3, "float32")
    values = lib.asarray([*BAD[name], 1.0], "float32")
    assert tokens(lib, x, 0, **{name: values}) == [-1, -1, 0]


@ordered
def test_a_bad_element_of_one_parameter_among_four(lib: Adapter) -> None:
    """Each parameter is bad in two rows of its own, in which the others are good."""
    x = lib.asarray([[0.0, -INF, -INF]] * 9, "float32")
    values = {name: np.ones(9) for name in BAD}
    for i, (name, bad) in enumerate(BAD.items()):
        values[name][2 * i : 2 * i + 2] = bad
    arrays = {name: lib.asarray(value, "float32") for name, value in values.items()}
    assert tokens(lib, x, 0, **arrays) == [-1] * 8 + [0]


@once
def test_temperature_0_takes_the_first_maximum(lib: Adapter) -> None:
    x = np.zeros((3, 300), np.float32)
    x[0, [7, 8, 290]] = 1.0
    x[1] = np.arange(300)
    for zero in lib.some((0, 0.0, lib.asarray(0.0, "float32"), lib.asarray(np.zeros(3), "float32"))):
        y, logprobs = lib.call(polysoftmax.sample, lib.asarray(x, "float32"), 4, temperature=zero, return_logprobs=True)
        assert lib.values(y).tolist() == [7, 299, 0]
        np.testing.assert_allclose(lib.values(logprobs), [-math.log(3), 0.0, -math.log(300)], rtol=1e-6)


@draws
def test_greedy_and_random_rows_mix(lib: Adapter) -> None:
    x = np.stack([logits(50, seed) for seed in range(5)])
    keys = random.split(12, 5)
    temperatures = [0.0, 0.7, 0.0, INF, 1.0]
    y = tokens(
        lib, lib.asarray(x, "float32"), lib.asarray(keys, "int32"), temperature=lib.asarray(temperatures, "float32")
    )
    assert y[0] == x[0].argmax()
    assert y[2] == x[2].argmax()
    assert y[1] == reference(x[1], keys[1:2], 0.7)[0]
    assert y[3] == reference(np.zeros(50, np.float32), keys[3:4])[0]
    assert y[4] == reference(x[4], keys[4:5])[0]


FILTERS = (
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 17, "temperature": 0.4},
    {"top_k": 200},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 30, "min_p": 0.2, "temperature": 1.5},
    {"top_p": 0.6},
    {"top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    {"top_k": 5, "temperature": 0.0},
    {"top_k": 5, "top_p": 0.5, "temperature": INF},
)


@ordered
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.usefixtures("compiled")
def test_sampling_after_truncation(lib: Adapter, options: dict[str, float]) -> None:
    """Survivors that are drawn from by themselves give the tokens that the truncated rows give."""
    if lib.can.compiles and (len(options) < 3 or "min_p" not in options or "top_k" not in options):
        pytest.skip("one of the longest shows it where each is three compilations; test_edges.py has top_p")
    x = np.random.default_rng(3).standard_normal((60, 300)).astype(np.float32) * 2
    x[::3] = np.round(x[::3])
    rows = lib.asarray(x, "float32")
    at = {"temperature": options.get("temperature", 1.0)}
    left = lib.call(polysoftmax.truncate, rows, **options)
    assert tokens(lib, rows, 21, **options) == tokens(lib, left, 21, **at)


@ordered
@pytest.mark.usefixtures("compiled")
def test_parameters_for_each_row(lib: Adapter, *, everything: bool) -> None:
    x = np.random.default_rng(5).standard_normal((4, 90)).astype(np.float32)
    keys = random.split(31, 4)
    given = {
        "temperature": [0.5, 1.0, 2.0, 0.0],
        "top_k": [3, 0, 90, 5],
        "top_p": [1.0, 0.6, 0.9, 0.3],
        "min_p": [0.0, 0.0, 0.1, 0.2],
    }

    def one_row(x: np.ndarray, key: np.ndarray, **options: float) -> Any:
        if lib.can.compiles and not everything:
            return polysoftmax.sample(x, key, **options)  # NumPy's, where numbers are another program for each row
        return tokens(lib, lib.asarray(x, "float32"), lib.asarray(key, "int32"), **options)

    alone = [one_row(x[i], keys[i], **{name: value[i] for name, value in given.items()}) for i in range(4)]
    arrays = {name: lib.asarray(value, "int32" if name == "top_k" else "float32") for name, value in given.items()}
    together = tokens(lib, lib.asarray(x, "float32"), lib.asarray(keys, "int32"), **arrays)
    assert together == alone
    several = random.split(32, 6).reshape(3, 2, 1, 2)
    y = tokens(lib, lib.asarray(x, "float32"), lib.asarray(several, "int32"), **arrays)
    assert np.asarray(y).shape == (3, 2, 4)
    assert np.asarray(y)[2, 1, 0] == one_row(x[0], several[2, 1, 0], temperature=0.5, top_k=3)


@eager
@pytest.mark.parametrize("kept", ["all", "ten"])
@pytest.mark.usefixtures("compiled")
def test_a_filter_that_is_off_changes_nothing(lib: Adapter, kept: str) -> None:
    x = lib.asarray(np.stack([logits(40, seed) for seed in range(20)]), "float32")
    plain = tokens(lib, x, 5)
    if kept == "all":
        for off in lib.some(({"top_k": 0}, {"top_k": 40}, {"top_p": 1.0}, {"min_p": 0}, {"top_k": 1000})):
            assert tokens(lib, x, 5, **off) == plain
    else:
        assert tokens(lib, x, 5, top_k=10, top_p=1.0, min_p=0.0) == tokens(lib, x, 5, top_k=10)
        assert tokens(lib, x, 5, top_k=10) != plain
