"""What a JAX user would call: ``jax.nn``, ``jax.scipy.special``, ``jax.random.categorical``, eagerly or under jit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from benchmarks.peers import SEED, TOP_K, TOP_P
from benchmarks.timing import wall

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

Array = Any
Axis = int
jit = jax.jit


def has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def asarray(x: np.ndarray, dtype: str) -> Array:
    return jax.device_put(jnp.asarray(x, dtype=dtype), jax.devices("cpu")[0])


def key() -> Array:
    return jax.random.key(SEED)


def stopwatch() -> Callable[..., float]:
    return wall(jax.block_until_ready)


def gradient(loss: Callable[..., Array]) -> Callable[..., Array]:
    return jax.grad(loss)


def pullback(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(x: Array, cotangent: Array, *, axis: Axis) -> Array:
        return jax.vjp(lambda x: function(x, axis=axis), x)[1](cotangent)[0]

    return call


def cross_entropy(x: Array, targets: Array, *, axis: Axis) -> Array:
    picked = jnp.take_along_axis(x, targets[..., None], axis=axis)[..., 0]
    return jnp.mean(jax.nn.logsumexp(x, axis=axis) - picked)


def log_prob(x: Array, tokens: Array, *, axis: Axis) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(x, axis=axis), tokens[..., None], axis=axis)[..., 0]


def categorical(x: Array, key: Array, *, axis: Axis) -> Array:
    return jax.random.categorical(key, x, axis=axis)


def categorical_many(x: Array, key: Array, *, axis: Axis, draws: int) -> Array:
    return jax.random.categorical(key, x, axis=axis, shape=(draws, *x.shape[:-1])).T


def categorical_top_k(x: Array, key: Array, *, axis: Axis) -> Array:
    values, kept = jax.lax.top_k(x, TOP_K)
    drawn = categorical(values, key, axis=axis)
    return jnp.take_along_axis(kept, drawn[..., None], axis=axis)[..., 0]


def categorical_top_p(x: Array, key: Array, *, axis: Axis) -> Array:
    order = jnp.argsort(x, axis=axis, descending=True)
    ordered = jnp.take_along_axis(x, order, axis=axis)
    y = jax.nn.softmax(ordered, axis=axis)
    beyond = jnp.cumsum(y, axis=axis) - y >= TOP_P
    drawn = categorical(jnp.where(beyond, -jnp.inf, ordered), key, axis=axis)
    return jnp.take_along_axis(order, drawn[..., None], axis=axis)[..., 0]


PEERS: dict[str, dict[str, Callable[..., Array]]] = {
    "softmax": {"jax": jax.nn.softmax},
    "log_softmax": {"jax": jax.nn.log_softmax},
    "logsumexp": {"jax": jax.scipy.special.logsumexp},
    "softmax_vjp": {"jax": pullback(jax.nn.softmax)},
    "cross_entropy": {"jax": cross_entropy},
    "cross_entropy_grad": {"jax": gradient(cross_entropy)},
    "log_prob": {"jax": log_prob},
    "sample": {"jax": categorical},
    "sample_top_k": {"jax": categorical_top_k},
    "sample_top_p": {"jax": categorical_top_p},
    "sample_many": {"jax": categorical_many},
}
