"""Derivatives of softmax, log_softmax and logsumexp against mpmath, by every way that a library differentiates."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter, Backend, rounded
from tests.quick_programs import run_once

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = math.inf, math.nan
OPS = ("softmax", "log_softmax")
LOGITS = ((1.0, 2.0, 3.0, 0.5), (1000.0, 1001.0, -INF, 999.0), (-2.0, -2.0, -2.0, -2.0), (0.25, -1.5, 4.0, 0.0))
TEMPERATURES = (1.0, 0.5, 0.0, 2.0)
VECTORS = ((1.0, -2.0, 0.5, 3.0), (0.25, 1.0, -1.0, 2.0), (1.0, 2.0, 3.0, 4.0), (-1.0, 0.0, 1.0, 0.5))
# One row for every line of the contract: logits, which of them exist, temperature.
LINES: dict[str, tuple[tuple[float, ...], tuple[bool, ...], float]] = {
    "plain": ((1.0, 2.0, 3.0, 0.5), (True,) * 4, 1.0),
    "huge": ((1e30, -1e30, 0.0, 1e30), (True,) * 4, 1.0),
    "-inf": ((1000.0, 1001.0, -INF, 999.0), (True,) * 4, 0.5),
    "one of -inf left": ((-INF, 0.0, -INF, -INF), (True,) * 4, 2.0),
    "T = 0": ((1.0, 2.0, 3.0, 0.5), (True,) * 4, 0.0),
    "tie at T = 0": ((3.0, 2.0, 3.0, -INF), (True,) * 4, 0.0),
    "T = inf": ((1.0, 2.0, -INF, 0.5), (True,) * 4, INF),
    "tiny T": ((3.0, 2.0, 3.0, 0.5), (True,) * 4, 1e-30),
    "NaN and inf under False": ((1.0, NAN, 2.0, INF), (True, False, True, False), 0.5),
    "no True": ((NAN, INF, -INF, 0.0), (False,) * 4, 1.0),
    "no True at T = 0": ((NAN, INF, -INF, 0.0), (False,) * 4, 0.0),
    "greatest under False": ((-INF, 1e30, 0.0, 0.25), (True, False, True, True), 1.0),
}
UNMASKED = [name for name, (_, exists, _) in LINES.items() if all(exists)]

# JAX differentiates in one program, jax:fused: eagerly, each step is a compilation, and one test below does that.
differentiable = pytest.mark.backends(lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles))


# PyTorch compiles the lines of the contract here; Jacobians, products of every shape and the gradient for one
# temperature are in test_torch_compiled.py.
compiled_elsewhere = pytest.mark.enough(lambda can: "compile" not in can.how)


def scores(row: Any, t: float, exists: Any) -> list[Any]:
    """Return z = (x - max) / T of a row of floats, -inf for what does not exist."""
    kept = [mpmath.mpf(one) if e else mpmath.ninf for one, e in zip(row, exists, strict=True)]
    top = max(kept)
    if t in (0, INF):
        return [mpmath.mpf(0) if x > mpmath.ninf and (t == INF or x == top) else mpmath.ninf for x in kept]
    return [(x - top) / mpmath.mpf(t) if x > mpmath.ninf else mpmath.ninf for x in kept]


def shares(z: list[Any]) -> list[Any]:
    """Return probabilities of scores; far below every format they are 0."""
    terms = [mpmath.exp(one) if one > -50_000 else mpmath.mpf(0) for one in z]
    total = mpmath.fsum(terms)
    return [one / total if total else mpmath.mpf(0) for one in terms]


def jacobian(op: str, row: Any, t: float = 1.0, exists: Any = (True,) * 4) -> list[list[Any]]:
    """Return y_i (δ_ij - y_j) / T, or (δ_ij - p_j) / T, as published."""
    p, n = shares(scores(row, t, exists)), range(len(row))
    if t in (0, INF):
        return [[mpmath.mpf(0)] * len(row) for _ in n]
    rows = [p[i] if op == "softmax" else mpmath.mpf(bool(exists[i])) for i in n]
    return [[rows[i] * ((i == j) - p[j]) / mpmath.mpf(t) for j in n] for i in n]


def forward(op: str, row: Any, v: Any, t: float = 1.0, exists: Any = (True,) * 4, *, dt: float = 0.0) -> list[Any]:
    """Return J·(dx - z·dT), what moves if the logits move by v and the temperature by dt."""
    z = scores(row, t, exists)
    move = [mpmath.mpf(a) - (mpmath.mpf(dt) * one if one > mpmath.ninf else 0) for a, one in zip(v, z, strict=True)]
    return [mpmath.fsum(a * b for a, b in zip(line, move, strict=True)) for line in jacobian(op, row, t, exists)]


def backward(op: str, row: Any, u: Any, t: float = 1.0, exists: Any = (True,) * 4) -> tuple[list[Any], Any]:
    """Return Jᵀ·u and -Σ z·Jᵀ·u, the gradients for logits and temperature."""
    matrix, n = jacobian(op, row, t, exists), range(len(row))
    gradient = [mpmath.fsum(matrix[i][j] * mpmath.mpf(u[i]) for i in n) for j in n]
    z = scores(row, t, exists)
    return gradient, -mpmath.fsum(g * one for g, one in zip(gradient, z, strict=True) if one > mpmath.ninf)


def exact(of_row: Callable[..., Any], op: str, *columns: Any) -> Any:
    """Apply a function of one row to every row, at 200 bits."""
    with mpmath.workprec(200):
        return [of_row(op, *one) for one in zip(*columns, strict=True)]


def close(lib: Adapter, y: Any, want: Any, dtype: str, scale: Any = 1.0, units: float = 32.0) -> None:
    """Compare within ``units`` in the last place of ``scale``, in the compute dtype, and one rounding to ``dtype``."""
    want = np.asarray(want, dtype=np.float64)
    want = np.where(np.abs(want) > FORMATS[dtype].largest, np.copysign(INF, want), want)
    lib.require(y, want.shape, dtype)
    compute, narrow = FORMATS[dtype].compute, FORMATS[dtype]
    allowed = units * compute.unit * np.maximum(np.abs(want), scale) + compute.tiny
    if compute is not narrow:
        allowed = allowed + narrow.unit * (np.abs(want) + allowed) + narrow.smallest / 2
    with np.errstate(invalid="ignore"):
        within = (lib.values(y) == want) | (np.abs(lib.values(y) - want) <= allowed)
    assert within.all(), f"{lib.values(y)}, not {want}"


PUBLISHED = ((0.0819, -0.0220, -0.0599), (-0.0220, 0.1848, -0.1628), (-0.0599, -0.1628, 0.2227))


@compiled_elsewhere
def test_published_jacobian(lib: Adapter) -> None:
    y = lib.call(polysoftmax.softmax_jacobian, lib.asarray((1.0, 2.0, 3.0), lib.can.default_float))
    np.testing.assert_allclose(lib.values(y), PUBLISHED, rtol=0, atol=0.5e-4)


@compiled_elsewhere
@pytest.mark.parametrize("op", OPS)
def test_jacobians(lib: Adapter, dtype: str, op: str) -> None:
    function = getattr(polysoftmax, f"{op}_jacobian")
    compute = FORMATS[dtype].compute.name
    x, t = lib.asarray(LOGITS, dtype), lib.asarray(TEMPERATURES, compute)
    rows = rounded(LOGITS, dtype)
    close(lib, lib.call(function, x), exact(jacobian, op, rows), dtype)
    close(lib, lib.call(function, x, temperature=t), exact(jacobian, op, rows, TEMPERATURES), dtype, scale=2.0)


@compiled_elsewhere
@pytest.mark.parametrize("op", OPS)
def test_products_with_the_jacobian(lib: Adapter, dtype: str, op: str) -> None:
    x, v = lib.asarray(LOGITS, dtype), lib.asarray(VECTORS, dtype)
    t = lib.asarray(TEMPERATURES, FORMATS[dtype].compute.name)
    rows = rounded(LOGITS, dtype)
    moved = exact(forward, op, rows, VECTORS)
    pulled = [one for one, _ in exact(backward, op, rows, VECTORS)]
    jvp, vjp = getattr(polysoftmax, f"{op}_jvp"), getattr(polysoftmax, f"{op}_vjp")
    close(lib, lib.call(jvp, x, v), moved, dtype, scale=8.0)
    close(lib, lib.call(vjp, x, v), pulled, dtype, scale=8.0)
    moved = exact(forward, op, rows, VECTORS, TEMPERATURES)
    pulled = [one for one, _ in exact(backward, op, rows, VECTORS, TEMPERATURES)]
    close(lib, lib.call(jvp, x, v, temperature=t), moved, dtype, scale=16.0)
    close(lib, lib.call(vjp, x, v, temperature=t), pulled, dtype, scale=16.0)


def rows_of(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Bring the reduced axes to the end, and flatten them and the others: one line a row."""
    kept = [i for i in range(x.ndim) if i not in axes]
    return x.transpose(*kept, *axes).reshape(math.prod(x.shape[i] for i in kept), -1)


GRID = np.asarray([(7 * i) % 24 / 8 - 1 for i in range(24)]).reshape(2, 3, 4)
# The axes, the axes in order, and a temperature for each of the rows that are left.
AXES = (
    (0, (0,), np.asarray([[0.5, 1, 2, 1]] * 3)),
    (-2, (1,), np.asarray([[0.5, 1, 2, 0.0]] * 2)),
    ((2, 0), (0, 2), np.asarray([0.5, INF, 2])),
    (None, (0, 1, 2), np.asarray(0.5)),
    ((), (), np.ones((2, 3, 4))),
)


@pytest.mark.backends(lambda can: not can.traced)
@pytest.mark.parametrize(("axis", "axes", "temperature"), AXES, ids=lambda one: str(one) if one is None else "")
@pytest.mark.parametrize("op", OPS)
def test_derivatives_along_axes(
    lib: Adapter, op: str, axis: int | tuple[int, ...] | None, axes: tuple[int, ...], temperature: np.ndarray
) -> None:
    """The remaining axes in order, then (n, n) for a Jacobian; the products have the shape of the input."""
    if lib.can.compiles and len(axes) != 2:
        pytest.skip("two axes show it where each case is three compilations")
    dtype = lib.can.default_float
    rows, vector = rows_of(GRID, axes), rows_of(np.roll(GRID, 1), axes)
    heats, everything = temperature.ravel(), [(True,) * rows.shape[1]] * len(rows)
    x, v, t = lib.asarray(GRID, dtype), lib.asarray(np.roll(GRID, 1), dtype), lib.asarray(temperature, dtype)
    n = rows.shape[1]
    matrices = np.asarray(exact(jacobian, op, rows, heats, everything), dtype=np.float64)
    y = lib.call(getattr(polysoftmax, f"{op}_jacobian"), x, axis=axis, temperature=t)
    close(lib, y, matrices.reshape(*temperature.shape, n, n), dtype, scale=2.0)
    moved = np.asarray(exact(forward, op, rows, vector, heats, everything), dtype=np.float64)
    pulled = np.asarray([one for one, _ in exact(backward, op, rows, vector, heats, everything)], dtype=np.float64)
    for way, want in (("jvp", moved), ("vjp", pulled)):
        y = lib.call(getattr(polysoftmax, f"{op}_{way}"), x, v, axis=axis, temperature=t)
        lib.require(y, GRID.shape, dtype)
        close(lib, lib.asarray(rows_of(lib.values(y), axes), dtype), want, dtype, scale=8.0)


@pytest.mark.backends(lambda can: not can.compiles)
@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_nothing(lib: Adapter, op: str) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(np.zeros((2, 0)), dtype)
    lib.require(lib.call(getattr(polysoftmax, f"{op}_jacobian"), x), (2, 0, 0), dtype)
    for way in ("jvp", "vjp"):
        lib.require(lib.call(getattr(polysoftmax, f"{op}_{way}"), x, x), (2, 0), dtype)


def pullback(lib: Adapter, function: Callable[..., Any], cotangent: Any, *primals: Any) -> tuple[Any, ...]:
    """Return the gradients for all primals by the library's own reverse mode."""
    if lib.backend.library == "jax":
        import jax

        def of_all(cotangent: Any, *primals: Any) -> Any:
            return jax.vjp(function, *primals)[1](cotangent)

        return tuple(lib.program(of_all)(cotangent, *primals))
    import torch

    if lib.backend is Backend.TORCH_FUNC:
        return tuple(torch.func.vjp(function, *primals)[1](cotangent))
    if lib.backend is Backend.TORCH_COMPILE:
        function = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    leaves = [one.detach().clone().requires_grad_() for one in primals]
    return tuple(torch.autograd.grad(function(*leaves), leaves, cotangent))


def pushforward(lib: Adapter, function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Return how the answer moves by the library's own forward mode: that of torch.func, or dual numbers."""
    if lib.backend.library == "jax":
        import jax

        def of_all(primals: Any, tangents: Any) -> Any:
            return jax.jvp(function, primals, tangents)[1]

        return lib.program(of_all)(primals, tangents)
    import torch
    from torch.autograd import forward_ad

    if lib.backend is Backend.TORCH_FUNC:
        return torch.func.jvp(function, primals, tangents)[1]
    with forward_ad.dual_level():
        moving = [forward_ad.make_dual(a, b) for a, b in zip(primals, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*moving)).tangent


def of_lines(lib: Adapter, op: str, mask: Any) -> Callable[..., Any]:
    function = getattr(polysoftmax, op)
    return lambda x, t: function(x, temperature=t, where=mask)


@differentiable
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradients_at_every_line_of_the_contract(lib: Adapter, op: str, *, masked: bool, everything: bool) -> None:
    if "compile" in lib.can.how and not (masked or everything):
        pytest.skip("the lines under a mask are these and more; test_gradient_for_one_temperature has no mask")
    dtype = lib.can.default_float
    rows, exists, t = zip(*[LINES[name] for name in (LINES if masked else UNMASKED)], strict=True)
    mask = lib.asarray(exists, "bool") if masked else None
    # What lies under False is ignored, even NaN.
    u = np.where(np.asarray(exists), np.resize(VECTORS, (len(rows), 4)), NAN)
    t = [float(one) for one in rounded(t, dtype)]
    finite = np.where(np.asarray(exists), rounded(rows, dtype), 0.0)
    found = exact(backward, op, finite, np.nan_to_num(u), t, exists)
    scale = np.asarray([[8 / one if 0 < one < INF else 0] for one in t])
    x, cotangent = lib.asarray(rows, dtype), lib.asarray(u, dtype)
    gradient, by_t = pullback(lib, of_lines(lib, op, mask), cotangent, x, lib.asarray(t, dtype))
    close(lib, gradient, [one for one, _ in found], dtype, scale * np.asarray(exists))
    # Of scores whose probability is 0 in every format softmax feels nothing; for tiny T the other overflows.
    rows_z = [scores(*one) for one in zip(finite, t, exists, strict=True)]
    least = -1000 if op == "softmax" else mpmath.ninf
    distance = [max((abs(float(z)) for z in row if z > least), default=0.0) for row in rows_z]
    close(lib, by_t, [one for _, one in found], dtype, scale[:, 0] * distance)


@differentiable
@pytest.mark.backends(lambda can: not can.traced or can.how != "under torch.compile(fullgraph=True)")
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_at_every_line_of_the_contract(lib: Adapter, op: str) -> None:
    dtype = lib.can.default_float
    rows, exists, t = zip(*LINES.values(), strict=True)
    t = [float(one) for one in rounded(t, dtype)]
    v = np.where(np.asarray(exists), np.resize(VECTORS, (len(rows), 4)), NAN)
    dt = np.resize([0.5, -1.0, 2.0], len(rows))
    finite = np.where(np.asarray(exists), rounded(rows, dtype), 0.0)
    with mpmath.workprec(200):
        want = [
            forward(op, row, np.nan_to_num(a), b, e, dt=c)
            for row, a, b, e, c in zip(finite, v, t, exists, dt, strict=True)
        ]
    primals = (lib.asarray(rows, dtype), lib.asarray(t, dtype))
    function = of_lines(lib, op, lib.asarray(exists, "bool"))
    moved = pushforward(lib, function, primals, (lib.asarray(v, dtype), lib.asarray(dt, dtype)))
    scale = np.maximum(8.0, np.max(np.abs(np.asarray(want, dtype=np.float64)), axis=-1, keepdims=True))
    dead = np.asarray(t)[:, None] * np.asarray(exists)
    close(lib, moved, want, dtype, np.where((dead > 0) & (dead < INF), scale, 0.0))


@pytest.mark.parametrize("op", OPS)
def test_products_at_every_line_of_the_contract(lib: Adapter, op: str) -> None:
    dtype = lib.can.default_float
    rows, exists, t = zip(*LINES.values(), strict=True)
    u = np.where(np.asarray(exists), np.resize(VECTORS, (len(rows), 4)), NAN)
    t = [float(one) for one in rounded(t, dtype)]
    finite = np.where(np.asarray(exists), rounded(rows, dtype), 0.0)
    moved = exact(forward, op, finite, np.nan_to_num(u), t, exists)
    pulled = [one for one, _ in exact(backward, op, finite, np.nan_to_num(u), t, exists)]
    scale = np.asarray([[16 / one if 0 < one < INF else 0] for one in t]) * np.asarray(exists)
    x, v = lib.asarray(rows, dtype), lib.asarray(u, dtype)
    options = {"temperature": lib.asarray(t, dtype), "where": lib.asarray(exists, "bool")}
    close(lib, lib.call(getattr(polysoftmax, f"{op}_jvp"), x, v, **options), moved, dtype, scale)
    close(lib, lib.call(getattr(polysoftmax, f"{op}_vjp"), x, v, **options), pulled, dtype, scale)


TARGET = (1.0, 0.0, -1.0, 2.0)


def of_entropy(row: Any, t: float, exists: Any) -> tuple[list[Any], Any]:
    """Return the gradients of the entropy for logits and temperature: with g = -p·(log p + H), g / T and -Σ g·z / T."""
    z = scores(row, t, exists)
    p = shares(z)
    logs = [mpmath.log(one) if one else mpmath.mpf(0) for one in p]
    y = -mpmath.fsum(a * b for a, b in zip(p, logs, strict=True))
    return over_temperature([-a * (b + y) for a, b in zip(p, logs, strict=True)], z, t)


def of_divergence(row: Any, t: float, exists: Any) -> tuple[list[Any], Any]:
    """Return the gradients of D(row ‖ TARGET): for z_p it is p·(log p - log q - D), for z_q it is q - p."""
    z, w = scores(row, t, exists), scores(TARGET, t, exists)
    p, q = shares(z), shares(w)
    ratio = [mpmath.log(a / b) if a else mpmath.mpf(0) for a, b in zip(p, q, strict=True)]
    y = mpmath.fsum(a * b for a, b in zip(p, ratio, strict=True))
    gradient, by_t = over_temperature([a * (b - y) for a, b in zip(p, ratio, strict=True)], z, t)
    return gradient, by_t + over_temperature([b - a for a, b in zip(p, q, strict=True)], w, t)[1]


def over_temperature(g: list[Any], z: list[Any], t: float) -> tuple[list[Any], Any]:
    if t in (0, INF):
        return [mpmath.mpf(0)] * len(g), mpmath.mpf(0)
    moment = mpmath.fsum(a * b for a, b in zip(g, z, strict=True) if a)
    return [one / mpmath.mpf(t) for one in g], -moment / mpmath.mpf(t)


@differentiable
@pytest.mark.parametrize("name", ["entropy", "kl_divergence"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradients_of_losses_at_every_line_of_the_contract(lib: Adapter, name: str, *, masked: bool) -> None:
    dtype = lib.can.default_float
    # Where the divergence is inf, or its gradient overflows, nothing is promised.
    beyond = ("T = 0", "tie at T = 0", "tiny T") if name == "kl_divergence" else ()
    rows, exists, t = zip(*[LINES[one] for one in (LINES if masked else UNMASKED) if one not in beyond], strict=True)
    t = [float(one) for one in rounded(t, dtype)]
    finite = np.where(np.asarray(exists), rounded(rows, dtype), 0.0)
    rule = of_entropy if name == "entropy" else of_divergence
    with mpmath.workprec(200):
        found = [rule(*one) for one in zip(finite, t, exists, strict=True)]
    mask = lib.asarray(exists, "bool") if masked else None
    other = lib.asarray(np.broadcast_to(TARGET, (len(rows), 4)), dtype)

    def function(x: Any, t: Any) -> Any:
        if name == "entropy":
            return polysoftmax.entropy(x, temperature=t, where=mask)
        return polysoftmax.kl_divergence(x, other, temperature=t, where=mask)

    ones = lib.asarray(np.ones(len(rows)), dtype)
    gradient, by_t = pullback(lib, function, ones, lib.asarray(rows, dtype), lib.asarray(t, dtype))
    scale = np.asarray([8 / one if 0 < one < INF else 0 for one in t])
    close(lib, gradient, [one for one, _ in found], dtype, scale[:, None] * np.asarray(exists))
    close(lib, by_t, [one for _, one in found], dtype, 8 * scale)


@pytest.mark.backends(lambda can: can.autodiff)
@compiled_elsewhere
@pytest.mark.parametrize("op", OPS)
def test_gradient_for_one_temperature(lib: Adapter, op: str) -> None:
    dtype = lib.can.default_float
    found = exact(backward, op, LOGITS, VECTORS, (0.5,) * 4)
    gradients = pullback(
        lib, of_lines(lib, op, None), lib.asarray(VECTORS, dtype), lib.asarray(LOGITS, dtype), lib.asarray(0.5, dtype)
    )
    # The scores reach 2002, whose rounding the probabilities feel.
    close(lib, gradients[1], mpmath.fsum(one for _, one in found), dtype, scale=256.0)


SUMS = ((1.0, 2.0, 3.0, 0.5), (1000.0, 0.0, -1e30, -INF), (-INF,) * 4, (NAN, 2.0, 0.0, INF), (NAN, INF, -INF, 0.0))
SUMS_EXIST = ((True,) * 4, (True,) * 4, (True,) * 4, (False, True, True, False), (False,) * 4)
WEIGHTS = ((1.0, -0.25, 2.0, 0.5), (1.0, 2.0, 0.5, 1.0), (1.0,) * 4, (1.0, 0.5, 2.0, 3.0), (1.0,) * 4)


def sum_slopes(row: Any, weights: Any, exists: Any) -> tuple[list[Any], list[Any]]:
    """Return w·exp(x) / Σ w·exp(x) and exp(x) / Σ w·exp(x), 0 if there is nothing to sum."""
    terms = [mpmath.exp(mpmath.mpf(x)) if e else mpmath.mpf(0) for x, e in zip(row, exists, strict=True)]
    parts = [mpmath.mpf(w) * one for w, one in zip(weights, terms, strict=True)]
    total = mpmath.fsum(parts) or mpmath.mpf(1)
    return [one / total for one in parts], [one / total for one in terms]


@differentiable
def test_gradients_of_logsumexp(lib: Adapter) -> None:
    dtype = lib.can.default_float
    with mpmath.workprec(200):
        weighted = [sum_slopes(*one) for one in zip(SUMS, WEIGHTS, SUMS_EXIST, strict=True)]
        plain = [sum_slopes(*one)[0] for one in zip(SUMS[:3], np.ones((3, 4)), SUMS_EXIST[:3], strict=True)]
    mask = lib.asarray(SUMS_EXIST, "bool")

    def of_weights(x: Any, w: Any) -> Any:
        return polysoftmax.logsumexp(x, weights=w, where=mask)

    x, ones = lib.asarray(SUMS, dtype), lib.asarray(np.ones(5), dtype)
    gradient, by_weight = pullback(lib, of_weights, ones, x, lib.asarray(WEIGHTS, dtype))
    close(lib, gradient, [one for one, _ in weighted], dtype)
    close(lib, by_weight, [one for _, one in weighted], dtype)
    (gradient,) = pullback(lib, polysoftmax.logsumexp, ones[:3], x[:3, :])
    close(lib, gradient, plain, dtype)
    (gradient,) = pullback(lib, polysoftmax.logsumexp, lib.asarray(1.0, dtype), lib.asarray((1000.0, 0.0), dtype))
    assert lib.values(gradient).tolist() == [1.0, 0.0]


@differentiable
@pytest.mark.backends(lambda can: "bfloat16" in can.dtypes)
@pytest.mark.enough(lambda can: "compile" not in can.how)  # whose roundings have tests in test_torch_programs.py
@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_narrow_gradients_are_rounded_once(lib: Adapter, op: str, narrow: str) -> None:
    function, x, u = getattr(polysoftmax, op), rounded(LOGITS, narrow), rounded(VECTORS, narrow)
    (wide,) = pullback(lib, function, lib.asarray(u, "float32"), lib.asarray(x, "float32"))
    (gradient,) = pullback(lib, function, lib.asarray(u, narrow), lib.asarray(x, narrow))
    lib.require(gradient, (4, 4), narrow)
    np.testing.assert_array_equal(lib.values(gradient), rounded(lib.values(wide), narrow))


ROW, CENTRE, HEAT = (0.5, -1.0, 2.0), (1.0, -2.0, 0.5), 0.75
FUNCTIONS = (*OPS, "logsumexp")


def scalar(name: str, row: Any, t: Any = HEAT) -> Any:
    """Return Σ c·f(x) by mpmath, with the temperature where f has one."""
    if name == "logsumexp":
        return mpmath.log(mpmath.fsum(mpmath.exp(one) for one in row))
    p = shares([(one - max(row)) / t for one in row])
    return mpmath.fsum(c * (one if name == "softmax" else mpmath.log(one)) for c, one in zip(CENTRE, p, strict=True))


@functools.cache
def curvature(name: str) -> Any:
    """Return the Hessian of `scalar` for logits and temperature, by mpmath's numerical differentiation."""
    n = 3 if name == "logsumexp" else 4
    point = [mpmath.mpf(one) for one in (*ROW, HEAT)[:n]]
    found = np.zeros((n, n))
    with mpmath.workprec(200):
        for i in range(n):
            for j in range(n):
                orders = tuple((k == i) + (k == j) for k in range(n))
                found[i, j] = mpmath.diff(lambda *q: scalar(name, q[:3], *q[3:]), point, orders)
    return found


def ours(name: str, xp: Any, like: Any, *, array: bool = True) -> Callable[[Any], Any]:
    """Return `scalar` as a function of one array, logits and then the temperature if that is an ``array``."""
    if name == "logsumexp":
        return polysoftmax.logsumexp
    centre = xp.asarray(CENTRE, dtype=like.dtype)
    function = getattr(polysoftmax, name)
    return lambda q: xp.sum(centre * function(q[:3], temperature=q[3] if array else HEAT))


@pytest.mark.parametrize("array", [False, True], ids=["T is a number", "T is an array"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_order_on_jax(name: str, *, array: bool) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        want = curvature(name) if array else curvature(name)[:3, :3]
        q = jax.numpy.asarray((*ROW, HEAT)[: len(want)])
        function = ours(name, jax.numpy, q, array=array)
        ways = (jax.jacfwd(jax.jacfwd(function)), jax.jacrev(jax.jacrev(function)), jax.hessian(function))
        for found in run_once(lambda q: [way(q) for way in ways], q):
            np.testing.assert_allclose(found, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("array", [False, True], ids=["T is a number", "T is an array"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_order_on_torch(name: str, *, array: bool) -> None:
    torch = pytest.importorskip("torch")
    want = curvature(name) if array else curvature(name)[:3, :3]
    q = torch.asarray((*ROW, HEAT)[: len(want)], dtype=torch.float64)
    function = ours(name, torch, q, array=array)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            np.testing.assert_allclose(outer(inner(function))(q), want, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(torch.autograd.functional.hessian(function, q), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str, engine: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(LOGITS[:1] + LOGITS[3:], dtype=torch.float64, requires_grad=True)
    w = torch.tensor(WEIGHTS[:2], dtype=torch.float64, requires_grad=True)
    t = torch.tensor((0.5, 2.0), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(((True, True, True, True), (True, False, True, True)))
    function = getattr(polysoftmax, name)

    def of_all(x: Any, other: Any) -> Any:
        y = function(x, where=mask, **{"weights" if name == "logsumexp" else "temperature": other})
        return y if name == "logsumexp" else y[mask]

    with polysoftmax.engine(engine):
        for call, primals in ((function, (x,)), (of_all, (x, w if name == "logsumexp" else t))):
            assert torch.autograd.gradcheck(call, primals, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(call, primals)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_the_loop(name: str) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    rows = np.asarray(LOGITS[:1] + LOGITS[2:], dtype=np.float32)
    u = np.asarray(VECTORS[0], dtype=np.float32)
    function = getattr(polysoftmax, name)

    def weighed(xp: Any) -> Callable[[Any], Any]:
        return lambda x: (xp.asarray(u) * function(x)).sum()

    ways = ((jax.numpy, jax.vmap, jax.grad, jax.jit), (torch, torch.func.vmap, torch.func.grad, lambda call: call))
    for xp, vmap, grad, compiled in ways:
        x = xp.asarray(rows)
        for call in (function, compiled(grad(weighed(xp)))):
            loop = np.asarray([np.asarray(call(x[i])) for i in range(3)])
            # In JAX's programs: eagerly, each step is one to compile, and test_vmap_over_temperatures does that.
            np.testing.assert_allclose(np.asarray(compiled(vmap(call))(x)), loop, rtol=4e-7, atol=4e-7)
            np.testing.assert_allclose(np.asarray(compiled(vmap(call, 1))(x.T)), loop, rtol=4e-7, atol=4e-7)


MEMORY_OPS = ("logsumexp", "cross_entropy", "gradient of logsumexp", "gradient of cross_entropy")


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("op", MEMORY_OPS)
def test_jax_keeps_no_array_of_the_size_of_the_logits(op: str, axis: int) -> None:
    jax = pytest.importorskip("jax")
    x = jax.ShapeDtypeStruct((2048, 2048), "float32")
    targets = jax.ShapeDtypeStruct((2048,), "int32")
    function = getattr(polysoftmax, op.rsplit(maxsplit=1)[-1])

    def of_all(*arrays: Any) -> Any:
        return function(*arrays, axis=axis).sum()

    call = jax.grad(of_all) if op.startswith("gradient") else of_all
    compiled = jax.jit(call).lower(*((x, targets) if "cross" in op else (x,))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # the logits are 16 MB


def test_rows_near_zero_under_vmap_on_jax() -> None:
    """One row of the batch is close to 0, or none is: the others' answers are the same."""
    jax = pytest.importorskip("jax")
    rows = np.asarray([[0.0, -40.0], [0.0, 0.0], [3.0, -40.0], [-INF, -INF], [INF, 0.0], [NAN, 0.0]], np.float32)
    want = [float(mpmath.exp(-40)), math.log(2), 3.0, -INF, INF, NAN]
    # Eagerly, each step would be a program to compile.
    once, twice = jax.vmap(polysoftmax.logsumexp), jax.vmap(jax.vmap(polysoftmax.logsumexp))
    ways = (jax.jit(once), jax.jit(twice), polysoftmax.logsumexp)
    for start in (0, 1):
        x = jax.numpy.asarray(rows[start:])
        for way, given in zip(ways, (x, x[None, ...], x), strict=True):
            np.testing.assert_allclose(np.ravel(way(given)), want[start:], rtol=1e-6)
    gradient = jax.jit(jax.vmap(jax.grad(polysoftmax.logsumexp)))(jax.numpy.asarray(rows[:3]))
    np.testing.assert_allclose(gradient, [[1.0, math.exp(-40)], [0.5, 0.5], [1.0, math.exp(-43)]], rtol=1e-5)


def test_vmap_over_temperatures() -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    t = (0.0, 0.5, 2.0)
    want = np.asarray([[float(one) for one in shares(scores(LOGITS[0], one, (True,) * 4))] for one in t])
    for xp, vmap in ((jax.numpy, jax.vmap), (torch, torch.func.vmap)):
        x = xp.asarray(LOGITS[0], dtype=xp.float32)
        y = vmap(lambda one, x=x: polysoftmax.softmax(x, temperature=one))(xp.asarray(t, dtype=xp.float32))
        np.testing.assert_allclose(np.asarray(y), want, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_gradient_compiled_by_inductor() -> None:
    torch = pytest.importorskip("torch")
    want = [one for one, _ in exact(backward, "log_softmax", LOGITS, VECTORS, (0.5,) * 4)]

    @torch.compile(fullgraph=True, dynamic=False)
    def function(x: Any) -> Any:
        return polysoftmax.log_softmax(x, temperature=0.5)

    x = torch.tensor(LOGITS, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x), x, torch.tensor(VECTORS))
    np.testing.assert_allclose(gradient, np.asarray(want, dtype=np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [5, 100, 5000])
@pytest.mark.parametrize("op", OPS)
def test_backward_keeps_the_answer_alone(op: str, length: int) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(8, length, requires_grad=True)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = getattr(polysoftmax, op)(x)
    large = {one.data_ptr() for one in kept if one.numel() >= x.numel()}
    assert large == {y.data_ptr()}
    y.backward(torch.ones_like(y))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("op", OPS)
def test_backward_keeps_the_answer_alone_on_jax(op: str) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(8, 50)))
    function = getattr(polysoftmax, op)
    for t in (1.0, 0.5, jax.numpy.full(8, 0.5)):
        y, pull = jax.vjp(lambda x, t=t: function(x, temperature=t), x)
        large = [one for one in jax.tree_util.tree_leaves(pull) if one.size >= x.size]
        assert len(large) == 1
        np.testing.assert_array_equal(large[0], y)
