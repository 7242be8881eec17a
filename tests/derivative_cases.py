"""Derivatives of one row in mpmath, rows for every line of the contract, and how an answer is held to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter, Backend

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

# JAX differentiates in one program, jax:fused: eagerly, each step is a compilation, as for one temperature alone.
differentiable = pytest.mark.backends(lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles))


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


WEIGHTS = ((1.0, -0.25, 2.0, 0.5), (1.0, 2.0, 0.5, 1.0), (1.0,) * 4, (1.0, 0.5, 2.0, 3.0), (1.0,) * 4)
