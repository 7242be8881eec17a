"""Inputs worth testing, as data: each has a name, and says nothing about what the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILY = ("softmax", "log_softmax", "logsumexp")
PROBABILITIES = ("softmax", "log_softmax")
BIG = 1e30


@dataclass(frozen=True, eq=False)
class Case:
    """One call: nested tuples stand for arrays, numbers for numbers; a function makes a large array.

    ``core`` cases run everywhere, the others only where a new shape or option does not cost a compilation.
    """

    name: str
    x: Any
    axis: int | tuple[int, ...] | None = -1
    temperature: Any = 1.0
    where: Any = None
    weights: Any = None
    ops: tuple[str, ...] = FAMILY
    large: bool = False
    core: bool = False

    def values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return x before it is rounded to a dtype."""
        return np.asarray(self.x() if callable(self.x) else self.x, dtype=np.float64)


# One row an idea, all of one length, so that one call tests them all and that they do not disturb each other.
FINITE = (
    (1, 2, 3),  # the classical example
    (1000, 1001, 1002),
    (-1000, -1001, -1002),
    (0, 0, 0),
    (3, 1, 3),  # ties
    (2, 2, -1),
    (0, -40, -41),  # logsumexp close to 0
    (1e-3, -1e-3, 0),
    (88.7, 88.6, -88.7),  # exp overflows in float32
    (0, -87.5, -103.9),  # exp is subnormal in float32
    (-0.6931472, -1.0986123, -1.7917595),  # 1/2, 1/3, 1/6: logsumexp is 0
    (BIG, -BIG, 0),
    (BIG, BIG, 1),
    (-BIG, -BIG, -BIG),
    (5, -inf, 4),
    (-inf, -inf, 7),
)
SPECIAL = (
    (nan, 0, 1),
    (0, 1, 2),
    (inf, 0, 1),
    (inf, -inf, inf),
    (-inf, -inf, -inf),
    (-inf, nan, -inf),
    (3, 1, 3),
    (nan, inf, -inf),
)
MASKED = (
    ((1, 2, 3), (True, True, False)),
    ((1, nan, 3), (True, False, True)),
    ((inf, 2, 3), (False, True, True)),
    ((-inf, 2, 3), (True, False, True)),
    ((1, 2, 3), (False, False, False)),
    ((nan, nan, inf), (False, False, False)),
    ((-inf, 2, nan), (True, False, False)),
    ((nan, 2, 3), (True, True, False)),
    ((3, 3, BIG), (True, True, False)),
    ((0, inf, 1), (True, True, False)),
    ((-BIG, 1, BIG), (True, True, True)),
)
PER_ROW = (
    (0, (3, 1, 3)),
    (0.5, (1, 2, 3)),
    (2, (1, 2, 3)),
    (inf, (1, -inf, 3)),
    (nan, (1, 2, 3)),
    (-1, (1, 2, 3)),
    (1e-30, (1, 2, 2)),
    (0, (1, nan, 3)),
    (0, (-inf, -inf, -inf)),
    (inf, (-inf, -inf, -inf)),
    (0, (BIG, -BIG, BIG)),
    (1, (0, 1, 2)),
    (-inf, (1, 2, 3)),
    (inf, (inf, 2, 3)),
)
WEIGHTED = (
    ((1, 2, 3), (1, 2, 0.5)),
    ((1, nan, 3), (1, 0, 2)),  # a weight of 0 removes whatever stands there
    ((inf, 2, 3), (0, 1, 1)),
    ((1, 1, 2), (1, -1, 1)),
    ((1, 1, 0), (1, -1, 0)),  # total 0
    ((1, 1, 0), (1, -2, 0)),  # total below 0
    ((1, 2, 3), (0, 0, 0)),
    ((0, -40, 5), (1, 1, 0)),
    ((1, 5, 4), (4, -0.01, 0.25)),
    ((-inf, 2, 3), (1, 1, 1)),
)

_GRID = tuple(tuple(tuple((7 * i + 5 * j + 3 * k) % 11 - 4.5 for k in range(4)) for j in range(3)) for i in range(2))
_GRID_MASK = tuple(tuple((i + 2 * k) % 3 != 1 for k in range(4)) for i in range(3))


def _columns(pairs: Any) -> tuple[Any, Any]:
    first, second = zip(*pairs, strict=True)
    return first, second


def _normal(*shape: int, scale: float = 3.0) -> Callable[[], Any]:
    return lambda: scale * np.random.default_rng(20250207).standard_normal(shape)


def _quantised(*shape: int) -> Callable[[], Any]:
    # Sixty-fourths: a million terms have a few hundred values, which mpmath can add up exactly.
    return lambda: np.clip(np.round(_normal(*shape)() * 64) / 64, -12, 12)


def _build() -> dict[str, Case]:
    masked_x, masked_where = _columns(MASKED)
    temperatures, per_row_x = _columns(PER_ROW)
    weighted_x, weights = _columns(WEIGHTED)
    found = [
        Case("finite rows", FINITE, core=True),
        *(
            Case(f"finite rows, T={t}", FINITE, temperature=t, ops=PROBABILITIES, core=t in (0, 0.1))
            for t in (0.1, 0.5, 2.0, 0, inf)
        ),
        Case("finite rows, tiny T", FINITE, temperature=1e-30, ops=PROBABILITIES),
        Case("special rows", SPECIAL, core=True),
        Case("special rows, T=0.5", SPECIAL, temperature=0.5, ops=PROBABILITIES),
        Case("a temperature a row", per_row_x, temperature=temperatures, ops=PROBABILITIES, core=True),
        Case("masked rows", masked_x, where=masked_where, core=True),
        Case("masked rows, T=0.5", masked_x, where=masked_where, temperature=0.5, ops=PROBABILITIES, core=True),
        Case("masked rows, T=0", masked_x, where=masked_where, temperature=0, ops=PROBABILITIES),
        Case("masked rows, T=inf", masked_x, where=masked_where, temperature=inf, ops=PROBABILITIES),
        Case("weighted rows", weighted_x, weights=weights, ops=("logsumexp",), core=True),
        *(Case(f"axis {axis}", _GRID, axis=axis) for axis in (0, 1, -1, (0, 1), (0, 2), (-1, 0), None, ())),
        Case(
            "axis 1, T of the reduced shape",
            _GRID,
            axis=1,
            temperature=((1, 2, 3, 0), (0.5, inf, 1, 2)),
            ops=PROBABILITIES,
        ),
        Case("axis 1, T that broadcasts", _GRID, axis=1, temperature=(((1, 2, 3, 0.5),),), ops=PROBABILITIES),
        Case(
            "axes (0, 2), T of the reduced shape",
            _GRID,
            axis=(0, 2),
            temperature=(0.5, 0, 2),
            ops=PROBABILITIES,
            core=True,
        ),
        Case("axis 0, mask that broadcasts", _GRID, axis=0, where=_GRID_MASK),
        Case("axes (1, 2), mask that broadcasts", _GRID, axis=(1, 2), where=_GRID_MASK, core=True),
        Case("axis None, 0-d T", _GRID, axis=None, temperature=np.asarray(0.5), ops=PROBABILITIES),
        Case("rows of one", ((2,), (-BIG,), (nan,), (-inf,), (inf,))),
        Case("0-d", 2.5, core=True),
        Case("0-d, axis None", 2.5, axis=None),
        Case("normal", _normal(4, 1000)),
        Case("normal, axis 0", _normal(1000, 3), axis=0, core=True),
        Case("wide normal", _normal(2, 257, scale=30.0)),
        Case("70000 zeros", lambda: np.zeros(70_000), large=True),
        Case("70000 zeros, axis 0", lambda: np.zeros((70_000, 2)), axis=0, large=True),
        Case("a million", _quantised(1_000_000), large=True, core=True),
        Case("200000, axis 0", _quantised(200_000, 3), axis=0, large=True, core=True),
    ]
    return {one.name: one for one in found}


CASES = _build()
"""Every case by its name."""
