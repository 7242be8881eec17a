"""Rows that are all but certain of one class: 1 - p of it comes from the other classes, and keeps its digits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import CHECKS, FORMATS, Adapter, Case, check_case, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

# float32 has no digit of 1 - p from a gap of 17 on, float64 none from 37 on. In bfloat16 all of these are exact.
GAPS = (1.5, 4.0, 12.0, 17.0, 37.5, 60.0)
CLASSES = 5
LOGITS = tuple((-0.5, gap, 0.0, -2.0, 0.25) for gap in GAPS)
SURE = 1
VECTOR = (0.5, -8.0, 0.25, 2.0, -3.0)  # the least at the sure class: no difference from it cancels another
ONLY_SURE = tuple(float(i == SURE) for i in range(CLASSES))

# Where PyTorch differentiates the formulas themselves, their rules are not asked.
by_rules = pytest.mark.backends(
    lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles) and "torch." not in can.how
)


class Row:
    """A row of logits in mpmath."""

    def __init__(self, logits: Any) -> None:
        self.x = [mpmath.mpf(float(one)) for one in logits]
        top = max(self.x)
        terms = [mpmath.exp(one - top) for one in self.x]
        total = mpmath.fsum(terms)
        self.p = [one / total for one in terms]
        self.log_p = [one - top - mpmath.log(total) for one in self.x]
        self.logsumexp = top + mpmath.log(total)
        self.entropy = -mpmath.fsum(p * log_p for p, log_p in zip(self.p, self.log_p, strict=True))


def of_rows(function: Callable[[Row], Any], dtype: str) -> Any:
    """Apply a function to each row, at 200 bits."""
    with mpmath.workprec(200):
        return np.asarray([[float(one) for one in function(Row(row))] for row in rounded(LOGITS, dtype)])


def require_digits(lib: Adapter, y: Any, want: Any, dtype: str, units: float = 64.0, size: float = 0.0) -> None:
    """Compare every entry within ``units`` of its own last place, and d of those for a term at a distance d.

    But for the sure class, an entry may be a difference of numbers of a ``size``.
    """
    compute, narrow = FORMATS[dtype].compute, FORMATS[dtype]
    distance = 2 * np.asarray(GAPS)[:, None]
    sizes = np.abs(want) + np.where(np.arange(CLASSES) == SURE, 0.0, size)
    allowed = (units + distance) * compute.unit * sizes + compute.tiny
    if compute is not narrow:
        allowed = allowed + narrow.unit * np.abs(want) + narrow.smallest
    got = lib.values(y)
    assert (np.abs(got - want) <= allowed).all(), f"{got}\nnot\n{want}"


# JAX in its programs: eagerly, each call is one to compile.
in_programs = pytest.mark.enough(lambda can: can.traced or not can.compiles)


@in_programs
def test_the_logarithm_of_a_probability_close_to_1(lib: Adapter, dtype: str) -> None:
    y = lib.call(polysoftmax.log_softmax, lib.asarray(LOGITS, dtype))
    require_digits(lib, y, of_rows(lambda row: row.log_p, dtype), dtype)


def softmax_product(row: Row, v: Any) -> list[Any]:
    """Return y_i·Σ_j y_j (v_i - v_j), in which nothing cancels."""
    return [a * mpmath.fsum(b * (c - d) for b, d in zip(row.p, v, strict=True)) for a, c in zip(row.p, v, strict=True)]


def log_softmax_push(row: Row, v: Any) -> list[Any]:
    return [mpmath.fsum(b * (c - d) for b, d in zip(row.p, v, strict=True)) for c in v]


def log_softmax_pull(row: Row, v: Any) -> list[Any]:
    return [c - b * mpmath.fsum(v) for b, c in zip(row.p, v, strict=True)]


@in_programs
@pytest.mark.parametrize("vector", [ONLY_SURE, VECTOR], ids=["of the sure class", "of all"])
def test_products_with_the_jacobian(lib: Adapter, dtype: str, vector: tuple[float, ...]) -> None:
    x, v = lib.asarray(LOGITS, dtype), lib.asarray([vector] * len(GAPS), dtype)
    for function, product in (
        (polysoftmax.softmax_jvp, softmax_product),
        (polysoftmax.softmax_vjp, softmax_product),
        (polysoftmax.log_softmax_jvp, log_softmax_push),
        (polysoftmax.log_softmax_vjp, log_softmax_pull),
    ):
        want = of_rows(lambda row, product=product: product(row, vector), dtype)
        require_digits(lib, lib.call(function, x, v), want, dtype)


@in_programs
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_rows_of_jacobians_add_up_to_0(lib: Adapter, op: str) -> None:
    dtype = lib.can.default_float
    y = lib.values(lib.call(getattr(polysoftmax, f"{op}_jacobian"), lib.asarray(LOGITS, dtype)))
    own = of_rows(
        lambda row: [
            (row.p[SURE] if op == "softmax" else 1) * mpmath.fsum(p for i, p in enumerate(row.p) if i != SURE)
        ],
        dtype,
    )[:, 0]
    units = (64 + 2 * np.asarray(GAPS)) * FORMATS[dtype].unit
    assert (np.abs(y[:, SURE, SURE] - own) <= units * own).all()
    assert (np.abs(y[:, SURE].sum(-1)) <= units * own).all()


def gradient(lib: Adapter, function: Callable[[Any], Any], x: Any) -> Any:
    """The gradient of a function of an array that answers a number, by the library's own reverse mode."""
    if lib.backend.library == "jax":
        import jax

        return lib.program(jax.grad(function))(x)
    import torch

    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def slope_of_loss(row: Row, c: Any, z_loss: float = 0.0) -> list[Any]:
    """Return Σ_j (p_i·c_j - p_j·c_i) + 2·z·logsumexp·p_i."""
    return [
        mpmath.fsum(p * b - q * a for q, b in zip(row.p, c, strict=True)) + 2 * z_loss * row.logsumexp * p
        for p, a in zip(row.p, c, strict=True)
    ]


SHARES = (0.125, 0.5, 0.25, 0.0, 0.125)
WEIGHT = (1.0, 0.5, 2.0, 0.0, 4.0)
SMOOTHED = tuple(0.75 * one + 0.25 / CLASSES for one in ONLY_SURE)


@by_rules
@pytest.mark.parametrize(
    ("targets", "options", "c"),
    [
        (SURE, {}, ONLY_SURE),
        (SURE, {"weight": WEIGHT}, tuple(0.5 * one for one in ONLY_SURE)),
        (SURE, {"label_smoothing": 0.25}, SMOOTHED),
        (
            SURE,
            {"label_smoothing": 0.25, "weight": WEIGHT},
            tuple(w * s for w, s in zip(WEIGHT, SMOOTHED, strict=True)),
        ),
        (ONLY_SURE, {}, ONLY_SURE),
        (SHARES, {"weight": WEIGHT}, tuple(w * s for w, s in zip(WEIGHT, SHARES, strict=True))),
        (SURE, {"z_loss": 0.5}, ONLY_SURE),
    ],
    ids=["class", "weight", "smoothing", "smoothing and weight", "certain", "probabilities", "z-loss"],
)
def test_gradient_of_cross_entropy(lib: Adapter, dtype: str, targets: Any, options: Any, c: Any) -> None:
    x = lib.asarray(LOGITS, dtype)
    given = [targets] * len(GAPS)
    target = lib.asarray(given, dtype) if isinstance(targets, tuple) else lib.asarray(given, lib.can.default_index)
    options = {name: lib.asarray(one, dtype) if name == "weight" else one for name, one in options.items()}

    def loss(x: Any) -> Any:
        return polysoftmax.cross_entropy(x, target, reduction="sum", **options)

    want = of_rows(lambda row: slope_of_loss(row, c, options.get("z_loss", 0.0)), dtype)
    require_digits(lib, gradient(lib, loss, x), want, dtype, size=max(c))


@by_rules
def test_gradient_of_entropy(lib: Adapter, dtype: str) -> None:
    want = of_rows(lambda row: [-p * (log_p + row.entropy) for p, log_p in zip(row.p, row.log_p, strict=True)], dtype)
    y = gradient(lib, lambda x: polysoftmax.entropy(x).sum(), lib.asarray(LOGITS, dtype))
    require_digits(lib, y, want, dtype, units=256)


@by_rules
def test_gradient_of_divergence_for_the_second_distribution(lib: Adapter, dtype: str) -> None:
    other = (0.0, 20.0, 1.0, -1.0, 0.5)
    with mpmath.workprec(200):
        q = Row(other).p
    want = of_rows(lambda row: [b - a for a, b in zip(row.p, q, strict=True)], dtype)
    x, y = lib.asarray(LOGITS, dtype), lib.asarray([other] * len(GAPS), dtype)
    slope = gradient(lib, lambda y: polysoftmax.kl_divergence(x, y).sum(), y)
    got = lib.values(slope)[:, SURE]
    lost = of_rows(lambda row: [1 - row.p[SURE]], dtype)[:, 0] + float(1 - q[SURE])
    compute = FORMATS[dtype].compute
    allowed = (64 + 2 * np.asarray(GAPS)) * compute.unit * lost + FORMATS[dtype].unit * np.abs(want[:, SURE])
    allowed += FORMATS[dtype].smallest
    assert (np.abs(got - want[:, SURE]) <= 2 * allowed).all(), f"{got}\nnot\n{want[:, SURE]}"


NEARNESS = (0.25, 1e-2, 1e-3, 1e-4, 1e-5)


@functools.cache
def nearly_equal(by: float, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of logits, rows close to them, and the divergences by mpmath, once for all backends."""
    random = np.random.default_rng(36)
    x = rounded(random.normal(size=(40, 30)), dtype)
    other = rounded(x + by * random.normal(size=x.shape), dtype)
    with mpmath.workprec(200):
        pairs = [(Row(a), Row(b)) for a, b in zip(x, other, strict=True)]
        each = [mpmath.fsum(c * (d - e) for c, d, e in zip(p.p, p.log_p, q.log_p, strict=True)) for p, q in pairs]
    return x, other, np.asarray(each, dtype=np.float64)


@in_programs
def test_divergence_of_nearly_equal_distributions(lib: Adapter) -> None:
    """The error is that of log p - log q, times the distance of p from q: about √KL."""
    dtype = lib.can.default_float
    for by in lib.some(NEARNESS):
        x, other, want = nearly_equal(by, dtype)
        got = lib.values(lib.call(polysoftmax.kl_divergence, lib.asarray(x, dtype), lib.asarray(other, dtype)))
        assert (got >= 0).all()
        allowed = 64 * FORMATS[dtype].unit * (want + np.sqrt(want))
        assert (np.abs(got - want) <= allowed).all(), (by, np.max(np.abs(got - want) / allowed))


@in_programs
def test_divergence_far_apart(lib: Adapter) -> None:
    """An entry that is impossible in one of the distributions."""
    inf = np.inf
    x = lib.asarray([[0.0, -inf, 1.0], [0.0, 1.0, 2.0], [0.0, -inf, -inf], [-200.0, 0.0, -200.0]], "float32")
    y = lib.asarray([[0.5, 1.0, 1.5], [0.0, -inf, 2.0], [3.0, 0.0, -inf], [0.0, 0.0, -200.0]], "float32")
    with mpmath.workprec(200):
        p, q, last = Row([0.0, 1.0]).log_p, Row([0.5, 1.0, 1.5]).log_p, Row([3.0, 0.0]).log_p[0]
        first = mpmath.exp(p[0]) * (p[0] - q[0]) + mpmath.exp(p[1]) * (p[1] - q[2])
    want = [float(first), inf, -float(last), np.log(2.0)]
    np.testing.assert_allclose(lib.values(lib.call(polysoftmax.kl_divergence, x, y)), want, rtol=1e-6)


@in_programs
def test_an_equal_distribution_has_no_divergence(lib: Adapter) -> None:
    x = lib.asarray(LOGITS, "float32")
    assert (lib.values(lib.call(polysoftmax.kl_divergence, x, x)) == 0).all()


@pytest.mark.backends(lambda can: not can.gpu)  # the CUDA kernels subtract it from the sum, where it cancels
@pytest.mark.parametrize("name", ["softmax_vjp", "softmax_jvp", "log_softmax_jvp"])
def test_the_entry_of_the_sure_class_is_subtracted_from_each_other(lib: Adapter, name: str) -> None:
    check = CHECKS[name]
    given = {"x": np.asarray([[0.0, 25.0, 55.0]]), check.positional[1]: np.asarray([[3.0, -4.0, -4.0]])}
    outcome = check_case(lib, check, Case("the others' entries are the same", given), "float32")
    assert outcome.is_right, str(outcome)
