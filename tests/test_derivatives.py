"""Derivatives of softmax, log_softmax and logsumexp against mpmath, by every way that a library differentiates."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter, rounded
from tests.derivative_cases import (
    INF,
    LINES,
    LOGITS,
    NAN,
    OPS,
    TEMPERATURES,
    UNMASKED,
    VECTORS,
    WEIGHTS,
    backward,
    close,
    differentiable,
    exact,
    forward,
    jacobian,
    of_lines,
    pullback,
    pushforward,
    scores,
    shares,
)

# PyTorch compiles the lines of the contract here; Jacobians, products of every shape and the gradient for one
# temperature are in test_torch_compiled.py.
compiled_elsewhere = pytest.mark.enough(lambda can: "compile" not in can.how)


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
    if (lib.can.compiles or lib.can.lazy) and len(axes) != 2:
        pytest.skip("two axes show it where each case is three compilations or graphs")
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


@compiled_elsewhere
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


@differentiable
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
