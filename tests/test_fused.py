"""The fused kernels: their exponential, their sums, and the contract where IEEE arithmetic alone would not keep it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax

numba = pytest.importorskip("numba", reason="the fused kernels need polysoftmax[fast]")

from polysoftmax.engines import _kernels, fused  # noqa: E402  # needs Numba
from polysoftmax.engines import numpy as numpy_engine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = np.inf, np.nan
FLOATS = [np.float32, np.float64]
U = {np.float32: 2.0**-24, np.float64: 2.0**-53}
Float = Any


@numba.njit(**_kernels._STRICT)  # type: ignore[untyped-decorator]
def exponentials(z: np.ndarray, out: np.ndarray) -> None:
    for i in range(z.size):
        out[i] = _kernels.exp(z[i])


@numba.njit(**_kernels._STRICT)  # type: ignore[untyped-decorator]
def logarithms(z: np.ndarray, out: np.ndarray) -> None:
    for i in range(z.size):
        out[i] = _kernels.log1p(z[i])


def exp(z: np.ndarray) -> np.ndarray:
    out = np.empty_like(z)
    exponentials(z, out)
    return out


def ulps(got: np.ndarray, want: list[mpmath.mpf]) -> np.ndarray:
    """Distance in units in the last place of the expected value, subnormal ones included."""
    spacing = np.spacing(np.asarray([float(one) for one in want]).astype(got.dtype))
    return np.asarray(
        [float(abs(mpmath.mpf(float(g)) - w) / float(s)) for g, w, s in zip(got, want, spacing, strict=True)]
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_is_within_one_ulp(dtype: Float) -> None:
    least = float(np.log(np.finfo(dtype).tiny))
    rng = np.random.default_rng(0)
    halves = (np.arange(0, -least / np.log(2), 0.5) * -np.log(2)).astype(dtype)  # where the reduction changes over
    z = np.concatenate(
        [
            np.linspace(least, 0, 4001).astype(dtype),
            -rng.exponential(1.0, 3000).astype(dtype),
            -np.logspace(-40, 0, 500).astype(dtype),
            halves,
            np.nextafter(halves, dtype(-INF)),
        ]
    )
    z = z[z >= least]
    with mpmath.workdps(60):
        worst = ulps(exp(z), [mpmath.exp(mpmath.mpf(float(one))) for one in z])
    assert worst.max() <= 1.0, z[worst.argmax()]


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_underflows_gradually(dtype: Float) -> None:
    info = np.finfo(dtype)
    z = np.linspace(float(np.log(info.smallest_subnormal)) - 2, float(np.log(info.tiny)), 2001).astype(dtype)
    with mpmath.workdps(60):
        want = [mpmath.exp(mpmath.mpf(float(one))) for one in z]
        error = [float(abs(mpmath.mpf(float(g)) - w)) for g, w in zip(exp(z), want, strict=True)]
    assert max(error) <= 1.5 * float(info.smallest_subnormal)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_of_what_is_not_finite(dtype: Float) -> None:
    z = np.asarray([0.0, -0.0, -INF, NAN, -NAN, np.finfo(dtype).min, NAN, NAN] * 9, dtype)
    z.view(f"u{z.itemsize}")[6::8] += 1  # NaN may carry anything in its last bits
    z.view(f"u{z.itemsize}")[7::8] += 511
    got = exp(z)
    np.testing.assert_array_equal(got, np.asarray([1, 1, 0, NAN, NAN, 0, NAN, NAN] * 9, dtype))


def rows(n: int, kind: str, dtype: Float) -> np.ndarray:
    rng = np.random.default_rng(n)
    if kind == "normal":
        return (3 * rng.standard_normal((2, n))).astype(dtype)
    x = np.full((2, n), -2.3 if kind == "constant" else 0.0, dtype)  # a rounding error that never changes sign
    x[:, 0] = 0
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 7, 24, 25, 64, 160, 161, 257, 511, 1023, 1025, 5000, 300_001])
@pytest.mark.parametrize("kind", ["normal", "constant", "equal"])
def test_errors_are_within_the_bounds(dtype: Float, n: int, kind: str) -> None:
    x = rows(n, kind, dtype)
    exact = x.astype(np.float64 if dtype is np.float32 else np.longdouble)
    top = exact.max(axis=1, keepdims=True)
    terms = np.exp(exact - top)
    total = terms.sum(axis=1, keepdims=True)
    p, d, log_total = terms / total, top - exact, np.log(total)
    spread = (p * d).sum(axis=1, keepdims=True)
    with polysoftmax.engine("fused"):
        y, log_y, lse = polysoftmax.softmax(x), polysoftmax.log_softmax(x), polysoftmax.logsumexp(x, keepdims=True)
    base, u = 16 + np.log2(n), U[dtype]
    tiny = np.finfo(dtype).tiny
    assert (np.abs(y - p) <= (base + d + spread) * p * u + tiny).all()
    log_p = -d - log_total
    assert (np.abs(log_y - log_p) <= (base + spread + d + np.abs(log_p)) * u + tiny).all()
    value = top + log_total
    assert (np.abs(lse - value) <= (base + spread + np.abs(value)) * u + tiny).all()
    targets = [[0], [n // 2]]
    with polysoftmax.engine("fused"):
        losses = polysoftmax.cross_entropy(x, np.ravel(targets), reduction="none")
    want, slack = (np.take_along_axis(one, np.asarray(targets), 1)[:, 0] for one in (-log_p, d + spread))
    assert (np.abs(losses - want) <= (base + slack + np.abs(want)) * u + tiny).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((7, 1300), 0), ((3, 40, 9), 1), ((30_001, 5), 0)])
@pytest.mark.parametrize("kind", ["normal", "constant"])
def test_errors_along_other_axes(dtype: Float, shape: tuple[int, ...], axis: int, kind: str) -> None:
    n = shape[axis]
    x = rows(int(np.prod(shape)), kind, dtype)[0].reshape(shape)
    np.moveaxis(x, axis, 0)[0] = 0
    exact = x.astype(np.float64 if dtype is np.float32 else np.longdouble)
    d = exact.max(axis=axis, keepdims=True) - exact
    total = np.exp(-d).sum(axis=axis, keepdims=True)
    p, log_p = np.exp(-d) / total, -d - np.log(total)
    spread = (p * d).sum(axis=axis, keepdims=True)
    with polysoftmax.engine("fused"):
        y, log_y = polysoftmax.softmax(x, axis=axis), polysoftmax.log_softmax(x, axis=axis)
    base, u, tiny = 16 + np.log2(n) + d + spread, U[dtype], np.finfo(dtype).tiny
    assert (np.abs(y - p) <= base * p * u + tiny).all()
    assert (np.abs(log_y - log_p) <= (base + np.abs(log_p)) * u + tiny).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_stay_in_their_rows_along_other_axes(dtype: Float) -> None:
    x = np.ascontiguousarray(nan_and_inf(30, dtype).T)
    with polysoftmax.engine("fused"), np.errstate(all="raise"):
        y, log_y = polysoftmax.softmax(x, axis=0), polysoftmax.log_softmax(x, axis=0)
    assert np.isnan(y[:, :4]).all()
    assert np.isnan(log_y[:, :4]).all()
    np.testing.assert_allclose(y[:, 4:].sum(axis=0), 1, rtol=1e-5)
    assert (y[15, 4], log_y[15, 4]) == (0, -INF)


@pytest.mark.parametrize("n", [2, 100, 300, 600, fused._LONG])
def test_what_is_close_to_zero_keeps_its_digits(n: int) -> None:
    x = np.full((3, n), -40.0)
    tops = [0, n // 2, n - 1]
    x[[0, 1, 2], tops] = 0
    with polysoftmax.engine("fused"):
        got = [*polysoftmax.logsumexp(x), *polysoftmax.cross_entropy(x, np.asarray(tops), reduction="none")]
    np.testing.assert_allclose(got, float(mpmath.log1p((n - 1) * mpmath.exp(-40))), rtol=1e-14)


def nan_and_inf(n: int, dtype: Float) -> np.ndarray:
    """Rows of n: with NaN, with a negative NaN, with inf, of -inf, with one -inf, ordinary."""
    x = np.tile(np.linspace(-1, 1, n), (6, 1)).astype(dtype)
    x[0, n // 2] = NAN
    x[1, -1] = -NAN if np.signbit(-NAN) else NAN
    x.view(f"u{x.itemsize}")[1, -1] += 1  # NaN may carry anything in its last bits
    x[2, 0] = INF
    x[3] = -INF
    x[4, n // 2] = -INF
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [3, 30, 300, 3000])
def test_nan_and_inf_stay_in_their_rows(dtype: Float, n: int) -> None:
    x = nan_and_inf(n, dtype)
    with polysoftmax.engine("fused"), np.errstate(all="raise"):
        y, log_y, lse = polysoftmax.softmax(x), polysoftmax.log_softmax(x), polysoftmax.logsumexp(x)
        losses = polysoftmax.cross_entropy(x, np.zeros(6, int), reduction="none")
    assert np.isnan(y[:4]).all()
    assert np.isnan(log_y[:4]).all()
    assert np.isfinite(y[4:]).all()
    np.testing.assert_allclose(y[4:].sum(axis=1), 1, rtol=1e-5)
    assert y[4, n // 2] == 0
    assert log_y[4, n // 2] == -INF
    np.testing.assert_array_equal(lse[:4], [NAN, NAN, INF, -INF])
    assert np.isnan(losses[:4]).all()
    assert np.isfinite(losses[4:]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [4, 40, 4000])
def test_what_stands_under_false_never_leaks(dtype: Float, n: int) -> None:
    x = np.zeros((4, n), dtype)
    where = np.zeros((4, n), bool)
    where[:3, :2] = True
    x[0, 2], x[1, 3] = NAN, INF
    x[2, :2] = -INF
    x[3] = NAN
    with polysoftmax.engine("fused"):
        y, log_y = polysoftmax.softmax(x, where=where), polysoftmax.log_softmax(x, where=where)
        lse = polysoftmax.logsumexp(x, where=where)
    np.testing.assert_array_equal(y[:, 2:], 0)
    np.testing.assert_array_equal(log_y[:, 2:], -INF)
    np.testing.assert_array_equal(y[:, :2], [[0.5, 0.5], [0.5, 0.5], [NAN, NAN], [0, 0]])
    assert np.isnan(log_y[2, :2]).all()
    np.testing.assert_array_equal(log_y[3], -INF)
    np.testing.assert_allclose(lse, [np.log(2), np.log(2), -INF, -INF], rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_temperatures_at_their_limits(dtype: Float) -> None:
    x = np.asarray([[1, 3, 3, -INF]] * 6, dtype)
    temperature = np.asarray([0.0, INF, 1e-30, -1.0, NAN, 2.0], dtype)
    with polysoftmax.engine("fused"):
        y = polysoftmax.softmax(x, temperature=temperature)
        log_y = polysoftmax.log_softmax(x, temperature=temperature)
        slopes = polysoftmax.softmax_vjp(x, np.asarray([[1, 0, 0, INF]] * 6, dtype), temperature=temperature)
    half, third = dtype(0.5), dtype(1) / dtype(3)
    cold, hot = [0, half, half, 0], [third, third, third, 0]
    np.testing.assert_array_equal(y[:5], np.asarray([cold, hot, cold, [NAN] * 4, [NAN] * 4], dtype))
    e = float(mpmath.exp(-1))
    np.testing.assert_allclose(y[5], np.asarray([e, 1, 1, 0]) / (2 + e), rtol=1e-6)
    np.testing.assert_allclose(
        log_y[:2],
        np.log(np.asarray([cold, hot]), where=np.asarray([cold, hot]) > 0, out=np.full((2, 4), -INF)),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(slopes[:5], 0)
    assert slopes[5, 0] > 0
    assert slopes[5, 3] == 0


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_other_dtypes_and_axes(dtype: Float, axis: int) -> None:
    x = np.random.default_rng(1).integers(-120, 120, (6, 5, 70)).astype(dtype)[::-1, :, ::2]
    wide = x.astype(np.float64)
    terms = np.exp(wide - wide.max(axis=axis, keepdims=True))
    with polysoftmax.engine("fused"):
        y = polysoftmax.softmax(x, axis=axis)
    assert y.dtype == (np.float16 if dtype is np.float16 else np.float64)
    np.testing.assert_allclose(y, terms / terms.sum(axis=axis, keepdims=True), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("n", [3, 70_000])
def test_float16_is_rounded_once(n: int) -> None:
    with polysoftmax.engine("fused"):
        y = polysoftmax.softmax(np.zeros((2, n), np.float16))
    np.testing.assert_array_equal(y, np.float16(1 / n))


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Whether two arrays of float16 agree, the signs of zeros included; any NaN is like any other."""
    return bool(((got.view(np.uint16) == want.view(np.uint16)) | (np.isnan(got) & np.isnan(want))).all())


@_kernels._kernel
def _widen_in_steps(bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(bits.size):
        out[i] = _kernels._of_float16_in_steps(bits[i])


@_kernels._kernel
def _narrow_in_steps(x: np.ndarray, bits: np.ndarray) -> None:
    for i in range(x.size):
        bits[i] = _kernels._to_float16_in_steps(x[i])


@pytest.mark.parametrize("widen", [_kernels.widen_float16, _widen_in_steps])
def test_every_float16_is_widened_exactly(widen: Callable[..., None]) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(bits.size, np.float32)
    widen(bits, wide)
    want = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(wide, want)
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(want))


@pytest.mark.parametrize("narrow", [_kernels.narrow_float16, _narrow_in_steps])
def test_rounding_to_float16(narrow: Callable[..., None]) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    odd = np.asarray([65504, 65519.996, 65520, 1e30, INF, NAN, 1e-40], np.float32)
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(INF))
    x = np.concatenate([halves, ties, below, above, odd])
    x = np.concatenate([x, -x])
    bits = np.empty(x.size, np.uint16)
    narrow(x, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_bits(bits.view(np.float16), x.astype(np.float16))


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide, again = np.empty(bits.size, np.float32), np.empty(bits.size, np.uint16)
    _kernels.widen_bfloat16(bits, wide)
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)
    _kernels.narrow_bfloat16(wide, again)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(again[number], bits[number])
    assert (again[~number] & 0x7FFF > 0x7F80).all()


@pytest.mark.parametrize(
    ("upper", "lower", "rounded"),
    [
        (0x3F80, 0x8000, 0x3F80),
        (0x3F81, 0x8000, 0x3F82),
        (0x3F80, 0x8001, 0x3F81),
        (0xBF80, 0x7FFF, 0xBF80),
        (0x7F7F, 0xFFFF, 0x7F80),
    ],
)
def test_rounding_to_bfloat16(upper: int, lower: int, rounded: int) -> None:
    x, bits = np.asarray([upper << 16 | lower], np.uint32).view(np.float32), np.empty(1, np.uint16)
    _kernels.narrow_bfloat16(x, bits)
    assert bits[0] == rounded


@pytest.mark.parametrize("dtype", FLOATS)
def test_logarithm_is_within_three_ulp(dtype: Float) -> None:
    doublings = 2.0 ** np.arange(-60, 40)
    z = np.concatenate([np.logspace(-30, 9, 2000), np.linspace(0, 3, 2000), doublings, doublings - 1]).astype(dtype)
    z = z[z >= 0]
    out = np.empty_like(z)
    logarithms(z, out)
    with mpmath.workdps(60):
        worst = ulps(out, [mpmath.log1p(mpmath.mpf(float(one))) for one in z])
    assert worst.max() <= 3.0, z[worst.argmax()]
    logarithms(np.asarray([0.0, INF, NAN], dtype), out[:3])
    np.testing.assert_array_equal(out[:3], np.asarray([0, INF, NAN], dtype))


def exact_softmax(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the softmax along the last axis and the logsumexp in a wider dtype."""
    wide = x.astype(np.longdouble)
    top = wide.max(axis=-1, keepdims=True)
    terms = np.exp(wide - top)
    total = terms.sum(axis=-1, keepdims=True)
    return terms / total, (top + np.log(total))[..., 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 15, 33, 160])
@pytest.mark.parametrize("m", [1, 7, 8, 9, 127, 128, 129, 300])
def test_short_rows_of_any_number_and_length(m: int, n: int, dtype: Float) -> None:
    x = 3 * np.random.default_rng(m * n).standard_normal((m, n)).astype(dtype)
    want, total = exact_softmax(x)
    around = np.full((m + 2, n), -7, dtype)  # what is moved by squares must not reach the neighbours
    _kernels.softmax_short(x, None, around[1:-1])
    np.testing.assert_allclose(around[1:-1], want.astype(dtype), rtol=64 * U[dtype])
    assert (around[[0, -1]] == -7).all()
    with polysoftmax.engine("fused"):
        np.testing.assert_allclose(
            polysoftmax.logsumexp(x), total.astype(dtype), rtol=64 * U[dtype], atol=64 * U[dtype]
        )
        np.testing.assert_allclose(
            polysoftmax.log_softmax(x), np.log(want).astype(dtype), rtol=64 * U[dtype], atol=64 * U[dtype]
        )


@pytest.mark.parametrize("n", [3, 40, 700, 300_000])
def test_16_bits_are_the_float32_answer_rounded_once(n: int) -> None:
    x = (3 * np.random.default_rng(n).standard_normal((5, n))).astype(np.float16)
    targets = np.arange(5) % n
    with polysoftmax.engine("fused"):
        for function in (polysoftmax.softmax, polysoftmax.log_softmax, polysoftmax.logsumexp):
            wide = function(x.astype(np.float32))
            if function is polysoftmax.softmax and n >= fused._LONG:
                wide = function(x, dtype=np.float32)  # of long rows, exponentials in float32 are scaled, too
            got = function(x)
            assert got.dtype == np.float16
            off = np.abs(got.astype(np.float64) - wide) / np.spacing(np.abs(wide.astype(np.float16))).astype(np.float64)
            assert off.max() <= 0.501
        losses = polysoftmax.cross_entropy(x, targets, reduction="none")
        wide = polysoftmax.cross_entropy(x.astype(np.float32), targets, reduction="none")
    np.testing.assert_array_equal(losses, wide.astype(np.float16))


@pytest.fixture(params=["fused", "blocks"])
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine that cuts long rows into pieces; blocks, which do so later, are told to cut them sooner."""
    monkeypatch.setattr(numpy_engine, "_BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(numpy_engine, "_LONG_BYTES", 1 << 20)
    return str(request.param)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_long_rows_in_pieces(cutting: str, dtype: Float, temperature: float) -> None:
    n = 3 * fused._PIECE + 5
    x = 3 * np.random.default_rng(2).standard_normal((3, n)).astype(dtype)
    x[1] = -2.3  # a rounding error that never changes sign
    x[2, : 2 * fused._PIECE] = -INF  # pieces with nothing in them
    exact = x.astype(np.longdouble) / temperature
    want, total = exact_softmax(exact)
    with np.errstate(divide="ignore"):
        log_want = np.log(want)
    with polysoftmax.engine(cutting), np.errstate(all="raise"):
        y = polysoftmax.softmax(x, temperature=temperature)
        log_y = polysoftmax.log_softmax(x, temperature=temperature)
        lse, losses = polysoftmax.logsumexp(x), polysoftmax.cross_entropy(x, np.full(3, n - 1), reduction="none")
    d = exact.max(axis=-1, keepdims=True) - exact
    spread = (want * np.where(want > 0, d, 0)).sum(axis=-1, keepdims=True)
    bound = (16 + np.log2(n) + np.where(want > 0, d, 0) + spread) * U[dtype]
    assert (np.abs(y - want) <= bound * want + np.finfo(dtype).tiny).all()
    finite = want > 0
    log_error = np.abs(log_y[finite] - log_want[finite])
    assert (log_error <= (bound + np.abs(log_want) * U[dtype])[finite]).all()
    assert (log_y[~finite] == -INF).all()
    if temperature == 1:
        np.testing.assert_allclose(lse, total.astype(dtype), rtol=64 * U[dtype])
        np.testing.assert_allclose(losses, -log_want[:, -1].astype(dtype), rtol=64 * U[dtype])


def test_nan_and_inf_in_pieces_of_long_rows(cutting: str) -> None:
    x = nan_and_inf(fused._LONG, np.float32)
    with polysoftmax.engine(cutting), np.errstate(all="raise"):
        y, log_y, lse = polysoftmax.softmax(x), polysoftmax.log_softmax(x), polysoftmax.logsumexp(x)
    assert np.isnan(y[:4]).all()
    assert np.isnan(log_y[:4]).all()
    assert np.isfinite(y[4:]).all()
    np.testing.assert_array_equal(lse[:4], [NAN, NAN, INF, -INF])
    assert np.isfinite(lse[4:]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_along_other_axes(cutting: str, dtype: Float) -> None:
    """Forty pieces or more, some with nothing in them, and a rounding error that never changes sign."""
    n = 40 * fused._ACROSS_PIECE // 2048
    x = np.full((n, 2048), -2.3, dtype)
    x[:, 1::2] = 3 * np.random.default_rng(4).standard_normal((n, 1024)).astype(dtype)
    x[0] = 0
    x[: n // 4, 6] = -INF
    x[:, 4] = -INF
    x[n // 2, 3] = NAN
    x[n // 2, 5] = INF
    columns = [0, 1, 2, 6, 7, 2046, 2047]
    want, total = exact_softmax(x.T[columns])
    with polysoftmax.engine(cutting), np.errstate(all="raise"):
        y, log_y, lse = (f(x, axis=0) for f in (polysoftmax.softmax, polysoftmax.log_softmax, polysoftmax.logsumexp))
    np.testing.assert_allclose(y[:, columns].T, want.astype(dtype), rtol=48 * U[dtype])
    with np.errstate(divide="ignore"):
        log_want = np.log(want).astype(dtype)
    np.testing.assert_allclose(log_y[:, columns].T, log_want, rtol=6 * U[dtype], atol=32 * U[dtype])
    np.testing.assert_allclose(lse[columns], total.astype(dtype), rtol=6 * U[dtype], atol=32 * U[dtype])
    for odd in (y[:, 3:6], log_y[:, 3:6]):
        assert np.isnan(odd).all()
    np.testing.assert_array_equal(lse[3:6], [NAN, -INF, INF])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1000, 7), (30_001, 9), (20, 3000)])
def test_logsumexp_along_other_axes(dtype: Float, shape: tuple[int, ...]) -> None:
    x = 3 * np.random.default_rng(3).standard_normal(shape).astype(dtype)
    x[:, :5] = nan_and_inf(len(x), dtype)[:5].T
    x[:, 5] = -40
    x[0, 5] = 0  # an answer close to 0 keeps its digits
    with polysoftmax.engine("fused"), np.errstate(all="raise"):
        got = polysoftmax.logsumexp(x, axis=0)
        y = polysoftmax.softmax(x, axis=0)
    np.testing.assert_array_equal(got[:4], [NAN, NAN, INF, -INF])
    np.testing.assert_allclose(got[6:], exact_softmax(x.T[6:])[1].astype(dtype), rtol=64 * U[dtype])
    np.testing.assert_allclose(got[5], np.log1p((len(x) - 1) * np.exp(-40.0)), rtol=64 * U[dtype])
    np.testing.assert_allclose(y[:, 5:], exact_softmax(x.T[5:])[0].T.astype(dtype), rtol=200 * U[dtype])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n", [2, 5, 40, 300])
def test_gradient_of_cross_entropy(n: int, narrow: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(n)
    m, z_loss, dtype = 301, 0.1, torch.bfloat16 if narrow else torch.float32
    x = torch.from_numpy(rng.standard_normal((m, n)) * 3).to(dtype)
    weight, g = rng.uniform(0.5, 2, n).astype(np.float32), rng.standard_normal(m).astype(np.float32)
    targets = rng.integers(0, n, m)
    targets[7::9] = -100
    x[7] = NAN
    wide = x.double().numpy()
    with np.errstate(invalid="ignore"):
        terms = np.exp(wide)
        p, total = terms / terms.sum(axis=1, keepdims=True), np.log(terms.sum(axis=1))
    counts = targets >= 0
    kept = np.where(counts, targets, 0)
    c, rows = weight[kept], np.arange(m)
    losses = np.where(counts, c * (total - wide[rows, kept]) + z_loss * total**2, 0)
    slopes = p * (c + 2 * z_loss * total)[:, None]
    slopes[rows, kept] -= c
    slopes = np.where(counts[:, None], slopes * g[:, None], 0)
    with polysoftmax.engine("fused"):
        leaf = x.clone().requires_grad_()
        y = polysoftmax.cross_entropy(
            leaf,
            torch.from_numpy(targets),
            weight=torch.from_numpy(weight),
            ignore_index=-100,
            z_loss=z_loss,
            reduction="none",
        )
        (gradient,) = torch.autograd.grad(y, leaf, torch.from_numpy(g).to(dtype))
    if narrow:
        slopes *= (torch.from_numpy(g).to(dtype).double().numpy() / g)[:, None]
    unit = 2.0**-8 if narrow else 64 * U[np.float32]
    np.testing.assert_allclose(y.detach().double(), losses, rtol=unit, atol=1e-5)
    np.testing.assert_allclose(gradient.double(), slopes, rtol=unit, atol=2e-5)


def test_ignored_targets_leave_no_trace() -> None:
    x = np.full((3, 100), NAN, np.float32)
    x[0] = 0
    with polysoftmax.engine("fused"):
        losses = polysoftmax.cross_entropy(x, np.asarray([5, -1, -1]), ignore_index=-1, reduction="none")
    np.testing.assert_allclose(losses, [np.log(100), 0, 0], rtol=1e-6)


def test_explanations() -> None:
    large, odd = np.zeros((1000, 600), np.float32), np.zeros((1000, 600), np.longdouble)
    fused = polysoftmax.explain(large, "softmax")
    assert fused.engine == "fused"
    assert "blocks of 250 rows of 600, row by row" in fused.reason
    assert polysoftmax.explain(large, "entropy").engine == "blocks"
    assert "no fused kernel for entropy" in polysoftmax.explain(large, "entropy").reason
    assert polysoftmax.explain(odd, "softmax").engine == "blocks"
    assert polysoftmax.explain(large[:9], "softmax").engine == "portable"
    assert "fewer than 10000 entries" in polysoftmax.explain(large[:9], "softmax").reason
    with polysoftmax.engine("blocks"):
        assert polysoftmax.explain(large, "softmax").engine == "blocks"
        assert 'asked for by engine("blocks")' in polysoftmax.explain(large, "softmax").reason


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_numba_is_imported_by_large_inputs_alone() -> None:
    code = """
import sys
import numpy as np
import polysoftmax
polysoftmax.softmax(np.zeros((90, 100)))
small = "numba" in sys.modules
polysoftmax.softmax(np.zeros((900, 100)))
print(small, "numba" in sys.modules)
"""
    done = _python(code)
    assert done.stdout == "False True\n", done.stderr


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # importing it raises ImportError
import numpy as np
import polysoftmax
"""


def test_without_numba_the_same_calls_work() -> None:
    code = WITHOUT_NUMBA + "print(polysoftmax.softmax(np.zeros((900, 100)))[0, 0], "
    code += "polysoftmax.explain(np.zeros((9000, 100)), 'softmax'))"
    done = _python(code)
    assert done.stdout.startswith("0.01 "), done.stderr
    assert "blocks" in done.stdout
    assert "no fused kernels without polysoftmax[fast]" in done.stdout


def test_asking_for_kernels_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install polysoftmax\[fast\]"), polysoftmax.engine("fused"):
        pass
