"""Every transformation of JAX through every differentiable function, against derivatives of the published formulas.

The formulas stand here once more, in NumPy and without care for range, and are differentiated by complex steps, which
are exact but for rounding; second derivatives are central differences of those.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from tests.quick_programs import run_once

if TYPE_CHECKING:
    from collections.abc import Callable

jax = pytest.importorskip("jax")
jnp = jax.numpy

X = np.asarray([[0.3, -1.1, 0.8], [1.4, 0.2, -0.5]])
T = np.asarray([[0.7], [1.6]])
W = np.asarray([[0.6, 1.3, 0.4], [0.9, 0.2, 1.7]])
POINT = np.concatenate([X.ravel(), T.ravel(), W.ravel()])
DIRECTION = np.cos(np.arange(POINT.size))
BATCH = np.stack([POINT, POINT + 0.01 * np.sin(np.arange(POINT.size))])

TARGETS = np.asarray([2, 0])
PAIR = np.asarray([[2, 1], [0, 0]])
ONE_HOT = np.eye(3)[TARGETS]
MASK = np.asarray([[True, True, False], [True, True, True]])


def parts(q: Any) -> tuple[Any, Any, Any]:
    """Return logits, temperatures, and what stands beside them: weights, other logits, a tangent or a cotangent."""
    return q[:6].reshape(2, 3), q[6:8].reshape(2, 1), q[8:].reshape(2, 3)


def total(x: Any) -> Any:
    return x.sum(axis=-1, keepdims=True)


def shares(x: Any, t: Any, exists: Any = 1.0) -> Any:
    terms = np.exp(x / t) * exists
    return terms / total(terms)


def loss(x: Any, q: Any, w: Any = 1.0, smoothing: float = 0.0, z_loss: float = 0.0) -> Any:
    log_total = np.log(total(np.exp(x)))
    c = (1 - smoothing) * q + smoothing / 3
    return total(c * w * (log_total - x)) + z_loss * log_total**2


def drawn(x: Any, t: Any) -> Any:
    return ps.sample(x, 7, temperature=t, return_logprobs=True)


def entropy(x: Any, t: Any, w: Any) -> Any:
    p = shares(x, t)
    return -total(p * np.log(p))


def divergence(x: Any, t: Any, w: Any) -> Any:
    p = shares(x, t)
    return total(p * np.log(p / shares(w, t)))


def softmax_product(x: Any, t: Any, w: Any) -> Any:
    y = shares(x, t)
    return y * (w - total(y * w)) / t


def losses(x: Any, targets: Any, **options: Any) -> Any:
    return ps.cross_entropy(x, targets, reduction="none", **options)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "softmax, where": (
        lambda x, t, w: ps.softmax(x, temperature=t, where=jnp.asarray(MASK)),
        lambda x, t, w: shares(x, t, MASK),
    ),
    "log_softmax": (
        lambda x, t, w: ps.log_softmax(x, temperature=t),
        lambda x, t, w: np.log(shares(x, t)),
    ),
    "logsumexp, weights": (
        lambda x, t, w: ps.logsumexp(x, weights=w),
        lambda x, t, w: np.log(total(w * np.exp(x))),
    ),
    "cross_entropy, probabilities": (
        lambda x, t, w: losses(x, w, z_loss=0.1),
        lambda x, t, w: loss(x, w, z_loss=0.1),
    ),
    "cross_entropy, smoothing and weight": (
        lambda x, t, w: losses(x, jnp.asarray(TARGETS), label_smoothing=0.2, weight=w[0]),
        lambda x, t, w: loss(x, ONE_HOT, w[0], 0.2),
    ),
    "entropy": (lambda x, t, w: ps.entropy(x, temperature=t), entropy),
    "kl_divergence": (lambda x, t, w: ps.kl_divergence(x, w, temperature=t), divergence),
    "softmax_jvp": (lambda x, t, w: ps.softmax_jvp(x, w, temperature=t), softmax_product),
    "softmax_vjp": (lambda x, t, w: ps.softmax_vjp(x, w, temperature=t), softmax_product),
    "log_softmax_jvp": (
        lambda x, t, w: ps.log_softmax_jvp(x, w, temperature=t),
        lambda x, t, w: (w - total(shares(x, t) * w)) / t,
    ),
    "log_softmax_vjp": (
        lambda x, t, w: ps.log_softmax_vjp(x, w, temperature=t),
        lambda x, t, w: (w - shares(x, t) * total(w)) / t,
    ),
    "log_prob": (
        lambda x, t, w: ps.log_prob(x, jnp.asarray(PAIR), temperature=t),
        lambda x, t, w: np.take_along_axis(np.log(shares(x, t)), PAIR, axis=1),
    ),
    "sample, log-probabilities": (
        lambda x, t, w: drawn(x, t)[1],
        lambda x, t, w: total(np.log(shares(x, t)) * np.eye(3)[np.asarray(drawn(jnp.asarray(X), jnp.asarray(T))[0])]),
    ),
    "truncate": (
        lambda x, t, w: jnp.where(ps.truncate(x, temperature=t, top_k=2) > -jnp.inf, ps.truncate(x, top_k=2), 0.0),
        lambda x, t, w: x * (np.argsort(np.argsort(-x.real)) < 2),
    ),
}
"""Each function of logits, temperatures and weights, and its formula."""

WAYS = ("jacfwd", "jacrev", "linearize", "checkpoint", "vmap", "hessian")


@functools.cache
def found(name: str) -> dict[str, Any]:
    """Return what every transformation answers, from one program."""
    function = CASES[name][0]

    def flat(q: Any) -> Any:
        return function(*parts(q)).ravel()

    def moment(q: Any) -> Any:
        y = flat(q)
        return jnp.cos(jnp.arange(y.size)) @ y

    def transformed(q: Any, v: Any, batch: Any) -> dict[str, Any]:
        gradient = jax.grad(moment)
        answers = (
            jax.jacfwd(flat)(q),
            jax.jacrev(flat)(q),
            jax.linearize(flat, q)[1](v),
            jax.grad(jax.checkpoint(moment))(q),
            jax.vmap(gradient)(batch),
            jax.hessian(moment)(q),  # the vmap of a jvp of a vjp
        )
        return dict(zip(WAYS, answers, strict=True))

    with jax.enable_x64(True):
        arrays = [jnp.asarray(one) for one in (POINT, DIRECTION, BATCH)]
        return {way: np.asarray(y) for way, y in run_once(transformed, *arrays).items()}


def jacobian_of(formula: Callable[..., Any], q: np.ndarray) -> np.ndarray:
    """Return the derivatives of a formula's entries, a column for each parameter."""
    step = 1e-30
    columns = [formula(*parts(q + step * 1j * one)).ravel().imag / step for one in np.eye(q.size)]
    return np.stack(columns, axis=1)


def gradient_of(formula: Callable[..., Any], q: np.ndarray) -> np.ndarray:
    jacobian = jacobian_of(formula, q)
    return np.cos(np.arange(len(jacobian))) @ jacobian


def hessian_of(formula: Callable[..., Any], q: np.ndarray) -> np.ndarray:
    step = 1e-3
    weights = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    columns = [
        sum(weight * gradient_of(formula, q + k * step * one) for k, weight in weights.items()) / step
        for one in np.eye(q.size)
    ]
    return np.stack(columns, axis=1)


@functools.cache
def wanted(name: str) -> dict[str, np.ndarray]:
    formula = CASES[name][1]
    with jax.enable_x64(True):  # where a formula asks which tokens are drawn
        jacobian, gradient, hessian = (way(formula, POINT) for way in (jacobian_of, gradient_of, hessian_of))
        batch = np.stack([gradient_of(formula, q) for q in BATCH])
    answers = (jacobian, jacobian, jacobian @ DIRECTION, gradient, batch, hessian)
    return dict(zip(WAYS, answers, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_transformations_give_the_published_derivatives(name: str, way: str) -> None:
    np.testing.assert_allclose(found(name)[way], wanted(name)[way], rtol=1e-8, atol=1e-9)


def test_transformations_of_a_function_that_is_vectorised_over_temperatures() -> None:
    """A temperature that is batched where the logits are not, forward and in reverse."""
    with jax.enable_x64(True):
        x, heats = jnp.asarray(X[0]), jnp.asarray([0.5, 1.0, 2.0])

        def loss_at(t: Any) -> Any:
            return ps.entropy(x, temperature=t)

        slopes = jax.jit(lambda t: (jax.vmap(jax.grad(loss_at))(t), jax.vmap(jax.jacfwd(loss_at))(t)))(heats)
    # dH/dT is the variance of the logits over T³.
    p = shares(X[:1], np.asarray([[0.5], [1.0], [2.0]]))
    variance = total(p * X[:1] ** 2) - total(p * X[:1]) ** 2
    for found_slopes in slopes:
        np.testing.assert_allclose(found_slopes, variance.ravel() / np.asarray([0.5, 1.0, 2.0]) ** 3, rtol=1e-10)
