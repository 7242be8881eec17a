"""Derivatives of cross_entropy, entropy and kl_divergence against mpmath, by every way of differentiating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from tests.loss_cases import (
    CLASSES,
    INF,
    LOGITS,
    OPTIONS,
    OTHER,
    PROBABILITIES,
    WEIGHT,
    arrays,
    close,
    exact,
    gradient,
    index_dtype,
    log_softmax,
    numbers,
    row_divergence,
    row_entropy,
    row_loss,
    skip_one_option,
)
from tests.quick_programs import run_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing import Adapter

# JAX differentiates in one program, jax:fused: eagerly, each step is a compilation; test_derivatives.py has such.
differentiable = pytest.mark.backends(lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles))


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
