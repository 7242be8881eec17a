"""Losses of one row as the contract has them, in mpmath, and how an answer is held to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

from polysoftmax.testing import FORMATS, Adapter, Backend, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = math.inf, math.nan
LOGITS = ((1.0, 2.0, 3.0, 0.5), (1000.0, 1001.0, -INF, 999.0), (-2.0, -2.0, -2.0, -2.0), (0.25, -1.5, 4.0, 0.0))
OTHER = ((3.0, 2.0, 1.0, 0.5), (1000.0, 999.0, -INF, 999.0), (-2.0, -1.0, -2.0, 0.0), (0.25, 1.5, -4.0, 0.0))
CLASSES = (2, 1, 3, 0)
PROBABILITIES = ((0.5, 0.25, 0.25, 0.0), (0.25, 0.75, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0))
WEIGHT = (0.5, 2.0, 1.0, 0.25)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.125},
    {"z_loss": 0.25},
    {"weight": WEIGHT},
    {"weight": WEIGHT, "label_smoothing": 0.125, "z_loss": 0.25},
)


def log_softmax(row: Any, temperature: float = 1.0) -> list[Any]:
    """Log-probabilities of a row of mpf, at 200 bits."""
    if temperature == 0:
        ties = [one == max(row) for one in row]
        return [-mpmath.log(sum(ties)) if tie else mpmath.ninf for tie in ties]
    scaled = [one / temperature for one in row]
    total = mpmath.log(mpmath.fsum(mpmath.exp(one) for one in scaled))
    return [one - total for one in scaled]


def row_loss(row: Any, target: Any, *, weight: Any = None, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Any:
    """The contract's row loss, written out as in its formula."""
    w = weight or (1.0,) * len(row)
    nll = [-one for one in log_softmax(row)]
    total = mpmath.log(mpmath.fsum(mpmath.exp(one) for one in row))
    q = target if isinstance(target, tuple) else tuple(float(c == target) for c in range(len(row)))
    possible = [c for c in range(len(row)) if row[c] != mpmath.ninf]
    of_target = mpmath.fsum(q[c] * w[c] * nll[c] for c in range(len(row)) if q[c] * w[c])
    spread = mpmath.fsum(w[c] * nll[c] for c in possible) / len(possible)
    return (1 - label_smoothing) * of_target + label_smoothing * spread + z_loss * total**2


def row_entropy(row: Any, temperature: float = 1.0) -> Any:
    return -mpmath.fsum(mpmath.exp(one) * one for one in log_softmax(row, temperature) if one != mpmath.ninf)


def row_divergence(row: Any, other: Any, temperature: float = 1.0) -> Any:
    pairs = zip(log_softmax(row, temperature), log_softmax(other, temperature), strict=True)
    return mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in pairs if p != mpmath.ninf)


def exact(rows: Any, dtype: str = "float64") -> list[list[Any]]:
    return [[mpmath.mpf(float(one)) for one in row] for row in rounded(rows, dtype)]


def close(lib: Adapter, y: Any, want: Any, dtype: str, units: float = 64.0) -> None:
    """Compare with an error of ``units`` in the last place of the compute dtype, in which losses are answered."""
    want = np.asarray(want, dtype=np.float64)
    compute = FORMATS[dtype].compute
    want = np.where(np.abs(want) > compute.largest, np.copysign(INF, want), want)
    lib.require(y, want.shape, compute.name)
    tolerance = units * compute.unit
    np.testing.assert_allclose(lib.values(y), want, rtol=tolerance, atol=tolerance)


def arrays(lib: Adapter, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {name: lib.asarray(one, dtype) if name == "weight" else one for name, one in options.items()}


def index_dtype(lib: Adapter) -> str:
    return lib.can.default_index


def gradient(lib: Adapter, function: Callable[[Any], Any], x: Any) -> Any:
    """The gradient of a function of an array that answers a number, by the library's own reverse mode."""
    if lib.backend.library == "jax":
        import jax

        return lib.program(jax.grad(function))(x)
    import torch

    if lib.backend is Backend.TORCH_FUNC:
        return torch.func.grad(function)(x)
    if lib.backend is Backend.TORCH_COMPILE:
        function = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


# What is special here is in the numbers. PyTorch compiles the program of the tests of cross_entropy and its gradient
# once more for their shape, and runs the operations of eager PyTorch; XLA has operations of its own.
numbers = pytest.mark.enough(lambda can: "compile" not in can.how)


def skip_one_option(lib: Adapter, options: dict[str, Any]) -> None:
    if lib.can.compiles and len(options) == 1:
        pytest.skip("none and all of the options show it where each is a compilation")
