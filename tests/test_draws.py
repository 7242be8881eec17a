"""The Numba kernels of the draw against the formulas: token for token, at every filter, temperature and odd row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random

pytest.importorskip("numba")
from polysoftmax.engines import _draws  # only where there is Numba

RNG = np.random.default_rng(5)
ROWS = 60


def _rows(length: int, dtype: type) -> np.ndarray:
    return (RNG.standard_normal((ROWS, length)) * 3).astype(dtype)


def _rounded(length: int, dtype: type) -> np.ndarray:
    """Return rows of many equal entries, of both zeros among others."""
    x = np.round(_rows(length, dtype) / 2)
    x[::3] *= -1
    return x


def _odd(length: int, dtype: type) -> np.ndarray:
    x = _rows(length, dtype)
    x[::3, 0] = np.nan
    x[1::7] = -np.inf
    x[2::5, -1] = np.inf
    x[4::9] = -np.nan
    x[5::11] = 0.0
    x[6::11] = -np.inf
    x[6::11, length // 2] = -1e30
    x[7::11, : length // 2] = -np.inf
    x[8::11] *= 1e-30
    return x


def _each(values: list[float]) -> np.ndarray:
    return RNG.choice(values, ROWS)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": _each([0, 0.5, 1, 2, np.inf, np.nan, -1])},
    "one token": {"top_k": 1},
    "top_k": {"top_k": 50},
    "top_k of most": {"top_k": 290},
    "top_ks": {"top_k": _each([0, 1, 2, 7, 40, 1000, -1]).astype(int)},
    "top_p": {"top_p": 0.9},
    "top_p of equals": {"top_p": 0.6, "temperature": np.inf},
    "top_ps": {"top_p": _each([0, 0.1, 0.5, 0.99, 1, np.nan, 2]), "temperature": 0.8},
    "min_p": {"min_p": 0.05},
    "min_ps": {"min_p": _each([0, 0.01, 0.5, 1, -1])},
    "all": {"temperature": 1.3, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
    "greedy": {"temperature": 0, "top_k": 3},
}


@pytest.mark.parametrize("make", [_rows, _rounded, _odd])
@pytest.mark.parametrize(
    ("length", "dtype"), [(300, np.float32), (1, np.float32), (20_000, np.float32), (700, np.float64)]
)
def test_same_tokens_as_the_formula(make: Any, length: int, dtype: type) -> None:
    x = make(length, dtype)
    mask = RNG.random(x.shape) < 0.3
    keys = random.split(7, ROWS)
    for name, options in SETTINGS.items():
        for where in (None, mask):
            given = {**options, "where": where, "return_logprobs": True}
            with polysoftmax.engine("portable"):
                tokens, logprobs = polysoftmax.sample(x, keys, **given)
            with polysoftmax.engine("fused"):
                assert polysoftmax.explain(x, "sample").engine == "fused"
                drawn, logs = polysoftmax.sample(x, keys, **given)
            np.testing.assert_array_equal(drawn, tokens, err_msg=name)
            np.testing.assert_allclose(logs, logprobs, rtol=1e-5, atol=2e-6, err_msg=name)
            assert drawn.dtype == tokens.dtype
            assert logs.dtype == logprobs.dtype


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ((60,), ()),
        ((60,), (60,)),
        ((60,), (5, 60)),
        ((60,), (5, 1)),
        ((1,), (7,)),
        ((), (3, 4)),
        ((20, 3), (5, 1, 3)),
        ((20, 1), (20, 4)),
        ((1, 60), (5, 60)),
        ((3, 1, 20), (2, 1, 4, 20)),
    ],
)
def test_keys_of_any_shape(batch: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x = _rows(1000, np.float32)[: int(np.prod(batch))].reshape(*batch, 1000)
    keys = random.split(3, int(np.prod(shape))).reshape(*shape, 2)
    with polysoftmax.engine("portable"):
        expected = polysoftmax.sample(x, keys)
    with polysoftmax.engine("fused"):
        np.testing.assert_array_equal(polysoftmax.sample(x, keys), expected)
    assert expected.shape == np.broadcast_shapes(batch, shape)
    if shape:  # one by one
        for at in np.ndindex(*expected.shape):
            row = np.broadcast_to(x, (*expected.shape, 1000))[at]
            assert polysoftmax.sample(row, np.broadcast_to(keys, (*expected.shape, 2))[at]) == expected[at]


def test_one_row_with_many_keys_draws_what_many_rows_do() -> None:
    row, keys = _rows(2000, np.float32)[0], random.split(3, 500)
    with polysoftmax.engine("fused"):
        np.testing.assert_array_equal(
            polysoftmax.sample(row, keys, top_k=9), polysoftmax.sample(np.tile(row, (500, 1)), keys, top_k=9)
        )


def test_gumbel_variates_are_those_of_the_public_generator() -> None:
    count = 100_000
    index, words = np.arange(count, dtype=np.int32), np.empty(count, np.uint32)
    noise, key = np.empty(count, np.float32), random.key(2026)
    _draws._gumbels(key[0], key[1], index, 0, count, words, noise)
    np.testing.assert_array_equal(words.view(np.int32), random.bits(2026, count))
    exact = -np.log(-np.log1p(-random.uniform(2026, count).astype(np.float64)))
    ulp = np.spacing(np.maximum(np.abs(exact), 1).astype(np.float32))
    assert (np.abs(noise - exact) / ulp).max() < 2


def test_logarithm_is_within_an_ulp() -> None:
    import numba

    v = np.exp(RNG.uniform(-87, 88, 200_000)).astype(np.float32)
    v = np.concatenate([v, np.float32([1e-45, 1e-40, 1.0, 0.70710677, 0.7071068, 1.4142135, 1.4142137, 0.99999994])])
    y = numba.vectorize(["float32(float32)"])(_draws._log_float32)(v)
    exact = np.log(v.astype(np.float64))
    assert (np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float32)).clip(1e-45)).max() < 1
    assert numba.vectorize(["float32(float32)"])(_draws._log_float32)(np.float32(0)) == -np.inf


@pytest.mark.parametrize("weighted", [False, True])
def test_end_of_a_prefix(weighted: bool) -> None:
    for _ in range(200):
        n = int(RNG.integers(1, 3000))
        places = (
            RNG.integers(-5, 5, n).astype(np.int32)
            if RNG.random() < 0.5
            else RNG.integers(-(2**31), 2**31, n).astype(np.int32)
        )
        weights = RNG.integers(0, 5, n).astype(np.float32) if weighted else None  # sums are exact
        heavy = np.empty(n + 1, np.float32) if weighted else None
        each = np.ones(n) if weights is None else weights.astype(np.float64)
        target = float(np.floor(RNG.random() * each.sum()) + 0.5)
        if target > each.sum():
            continue
        end, room = _draws._end_of_prefix(places, weights, target, np.empty(n + 1, np.int32), heavy)
        above, there = each[places > end].sum(), each[places == end]
        assert above < target <= above + there.sum()
        if not weighted:
            assert room == int(np.ceil(target - above))
