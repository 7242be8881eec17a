"""What a NumPy user would call: SciPy, the plain formula, or PyTorch on the same memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from benchmarks.peers import SEED, TOP_K, TOP_P, from_probabilities
from benchmarks.timing import wall

if TYPE_CHECKING:
    from collections.abc import Callable

Array = Any
Axis = int
gradient = None
pullback = None
_RNG = np.random.default_rng(SEED)


def asarray(x: np.ndarray, dtype: str) -> Array:
    return x.astype(dtype, copy=False)


def key() -> int:
    return SEED


def stopwatch() -> Callable[..., float]:
    return wall(lambda y: y)


def naive_softmax(x: Array, *, axis: Axis) -> Array:
    y = np.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


def naive_log_softmax(x: Array, *, axis: Axis) -> Array:
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def naive_logsumexp(x: Array, *, axis: Axis) -> Array:
    most = x.max(axis=axis, keepdims=True)
    return np.squeeze(most + np.log(np.exp(x - most).sum(axis=axis, keepdims=True)), axis=axis)


def scipy_softmax_vjp(x: Array, cotangent: Array, *, axis: Axis) -> Array:
    y = special.softmax(x, axis=axis)
    return y * (cotangent - (y * cotangent).sum(axis=axis, keepdims=True))


def scipy_cross_entropy(x: Array, targets: Array, *, axis: Axis) -> Array:
    picked = np.take_along_axis(x, targets[..., None], axis=axis)[..., 0]
    return (special.logsumexp(x, axis=axis) - picked).mean()


def scipy_cross_entropy_grad(x: Array, targets: Array, *, axis: Axis) -> Array:
    return from_probabilities(special.softmax(x, axis=axis), targets)


def scipy_log_prob(x: Array, tokens: Array, *, axis: Axis) -> Array:
    return np.take_along_axis(special.log_softmax(x, axis=axis), tokens[..., None], axis=axis)[..., 0]


def gumbel(x: Array, key: int, *, axis: Axis) -> Array:
    """Draw by ``argmax(x + gumbel)``, as it is usually written."""
    del key
    return np.argmax(x + _RNG.gumbel(size=x.shape), axis=axis)


def gumbel_float32(x: Array, key: int, *, axis: Axis) -> Array:
    """Draw the same with the cheapest Gumbel variates that NumPy has; few write it like this."""
    del key
    noise = _RNG.standard_exponential(x.shape, dtype=np.float32)
    noise += np.float32(2.0**-126)  # an exponential in float32 is 0 once in 2^23 draws, and would win
    np.log(noise, out=noise)
    return np.subtract(x, noise, out=noise).argmax(axis=axis)


def gumbel_top_k(x: Array, key: int, *, axis: Axis) -> Array:
    kept = np.argpartition(x, -TOP_K, axis=axis)[..., -TOP_K:]
    drawn = gumbel(np.take_along_axis(x, kept, axis=axis), key, axis=axis)
    return np.take_along_axis(kept, drawn[..., None], axis=axis)[..., 0]


def gumbel_top_p(x: Array, key: int, *, axis: Axis) -> Array:
    order = np.argsort(-x, axis=axis)
    ordered = np.take_along_axis(x, order, axis=axis)
    y = naive_softmax(ordered, axis=axis)
    ordered[np.cumsum(y, axis=axis) - y >= TOP_P] = -np.inf
    drawn = gumbel(ordered, key, axis=axis)
    return np.take_along_axis(order, drawn[..., None], axis=axis)[..., 0]


def choice(x: Array, key: int, *, axis: Axis, draws: int) -> Array:
    del key
    p = naive_softmax(x.astype(np.float64), axis=axis).reshape(-1, x.shape[axis])
    drawn = [_RNG.choice(len(row), size=draws, p=row) for row in p]
    return np.stack(drawn).reshape(*x.shape[:-1], draws)


def _through_torch(op: str) -> dict[str, Callable[..., Array]]:
    """Return the detour that shares memory with PyTorch both ways, if it is installed."""
    if find_spec("torch") is None:
        return {}
    import torch

    from benchmarks.peers import torch as peers

    function = peers.PEERS[op]["torch"]

    def detour(x: Array, *others: Array, **options: int) -> Array:
        tensors = [torch.from_numpy(y) if isinstance(y, np.ndarray) else y for y in (x, *others)]
        return function(*tensors, **options).numpy()

    return {"torch, no copy": detour}


PEERS: dict[str, dict[str, Callable[..., Array]]] = {
    "softmax": {"scipy": special.softmax, "naive": naive_softmax},
    "log_softmax": {"scipy": special.log_softmax, "naive": naive_log_softmax},
    "logsumexp": {"scipy": special.logsumexp, "naive": naive_logsumexp},
    "softmax_vjp": {"scipy": scipy_softmax_vjp},
    "cross_entropy": {"scipy": scipy_cross_entropy},
    "cross_entropy_grad": {"scipy": scipy_cross_entropy_grad},
    "log_prob": {"scipy": scipy_log_prob},
    "sample": {"gumbel": gumbel, "gumbel, float32": gumbel_float32},
    "sample_top_k": {"gumbel": gumbel_top_k},
    "sample_top_p": {"gumbel": gumbel_top_p},
    "sample_many": {"choice": choice},
}
PEERS = {op: found | _through_torch(op) for op, found in PEERS.items()}
