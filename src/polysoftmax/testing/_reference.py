"""Expected answers in mpmath, and how far an answer may be from them.

An expectation is a pair of float64 numbers whose sum has more digits than any format under test, and a bound in units
of the compute dtype. Equal terms of a row are computed once, so that a row of a million entries costs little.
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
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BITS = 200
_CONSTANT = 16


@dataclass(frozen=True)
class Reference:
    """Exact answers ``high + low``, and the bound on the error of each in units of the compute dtype.

    ``dtype`` is the answer's: the name of a dtype, or ``"index"`` for the library's default index dtype. A bound of
    infinity leaves an entry undecided, where rounding may turn the answer either way.
    """

    high: Floats
    low: Floats
    units: Floats
    dtype: str
    compute: str

    @property
    def is_floating(self) -> bool:
        """Whether errors have a size; an integer is right or wrong."""
        return self.dtype in FORMATS

    def error(self, answer: Floats) -> Floats:
        """Return the absolute error: 0 where NaN, inf or -inf is right, inf where it is wrong."""
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs((answer - self.high) - self.low)
            same = (answer == self.high) | (np.isnan(answer) & np.isnan(self.high))
            exact = ~np.isfinite(self.high) | ~np.isfinite(answer)
        return np.where(exact, np.where(same, 0.0, math.inf), distance)

    def allowed(self) -> Floats:
        """Return the absolute error that the contract allows."""
        if not self.is_floating:
            return np.where(self.units > 0, math.inf, 0.0)
        wide, narrow = FORMATS[self.compute], FORMATS[self.dtype]
        bound = self.units * wide.unit + np.where(self.units > 0, wide.tiny, 0.0)
        if narrow.precision < wide.precision:
            size = np.where(np.isfinite(self.high), np.abs(self.high), 0.0)
            bound = bound + (size + bound) * narrow.unit + narrow.smallest / 2
        return bound

    def excess(self, answer: Floats) -> Floats:
        """Return the error in units of what is allowed; 1 is the bound."""
        error, allowed = self.error(answer), self.allowed()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = np.where(error == 0, 0.0, error / allowed)
        return np.where(self._overflows(answer) | np.isinf(allowed), 0.0, ratio)

    def ulps(self, answer: Floats, *, relative: bool) -> Floats:
        """Return the error in units in the last place of the answer.

        Unless it is ``relative``, the unit of an answer between -1 and 1 is that of 1. An answer below the smallest
        normal number has no such unit; libraries differ in whether they keep it.
        """
        if not self.is_floating:
            return np.where(self.excess(answer) > 1, math.inf, 0.0)
        size = np.abs(self.high)
        with np.errstate(invalid="ignore"):
            left_out = self._overflows(answer) | np.isinf(self.units)
            if relative:
                left_out |= (size < FORMATS[self.dtype].tiny) & (np.abs(answer) <= FORMATS[self.dtype].tiny)
        unit = 2 * FORMATS[self.dtype].unit * _binade(size if relative else np.maximum(size, 1.0))
        return np.where(left_out, 0.0, self.error(answer) / unit)

    def _overflows(self, answer: Floats) -> Any:
        if not self.is_floating:
            return False
        with np.errstate(invalid="ignore"):
            beyond = np.isfinite(self.high) & (np.abs(self.high) > FORMATS[self.dtype].largest)
            return beyond & (answer == np.sign(self.high) * math.inf)


def _binade(size: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(size) & (size > 0), size, 1.0)
    return np.asarray(np.exp2(np.floor(np.log2(finite))))


def exactly(values: Any, dtype: str, free: Any = False) -> Reference:
    """Return the expectation of values that have no error, but for entries that are left undecided."""
    high = np.asarray(values, dtype=np.float64)
    units = np.where(np.broadcast_to(free, high.shape), math.inf, 0.0)
    return Reference(high, np.zeros_like(high), units, dtype, dtype)


def split(pairs: Iterable[tuple[Any, Any]]) -> Floats:
    """Return exact answers with their bounds as three rows of float64 numbers: high parts, low parts, units."""
    each = []
    for y, units in pairs:
        high = float(y)
        each.append((high, float(y - high) if math.isfinite(high) else 0.0, float(units)))
    return np.asarray(each, dtype=np.float64).reshape(-1, 3).T


def constant(values: Any) -> Floats:
    """Return answers without an error as `split` does."""
    high = np.atleast_1d(np.asarray(values, dtype=np.float64))
    return np.stack([high, np.zeros_like(high), np.zeros_like(high)])


def exponential(z: Any) -> Any:
    """Return exp(z), and 0 far below every format, where mpmath would carry enormous exponents."""
    return mpmath.exp(z) if z > -50_000 else mpmath.mpf(0)


@dataclass(frozen=True)
class Scored:
    """Scores and probabilities of the distinct entries of a row.

    The bounds follow from them: with d = -z and D = Σ p·d, a probability has a relative error of 16 + log2 n + d + D
    units, the logarithm of one an absolute error of as many and |log p|. Where x - max is divided by a temperature a
    score is rounded twice, and d and D count twice.
    """

    z: list[Any]
    p: list[Any]
    log_total: Any
    mean: float
    n: int
    roundings: int

    def relative(self, i: int) -> float:
        """Return the bound on the relative error of a probability."""
        return float(_CONSTANT + math.log2(self.n) + self.roundings * (self.mean - self.z[i])) if self.p[i] else 0.0

    def log_p(self, i: int) -> Any:
        """Return the logarithm of a probability."""
        return self.z[i] - self.log_total

    def absolute(self, i: int) -> float:
        """Return the bound on the absolute error of the logarithm of a probability."""
        if self.z[i] == -mpmath.inf:
            return 0.0
        spread = self.roundings * (self.mean - self.z[i])
        return float(_CONSTANT + math.log2(self.n) + spread + abs(self.log_p(i)))


class Row:
    """The operands of one row."""

    def __init__(
        self, number: int, x: Floats, exists: NDArray[Any], temperature: float, others: dict[str, Any]
    ) -> None:
        self.number = number
        self.x = x
        self.exists = exists
        self.temperature = temperature
        self.others = others

    @property
    def n(self) -> int:
        """Length of the row."""
        return len(self.x)

    @functools.cached_property
    def distinct(self) -> tuple[list[float], list[int], NDArray[Any]]:
        """The distinct entries that exist, how often each occurs, and for every place the number of its entry."""
        values, inverse, counts = np.unique(self.x[self.exists], return_inverse=True, return_counts=True)
        place = np.full(self.n, -1)
        place[self.exists] = inverse
        return values.tolist(), counts.tolist(), place

    @property
    def is_undefined(self) -> bool:
        """Whether the row answers NaN wherever it has an entry."""
        values, *_ = self.distinct
        top = max(values)
        return not (self.temperature >= 0 and math.isfinite(top) and not any(map(math.isnan, values)))

    @functools.cached_property
    def scored(self) -> Scored:
        """Scores and probabilities of a row that is defined."""
        if self.is_undefined:
            msg = "a row without an answer has no scores, so nothing is expected of them"
            raise ValueError(msg)
        values, counts, _ = self.distinct
        top, t = max(values), self.temperature
        z = [_score(v, top, t) for v in values]
        terms = [exponential(one) for one in z]
        total = mpmath.fsum(n * e for n, e in zip(counts, terms, strict=True))
        p = [e / total for e in terms]
        mean = mpmath.fsum(-n * q * one for n, q, one in zip(counts, p, z, strict=True) if q)
        return Scored(z, p, mpmath.log(total), float(mean), self.n, 1 if t == 1 else 2)

    def everywhere(self, of_distinct: Floats, missing: float) -> Floats:
        """Give each place the answer of its entry."""
        place = self.distinct[2]
        absent = np.asarray([[missing], [0.0], [0.0]])
        return np.where(place >= 0, of_distinct[:, place], absent)


def _score(value: float, top: float, t: float) -> Any:
    if value == -math.inf or (t == 0 and value < top):
        return mpmath.mpf("-inf")
    if t in (0, math.inf):
        return mpmath.mpf(0)
    return (mpmath.mpf(value) - mpmath.mpf(top)) / mpmath.mpf(t)


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


def _from_rows(rows: NDArray[Any], shape: tuple[int, ...], axes: tuple[int, ...]) -> NDArray[Any]:
    kept = tuple(i for i in range(len(shape)) if i not in axes)
    moved = rows.reshape(tuple(shape[i] for i in kept + axes))
    return np.moveaxis(moved, range(len(kept), len(shape)), axes)


PER_ROW = ("temperature", "top_k", "top_p", "min_p")
"""Parameters that are a number, or an array with one entry a row."""


UNIT = "hidden"
"""The hidden states of a head, which are the rows of a unit matrix, so that its weight holds the logits."""

_NOT_BESIDE_ROWS = ("where", "weight", UNIT)
"""Arrays that are not taken apart as the rows are; a mask is, by itself."""


@dataclass(frozen=True)
class Given:
    """The operands of one call as the library sees them: arrays rounded to their dtypes, numbers, and options."""

    operands: dict[str, Any]
    dtype: str
    compute: str

    def __getitem__(self, name: str) -> Any:
        return self.operands[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an operand, or a default where it is not given."""
        return self.operands.get(name, default)

    @property
    def unit(self) -> float:
        """Unit roundoff of the compute dtype."""
        return FORMATS[self.compute].unit

    def layout(self, main: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shape of the main operand, its axes along a row, and its shape without them."""
        shape = np.shape(self[main])
        axes = axes_of(self.get("axis", -1), len(shape))
        return shape, axes, tuple(n for i, n in enumerate(shape) if i not in axes)

    def rows(self, main: str) -> Iterator[Row]:
        """Take every operand apart into rows."""
        shape, axes, _ = self.layout(main)
        x = to_rows(self[main], axes)
        exists = to_rows(np.broadcast_to(self.get("where", True), shape), axes)
        each: dict[str, Any] = {}
        for name, value in self.operands.items():
            if name in PER_ROW:
                each[name] = self._parameter(value, shape, axes, self.compute if name != "top_k" else "int64")
            elif isinstance(value, np.ndarray) and name not in (main, *_NOT_BESIDE_ROWS):
                is_entry = value.ndim == len(shape) and name not in ("key", "tokens")
                each[name] = (
                    to_rows(np.broadcast_to(value, shape), axes)
                    if is_entry or name == "weights"
                    else value.reshape(len(x), *value.shape[len(shape) - len(axes) :])
                )
        for i in range(len(x)):
            others = {name: value[i] for name, value in each.items()}
            yield Row(i, x[i], exists[i], float(others.get("temperature", 1.0)), others)

    @staticmethod
    def _parameter(value: Any, shape: tuple[int, ...], axes: tuple[int, ...], dtype: str) -> NDArray[Any]:
        exact = rounded(0.0 if value is None else value, dtype)
        reduced = tuple(n for i, n in enumerate(shape) if i not in axes)
        if exact.ndim == len(shape) and exact.shape != reduced and exact.ndim:
            kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
            return np.broadcast_to(exact, kept).reshape(-1)
        return np.broadcast_to(exact, reduced).reshape(-1)

    def shaped(self, main: str, columns: list[Floats], layout: str, dtype: str) -> Reference:
        """Put the answers of all rows together.

        ``layout`` is ``"entries"`` for the shape of the main operand, ``"row"`` for one answer a row, ``"kept"`` for
        one with length 1 on the axis, ``"along"`` for several on the axis, ``"last"`` for several, or a matrix, behind
        all other axes.
        """
        shape, axes, reduced = self.layout(main)
        m = columns[0].shape[1] if columns else 0
        out = np.stack(columns, axis=1) if columns else np.zeros((3, 0, m))
        if layout == "entries":
            each = [_from_rows(one, shape, axes) for one in out]
        elif layout == "along":
            each = [np.moveaxis(one.reshape(*reduced, m), -1, axes[0]) for one in out]
        else:
            n = math.prod(shape[i] for i in axes)
            kept = tuple(1 if i in axes else k for i, k in enumerate(shape))
            target = {"row": reduced, "kept": kept, "last": (*reduced, m), "matrix": (*reduced, n, n)}[layout]
            each = [one.reshape(target) for one in out]
        return Reference(
            each[0], each[1], each[2], {"dtype": self.dtype, "compute": self.compute}.get(dtype, dtype), self.compute
        )
