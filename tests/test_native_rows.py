"""The C++ kernels of softmax, logsumexp and the losses: the answers of the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

from polysoftmax import _losses
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from tests.native_cases import (
    ABSENT,
    DTYPES,
    LENGTHS,
    OPS,
    TOLERANCE,
    Value,
    assert_close,
    cases,
    masks,
    needs_library,
    rows,
    run,
    temperatures,
)

if TYPE_CHECKING:
    from polysoftmax._arrays import Array

pytestmark = needs_library


class Setting:
    """Rows with a temperature and a mask, or without, and cotangents for them."""

    def __init__(self, dtype: Any, n: int, masked: bool, hot: bool) -> None:
        self.dtype, self.tolerance, self.hot = dtype, TOLERANCE[dtype], hot
        self.x = rows(dtype, n)
        self.mask = masks(n) if masked else None
        self.t = temperatures(dtype) if hot else None
        self.t_column = None if self.t is None else self.t[:, None]
        self.g = np.random.default_rng(3).standard_normal(self.x.shape).astype(dtype)
        self.g_row = np.ascontiguousarray(self.g[:, 0])

    def row(self) -> Array:
        return np.full(self.x.shape[0], 7, self.dtype)

    def like(self) -> Array:
        return np.full_like(self.x, 7)

    def run(self, kernel: int, *operands: Array | Value | None, **options: Any) -> None:
        run(kernel, self.x, *operands, compute=self.dtype, **options)


@cases
@pytest.mark.parametrize(("kernel", "formula"), [(0, SOFTMAX), (1, LOG_SOFTMAX)])
def test_softmax(dtype: Any, n: int, masked: bool, hot: bool, kernel: int, formula: Any) -> None:
    s = Setting(dtype, n, masked, hot)
    y = s.like()
    s.run(kernel, Value(s.t), s.mask, y)
    expected = formula.function(OPS, s.x.copy(), s.t_column, s.mask)
    assert_close(y, expected, 4 * s.tolerance)

    pushed = s.like()
    s.run(kernel + 5, Value(s.t), s.mask, s.g, pushed)
    assert_close(pushed, formula.jvp(OPS, (s.x, s.t_column, s.mask), (s.g, None, None), expected), 100 * s.tolerance)

    wanted = (True, hot, False)
    slopes = formula.vjp(OPS, (s.x, s.t_column, s.mask), expected, s.g, wanted)
    for answer in (expected, ABSENT):
        gx, gt = s.like(), s.row()
        s.run(kernel + 3, Value(s.t), s.mask, answer, s.g, gx, Value(gt if hot else None))
        assert_close(gx, slopes[0], 100 * s.tolerance)
        if hot:
            assert_close(gt[:, None], slopes[1], 1e4 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_logsumexp(dtype: Any, n: int, masked: bool, weighted: bool) -> None:
    s = Setting(dtype, n, masked, hot=False)
    rng = np.random.default_rng(4)
    weights = (rng.random(s.x.shape) * (rng.random(s.x.shape) < 0.8)).astype(dtype) if weighted else None
    y, gx, gw = s.row(), s.like(), s.like()
    s.run(2, weights, s.mask, Value(y))
    expected = LOGSUMEXP.function(OPS, s.x.copy(), weights, s.mask)
    assert_close(y[:, None], expected, s.tolerance)
    s.run(7, weights, s.mask, Value(s.g_row), gx, gw if weighted else None)
    operands = (s.x, weights, s.mask)
    slopes = LOGSUMEXP.vjp(OPS, operands, expected, s.g_row[:, None], (True, weighted, False))
    assert_close(gx, slopes[0], 30 * s.tolerance)
    if weighted:
        assert_close(gw, slopes[1], 30 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(-40, -10), (-10, -1)])
def test_a_logsumexp_close_to_0_keeps_its_digits(dtype: Any, low: int, high: int) -> None:
    x = np.random.default_rng(5).uniform(low, high, (8, 300)).astype(dtype)
    x[:, 17] = 0.0
    y = np.empty(8, dtype)
    run(2, x, None, None, Value(y), compute=dtype)
    with mpmath.workdps(60):
        expected = [float(mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(v))) for v in row))) for row in x]
    np.testing.assert_allclose(y, expected, rtol=8 * float(np.finfo(dtype).eps))


@cases
def test_entropy_and_divergence(dtype: Any, n: int, masked: bool, hot: bool) -> None:
    s = Setting(dtype, n, masked, hot)
    y, gx, gt, gother = s.row(), s.like(), s.row(), s.like()
    given, g = (s.x, s.t_column, s.mask), s.g_row[:, None]
    s.run(10, Value(s.t), s.mask, Value(y))
    expected = _losses.ENTROPY.function(OPS, s.x.copy(), s.t_column, s.mask)
    assert_close(y[:, None], expected, 4 * s.tolerance)
    s.run(11, Value(s.t), s.mask, Value(s.g_row), gx, Value(gt if hot else None))
    slopes = _losses.ENTROPY.vjp(OPS, given, expected, g, (True, hot, False))
    assert_close(gx, slopes[0], 100 * s.tolerance)
    if hot:
        assert_close(gt[:, None], slopes[1], 1e4 * s.tolerance)

    other = np.random.default_rng(6).standard_normal(s.x.shape).astype(dtype)
    other[14, 0], other[15, 0], other[20] = -np.inf, np.nan, -np.inf
    s.run(12, other, Value(s.t), s.mask, Value(y))
    expected = _losses.KL_DIVERGENCE.function(OPS, s.x.copy(), other.copy(), s.t_column, s.mask)
    assert_close(y[:, None], expected, 10 * s.tolerance)
    s.run(13, other, Value(s.t), s.mask, Value(s.g_row), gx, gother, Value(gt if hot else None))
    operands = (s.x, other, s.t_column, s.mask)
    slopes = _losses.KL_DIVERGENCE.vjp(OPS, operands, expected, g, (True, True, hot, False))
    assert_close(gx, slopes[0], 1000 * s.tolerance)
    assert_close(gother, slopes[1], 100 * s.tolerance)
    if hot:
        assert_close(gt[:, None], slopes[2], 1e5 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("targets", ["classes", "ignored", "probabilities"])
def test_cross_entropy(dtype: Any, n: int, smoothing: float, z_loss: float, weighted: bool, targets: str) -> None:
    s = Setting(dtype, n, masked=False, hot=False)
    rng = np.random.default_rng(7)
    weight = (rng.random(n) * (rng.random(n) < 0.8)).astype(dtype) if weighted else None
    if targets == "probabilities":
        q: Array = rng.random(s.x.shape).astype(dtype)
        q[10, ::2] = 0.0
        given: Array | Value = q
    else:
        q = rng.integers(0, n, (37, 1))
        q[17], q[18] = n + 3, -1
        given = Value(q[:, 0])
    ignored = 0 if targets == "ignored" else None
    options = (int(ignored is not None), ignored or 0, smoothing, z_loss)
    each = None if weight is None else np.broadcast_to(weight, s.x.shape)
    column = None if weight is None else weight[None, :]
    y, gx = s.row(), s.like()
    named = {"ignore_index": ignored, "label_smoothing": smoothing, "z_loss": z_loss}
    s.run(8, given, each, Value(y), options=options)
    assert_close(y[:, None], _losses.CROSS_ENTROPY.function(OPS, s.x.copy(), q, column, **named), 8 * s.tolerance)
    s.run(9, given, each, Value(s.g_row), gx, options=options)
    operands = (s.x.copy(), q, column)
    slopes = _losses.CROSS_ENTROPY.vjp(OPS, operands, None, s.g_row[:, None], (True, False, False), **named)
    assert_close(gx, slopes[0], 100 * s.tolerance)
