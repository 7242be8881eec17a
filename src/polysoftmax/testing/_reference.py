"""What the contract answers, from mpmath, and how far an answer may be from it.

An expectation is a pair of float64 numbers whose sum has more digits than any format under test. Equal terms of
a row are computed once, so that rows of a million entries with few values cost little.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np

from polysoftmax.testing._formats import FORMATS, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from polysoftmax.testing._cases import Case

    Floats = NDArray[np.float64]

_BITS = 200
_CONSTANT = 16


@dataclass(frozen=True)
class Reference:
    """Exact answers ``high + low``, and the bound on the error of each in units of the compute dtype."""

    high: Floats
    low: Floats
    units: Floats

    def error(self, answer: Floats) -> Floats:
        """Return the absolute error: 0 where NaN, inf or -inf is right, inf where it is wrong."""
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs((answer - self.high) - self.low)
            same = (answer == self.high) | (np.isnan(answer) & np.isnan(self.high))
            exact = ~np.isfinite(self.high) | ~np.isfinite(answer)
        return np.where(exact, np.where(same, 0.0, math.inf), distance)

    def allowed(self, result: str, compute: str) -> Floats:
        """Return the absolute error that the contract allows an answer of a dtype."""
        wide, narrow = FORMATS[compute], FORMATS[result]
        bound = self.units * wide.unit + wide.tiny
        if narrow.precision < wide.precision:
            size = np.where(np.isfinite(self.high), np.abs(self.high), 0.0)
            bound = bound + (size + bound) * narrow.unit + narrow.smallest / 2
        return bound

    def excess(self, answer: Floats, result: str, compute: str) -> Floats:
        """Return the error in units of what is allowed; 1 is the bound."""
        return np.where(self._overflows(answer, result), 0.0, self.error(answer) / self.allowed(result, compute))

    def ulps(self, answer: Floats, result: str, *, relative: bool) -> Floats:
        """Return the error in units in the last place of the answer.

        A logarithm, which is not ``relative``, has that of 1 where it lies between -1 and 1. An answer below the
        smallest normal number has no such unit; libraries differ in whether they keep it.
        """
        size = np.abs(self.high)
        with np.errstate(invalid="ignore"):
            left_out = self._overflows(answer, result)
            if relative:
                left_out |= (size < FORMATS[result].tiny) & (np.abs(answer) <= FORMATS[result].tiny)
        unit = 2 * FORMATS[result].unit * _binade(size if relative else np.maximum(size, 1.0))
        return np.where(left_out, 0.0, self.error(answer) / unit)

    def _overflows(self, answer: Floats, result: str) -> Any:
        with np.errstate(invalid="ignore"):
            beyond = np.isfinite(self.high) & (np.abs(self.high) > FORMATS[result].largest)
            return beyond & (answer == np.sign(self.high) * math.inf)


def _binade(size: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(size) & (size > 0), size, 1.0)
    return np.asarray(np.exp2(np.floor(np.log2(finite))))


@dataclass(frozen=True)
class Row:
    """The entries of one row that exist, each value with how often it occurs."""

    values: list[float]
    counts: list[int]
    weights: list[float]
    temperature: float

    @property
    def undefined(self) -> bool:
        """Whether the row answers NaN wherever it has a True."""
        top = max(self.values)
        return not (self.temperature >= 0 and math.isfinite(top) and not any(map(math.isnan, self.values)))

    @property
    def roundings(self) -> int:
        """How often a score is rounded: where x - max is divided, twice."""
        return 1 if self.temperature == 1 else 2

    def scores(self) -> list[Any]:
        """Return (x - max) / T, exactly."""
        top, t = max(self.values), self.temperature
        return [self._score(v, top, t) for v in self.values]

    @staticmethod
    def _score(value: float, top: float, t: float) -> Any:
        if value == -math.inf or (t == 0 and value < top):
            return mpmath.mpf("-inf")
        if t in (0, math.inf):
            return mpmath.mpf(0)
        return (mpmath.mpf(value) - mpmath.mpf(top)) / mpmath.mpf(t)


def exponential(z: Any) -> Any:
    """Return exp(z), and 0 far below every format, where mpmath would carry enormous exponents."""
    return mpmath.exp(z) if z > -50_000 else mpmath.mpf(0)


def spread(row: Row) -> tuple[list[Any], list[Any], Any, float]:
    """Return scores, probabilities, log Σ exp and D = Σ p·d of a row that has an answer."""
    z = row.scores()
    terms = [exponential(one) for one in z]
    total = mpmath.fsum(n * e for n, e in zip(row.counts, terms, strict=True))
    p = [e / total for e in terms]
    mean = mpmath.fsum(-n * q * one for n, q, one in zip(row.counts, p, z, strict=True) if q)
    return z, p, mpmath.log(total), float(mean)


Answers = list[tuple[Any, float]]


def _softmax(row: Row, n: int) -> Answers:
    if row.undefined:
        return [(mpmath.nan, 0.0)] * len(row.values)
    z, p, _, mean = spread(row)
    return [
        (q, float((_CONSTANT + math.log2(n) + row.roundings * (mean - one)) * q if q else 0))
        for one, q in zip(z, p, strict=True)
    ]


def _log_softmax(row: Row, n: int) -> Answers:
    if row.undefined:
        return [(mpmath.nan, 0.0)] * len(row.values)
    z, _, log_total, mean = spread(row)
    return [
        (y, float(_CONSTANT + math.log2(n) + row.roundings * (mean - one) + abs(y)) if one > -mpmath.inf else 0.0)
        for one in z
        for y in [one - log_total]
    ]


def _logsumexp(row: Row, n: int) -> Answers:
    """Answer one value a row; the condition number of a sum with signs enters its bound."""
    entries = [e for e in zip(row.values, row.counts, row.weights, strict=True) if e[2] != 0]
    if not entries:
        return [(mpmath.mpf("-inf"), 0.0)]
    values = [v for v, _, _ in entries]
    top = max(values)
    if any(map(math.isnan, values)) or not math.isfinite(top):
        return [(mpmath.nan if any(map(math.isnan, values)) else mpmath.mpf(top), 0.0)]
    d = [mpmath.mpf(top) - mpmath.mpf(v) for v in values]
    terms = [k * mpmath.mpf(w) * exponential(-one) for (_, k, w), one in zip(entries, d, strict=True)]
    total = mpmath.fsum(terms)
    if total <= 0:
        return [(mpmath.nan if total < 0 else mpmath.mpf("-inf"), 0.0)]
    y = mpmath.mpf(top) + mpmath.log(total)
    size = mpmath.fsum(abs(t) for t in terms)
    mean = mpmath.fsum(abs(t) * one for t, one in zip(terms, d, strict=True) if t) / total
    return [(y, float((_CONSTANT + math.log2(n)) * size / total + mean + abs(y)))]


_OPS: dict[str, tuple[Callable[[Row, int], Answers], float]] = {
    "softmax": (_softmax, 0.0),
    "log_softmax": (_log_softmax, -math.inf),
    "logsumexp": (_logsumexp, -math.inf),
}


def axes_of(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """Return the reduced axes in increasing order."""
    if axis is None or ndim == 0:
        return tuple(range(ndim))
    return tuple(sorted(one % ndim for one in (axis if isinstance(axis, tuple) else (axis,))))


def to_rows(x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Bring the reduced axes to the end and flatten them, and everything else, to a matrix of rows."""
    moved = np.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    n = math.prod(moved.shape[x.ndim - len(axes) :])
    return moved.reshape(math.prod(moved.shape[: x.ndim - len(axes)]), n)


def from_rows(rows: NDArray[Any], shape: tuple[int, ...], axes: tuple[int, ...]) -> NDArray[Any]:
    """Undo ``to_rows``."""
    kept = tuple(i for i in range(len(shape)) if i not in axes)
    moved = rows.reshape(tuple(shape[i] for i in kept + axes))
    return np.moveaxis(moved, range(len(kept), len(shape)), axes)


def parameter_rows(value: Any, shape: tuple[int, ...], axes: tuple[int, ...], dtype: str) -> Floats:
    """Return a parameter for each row: a number, the reduced shape, or one that broadcasts against x."""
    exact = rounded(value, dtype)
    reduced = tuple(n for i, n in enumerate(shape) if i not in axes)
    if exact.ndim == len(shape) and exact.shape != reduced and exact.ndim:
        kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
        return np.broadcast_to(exact, kept).reshape(-1)
    return np.broadcast_to(exact, reduced).reshape(-1)


# Backends are looped over outside, so that a reference serves all of them.
@functools.lru_cache(maxsize=512)
def reference(case: Case, op: str, dtype: str, compute: str) -> Reference:
    """Return what the contract answers to a case whose arrays are of a dtype.

    Parameters
    ----------
    case : Case
        The call.
    op : str
        ``"softmax"``, ``"log_softmax"`` or ``"logsumexp"``.
    dtype : str
        Dtype of the logits, and of the weights: they are rounded to it first.
    compute : str
        Dtype that the contract computes in; the temperature is rounded to it.

    Returns
    -------
    Reference
        Of the shape of the answer.
    """
    answer, missing = _OPS[op]
    x = rounded(case.values(), dtype)
    axes = axes_of(case.axis, x.ndim)
    rows = to_rows(x, axes)
    exists = to_rows(np.broadcast_to(True if case.where is None else case.where, x.shape), axes)
    weights = to_rows(np.broadcast_to(1.0 if case.weights is None else rounded(case.weights, dtype), x.shape), axes)
    temperature = parameter_rows(case.temperature, x.shape, axes, compute)
    per_row = op == "logsumexp"
    out = np.zeros((3, len(rows), 1 if per_row else rows.shape[1]))
    out[0] = missing
    with mpmath.workprec(_BITS):
        for i in range(len(rows)):
            if rows.shape[1] and exists[i].any():
                row, inverse = _row(rows[i][exists[i]], weights[i][exists[i]], float(temperature[i]))
                split = np.asarray([_split(y, units) for y, units in answer(row, rows.shape[1])]).T
                target = slice(None) if per_row else exists[i]
                out[:, i, target] = split if per_row else split[:, inverse]
    if per_row:
        reduced = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        return Reference(*(one.reshape(reduced) for one in out))
    return Reference(*(from_rows(one, x.shape, axes) for one in out))


def _row(x: Floats, weights: Floats, temperature: float) -> tuple[Row, NDArray[Any]]:
    if (weights == 1).all():
        values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return Row(values.tolist(), counts.tolist(), [1.0] * len(values), temperature), inverse
    # Weighted rows are short: nothing is gained by looking for equal terms.
    return Row(x.tolist(), [1] * len(x), weights.tolist(), temperature), np.arange(len(x))


def _split(y: Any, units: float) -> tuple[float, float, float]:
    high = float(y)
    return high, float(y - high) if math.isfinite(high) else 0.0, units
