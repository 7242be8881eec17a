"""What a PyTorch user would call: ``torch.nn.functional``, autograd, ``multinomial``, ``torch.compile``."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from benchmarks.peers import SEED, TOP_K, TOP_P
from benchmarks.timing import wall

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

Array = Any
Axis = int


def asarray(x: np.ndarray, dtype: str) -> Array:
    return torch.from_numpy(x).to(getattr(torch, dtype))


def key() -> int:
    return SEED


def stopwatch() -> Callable[..., float]:
    return wall(lambda y: y)


def gradient(loss: Callable[..., Array]) -> Callable[..., Array]:
    def call(x: Array, targets: Array, *, axis: Axis) -> Array:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets, axis=axis), leaf)[0]

    return call


def pullback(function: Callable[..., Array]) -> Callable[..., Array]:
    def call(x: Array, cotangent: Array, *, axis: Axis) -> Array:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, axis=axis), leaf, cotangent)[0]

    return call


def softmax(x: Array, *, axis: Axis) -> Array:
    return torch.softmax(x, axis)


def log_softmax(x: Array, *, axis: Axis) -> Array:
    return torch.log_softmax(x, axis)


def logsumexp(x: Array, *, axis: Axis) -> Array:
    return torch.logsumexp(x, axis)


def cross_entropy(x: Array, targets: Array, *, axis: Axis) -> Array:
    assert axis == -1
    return functional.cross_entropy(x, targets)


def log_prob(x: Array, tokens: Array, *, axis: Axis) -> Array:
    return torch.log_softmax(x, axis).gather(axis, tokens[..., None])[..., 0]


def multinomial(x: Array, key: int, *, axis: Axis) -> Array:
    del key
    return torch.multinomial(torch.softmax(x, axis), 1)[..., 0]


def multinomial_many(x: Array, key: int, *, axis: Axis, draws: int) -> Array:
    del key
    return torch.multinomial(torch.softmax(x, axis), draws, replacement=True)


def exponential(x: Array, key: int, *, axis: Axis) -> Array:
    """Draw by a race of exponential variates, which avoids the cumulative sums of ``multinomial``."""
    del key
    y = torch.softmax(x, axis)
    return torch.argmax(y / torch.empty_like(y).exponential_(), axis)


def multinomial_top_k(x: Array, key: int, *, axis: Axis) -> Array:
    values, kept = torch.topk(x, TOP_K, dim=axis)
    drawn = multinomial(values, key, axis=axis)
    return torch.gather(kept, axis, drawn[..., None])[..., 0]


def multinomial_top_p(x: Array, key: int, *, axis: Axis) -> Array:
    ordered, order = torch.sort(x, dim=axis, descending=True)
    y = torch.softmax(ordered, axis)
    beyond = torch.cumsum(y, axis) - y >= TOP_P
    drawn = multinomial(ordered.masked_fill(beyond, -torch.inf), key, axis=axis)
    return torch.gather(order, axis, drawn[..., None])[..., 0]


def _plain_softmax(x: Array, *, axis: Axis) -> Array:
    y = torch.exp(x - torch.amax(x, axis, keepdim=True))
    return y / torch.sum(y, axis, keepdim=True)


def _plain_log_softmax(x: Array, *, axis: Axis) -> Array:
    shifted = x - torch.amax(x, axis, keepdim=True)
    return shifted - torch.log(torch.sum(torch.exp(shifted), axis, keepdim=True))


def _plain_logsumexp(x: Array, *, axis: Axis) -> Array:
    most = torch.amax(x, axis, keepdim=True)
    return torch.squeeze(most + torch.log(torch.sum(torch.exp(x - most), axis, keepdim=True)), axis)


@lru_cache
def compiled(op: str) -> dict[str, Callable[..., Array]]:
    """Return ``torch.compile`` of the plain formula; the first call for a shape takes seconds."""
    plain = {"softmax": _plain_softmax, "log_softmax": _plain_log_softmax, "logsumexp": _plain_logsumexp}
    return {"torch.compile": torch.compile(plain[op], dynamic=True)} if op in plain else {}


PEERS: dict[str, dict[str, Callable[..., Array]]] = {
    "softmax": {"torch": softmax},
    "log_softmax": {"torch": log_softmax},
    "logsumexp": {"torch": logsumexp},
    "softmax_vjp": {"torch": pullback(softmax)},
    "cross_entropy": {"torch": cross_entropy},
    "cross_entropy_grad": {"torch": gradient(cross_entropy)},
    "log_prob": {"torch": log_prob},
    "sample": {"torch": multinomial, "torch exponential": exponential},
    "sample_top_k": {"torch": multinomial_top_k},
    "sample_top_p": {"torch": multinomial_top_p},
    "sample_many": {"torch": multinomial_many},
}
