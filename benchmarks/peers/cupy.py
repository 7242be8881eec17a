"""What a CuPy user would call: ``cupyx.scipy.special`` and the plain formulas. Not yet run: no GPU was at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy as cp
from cupyx.scipy import special

from benchmarks.peers import SEED, TOP_K, TOP_P

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

Array = Any
Axis = int
pullback = None


def has_gpu() -> bool:
    return cp.cuda.is_available()


def asarray(x: np.ndarray, dtype: str, device: str) -> Array:
    del device
    return cp.asarray(x, dtype=dtype)


def key() -> int:
    return SEED


def stopwatch(device: str) -> Callable[..., float]:
    del device
    return _events


def _events(function: Callable[[], Array], number: int) -> float:
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record()
    for _ in range(number):
        function()
    end.record()
    end.synchronize()
    return cp.cuda.get_elapsed_time(start, end) / 1e3 / number


def copy(x: Array) -> Callable[[], Array]:
    target = cp.empty_like(x)
    return lambda: cp.copyto(target, x)


def read(x: Array) -> Callable[[], Array]:
    return lambda: cp.sum(x)


gradient = None


def softmax_vjp(x: Array, cotangent: Array, *, axis: Axis) -> Array:
    y = special.softmax(x, axis=axis)
    return y * (cotangent - (y * cotangent).sum(axis=axis, keepdims=True))


def cross_entropy(x: Array, targets: Array, *, axis: Axis) -> Array:
    picked = cp.take_along_axis(x, targets[..., None], axis=axis)[..., 0]
    return (special.logsumexp(x, axis=axis) - picked).mean()


def cross_entropy_grad(x: Array, targets: Array, *, axis: Axis) -> Array:
    y = special.softmax(x, axis=axis)
    y[cp.arange(len(y)), targets] -= 1
    y *= 1 / len(y)
    return y


def gumbel(x: Array, key: int, *, axis: Axis) -> Array:
    del key
    return (x + cp.random.gumbel(size=x.shape, dtype=x.dtype)).argmax(axis=axis)


def gumbel_top_k(x: Array, key: int, *, axis: Axis) -> Array:
    kept = cp.argpartition(x, -TOP_K, axis=axis)[..., -TOP_K:]
    drawn = gumbel(cp.take_along_axis(x, kept, axis=axis), key, axis=axis)
    return cp.take_along_axis(kept, drawn[..., None], axis=axis)[..., 0]


def gumbel_top_p(x: Array, key: int, *, axis: Axis) -> Array:
    order = cp.argsort(-x, axis=axis)
    ordered = cp.take_along_axis(x, order, axis=axis)
    y = special.softmax(ordered, axis=axis)
    ordered[cp.cumsum(y, axis=axis) - y >= TOP_P] = -cp.inf
    drawn = gumbel(ordered, key, axis=axis)
    return cp.take_along_axis(order, drawn[..., None], axis=axis)[..., 0]


PEERS: dict[str, dict[str, Callable[..., Array]]] = {
    "softmax": {"cupyx": special.softmax},
    "log_softmax": {"cupyx": special.log_softmax},
    "logsumexp": {"cupyx": special.logsumexp},
    "softmax_vjp": {"cupyx": softmax_vjp},
    "cross_entropy": {"cupyx": cross_entropy},
    "cross_entropy_grad": {"cupyx": cross_entropy_grad},
    "sample": {"gumbel": gumbel},
    "sample_top_k": {"gumbel": gumbel_top_k},
    "sample_top_p": {"gumbel": gumbel_top_p},
}
