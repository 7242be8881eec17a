"""Random calls of the public functions, as the cases of the conformance kit, which knows what each returns.

A call is left out only where the kit has no expectation for it: derivatives and statistics of rows without an answer,
masked Jacobians, weights that cancel, subnormal temperatures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polysoftmax.testing import CHECKS, FORMATS, Case, Check
from polysoftmax.testing._reference import axes_of, to_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Draw = Callable[[st.SearchStrategy[Any]], Any]
    Given = dict[str, Any]

inf, nan = math.inf, math.nan

_EIGHTHS = st.integers(-40, 40).map(lambda k: k / 8)  # with many ties
_REAL = st.floats(-60, 60)
_EXTREMES = st.sampled_from(
    (0.0, -0.0, 1e4, -1e4, 1e30, -1e30, 3.4e38, -3.4e38, 1.7e308, -1.7e308, 1e-7, -1e-20, 1e-40, 5e-324, -inf)
)
_WITH_EXTREMES = st.one_of(_EIGHTHS, _REAL, _EXTREMES)
_SPECIAL = st.one_of(_WITH_EXTREMES, _EIGHTHS, st.sampled_from((nan, inf, -inf)))
_DEFINED = (_EIGHTHS, _REAL, _WITH_EXTREMES)
_VECTORS = (_EIGHTHS, st.floats(-8, 8))

_TEMPERATURES = (0.0, 1.0, 0.5, 2.0, 0.1, 0.7, 3.0, inf, 1e-30, 1e-6, 1e30)
_SHARES = (0.0, 1.0, 0.9, 0.5, 0.8, 0.95, 1e-3, 0.999)
_LONG = ((300,), (2, 300), (300, 2), (257,), (1, 300, 1))
LAYOUTS = ("plain", "fortran", "strided", "offset", "reversed", "other order of bytes", "read-only")


@dataclass(frozen=True)
class RandomCall:
    """A function's check, its operands, the dtype of its arrays, and how these lie in memory."""

    check: Check
    case: Case
    dtype: str
    layout: str = "plain"

    @property
    def has_integers(self) -> bool:
        """Whether the logits are integers, which become the library's default float."""
        return "x" in self.case.given and self.case.given["x"].dtype.kind == "i"


@st.composite
def _shapes(draw: Draw, least: int, most: int) -> tuple[int, ...]:
    if most >= 48 and draw(st.integers(0, 49)) == 0:
        return tuple(draw(st.sampled_from(_LONG)))
    shape: list[int] = []
    for _ in range(draw(st.integers(least, 5))):
        left = most // max(1, math.prod(shape))
        shape.append(0 if draw(st.integers(0, 39)) == 0 else draw(st.integers(1, max(1, min(12, left)))))
    return tuple(draw(st.permutations(shape)))


class _Rows:
    """The shape and the axis of a call, and operands that go with them."""

    def __init__(self, draw: Draw, shape: tuple[int, ...], axis: Given) -> None:
        self.draw, self.shape, self.axis = draw, shape, axis
        self.axes = axes_of(axis.get("axis", -1), len(shape))
        self.reduced = tuple(n for i, n in enumerate(shape) if i not in self.axes)
        self.n = math.prod(shape[i] for i in self.axes)
        self.count = math.prod(self.reduced)

    def sometimes(self, one_in: int = 2) -> bool:
        return bool(self.draw(st.integers(1, one_in)) == 1)

    def of(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def array(self, shape: tuple[int, ...], elements: Any) -> NDArray[Any]:
        return np.asarray(self.draw(arrays(np.float64, shape, elements=elements, fill=st.nothing())))

    def integers(self, shape: tuple[int, ...], least: int, most: int) -> NDArray[Any]:
        return np.asarray(self.draw(arrays(np.int64, shape, elements=st.integers(least, most), fill=st.nothing())))

    def broadcast(self) -> tuple[int, ...]:
        """Return a shape that broadcasts to that of the rows."""
        if self.sometimes():
            return self.shape
        shape = tuple(1 if self.sometimes(3) else n for n in self.shape)
        return shape[self.draw(st.integers(0, len(shape))) :]

    def logits(self, where: Any = True, *, is_defined: bool = False) -> NDArray[Any]:
        """Return logits; each row has an answer if ``is_defined``, whatever is masked."""
        x = self.array(self.shape, self.of(_DEFINED if is_defined else (*_DEFINED, _SPECIAL)))
        if not is_defined:
            return x
        exists = np.broadcast_to(where, self.shape)
        for row in to_rows(np.arange(x.size).reshape(self.shape), self.axes):
            there = row[exists.flat[row]]
            if len(there) and not np.isfinite(x.flat[there]).any():
                x.flat[there[0]] = 0.0
        return np.where(exists, x, self.of((nan, inf, -inf, 1e30, 0.0)))

    def mask(self) -> Given:
        if not self.sometimes(3):
            return {}
        shape = self.broadcast()
        return {"where": np.asarray(self.draw(arrays(np.bool_, shape, elements=st.booleans(), fill=st.nothing())))}

    def per_row(self, elements: Any, dtype: Any = np.float64) -> NDArray[Any]:
        """Return a parameter with an entry a row: without axes, without the rows', or with length 1 there."""
        kept = tuple(1 if i in self.axes else n for i, n in enumerate(self.shape))
        some = tuple(1 if self.sometimes(3) else n for n in kept)
        shape = self.of(((), self.reduced, kept, some))
        return np.asarray(self.draw(arrays(dtype, shape, elements=elements, fill=st.nothing())))

    def temperature(self, *, is_defined: bool = False) -> Given:
        how = self.draw(st.integers(0, 5))
        if how < 3:
            return {}
        number = st.one_of(st.sampled_from(_TEMPERATURES), st.floats(0.0625, 16))
        if how < 5:
            return {"temperature": self.draw(number)}
        bad = () if is_defined else (nan, -1.0, -inf)
        return {"temperature": self.per_row(st.one_of(number, st.sampled_from((1.0, 0.5, *bad))))}

    def filters(self) -> Given:
        found: Given = {}
        if self.sometimes(3):
            k = st.integers(0, self.n + 2)
            bad = st.sampled_from((-1, 0, 2**31 - 1, 1))
            found["top_k"] = self.per_row(st.one_of(k, k, bad), np.int64) if self.sometimes(3) else self.draw(k)
        for name in ("top_p", "min_p"):
            if self.sometimes(3):
                share = st.one_of(st.sampled_from(_SHARES), st.floats(0, 1))
                bad = st.sampled_from((-0.5, 1.5, nan, 0.25))
                found[name] = self.per_row(st.one_of(share, share, bad)) if self.sometimes(3) else self.draw(share)
        return found

    def key(self) -> Any:
        if self.sometimes(3):
            return self.draw(st.one_of(st.integers(0, 99), st.integers(0, 2**63 - 1)))
        return self.integers((*self.reduced, 2), -(2**31), 2**31 - 1)


def _probabilities(rows: _Rows) -> Given:
    given = rows.mask() | rows.temperature() | rows.axis
    if rows.sometimes(12):
        return {"x": rows.integers(rows.shape, -128, 127), **given}
    return {"x": rows.logits(), **given}


def _logsumexp(rows: _Rows) -> Given:
    given = rows.mask() | rows.axis
    if not rows.sometimes():
        return {"x": rows.logits(), **given}
    weights = rows.array(rows.broadcast(), st.sampled_from((0.0, 1.0, 0.5, 2.0, 1e-3, 7.0)))
    if not rows.sometimes(3):
        return {"x": rows.logits(), "weights": weights, **given}
    x = rows.array(rows.shape, _EIGHTHS)
    signs = rows.array(weights.shape, st.sampled_from((1.0, 1.0, 1.0, -1.0)))
    exists = np.broadcast_to(given.get("where", True), rows.shape)
    terms = np.where(exists, np.exp(x) * np.broadcast_to(weights * signs, rows.shape), 0.0)
    total, size = (to_rows(one, rows.axes).sum(axis=1) for one in (terms, np.abs(terms)))
    is_steady = bool((size <= 64 * np.abs(total)).all())
    return {"x": x, "weights": np.asarray(weights * signs) if is_steady else weights, **given}


def _product(vector: str) -> Callable[[_Rows], Given]:
    def given_of(rows: _Rows) -> Given:
        mask = rows.mask()
        x = rows.logits(mask.get("where", True), is_defined=True)
        tangent = rows.array(rows.shape, rows.of(_VECTORS))
        return {"x": x, vector: tangent, **mask, **rows.temperature(is_defined=True), **rows.axis}

    return given_of


def _statistics(rows: _Rows) -> Given:
    mask = rows.mask()
    x = rows.logits(mask.get("where", True), is_defined=True)
    return {"x": x, **mask, **rows.temperature(is_defined=True), **rows.axis}


def _matrix(rows: _Rows) -> Given:
    return {"x": rows.logits(is_defined=True), **rows.temperature(is_defined=True), **rows.axis}


def _pair(rows: _Rows) -> Given:
    right = rows.array(rows.shape, rows.of(_DEFINED))
    return {"left": rows.logits(is_defined=True), "right": right, **rows.temperature(is_defined=True), **rows.axis}


def _divergence(rows: _Rows) -> Given:
    given = rows.mask() | rows.temperature() | rows.axis
    p = rows.logits()
    if rows.sometimes():
        return {"logits_p": p, "logits_q": rows.logits(), **given}
    with np.errstate(over="ignore", invalid="ignore"):
        q = np.asarray(p + rows.array(rows.shape, _EIGHTHS) * rows.of((1.0, 2.0**-7, 2.0**-12)))
    return {"logits_p": p, "logits_q": q, **given}


def _cross_entropy(rows: _Rows) -> Given:
    given: Given = {"reduction": rows.of(("none", "sum", "mean") if rows.count else ("none",)), **rows.axis}
    if rows.sometimes():
        targets = rows.integers(rows.reduced, 0, rows.n - 1)
        if rows.sometimes():
            given["ignore_index"] = rows.of((-100, -1, 0, rows.n - 1))
            targets = np.where(rows.integers(rows.reduced, 0, 3) == 0, given["ignore_index"], targets)
    else:
        targets = rows.array(rows.shape, st.sampled_from((0.0, 0.25, 0.5, 1.0, 0.125)))
    if rows.sometimes(3):
        given["label_smoothing"] = rows.of((0.125, 0.5, 1.0))
    if rows.sometimes(3):
        given["z_loss"] = rows.of((0.25, 2.0**-10))
    if len(rows.axes) == 1 and rows.sometimes(3):
        given["weight"] = rows.array((rows.n,), st.sampled_from((0.0, 0.5, 1.0, 2.0, 0.25)))
    return {"logits": rows.logits(), "targets": targets, **given}


def _truncate(rows: _Rows) -> Given:
    return {"logits": rows.logits(), **rows.temperature(), **rows.filters(), **rows.axis}


def _sample(rows: _Rows) -> Given:
    given = rows.temperature() | rows.filters() | rows.mask() | rows.axis
    if rows.count and rows.sometimes(3):
        given |= {"draws": rows.draw(st.integers(1, 4)), "replace": rows.sometimes()}
    if rows.sometimes():
        given["return_logprobs"] = True
    return {"logits": rows.logits(), "key": rows.key(), **given}


def _log_prob(rows: _Rows) -> Given:
    given = rows.temperature() | rows.filters() | rows.mask() | rows.axis
    has_several = rows.axes == (len(rows.shape) - 1,) and rows.sometimes(3)
    shape = (*rows.reduced, rows.draw(st.integers(1, 4))) if has_several else rows.reduced
    if rows.sometimes(3):
        given["return_rank"] = True
    return {"logits": rows.logits(), "tokens": rows.integers(shape, -1, rows.n - 1), **given}


def _top_log_probs(rows: _Rows) -> Given:
    k = rows.draw(st.integers(1, rows.n))
    return {"logits": rows.logits(), "k": k, **rows.mask(), **rows.temperature(), **rows.axis}


@dataclass(frozen=True)
class _Space:
    """How the operands of a function are drawn, and what its expectation needs: axes, entries, rows; how large."""

    given: Callable[[_Rows], Given]
    needs: str = ""
    most: int = 48


_SPACES = {
    "softmax": _Space(_probabilities),
    "log_softmax": _Space(_probabilities),
    "logsumexp": _Space(_logsumexp),
    "softmax_jvp": _Space(_product("tangent")),
    "softmax_vjp": _Space(_product("cotangent")),
    "log_softmax_jvp": _Space(_product("tangent")),
    "log_softmax_vjp": _Space(_product("cotangent")),
    "softmax_jacobian": _Space(_matrix, "entries", 24),
    "log_softmax_jacobian": _Space(_matrix, "entries", 24),
    "cross_entropy": _Space(_cross_entropy, "axes entries"),
    "entropy": _Space(_probabilities),
    "kl_divergence": _Space(_divergence),
    "truncate": _Space(_truncate),
    "sample": _Space(_sample, "entries"),
    "log_prob": _Space(_log_prob, "axes entries"),
    "top_log_probs": _Space(_top_log_probs, "one axis entries rows"),
    "partial": _Space(_statistics),
    "merge": _Space(_pair),
}
FUNCTIONS = tuple(_SPACES)


@st.composite
def _axes(draw: Draw, shape: tuple[int, ...], needs: str) -> Given:
    """Return an axis as an int, several in any order, all, or none, by their numbers from either end."""
    ndim = len(shape)
    how = draw(st.integers(0, 7))
    if how < 3 or (ndim == 0 and how < 6):
        return {}
    either = [i - draw(st.sampled_from((0, ndim))) for i in range(ndim)]
    if how < 6 or "one axis" in needs:
        return {"axis": draw(st.sampled_from(either))}
    if how == 6:
        return {"axis": None}
    least = 1 if "axes" in needs else 0
    return {"axis": tuple(draw(st.permutations(either))[: draw(st.integers(least, ndim))])}


@st.composite
def random_calls(
    draw: Draw, functions: tuple[str, ...] = FUNCTIONS, shapes: tuple[tuple[int, ...], ...] = ()
) -> RandomCall:
    """Return a call of one of some functions, on arrays of one of some shapes if any are given."""
    function = draw(st.sampled_from(functions))
    space = _SPACES[function]
    needs_axes = "axis" in space.needs or "axes" in space.needs
    few = [one for one in shapes if math.prod(one) <= space.most or space.most >= 48]
    own = draw(st.sampled_from(few)) if few else draw(_shapes(int(needs_axes), space.most))
    if "entries" in space.needs and 0 in own:
        own = tuple(max(1, n) for n in own)
    rows = _Rows(draw, own, draw(_axes(own, space.needs)))
    case = Case("a random call", space.given(rows))
    dtype = draw(st.sampled_from(tuple(FORMATS)))
    return RandomCall(CHECKS[function], case, dtype, draw(st.sampled_from(("plain", *LAYOUTS))))
