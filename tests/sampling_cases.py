"""The draw as it is defined, in double precision, and which backends a test of it runs on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random
from polysoftmax.engines import portable

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

INF, NAN = math.inf, math.nan

draws = pytest.mark.backends(lambda can: "func" not in can.how)  # indices have no gradient
once = pytest.mark.backends(
    lambda can: "func" not in can.how and "compile" not in can.how and (can.traced or not can.compiles)
)  # jax:fused shows it
# Layouts, keys and frequencies, the same calls on every library: not where each is a compilation or a graph.
eager = pytest.mark.backends(lambda can: can.gpu or not (can.traced or can.compiles or can.lazy))
ordered = pytest.mark.backends(lambda can: not can.lazy and not can.traced and "64" not in can.how)  # Dask cannot sort


@pytest.fixture
def compiled(lib: Adapter) -> None:
    """Leave JAX without an engine out: it compiles each operation for each shape."""
    if lib.backend.library == "jax" and portable():
        pytest.skip("too slow")


def gumbels(keys: np.ndarray, index: np.ndarray, domain: int) -> np.ndarray:
    """Return the variates of indices in double precision, one row a key; the words have tests of their own."""
    counters = np.stack([index, np.full_like(index, domain)], axis=-1).astype(np.uint32)
    word = random.threefry2x32(keys[:, None, :].view(np.uint32), counters[None])[..., 0]
    whole = (word >> 16).astype(np.float32) * np.float32(65536) + (word & 65535).astype(np.float32) + np.float32(0.5)
    u = np.minimum(whole.astype(np.float64) * 2.0**-32, 1 - 2.0**-24)
    return -np.log(-np.log1p(-u))


def reference(row: np.ndarray, keys: np.ndarray, temperature: float = 1.0) -> list[int]:
    """Draw one token with each key from a row, in double precision, as the definition says."""
    n = len(row)
    size = max(2, min(256, 2 ** (((n - 1).bit_length() + 1) // 2)))
    count = -(-n // size)
    z = np.full(count * size, -INF)
    z[:n] = (row.astype(np.float64) - row.max()) / temperature
    z = z.reshape(count, size)
    with np.errstate(divide="ignore"):
        scores = np.log(np.exp(z).sum(axis=1)) + gumbels(keys, np.arange(count), 1)
    blocks = scores.argmax(axis=1)
    noise = gumbels(keys, np.arange(count * size), 2).reshape(len(keys), count, size)
    inside = z[blocks] + noise[np.arange(len(keys)), blocks]
    return (blocks * size + inside.argmax(axis=1)).tolist()


def logits(n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 2).astype(np.float32)


def tokens(lib: Adapter, *args: Any, **options: Any) -> list[Any]:
    return lib.values(lib.call(polysoftmax.sample, *args, **options)).tolist()


def shares(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((row.astype(np.float64) - row.max()) / temperature)
    return e / e.sum()
