"""The log-probability of given tokens: the bits that a draw answers, within the bound, with a slope of its own."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax.engines import portable

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

INF, NAN = math.inf, math.nan
U = 2.0**-24

here = pytest.mark.backends(lambda can: not can.lazy and "func" not in can.how)
ordered = here  # Dask cannot sort
quick = pytest.mark.backends(lambda can: can.gpu or not (can.compiles or can.traced or can.lazy))


def rows_of(n: int, rows: int = 3, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, n))).astype(np.float32)


def exact(row: list[float], left: list[bool], token: int, t: float) -> Any:
    """Return the log-probability of a token of a row, of which some are left, from mpmath."""
    if not left[token]:
        return -mpmath.inf
    with mpmath.workprec(200):
        z = [mpmath.mpf(float(v)) / mpmath.mpf(t) for v in row]
        total = mpmath.fsum(mpmath.exp(one) for one, keep in zip(z, left, strict=True) if keep)
        return z[token] - mpmath.log(total)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05, "temperature": 2.0},
    "all": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
    "uniform": {"temperature": INF, "top_k": 3},
}


@ordered
@pytest.mark.parametrize("name", OPTIONS)
def test_a_draw_answers_these_bits(lib: Adapter, name: str) -> None:
    options, cases = OPTIONS[name], [(33, True), (5, False), (700, True), (33, False)]
    if lib.can.compiles:
        cases = cases[:1] if name == "all" and not portable() else []
    for n, masked in cases:
        x = lib.asarray(rows_of(n), "float32")
        where = lib.asarray(np.random.default_rng(1).random((3, n)) < 0.7, "bool") if masked else None
        given = {**options, "where": where}
        tokens, drawn = lib.call(ps.sample, x, 7, draws=4, return_logprobs=True, **given)
        y = lib.call(ps.log_prob, x, tokens, **given)
        lib.require(y, (3, 4), "float32")
        assert lib.values(y).tobytes() == lib.values(drawn).tobytes()
        if lib.can.compiles:
            continue
        first = lib.asarray(lib.values(tokens)[:, 0], lib.dtype_name(tokens))
        np.testing.assert_array_equal(lib.values(lib.call(ps.log_prob, x, first, **given)), lib.values(y)[:, 0])


def test_a_million_draws_answer_these_bits() -> None:
    """Every combination of filters, masks, temperatures and dtypes, on NumPy, whose kernels PyTorch runs too."""
    rng, drawn = np.random.default_rng(3), 0
    filters = itertools.product((None, 3, 40), (None, 0.7, 0.95), (None, 0.02), (1.0, 0.3, 0.0), (False, True))
    for (k, p, min_p, t, masked), dtype in itertools.product(filters, (np.float16, np.float32, np.float64)):
        n = int(rng.choice([2, 10, 65, 300, 1100]))
        x = (3 * rng.standard_normal((8, n))).astype(dtype)
        where = rng.random((8, n)) < 0.8 if masked else None
        options = {"top_k": k, "top_p": p, "min_p": min_p, "temperature": t, "where": where}
        tokens, found = ps.sample(x, drawn, draws=400, return_logprobs=True, **options)
        y = ps.log_prob(x, tokens, **options)
        assert y.tobytes() == found.tobytes(), options
        drawn += tokens.size
    assert drawn > 10**6


@here
def test_values_against_mpmath(lib: Adapter) -> None:
    rows = rows_of(12, rows=2)
    x, where = lib.asarray(rows, "float32"), np.asarray([True] * 9 + [False] * 3)
    tokens = np.broadcast_to(np.arange(12), (2, 12))
    options = {"temperature": 0.5, "top_k": 5, "where": lib.asarray(where, "bool")}
    y = lib.values(lib.call(ps.log_prob, x, lib.asarray(tokens, "int32"), **options))
    for row, answers in zip(rows.tolist(), y, strict=True):
        kept = sorted(range(9), key=lambda j: -row[j])[:5]
        for token in range(12):
            want = exact(row, [j in kept for j in range(12)], token, 0.5)
            if want == -mpmath.inf:
                assert answers[token] == -INF
            else:
                assert abs(answers[token] - want) < (40 + float(abs(want))) * U


@here
@pytest.mark.parametrize("gap", [10.0, 17.0, 40.0])
def test_the_most_likely_token_keeps_its_digits(lib: Adapter, gap: float) -> None:
    y = lib.values(lib.call(ps.log_prob, lib.asarray([0.0, gap, -1.0], "float32"), lib.asarray([1], "int32")))
    want = exact([0.0, gap, -1.0], [True] * 3, 1, 1.0)
    assert abs(y[0] / float(want) - 1) < 8 * U


@here
def test_tokens_that_do_not_exist(lib: Adapter) -> None:
    rows = [[1, 2, 3], [1, 2, NAN], [-INF, 2, 3], [-INF, -INF, -INF], [1, INF, 0], [1, 2, 3]]
    where = [[True, True, True]] * 5 + [[False, False, False]]
    x, mask = lib.asarray(rows, "float32"), lib.asarray(where, "bool")
    tokens = [[2, -1], [0, -1], [0, 2], [1, -1], [0, 1], [0, -1]]
    y = lib.values(lib.call(ps.log_prob, x, lib.asarray(tokens, "int32"), where=mask))
    assert np.isnan(y[:, 1]).tolist() == [True, True, False, True, True, True]
    assert np.isnan(y[:, 0]).tolist() == [False, True, False, True, True, False]
    assert (y[2, 0], y[5, 0]) == (-INF, -INF)
    if not (portable() and lib.backend.library == "jax"):
        filtered = lib.values(lib.call(ps.log_prob, x, lib.asarray(tokens, "int32"), where=mask, top_k=2))
        assert np.isnan(filtered).tolist() == np.isnan(y).tolist()
        assert (filtered[2, 0], filtered[5, 0]) == (-INF, -INF)


@pytest.mark.parametrize("wrong", [3, -2, 2**40])
@quick
def test_a_token_out_of_range(lib: Adapter, wrong: int) -> None:
    if lib.backend.library not in ("numpy", "torch") or lib.can.gpu:
        pytest.skip("a look at the values is not free")
    x = lib.asarray([[1, 2, 3], [1, 2, 3]], "float32")
    with pytest.raises(IndexError, match=f"token {wrong} is out of range for 3 tokens"):
        ps.log_prob(x, lib.asarray([0, wrong], "int64"))


@quick
def test_axes_and_shapes(lib: Adapter) -> None:
    rows = rows_of(24, rows=1)[0].reshape(2, 3, 4)
    x, whole = lib.asarray(rows, "float32"), np.asarray(ps.log_softmax(rows, axis=1))
    one = np.asarray([[0, 1, 2, 0], [2, 2, 1, 0]])
    y = lib.values(lib.call(ps.log_prob, x, lib.asarray(one, "int32"), axis=1))
    np.testing.assert_allclose(y, np.take_along_axis(whole, one[:, None], 1)[:, 0], rtol=1e-6)
    several = np.stack([one, one[::-1]], axis=1)
    y = lib.values(lib.call(ps.log_prob, x, lib.asarray(several, "int64"), axis=1))
    np.testing.assert_allclose(y, np.take_along_axis(whole, several, 1), rtol=1e-6)
    flat, tokens = ps.log_softmax(rows, axis=(0, 2)), np.asarray([[7, 0], [3, 3], [5, 6]])
    y = lib.values(lib.call(ps.log_prob, x, lib.asarray(tokens, "int64"), axis=(0, 2)))
    expected = np.take_along_axis(np.moveaxis(flat, 1, 0).reshape(3, 8), tokens, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"tokens must have the shape .* \(2, 4\), or \(2, K, 4\)"):
        ps.log_prob(x, lib.asarray([0, 1], "int64"), axis=1)
    with pytest.raises(TypeError, match="tokens must be integers, got dtype"):
        ps.log_prob(x, x, axis=1)


@here
def test_ranks_count_the_tokens_before(lib: Adapter) -> None:
    x = lib.asarray([[1, 3, 3, -INF], [1, NAN, 3, 0], [5, 4, 3, 2]], "float32")
    where = lib.asarray([[True] * 4, [True] * 4, [True, False, True, True]], "bool")
    tokens = lib.asarray([[1, 2, 0, 3], [0, 1, 2, 3], [0, 1, 2, -1]], "int32")
    _, ranks = lib.call(ps.log_prob, x, tokens, where=where, return_rank=True)
    assert lib.values(ranks).tolist() == [[0, 1, 2, 3], [-1] * 4, [0, -1, 1, -1]]


@ordered
def test_the_greatest_log_probabilities(lib: Adapter) -> None:
    if portable() and lib.backend.library == "jax":
        pytest.skip("each operation is a compilation")
    rows = [[1, 3, 3, -INF, 2], [1, NAN, 3, 0, 0], [-INF, -INF, 0, -INF, 1], [5, 5, 5, 5, 5]]
    x = lib.asarray(rows, "float32")
    y, tokens = lib.call(ps.top_log_probs, x, 3, temperature=0.5)
    assert lib.values(tokens).tolist() == [[1, 2, 4], [-1] * 3, [4, 2, 0], [0, 1, 2]]
    again = lib.call(ps.log_prob, x, tokens, temperature=0.5)
    assert lib.values(again).tobytes() == lib.values(y).tobytes()
    assert lib.values(y)[2, 2] == -INF
    assert np.isnan(lib.values(y)[1]).all()


@quick
@pytest.mark.parametrize("n", [7, 300, 5000])
def test_leading_tokens_of_any_number(lib: Adapter, n: int) -> None:
    rows = np.round(rows_of(n), 1)  # with ties
    for k in (1, 5, n // 2, n):
        _, tokens = lib.call(ps.top_log_probs, lib.asarray(rows, "float32"), k)
        np.testing.assert_array_equal(lib.values(tokens), np.argsort(-rows, axis=-1, kind="stable")[:, :k])


def test_k_of_the_greatest() -> None:
    x = np.zeros(3)
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 3\]"):
            ps.top_log_probs(x, wrong)
    with pytest.raises(TypeError, match="k must be an int, got float"):
        ps.top_log_probs(x, 2.0)  # type: ignore[arg-type]


@quick
@pytest.mark.parametrize("n", [1, 2, 16])
def test_tokens_of_short_rows_that_lie_in_columns(lib: Adapter, n: int) -> None:
    """Rows are computed with what pads them; beside a row of one entry that is not another row."""
    dtype = "float16" if "float16" in lib.can.dtypes else lib.can.default_float
    x, tokens = rows_of(n, rows=35).astype(np.float16), np.arange(70).reshape(2, 35).T % n
    expected = lib.values(
        lib.call(ps.log_prob, lib.asarray(x, dtype), lib.asarray(np.ascontiguousarray(tokens), "int64"))
    )
    columns = lib.xp.permute_dims(lib.asarray(np.ascontiguousarray(tokens.T), "int64"), (1, 0))
    found = lib.values(lib.call(ps.log_prob, lib.asarray(x, dtype), columns))
    np.testing.assert_array_equal(found, expected)
    if n == 1:
        np.testing.assert_array_equal(found, 0.0)
