"""Second derivatives, batches, and what a derivative keeps in memory: softmax, log_softmax and logsumexp."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from tests.derivative_cases import INF, LOGITS, NAN, OPS, VECTORS, WEIGHTS, backward, exact, scores, shares
from tests.quick_programs import run_once

if TYPE_CHECKING:
    from collections.abc import Callable

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
            # In JAX's programs: eagerly, each step is one to compile, and test_vmap_over_temperatures has such.
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
