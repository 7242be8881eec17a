"""Long runs of the draw: python -m benchmarks.draws [agreement] [rare] [gone]. Each takes a minute or a few."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

import polysoftmax
from polysoftmax import random

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 50_257
ROWS, KEYS = 1000, 1000
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
)


def logits(rows: int, seed: int) -> np.ndarray:
    """Return rows like a language model's: a few likely tokens above a wide, skewed rest."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, VOCABULARY)) * generator.uniform(1.5, 3.5, (rows, 1))
    x += generator.gumbel(size=x.shape)
    return x.astype(np.float32)


def agreement() -> None:
    """Draw a million tokens in each setting with NumPy, JAX and PyTorch's own operations, and count differences."""
    import jax
    import torch

    def draw_portably(x: np.ndarray, keys: np.ndarray, **options: Any) -> np.ndarray:
        with polysoftmax.engine("portable"):
            return np.asarray(polysoftmax.sample(torch.from_numpy(x), torch.from_numpy(keys), **options))

    others: dict[str, Callable[..., np.ndarray]] = {
        "jax": lambda x, keys, **options: np.asarray(polysoftmax.sample(jax.numpy.asarray(x), keys, **options)),
        "torch": draw_portably,
    }
    step = 20
    for options in SETTINGS:
        differences = dict.fromkeys(others, 0)
        for start in track(range(0, ROWS, step), str(options or "plain")):
            x = logits(step, start)
            keys = random.split(random.fold_in(2026, start), KEYS * step).reshape(KEYS, step, 2)
            expected = polysoftmax.sample(x, keys, **options)
            for name, draw in others.items():
                differences[name] += int((draw(x, keys, **options) != expected).sum())
        rates = ", ".join(f"{name} {count / (ROWS * KEYS / 1e6):g}" for name, count in differences.items())
        print(f"{options or 'plain'}: differences from numpy per million draws: {rates}", flush=True)


def rare() -> None:
    """Draw 10^8 times from a row with a token of probability 1e-6 and a hundred of 1e-8, and count them."""
    p = np.asarray([0.6, 1e-6, 0.4 - 2e-6, *[1e-8] * 100])
    x, step, total = np.log(p), 500_000, 100_000_000
    counts = np.zeros(len(p), np.int64)
    for start in track(range(0, total, step), "rare tokens"):
        seeds = np.arange(start, start + step)
        counts += np.bincount(polysoftmax.sample(x, random.key(seeds)), minlength=len(p))
    for label, chosen in (("0.6", slice(0, 1)), ("1e-6", slice(1, 2)), ("a hundred times 1e-8", slice(3, None))):
        share, count = float(p[chosen].sum()), int(counts[chosen].sum())
        sigmas = (count - total * share) / math.sqrt(total * share * (1 - share))
        print(f"p = {label}: {count} drawn, {total * share:.0f} expected, {sigmas:+.2f} sigma")


def gone() -> None:
    """Draw 10^7 times from rows of one survivor, of equal logits under a mask, and with entries of 1e-30."""
    n, repeats = 100, 100_000
    rows = np.full((100, n), -np.inf, np.float32)
    rows[np.arange(40), np.arange(40)] = -3.0
    rows[40:80, ::7] = 0.0
    rows[80:] = -69.0
    rows[80:, 5] = 0.0
    allowed = np.isfinite(rows) & ~((rows == -69.0) & (np.arange(100)[:, None] >= 80))
    wrong = 0
    for start in track(range(0, repeats, 10_000), "removed tokens"):
        keys = random.split(random.fold_in(5, start), 10_000 * 100).reshape(10_000, 100, 2)
        tokens = polysoftmax.sample(rows, keys)
        wrong += int((~allowed[np.arange(100), tokens]).sum() + (tokens < 0).sum())
    print(f"{repeats * 100} draws, {wrong} of a token that is gone or of probability 1e-30")


if __name__ == "__main__":
    runs = {"agreement": agreement, "rare": rare, "gone": gone}
    for name in sys.argv[1:] or runs:
        runs[name]()
