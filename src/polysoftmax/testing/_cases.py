"""Inputs worth testing, as data: each has a name, and says nothing about what the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

BIG = 1e30


@dataclass(frozen=True, eq=False)
class Case:
    """One call as data: its operands by name.

    NumPy arrays stand for arrays of the library, a function makes a large one; everything else is passed as it is.
    ``core`` cases run everywhere, the others only where a new shape or option does not cost a compilation.
    """

    name: str
    given: dict[str, Any]
    large: bool = False
    core: bool = False

    def operand(self, name: str) -> Any:
        """Return an operand before it is rounded to a dtype."""
        value = self.given[name]
        return value() if callable(value) else value


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


def case(name: str, *, large: bool = False, core: bool = False, **given: Any) -> Case:
    """Make a case; nested tuples become arrays, but for an axis and a shape."""
    arrays = {
        key: np.asarray(one) if isinstance(one, tuple) and key not in ("axis", "shape") else one
        for key, one in given.items()
    }
    return Case(name, arrays, large, core)


def _columns(pairs: Any) -> tuple[Any, Any]:
    first, second = zip(*pairs, strict=True)
    return first, second


def normal(*shape: int, scale: float = 3.0, seed: int = 20250207) -> Callable[[], Any]:
    """Return a function that makes an array of normal variates."""
    return lambda: scale * np.random.default_rng(seed).standard_normal(shape)


def _quantised(*shape: int) -> Callable[[], Any]:
    # Sixty-fourths: a million terms have a few hundred values, which mpmath can add up exactly.
    return lambda: np.clip(np.round(normal(*shape)() * 64) / 64, -12, 12)


def _plain() -> list[Case]:
    masked_x, masked_where = _columns(MASKED)
    return [
        case("finite rows", x=FINITE, core=True),
        case("special rows", x=SPECIAL, core=True),
        case("masked rows", x=masked_x, where=masked_where, core=True),
        *(case(f"axis {axis}", x=_GRID, axis=axis) for axis in (0, 1, -1, (0, 1), (0, 2), (-1, 0), None, ())),
        case("axis 0, mask that broadcasts", x=_GRID, axis=0, where=_GRID_MASK),
        case("axes (1, 2), mask that broadcasts", x=_GRID, axis=(1, 2), where=_GRID_MASK, core=True),
        case("rows of one", x=((2.0,), (-BIG,), (nan,), (-inf,), (inf,))),
        case("0-d", x=np.asarray(2.5), core=True),
        case("0-d, axis None", x=np.asarray(2.5), axis=None),
        case("normal", x=normal(4, 1000)),
        case("normal, axis 0", x=normal(1000, 3), axis=0, core=True),
        case("wide normal", x=normal(2, 257, scale=30.0)),
        case("70000 zeros", x=lambda: np.zeros(70_000), large=True),
        case("70000 zeros, axis 0", x=lambda: np.zeros((70_000, 2)), axis=0, large=True),
        case("a million", x=_quantised(1_000_000), large=True, core=True),
        case("200000, axis 0", x=_quantised(200_000, 3), axis=0, large=True, core=True),
    ]


def _with_temperature() -> list[Case]:
    masked_x, masked_where = _columns(MASKED)
    temperatures, per_row_x = _columns(PER_ROW)
    masked = {"x": masked_x, "where": masked_where}
    return [
        *(case(f"finite rows, T={t}", x=FINITE, temperature=t, core=t in (0, 0.1)) for t in (0.1, 0.5, 2.0, 0, inf)),
        case("finite rows, tiny T", x=FINITE, temperature=1e-30),
        case("special rows, T=0.5", x=SPECIAL, temperature=0.5),
        case("a temperature a row", x=per_row_x, temperature=temperatures, core=True),
        *(case(f"masked rows, T={t}", **masked, temperature=t, core=t == 0.5) for t in (0.5, 0, inf)),
        case("axis 1, T of the reduced shape", x=_GRID, axis=1, temperature=((1, 2, 3, 0), (0.5, inf, 1, 2))),
        case("axis 1, T that broadcasts", x=_GRID, axis=1, temperature=(((1, 2, 3, 0.5),),)),
        case("axes (0, 2), T of the reduced shape", x=_GRID, axis=(0, 2), temperature=(0.5, 0, 2), core=True),
        case("axis None, 0-d T", x=_GRID, axis=None, temperature=np.asarray(0.5)),
    ]


_WEIGHTED = _columns(WEIGHTED)
PLAIN = _plain()
PROBABILITIES = PLAIN + _with_temperature()
LOGSUMEXP = [*PLAIN, case("weighted rows", x=_WEIGHTED[0], weights=_WEIGHTED[1], core=True)]
