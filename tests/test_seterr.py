"""NumPy's error settings: no function raises a FloatingPointError, and none changes its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = np.inf, np.nan

# Each row underflows, overflows, or is not finite, in some dtype and some step.
ROWS = (
    (0.0, -20.0, -20.0),
    (0.0, -103.9, -745.0),
    (3e38, -3e38, 0.0),
    (1e308, -1e308, 1e-320),
    (1e-40, 0.0, 2e-40),
    (6e4, -6e4, 6e-8),
    (INF, 0.0, -INF),
    (-INF, -INF, -INF),
    (NAN, 1.0, 2.0),
)
N = len(ROWS)
MASK = np.asarray([[True, False, True]] * (N - 1) + [[False] * 3])
TARGETS = np.arange(N) % 3
TINY = np.full(N, 1e-300)
TEMPERATURES: tuple[Any, ...] = (1.0, 1e-300, 1e300, 0, INF, TINY, np.asarray(1e-300), np.linspace(-1, 1, N))

CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "softmax": lambda x, t: polysoftmax.softmax(x, temperature=t, where=MASK),
    "softmax to 16 bits": lambda x, t: polysoftmax.softmax(x, temperature=t, dtype=np.float16),
    "log_softmax": lambda x, t: polysoftmax.log_softmax(x, temperature=t),
    "log_softmax to 16 bits": lambda x, t: polysoftmax.log_softmax(x, temperature=t, dtype=np.float16),
    "logsumexp": lambda x, t: polysoftmax.logsumexp(x, weights=np.full(3, 1e-300), where=MASK),
    "logsumexp to 16 bits": lambda x, t: polysoftmax.logsumexp(x, dtype=np.float16),
    "softmax_jvp": lambda x, t: polysoftmax.softmax_jvp(x, x[::-1], temperature=t),
    "softmax_vjp": lambda x, t: polysoftmax.softmax_vjp(x, x[::-1], temperature=t, where=MASK),
    "log_softmax_jvp": lambda x, t: polysoftmax.log_softmax_jvp(x, x[::-1], temperature=t),
    "log_softmax_vjp": lambda x, t: polysoftmax.log_softmax_vjp(x, x[::-1], temperature=t),
    "softmax_jacobian": lambda x, t: polysoftmax.softmax_jacobian(x, temperature=t),
    "log_softmax_jacobian": lambda x, t: polysoftmax.log_softmax_jacobian(x, temperature=t),
    "cross_entropy": lambda x, t: polysoftmax.cross_entropy(x, TARGETS, reduction="none"),
    "cross_entropy to 16 bits": lambda x, t: polysoftmax.cross_entropy(x, TARGETS, dtype=np.float16),
    "sum of losses": lambda x, t: polysoftmax.cross_entropy(x, TARGETS, reduction="sum"),
    "weighted loss": lambda x, t: polysoftmax.cross_entropy(
        x, TARGETS, weight=np.asarray([1e300, 1e-300, 0.0]), z_loss=1.0, label_smoothing=0.1, ignore_index=1
    ),
    "loss of probabilities": lambda x, t: polysoftmax.cross_entropy(x, np.full((N, 3), 1e-300), reduction="sum"),
    "entropy": lambda x, t: polysoftmax.entropy(x, temperature=t, where=MASK),
    "entropy to 16 bits": lambda x, t: polysoftmax.entropy(x, temperature=t, dtype=np.float16),
    "kl_divergence": lambda x, t: polysoftmax.kl_divergence(x, x[::-1], temperature=t),
    "truncate": lambda x, t: polysoftmax.truncate(x, temperature=t, top_p=0.9, min_p=TINY),
    "truncate by nothing": lambda x, t: polysoftmax.truncate(x),
    "sample": lambda x, t: polysoftmax.sample(x, 7, temperature=t, top_k=2, return_logprobs=True),
    "log_prob": lambda x, t: polysoftmax.log_prob(x, np.zeros(N, int), temperature=t, where=MASK),
    "top_log_probs": lambda x, t: polysoftmax.top_log_probs(x, 2, temperature=t, where=MASK),
    "gumbel_softmax": lambda x, t: polysoftmax.gumbel_softmax(x, 7, t, where=MASK, hard=True),
    "sample of masked rows": lambda x, t: polysoftmax.sample(x, 7, temperature=t, where=MASK),
}


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "longdouble"])
@pytest.mark.parametrize("name", CALLS)
def test_what_the_caller_makes_an_error_is_none_here(name: str, dtype: str, engine: str) -> None:
    real = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(all="ignore"):
        x = np.asarray(ROWS).astype(real)
    with polysoftmax.engine(engine):
        for t in TEMPERATURES if name.startswith(("soft", "log_", "entropy", "kl", "trunc", "sample")) else (1.0,):
            if np.ndim(t) == 0 and isinstance(t, float) and t < 0:
                continue
            with np.errstate(all="ignore"):
                expected = CALLS[name](x, t)
            with np.errstate(all="raise"):
                y = CALLS[name](x, t)
            for one, want in zip(*((y, expected) if isinstance(y, tuple) else ((y,), (expected,))), strict=True):
                if dtype == "longdouble":  # it has bytes without a meaning
                    np.testing.assert_array_equal(one, want)
                else:
                    assert one.tobytes() == want.tobytes(), t


def test_losses_that_add_up_to_more_than_float32_holds() -> None:
    x = np.asarray([[3e38, 0.0], [3e38, 0.0]], np.float32)
    targets = np.asarray([1, 1])
    with np.errstate(all="raise"):
        assert polysoftmax.cross_entropy(x, targets, reduction="none").tolist() == [np.float32(3e38)] * 2
        assert polysoftmax.cross_entropy(x, targets, reduction="sum") == INF
        assert polysoftmax.cross_entropy(x, targets, weight=np.ones(2)) == INF


def test_random_numbers() -> None:
    keys = random.split(random.key(np.asarray([-1, 2**63 - 1])), 5)
    with np.errstate(all="raise"):
        word = random.bits(keys, (100, 100))
        assert np.isfinite(random.gumbel(keys, (100, 100))).all()
        u = random.uniform(keys, (100, 100))
        assert 0 < u.min() < u.max() < 1
        assert random.fold_in(-1, -1).shape == (2,)
        np.testing.assert_array_equal(random.bits(random.split(random.key(-1), 5), 10)[0], random.bits(keys, 10)[0, 0])
        random.threefry2x32(word[0, 0, 0, :2], word[0, 0, 1, :2])


def test_array_api_strict() -> None:
    xp = pytest.importorskip("array_api_strict")
    with np.errstate(all="ignore"):
        x = xp.asarray(np.asarray(ROWS).astype(np.float32))
    with np.errstate(all="raise"):
        polysoftmax.softmax(x, temperature=xp.asarray(TINY))
        polysoftmax.softmax_jacobian(x, temperature=xp.asarray(TINY))
        polysoftmax.cross_entropy(x, xp.asarray(TARGETS), weight=xp.asarray([1e300, 1e-300, 0.0]))
        polysoftmax.truncate(x)
