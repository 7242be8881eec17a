"""cross_entropy, entropy and kl_divergence against mpmath, with their derivatives."""

from __future__ import annotations

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
LOGITS = ((1.0, 2.0, 3.0, 0.5), (1000.0, 1001.0, -INF, 999.0), (-2.0, -2.0, -2.0, -2.0), (0.25, -1.5, 4.0, 0.0))
OTHER = ((3.0, 2.0, 1.0, 0.5), (1000.0, 999.0, -INF, 999.0), (-2.0, -1.0, -2.0, 0.0), (0.25, 1.5, -4.0, 0.0))
CLASSES = (2, 1, 3, 0)
PROBABILITIES = ((0.5, 0.25, 0.25, 0.0), (0.25, 0.75, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0))
WEIGHT = (0.5, 2.0, 1.0, 0.25)
MASK = ((True, True, False, True), (False, True, True, True), (False, False, False, False), (True, False, False, False))
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


# JAX differentiates in one program, jax:fused: eagerly, each step is a compilation, and test_derivatives.py does that.
differentiable = pytest.mark.backends(lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles))


# What is special here is in the numbers. PyTorch compiles the program of the tests of cross_entropy and its gradient
# once more for their shape, and runs the operations of eager PyTorch; XLA has operations of its own.
numbers = pytest.mark.enough(lambda can: "compile" not in can.how)


def skip_one_option(lib: Adapter, options: dict[str, Any]) -> None:
    if lib.can.compiles and len(options) == 1:
        pytest.skip("none and all of the options show it where each is a compilation")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: "+".join(one) or "plain")
def test_cross_entropy_of_classes_and_probabilities(
    lib: Adapter, dtype: str, options: dict[str, Any], *, everything: bool
) -> None:
    skip_one_option(lib, options)
    x = lib.asarray(LOGITS, dtype)
    keywords = arrays(lib, options, dtype)
    with mpmath.workprec(200):
        rows = exact(LOGITS, dtype)
        classes = [row_loss(row, t, **options) for row, t in zip(rows, CLASSES, strict=True)]
        probabilities = [row_loss(row, q, **options) for row, q in zip(rows, PROBABILITIES, strict=True)]
        w = [options.get("weight", (1,) * 4)[t] for t in CLASSES]
        mean = mpmath.fsum(classes) / mpmath.fsum(w)
    targets, q = lib.asarray(CLASSES, index_dtype(lib)), lib.asarray(PROBABILITIES, dtype)
    call = polysoftmax.cross_entropy
    close(lib, lib.call(call, x, targets, reduction="none", **keywords), classes, dtype)
    close(lib, lib.call(call, x, q, reduction="mean", **keywords), mpmath.fsum(probabilities) / 4, dtype)
    if lib.can.compiles and not options:
        return  # all options together have the other reductions
    close(lib, lib.call(call, x, targets, **keywords), mean, dtype)
    if "compile" in lib.can.how and not everything:
        return  # PyTorch's mean of probabilities is made of the other two reductions
    close(lib, lib.call(call, x, q, reduction="none", **keywords), probabilities, dtype)
    close(lib, lib.call(call, x, q, reduction="sum", **keywords), mpmath.fsum(probabilities), dtype)


def test_cross_entropy_along_other_axes(lib: Adapter) -> None:
    grid = np.asarray(LOGITS[0] * 6).reshape(2, 3, 4) * np.arange(1, 7).reshape(2, 3, 1)
    with mpmath.workprec(200):
        first = [row_loss(row, 1) for row in exact(grid[:, 1, :].T)]
        both = [row_loss(row, 5) for row in exact(grid.transpose(1, 0, 2).reshape(3, 8))]
    dtype = lib.can.default_float
    x = lib.asarray(grid, dtype)
    ones = lib.asarray(np.ones((3, 4)), index_dtype(lib))
    y = lib.call(polysoftmax.cross_entropy, x, ones, axis=0, reduction="none")
    close(lib, y[1, :], first, dtype)
    fives = lib.asarray(np.full(3, 5), index_dtype(lib))
    close(lib, lib.call(polysoftmax.cross_entropy, x, fives, axis=(0, 2), reduction="none"), both, dtype)


def test_ignored_rows_leave_no_trace(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray((*LOGITS, (NAN, INF, 0.0, -INF)), dtype)
    targets = lib.asarray((2, -1, 3, 0, -1), index_dtype(lib))
    with mpmath.workprec(200):
        kept = [0, *(row_loss(exact(LOGITS)[i], CLASSES[i], weight=WEIGHT) for i in (0, 2, 3)), 0]
    want = [kept[1], 0, kept[2], kept[3], 0]
    weight = lib.asarray(WEIGHT, dtype)
    y = lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, weight=weight, reduction="none")
    close(lib, y, want, dtype)
    mean = lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, weight=weight)
    close(lib, mean, mpmath.fsum(want) / (WEIGHT[2] + WEIGHT[3] + WEIGHT[0]), dtype)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.5}, {"z_loss": 1.0}], ids=lambda one: "+".join(one) or "plain"
)
def test_every_target_ignored_is_0(lib: Adapter, options: dict[str, float], *, everything: bool) -> None:
    if "compile" in lib.can.how and not options and not everything:
        pytest.skip("each of the options shows it, too, where that is two compilations")
    dtype = lib.can.default_float
    x, targets = lib.asarray(((NAN, 1.0), (2.0, 3.0)), dtype), lib.asarray((-1, -1), index_dtype(lib))

    def loss(x: Any) -> Any:
        return polysoftmax.cross_entropy(x, targets, ignore_index=-1, **options)

    close(lib, lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, **options), 0.0, dtype, units=0)
    if lib.can.autodiff and lib.backend is not Backend.JAX:
        close(lib, gradient(lib, loss, x), np.zeros((2, 2)), dtype, units=0)


@numbers
def test_classes_without_weight_count_for_nothing(lib: Adapter) -> None:
    """The mean over no weight is 0, and so is its gradient."""
    dtype = lib.can.default_float
    x, targets = lib.asarray(LOGITS[:1], dtype), lib.asarray((1,), index_dtype(lib))
    weight = lib.asarray((1.0, 0.0, 1.0, 1.0), dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, x, targets, weight=weight), 0.0, dtype, units=0)
    if lib.can.autodiff and lib.backend is not Backend.JAX:
        slope_ = gradient(lib, lambda x: polysoftmax.cross_entropy(x, targets, weight=weight), x)
        close(lib, slope_, np.zeros((1, 4)), dtype, units=0)


@pytest.mark.backends(lambda can: not can.compiles)
def test_entropy_and_divergence_along_other_axes(lib: Adapter) -> None:
    dtype = lib.can.default_float
    grid = np.asarray([(7 * i) % 24 / 8 for i in range(24)]).reshape(2, 3, 4)
    x, other = lib.asarray(grid, dtype), lib.asarray(grid[::-1, :, ::-1], dtype)
    for axis, axes, shape in ((0, (0,), (3, 4)), ((2, 0), (0, 2), (3,)), (None, (0, 1, 2), ())):
        kept = [i for i in range(3) if i not in axes]
        rows, others = (
            one.transpose(*kept, *axes).reshape(math.prod(shape), -1) for one in (grid, grid[::-1, :, ::-1])
        )
        with mpmath.workprec(200):
            entropies = [row_entropy(row) for row in exact(rows)]
            divergences = [row_divergence(a, b) for a, b in zip(exact(rows), exact(others), strict=True)]
        y = lib.call(polysoftmax.entropy, x, axis=axis)
        close(lib, y, np.asarray(entropies, dtype=np.float64).reshape(shape), dtype)
        y = lib.call(polysoftmax.kl_divergence, x, other, axis=axis)
        close(lib, y, np.asarray(divergences, dtype=np.float64).reshape(shape), dtype, units=256)


@numbers
def test_rows_without_an_answer_are_nan(lib: Adapter) -> None:
    rows = ((INF, 1.0), (-INF, -INF), (NAN, 0.0), (0.0, 0.0))
    x = lib.asarray(rows, lib.can.default_float)
    targets = lib.asarray((1, 0, 1, 1), index_dtype(lib))
    for target in (targets, lib.asarray(((0.0, 1.0),) * 4, lib.can.default_float)):
        y = lib.values(lib.call(polysoftmax.cross_entropy, x, target, reduction="none"))
        assert np.isnan(y).tolist() == [True, True, True, False]


def test_target_out_of_range(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(LOGITS, dtype)
    looked_at = lib.backend.library == "numpy" or lib.backend in (Backend.TORCH, Backend.TORCH_AUTOGRAD)
    for wrong in (4, -1):
        targets = lib.asarray((2, wrong, 3, 0), index_dtype(lib))
        for options in ({}, {"label_smoothing": 0.25}):
            if looked_at:
                with pytest.raises(IndexError, match=rf"target {wrong} is out of range for 4 classes"):
                    lib.call(polysoftmax.cross_entropy, x, targets, reduction="none", **options)
            else:
                y = lib.call(polysoftmax.cross_entropy, x, targets, reduction="none", **options)
                assert np.isnan(lib.values(y)).tolist() == [False, True, False, False]


@numbers
def test_confident_loss_keeps_its_digits(lib: Adapter) -> None:
    x = lib.asarray(((1000.0, 960.0), (960.0, 1000.0)), "float32")
    y = lib.call(polysoftmax.cross_entropy, x, lib.asarray((0, 1), index_dtype(lib)), reduction="none")
    np.testing.assert_allclose(lib.values(y), float(mpmath.log1p(mpmath.exp(-40))), rtol=1e-6)


@numbers
def test_losses_where_the_rule_for_confident_rows_begins(lib: Adapter) -> None:
    """The probability of the target passes 1 / 1.25, and the target is or is not the maximum, in one batch."""
    dtype = lib.can.default_float
    rest = (1e-9, 0.125, 0.2499, 0.25, 0.2501, 0.5, 0.999, 1.0, 1.001)
    rows = [(7.0, 7.0 + math.log(one / 2), 7.0 + math.log(one / 2), -INF) for one in rest]
    for target in (0, 1):
        targets = lib.asarray((target,) * len(rows), index_dtype(lib))
        with mpmath.workprec(200):
            want = [-log_softmax(row)[target] for row in exact(rows, dtype)]
        y = lib.call(polysoftmax.cross_entropy, lib.asarray(rows, dtype), targets, reduction="none")
        np.testing.assert_allclose(lib.values(y), np.asarray(want, dtype=np.float64), rtol=64 * FORMATS[dtype].unit)


@numbers
def test_smoothing_leaves_impossible_classes_out(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(((0.0, -INF, 0.0, -INF),), dtype)
    y = lib.call(polysoftmax.cross_entropy, x, lib.asarray((0,), index_dtype(lib)), label_smoothing=0.5)
    close(lib, y, mpmath.log(2), dtype)


def test_entropy_and_divergence(lib: Adapter, dtype: str) -> None:
    x, other = lib.asarray(LOGITS, dtype), lib.asarray(OTHER, dtype)
    for t in lib.some((0.5, 1.0, 2.0, 0.0)):
        with mpmath.workprec(200):
            pairs = list(zip(exact(LOGITS, dtype), exact(OTHER, dtype), strict=True))
            entropies = [row_entropy(row, t) for row, _ in pairs]
            divergences = [row_divergence(row, b, t) for row, b in pairs]
        close(lib, lib.call(polysoftmax.entropy, x, temperature=t), entropies, dtype)
        # The conditioning of log p - log q is that of the logits' distance over T.
        close(lib, lib.call(polysoftmax.kl_divergence, x, other, temperature=t), divergences, dtype, units=256)


def test_masked_entropy_and_divergence(lib: Adapter) -> None:
    dtype = lib.can.default_float
    poisoned = np.where(np.asarray(MASK), np.asarray(LOGITS), NAN)
    temperature = (0.5, 1.0, 1.0, 2.0)
    with mpmath.workprec(200):
        kept = [
            [[row[i] for i in range(4) if m[i]] for row, m in zip(exact(rows), MASK, strict=True)]
            for rows in (LOGITS, OTHER)
        ]
        kept[0][1], kept[1][1] = ([one for one in row if one != mpmath.ninf] for row in (kept[0][1], kept[1][1]))
        entropies = [row_entropy(row, t) if row else 0 for row, t in zip(kept[0], temperature, strict=True)]
        divergences = [row_divergence(row, b, t) if row else 0 for row, b, t in zip(*kept, temperature, strict=True)]
    x, other = lib.asarray(poisoned, dtype), lib.asarray(np.where(np.asarray(MASK), np.asarray(OTHER), INF), dtype)
    where, t = lib.asarray(MASK, "bool"), lib.asarray(temperature, dtype)
    close(lib, lib.call(polysoftmax.entropy, x, where=where, temperature=t), entropies, dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, x, other, where=where, temperature=t), divergences, dtype)


@numbers
def test_impossible_under_q(lib: Adapter) -> None:
    dtype = lib.can.default_float
    p, q = lib.asarray(((0.0, 0.0), (0.0, -INF)), dtype), lib.asarray(((0.0, -INF), (0.0, 0.0)), dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, p, q), [INF, mpmath.log(2)], dtype)


def slope(function: Callable[..., Any], row: list[Any], *args: Any, **kwargs: Any) -> list[float]:
    """The gradient of a function of one row by mpmath's numerical differentiation at 200 bits."""
    found = []
    for i, one in enumerate(row):
        if one == mpmath.ninf:
            found.append(mpmath.mpf(0))
            continue

        def along(value: Any, i: int = i) -> Any:
            return function([*row[:i], value, *row[i + 1 :]], *args, **kwargs)

        found.append(mpmath.diff(along, one))
    return [float(one) for one in found]


@differentiable
@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: "+".join(one) or "plain")
def test_gradient_of_cross_entropy(lib: Adapter, options: dict[str, Any]) -> None:
    skip_one_option(lib, options)
    dtype = lib.can.default_float
    keywords = arrays(lib, options, dtype)
    x = lib.asarray(LOGITS, dtype)
    with mpmath.workprec(200):
        by_class = [slope(row_loss, row, t, **options) for row, t in zip(exact(LOGITS), CLASSES, strict=True)]
        by_q = [slope(row_loss, row, q, **options) for row, q in zip(exact(LOGITS), PROBABILITIES, strict=True)]
    targets, q = lib.asarray(CLASSES, index_dtype(lib)), lib.asarray(PROBABILITIES, dtype)
    # z_loss multiplies the gradient by the logsumexp, up to 1001 here.
    units = 64 * (1000 if "z_loss" in options else 1)

    def of_classes(x: Any) -> Any:
        return polysoftmax.cross_entropy(x, targets, reduction="sum", **keywords)

    def of_probabilities(x: Any) -> Any:
        return polysoftmax.cross_entropy(x, q, reduction="sum", **keywords)

    close(lib, gradient(lib, of_classes, x), by_class, dtype, units)
    close(lib, gradient(lib, of_probabilities, x), by_q, dtype, units)


@differentiable
def test_gradients_of_entropy_and_divergence(lib: Adapter, *, everything: bool) -> None:
    dtype = lib.can.default_float
    x, other = lib.asarray(LOGITS, dtype), lib.asarray(OTHER, dtype)
    t = 0.5
    with mpmath.workprec(200):
        pairs = list(zip(exact(LOGITS), exact(OTHER), strict=True))
        of_entropy = [slope(row_entropy, row, t) for row, _ in pairs]
        of_p = [slope(row_divergence, row, b, t) for row, b in pairs]
        of_q = [slope(lambda b, row=row: row_divergence(row, b, t), b) for row, b in pairs]
        by_temperature = float(
            mpmath.fsum(mpmath.diff(lambda s, a=a, b=b: row_divergence(a, b, s), t) for a, b in pairs)
        )

    xp = lib.xp

    def summed(y: Any) -> Any:
        return xp.sum(y)

    close(lib, gradient(lib, lambda b: summed(polysoftmax.kl_divergence(x, b, temperature=t)), other), of_q, dtype, 256)
    if "compile" in lib.can.how and not everything:
        return  # test_derivatives.py has the others, for logits and temperature in one program
    close(lib, gradient(lib, lambda x: summed(polysoftmax.entropy(x, temperature=t)), x), of_entropy, dtype, 256)
    close(lib, gradient(lib, lambda x: summed(polysoftmax.kl_divergence(x, other, temperature=t)), x), of_p, dtype, 256)
    moved = gradient(lib, lambda s: summed(polysoftmax.kl_divergence(x, other, temperature=s)), lib.asarray(t, dtype))
    close(lib, moved, by_temperature, dtype, 1024)


@differentiable
def test_gradients_for_targets_and_weights(lib: Adapter) -> None:
    dtype = lib.can.default_float
    finite = LOGITS[:1] + LOGITS[2:]
    x, q = lib.asarray(finite, dtype), lib.asarray(PROBABILITIES[:3], dtype)
    with mpmath.workprec(200):
        nll = [[float(-one) for one in log_softmax(row)] for row in exact(finite)]
    by_weight = (np.asarray(nll) * np.asarray(PROBABILITIES[:3])).sum(0)

    def of_targets(q: Any) -> Any:
        return polysoftmax.cross_entropy(x, q, reduction="sum")

    def of_weights(w: Any) -> Any:
        return polysoftmax.cross_entropy(x, q, weight=w, reduction="sum")

    close(lib, gradient(lib, of_targets, q), nll, dtype)
    close(lib, gradient(lib, of_weights, lib.asarray(WEIGHT, dtype)), by_weight, dtype)


@differentiable
@numbers
def test_finite_gradient_at_an_impossible_class(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x, q = lib.asarray(((0.0, -INF, 0.0),), dtype), lib.asarray(((0.5, 0.0, 0.5),), dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, x, q), mpmath.log(2), dtype)
    close(lib, gradient(lib, lambda x: polysoftmax.cross_entropy(x, q), x), np.zeros((1, 3)), dtype)


@pytest.mark.parametrize("function", ["cross_entropy", "entropy", "kl_divergence"])
def test_second_order(function: str) -> None:
    """Hessians of JAX, forward over forward and reverse over reverse, and of torch, against mpmath.

    The last of the four numbers is the temperature, or the part of the target that is given to another class.
    """
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    row, b = [0.5, -1.0, 2.0, 0.75], [1.0, 0.0, -0.5]
    with mpmath.workprec(200):
        of_row = {
            "cross_entropy": lambda r: row_loss(r[:3], (r[3], 1 - r[3], 0.0), label_smoothing=0.25, z_loss=0.5),
            "entropy": lambda r: row_entropy(r[:3], r[3]),
            "kl_divergence": lambda r: row_divergence(r[:3], b, r[3]),
        }[function]
        point = [mpmath.mpf(one) for one in row]
        want = [slope(lambda r, i=i: mpmath.diff(_along(of_row, r, i), r[i]), point) for i in range(4)]

    def ours(x: Any) -> Any:
        xp = lib_of(x)
        if function == "cross_entropy":
            q = xp.stack([x[3], 1 - x[3], xp.zeros_like(x[3])])
            return polysoftmax.cross_entropy(x[:3], q, label_smoothing=0.25, z_loss=0.5)
        if function == "entropy":
            return polysoftmax.entropy(x[:3], temperature=x[3])
        return polysoftmax.kl_divergence(x[:3], xp.asarray(b, dtype=x.dtype), temperature=x[3])

    def lib_of(x: Any) -> Any:
        return torch if isinstance(x, torch.Tensor) else jax.numpy

    with jax.enable_x64(True):
        x = jax.numpy.asarray(row)
        ways = (jax.jacfwd(jax.jacfwd(ours)), jax.jacrev(jax.jacrev(ours)), jax.hessian(ours))
        for found in run_once(lambda x: [way(x) for way in ways], x):
            np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-13)
    x = torch.asarray(row, dtype=torch.float64)
    for hessian in (torch.func.jacfwd(torch.func.jacfwd(ours)), torch.func.hessian(ours)):
        np.testing.assert_allclose(hessian(x), want, rtol=1e-12, atol=1e-13)
    by_autograd = torch.autograd.functional.hessian(ours, x)
    np.testing.assert_allclose(by_autograd, want, rtol=1e-12, atol=1e-13)


def _along(function: Callable[[Any], Any], row: list[Any], i: int) -> Callable[[Any], Any]:
    return lambda value: function([*row[:i], value, *row[i + 1 :]])


AT_REST: dict[str, Callable[[Any, Any], Any]] = {
    "cross_entropy": lambda x, other: polysoftmax.cross_entropy(x, polysoftmax.softmax(other)),
    "entropy": lambda x, other: -polysoftmax.entropy(x),
    "divergence from": polysoftmax.kl_divergence,
    "divergence of": lambda x, other: polysoftmax.kl_divergence(other, x),
}


@pytest.mark.parametrize("loss", AT_REST)
def test_second_order_where_the_gradient_is_0(loss: str) -> None:
    """At three equal logits every gradient is 0, and every Hessian that of the logsumexp: diag p - p·p."""
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    want = np.eye(3) / 3 - 1 / 9
    with jax.enable_x64(True):
        x = jax.numpy.zeros(3)

        def of_jax(x: Any) -> Any:
            return AT_REST[loss](x, jax.numpy.zeros(3))

        ways = (jax.grad(of_jax), jax.jacfwd(jax.jacfwd(of_jax)), jax.jacrev(jax.jacrev(of_jax)), jax.hessian(of_jax))
        slope_, *hessians = run_once(lambda x: [way(x) for way in ways], x)
        assert np.abs(slope_).max() < 1e-15
        for hessian in hessians:
            np.testing.assert_allclose(hessian, want, rtol=1e-13)

    def of_torch(x: Any) -> Any:
        return AT_REST[loss](x, torch.zeros(3, dtype=x.dtype))

    x = torch.zeros(3, dtype=torch.float64)
    for hessian in (torch.func.jacfwd(torch.func.jacfwd(of_torch)), torch.func.hessian(of_torch)):
        np.testing.assert_allclose(hessian(x), want, rtol=1e-13)
    np.testing.assert_allclose(torch.autograd.functional.hessian(of_torch, x), want, rtol=1e-13)


def of_each(xp: Any) -> dict[str, Callable[[Any], Any]]:
    """Return each loss as a function of its logits, for a row and for a batch of rows of three."""
    q, other = xp.asarray([0.5, 0.25, 0.25]), xp.asarray([1.0, 0.0, -0.5])

    def like(row: Any, x: Any) -> Any:
        return xp.broadcast_to(xp.asarray(row, dtype=x.dtype), x.shape)

    return {
        "class": lambda x: polysoftmax.cross_entropy(x, xp.ones(x.shape[:-1], dtype=xp.int32), label_smoothing=0.25),
        "probabilities": lambda x: polysoftmax.cross_entropy(x, like(q, x), z_loss=0.5, reduction="sum"),
        "entropy": lambda x: polysoftmax.entropy(x, temperature=0.5).sum(),
        "kl_divergence": lambda x: polysoftmax.kl_divergence(like(other, x), x, temperature=2.0).sum(),
    }


LOSSES = ("class", "probabilities", "entropy", "kl_divergence")


@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_is_the_loop(loss: str) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    rows = np.asarray([[1.0, 2.0, 3.0], [1000.0, 1001.0, 999.0], [0.25, -1.5, 4.0]], dtype=np.float32)
    ways = ((jax.numpy, jax.vmap, jax.grad, jax.jit), (torch, torch.func.vmap, torch.func.grad, lambda call: call))
    for xp, vmap, grad, compiled in ways:
        x, function = xp.asarray(rows), of_each(xp)[loss]
        for call in (function, compiled(grad(function))):
            loop = np.asarray([np.asarray(call(x[i])) for i in range(3)])
            # In JAX's programs: eagerly, each step is one to compile, and test_derivatives.py does that.
            np.testing.assert_allclose(np.asarray(compiled(vmap(call))(x)), loop, rtol=4e-7, atol=4e-7)
            np.testing.assert_allclose(np.asarray(compiled(vmap(call, 1))(x.T)), loop, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, engine: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([[1.0, 2.0, 3.0], [0.25, -1.5, 4.0]], dtype=torch.float64, requires_grad=True)
    with polysoftmax.engine(engine):
        assert torch.autograd.gradcheck(of_each(torch)[loss], (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(of_each(torch)[loss], (x,))


def test_backward_keeps_nothing_of_the_size_of_the_logits_but_them() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    targets = np.arange(64) % 50
    x = torch.randn(64, 50, requires_grad=True)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        polysoftmax.cross_entropy(x, torch.asarray(targets), label_smoothing=0.1, z_loss=0.1)
    assert any(one.data_ptr() == x.data_ptr() for one in kept)
    assert all(one.numel() <= 64 for one in kept if one.data_ptr() != x.data_ptr())

    logits = jax.numpy.asarray(x.detach().numpy())
    _, pullback = jax.vjp(lambda x: polysoftmax.cross_entropy(x, jax.numpy.asarray(targets)), logits)
    large = [one for one in jax.tree_util.tree_leaves(pullback) if one.size > 64]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0], logits)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, t: polysoftmax.cross_entropy(x, t, reduction="max"), ValueError, r"reduction.*'max'"),
        (lambda x, t: polysoftmax.cross_entropy(x, t[:1]), ValueError, r"\(2,\).*got \(1,\)"),
        (lambda x, t: polysoftmax.cross_entropy(x, x[:, :1]), ValueError, r"probabilities.*\(2, 3\).*\(2, 1\)"),
        (lambda x, t: polysoftmax.cross_entropy(x, t > 0), TypeError, "integers.*floating.*bool"),
        (lambda x, t: polysoftmax.cross_entropy(x, [0, 1]), TypeError, "targets must be an array of numpy.*list"),
        (lambda x, t: polysoftmax.cross_entropy(x, x, ignore_index=0), ValueError, "ignore_index=0.*integer targets"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=1.0), TypeError, "ignore_index.*int or None.*float"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=True), TypeError, "ignore_index.*got bool"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=t), TypeError, "ignore_index.*got ndarray"),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, weight=[1, 2, 3]),
            TypeError,
            "weight must be an array.*got list",
        ),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, weight=x[0] > 0),
            TypeError,
            "weight must hold real numbers.*bool",
        ),
        (lambda x, t: polysoftmax.cross_entropy(x, t, label_smoothing=1.5), ValueError, r"label_smoothing.*1\.5"),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, label_smoothing=x),
            TypeError,
            "label_smoothing.*number.*ndarray",
        ),
        (lambda x, t: polysoftmax.cross_entropy(x, t, z_loss=-1), ValueError, "z_loss.*-1"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, weight=x), ValueError, r"one entry a class.*\(3,\).*\(2, 3\)"),
        (lambda x, t: polysoftmax.cross_entropy(x[:, :0], t), ValueError, "at least one class"),
        (lambda x, t: polysoftmax.kl_divergence(x, x[:1]), ValueError, r"logits_q.*\(2, 3\).*\(1, 3\)"),
        (lambda x, t: polysoftmax.entropy(x, temperature=-2), ValueError, "temperature.*-2"),
        (lambda x, t: polysoftmax.entropy(x, axis=2), ValueError, "axis 2 is out of bounds.*dimension 2"),
    ],
)
def test_errors(call: Callable[[Any, Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(np.zeros((2, 3)), np.asarray([0, 1]))


@pytest.mark.backends(lambda can: not can.compiles)
def test_nothing_to_sum(lib: Adapter) -> None:
    dtype = lib.can.default_float
    empty = lib.asarray(np.zeros((2, 0)), dtype)
    close(lib, lib.call(polysoftmax.entropy, empty), [0.0, 0.0], dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, empty, empty), [0.0, 0.0], dtype)
    if lib.can.lazy:
        return  # Dask's own maximum fails without rows
    no_rows = lib.asarray(np.zeros((0, 3)), dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, no_rows, lib.asarray(np.zeros(0), index_dtype(lib))), 0.0, dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, no_rows, no_rows), 0.0, dtype)
