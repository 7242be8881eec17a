"""Functions of one array, logits or parameters, and their derivatives from definitions in mpmath.

Derivatives are differences of 30 digits, so that nothing is expected because the library answers it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mpmath as mp
import numpy as np
import pytest

import polysoftmax as ps

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")
DIGITS, STEP = 60, mp.mpf(10) ** -15

X = np.asarray([[0.3, -1.2, 0.8], [1.1, 0.4, -0.6]])
OTHER = np.asarray([[-0.4, 0.9, 0.2], [0.5, -0.3, 1.3]])
HEATS = np.asarray([[0.7], [1.6]])
"""Temperatures."""
WEIGHTS = np.asarray([[0.5, 2.0, 1.5], [1.0, 3.0, -0.25]])
CLASS_WEIGHTS = np.asarray([0.5, 2.0, 1.25])
CLASSES = np.asarray([2, 0])
Q = np.asarray([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]])
MASK = np.asarray([[True, True, False], [True, True, True]])
TOKENS = ps.sample(X, 7, temperature=HEATS)
SURVIVORS = np.asarray([[0, 2], [0, 1]])
"""What top_k=2 leaves of X."""
FEW = ps.sample(X, 7, top_k=2)
PAIR = np.asarray([[0, 1], [2, 0]])
"""Two tokens a row."""


# Definitions of one row, in mpmath


def log_p(x: Any, t: Any = 1, where: Any = (True,) * 3) -> list[Any]:
    total = mp.log(mp.fsum(mp.exp(one / t) for one, exists in zip(x, where, strict=True) if exists))
    return [one / t - total for one in x]


def p(x: Any, t: Any = 1, where: Any = (True,) * 3) -> list[Any]:
    return [mp.exp(one) if exists else mp.mpf(0) for one, exists in zip(log_p(x, t, where), where, strict=True)]


def lse(x: Any, w: Any = (1,) * 3) -> Any:
    return mp.log(mp.fsum(a * mp.exp(b) for a, b in zip(w, x, strict=True)))


def dot(a: Any, b: Any) -> Any:
    return mp.fsum(one * other for one, other in zip(a, b, strict=True))


def entropy(x: Any, t: Any = 1) -> Any:
    return -dot(p(x, t), log_p(x, t))


def divergence(x: Any, other: Any, t: Any = 1) -> Any:
    return dot(p(x, t), [a - b for a, b in zip(log_p(x, t), log_p(other, t), strict=True)])


def loss(x: Any, q: Any, w: Any = (1,) * 3, smoothing: Any = 0, z_loss: Any = 0) -> Any:
    c = [((1 - mp.mpf(smoothing)) * one + mp.mpf(smoothing) / 3) * weight for one, weight in zip(q, w, strict=True)]
    return -dot(c, log_p(x)) + mp.mpf(z_loss) * lse(x) ** 2


def push(x: Any, dx: Any, t: Any = 1) -> list[Any]:
    y = p(x, t)
    return [one * (a - dot(y, dx)) / t for one, a in zip(y, dx, strict=True)]


def push_log(x: Any, dx: Any, t: Any = 1) -> list[Any]:
    return [(a - dot(p(x, t), dx)) / t for a in dx]


def pull_log(x: Any, g: Any, t: Any = 1) -> list[Any]:
    return [(a - b * mp.fsum(g)) / t for a, b in zip(g, p(x, t), strict=True)]


def jacobian(x: Any) -> list[Any]:
    y = p(x)
    return [y[i] * ((i == j) - y[j]) for i in range(3) for j in range(3)]


ONE_HOT = np.eye(3)[CLASSES]


def case(at: Any, function: Callable[[Any], Any], *rows: Callable[..., Any], mean: Any = None) -> SimpleNamespace:
    """A function of one array, and what each of its rows is; ``mean`` is what the sum of all is divided by."""
    return SimpleNamespace(at=at, function=function, rows=rows * (1 if len(rows) == 2 else 2), mean=mean)


def per_row(of: Callable[..., Any], *others: Any) -> list[Callable[[Any], Any]]:
    """What each of two rows is, where others stand beside it."""
    return [lambda v, i=i: of(v, *[one[i] for one in others]) for i in range(2)]


# The same as tensors, which torch.compile takes for constants

LOGITS = torch.from_numpy(X)
OTHERS = torch.from_numpy(OTHER)
TEMPERATURES = torch.from_numpy(HEATS)
SCALES = torch.from_numpy(WEIGHTS)
SCALES_OF_CLASSES = torch.from_numpy(CLASS_WEIGHTS)
LABELS = torch.from_numpy(CLASSES)
SHARES = torch.from_numpy(Q)
EXISTS = torch.from_numpy(MASK)
PAIRS = torch.from_numpy(PAIR)
DRAWN = torch.as_tensor(FEW)


def survivors(y: Any) -> Any:
    return torch.where(y > -torch.inf, y, 0.0)


CASES: dict[str, SimpleNamespace] = {
    "softmax": case(X, ps.softmax, p),
    "softmax, T": case(X, lambda x: ps.softmax(x, temperature=0.7), lambda v: p(v, mp.mpf(0.7))),
    "softmax, mask": case(X, lambda x: ps.softmax(x, where=EXISTS), *per_row(lambda v, m: p(v, 1, m), MASK)),
    "softmax by T": case(HEATS, lambda v: ps.softmax(LOGITS, temperature=v), *per_row(lambda v, x: p(x, v[0]), X)),
    "log_softmax": case(X, ps.log_softmax, log_p),
    "log_softmax, T": case(
        X, lambda x: ps.log_softmax(x, temperature=TEMPERATURES), *per_row(lambda v, r: log_p(v, r[0]), HEATS)
    ),
    "log_softmax by T": case(
        HEATS, lambda v: ps.log_softmax(LOGITS, temperature=v), *per_row(lambda v, x: log_p(x, v[0]), X)
    ),
    "logsumexp": case(X, ps.logsumexp, lse),
    "logsumexp, weights": case(X, lambda x: ps.logsumexp(x, weights=SCALES), *per_row(lse, WEIGHTS)),
    "logsumexp by weights": case(
        WEIGHTS, lambda v: ps.logsumexp(LOGITS, weights=v), *per_row(lambda v, x: lse(x, v), X)
    ),
    "cross_entropy": case(X, lambda x: ps.cross_entropy(x, LABELS), *per_row(loss, ONE_HOT), mean=2),
    "cross_entropy, ignored": case(
        X,
        lambda x: ps.cross_entropy(x, torch.tensor([2, -1]), ignore_index=-1, reduction="none"),
        *per_row(lambda v, q: loss(v, q) * int(q[2] == 1), ONE_HOT),
    ),
    "cross_entropy, options": case(
        X,
        lambda x: ps.cross_entropy(
            x, LABELS, weight=SCALES_OF_CLASSES, label_smoothing=0.125, z_loss=0.25, reduction="sum"
        ),
        *per_row(lambda v, q: loss(v, q, CLASS_WEIGHTS, 0.125, 0.25), ONE_HOT),
        mean=1,
    ),
    "cross_entropy, weighted mean": case(
        X,
        lambda x: ps.cross_entropy(x, LABELS, weight=SCALES_OF_CLASSES),
        *per_row(lambda v, q: loss(v, q, CLASS_WEIGHTS), ONE_HOT),
        mean=CLASS_WEIGHTS[CLASSES].sum(),
    ),
    "cross_entropy, probabilities": case(
        X,
        lambda x: ps.cross_entropy(x, SHARES, label_smoothing=0.125),
        *per_row(lambda v, q: loss(v, q, smoothing=0.125), Q),
        mean=2,
    ),
    "cross_entropy by probabilities": case(
        Q, lambda v: ps.cross_entropy(LOGITS, v, reduction="none"), *per_row(lambda v, x: loss(x, v), X)
    ),
    "entropy": case(X, ps.entropy, entropy),
    "entropy by T": case(
        HEATS, lambda v: ps.entropy(LOGITS, temperature=v), *per_row(lambda v, x: entropy(x, v[0]), X)
    ),
    "kl_divergence by p": case(X, lambda x: ps.kl_divergence(x, OTHERS), *per_row(divergence, OTHER)),
    "kl_divergence by q": case(
        OTHER, lambda v: ps.kl_divergence(LOGITS, v), *per_row(lambda v, x: divergence(x, v), X)
    ),
    "kl_divergence by T": case(
        HEATS,
        lambda v: ps.kl_divergence(LOGITS, OTHERS, temperature=v),
        *per_row(lambda v, x, other: divergence(x, other, v[0]), X, OTHER),
    ),
    "softmax_jvp": case(X, lambda x: ps.softmax_jvp(x, OTHERS), *per_row(push, OTHER)),
    "softmax_jvp by tangent": case(OTHER, lambda v: ps.softmax_jvp(LOGITS, v), *per_row(lambda v, x: push(x, v), X)),
    "softmax_vjp": case(X, lambda x: ps.softmax_vjp(x, OTHERS), *per_row(push, OTHER)),
    "softmax_vjp by T": case(
        HEATS,
        lambda v: ps.softmax_vjp(LOGITS, OTHERS, temperature=v),
        *per_row(lambda v, x, g: push(x, g, v[0]), X, OTHER),
    ),
    "log_softmax_jvp": case(X, lambda x: ps.log_softmax_jvp(x, OTHERS), *per_row(push_log, OTHER)),
    "log_softmax_vjp": case(X, lambda x: ps.log_softmax_vjp(x, OTHERS), *per_row(pull_log, OTHER)),
    "log_softmax_vjp by cotangent": case(
        OTHER, lambda v: ps.log_softmax_vjp(LOGITS, v), *per_row(lambda v, x: pull_log(x, v), X)
    ),
    "softmax_jacobian": case(X, ps.softmax_jacobian, jacobian),
    "truncate": case(
        X,
        lambda x: survivors(ps.truncate(x, top_k=2)),
        *per_row(lambda v, kept: [one if i in kept else mp.mpf(0) for i, one in enumerate(v)], SURVIVORS),
    ),
    "log_prob": case(
        X,
        lambda x: ps.log_prob(x, PAIRS, temperature=TEMPERATURES, where=EXISTS),
        *per_row(lambda v, r, m, pair: [log_p(v, r[0], m)[one] for one in pair], HEATS, MASK, PAIR),
    ),
    "log_prob by T, top_k": case(
        HEATS,
        lambda v: ps.log_prob(LOGITS, DRAWN, temperature=v, top_k=2),
        *per_row(
            lambda v, x, kept, token: x[token] / v[0] - mp.log(mp.fsum(mp.exp(x[i] / v[0]) for i in kept)),
            X,
            SURVIVORS,
            FEW,
        ),
    ),
    "sample": case(
        X,
        lambda x: ps.sample(x, 7, temperature=TEMPERATURES, return_logprobs=True)[1],
        *per_row(lambda v, r, token: log_p(v, r[0])[token], HEATS, TOKENS),
    ),
    "sample by T": case(
        HEATS,
        lambda v: ps.sample(LOGITS, 7, temperature=v, return_logprobs=True)[1],
        *per_row(lambda v, x, token: log_p(x, v[0])[token], X, TOKENS),
    ),
    "sample, top_k": case(
        X,
        lambda x: ps.sample(x, 7, top_k=2, return_logprobs=True)[1],
        *per_row(lambda v, kept, token: v[token] - mp.log(mp.fsum(mp.exp(v[i]) for i in kept)), SURVIVORS, FEW),
    ),
}


def definition(one: SimpleNamespace, v: list[Any]) -> Any:
    """All entries of the answer, in mpmath."""
    shape = one.at.shape
    rows = [v[: shape[-1]], v[shape[-1] :]]
    answers = [row(part) for row, part in zip(one.rows, rows, strict=True)]
    if one.mean is not None:
        return np.asarray([mp.fsum(answers) / one.mean], dtype=object)
    return np.asarray(answers, dtype=object).reshape(-1)


def moved(v: list[Any], *steps: tuple[int, int]) -> list[Any]:
    found = list(v)
    for i, sign in steps:
        found[i] = found[i] + sign * STEP
    return found


def slope(one: SimpleNamespace, v: list[Any], j: int) -> Any:
    return (definition(one, moved(v, (j, 1))) - definition(one, moved(v, (j, -1)))) / (2 * STEP)


@functools.cache
def expected(name: str) -> dict[str, Any]:
    """Values and derivatives, by differences, at the place of a case and at another, for a moment c·y of the answer."""
    one = CASES[name]
    shape, count = one.at.shape, one.at.size
    with mp.workdps(DIGITS):
        v, u = ([mp.mpf(float(a)) for a in place.reshape(-1)] for place in places(one))
        y = [definition(one, at) for at in (v, u)]
        slopes = [np.stack([slope(one, at, j) for j in range(count)], -1) for at in (v, u)]
        c = np.cos(np.arange(y[0].size))
        second = np.empty((count, count), dtype=object)
        for i, j in np.ndindex(count, count):
            terms = [a * b * (c @ definition(one, moved(v, (i, a), (j, b)))) for a in (1, -1) for b in (1, -1)]
            second[i, j] = mp.fsum(terms) / (4 * STEP**2)
        of_moment = [c @ one for one in slopes]
        d = np.sin(1 + np.arange(count))
        found = {
            "y": np.stack(y),
            "J": slopes[0],
            "Jd": slopes[0] @ d,
            "g": of_moment[0],
            "gs": np.stack(of_moment),
            "H": second,
            "Hd": second @ d,
        }
        return {key: value.astype(np.float64).reshape(-1) for key, value in found.items()} | {
            "c": c,
            "d": d.reshape(shape),
        }


def places(one: SimpleNamespace) -> tuple[Any, Any]:
    """Where a case is differentiated: at its own place, and close by, where tokens and survivors are the same."""
    return one.at, one.at * (1 + 1e-3 * np.arange(1, 1 + one.at.size).reshape(one.at.shape))
