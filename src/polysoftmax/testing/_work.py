"""Work in front of a call: arrays that a product rounds to the values of a case, inside the caller's own program.

A compiler computes such logits anew wherever they are used, and contracts the product and what comes after it. Arrays
in memory never show that.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from polysoftmax.testing._formats import FORMATS, rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray


def unmultiplied(x: NDArray[np.float64], dtype: str) -> tuple[NDArray[np.float64], float | NDArray[np.float64]]:
    """Return values v and a factor c near 1, all of a dtype, such that v·c rounds to x.

    Where no one factor reaches every value, as in a narrow dtype, each has its own.
    """
    return _unmultiplied(x.tobytes(), x.shape, dtype)


# Functions are looped over outside, so that a million values are searched once for all of them.
@functools.lru_cache(maxsize=8)
def _unmultiplied(
    content: bytes, shape: tuple[int, ...], dtype: str
) -> tuple[NDArray[np.float64], float | NDArray[np.float64]]:
    x = np.frombuffer(content, np.float64).reshape(shape)
    v, each, found = x, np.ones_like(x), np.isnan(x)
    for k in range(FORMATS[dtype].precision - 3, 2, -1):
        for c in (1 - 2.0**-k, 1 + 2.0**-k):
            candidate, hit = _reaching(x, c, dtype)
            if hit.all():
                return candidate, c
            v, each = np.where(hit & ~found, candidate, v), np.where(hit & ~found, c, each)
            found = found | hit
    return v, each


def _reaching(x: NDArray[np.float64], c: float, dtype: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return a value for each x, and whether its product with c rounds to x."""
    with np.errstate(all="ignore"):
        nearest = np.where(np.isfinite(x) & (x != 0), rounded(x / c, dtype), x)
        step = np.abs(x) * 2.0 ** (1 - FORMATS[dtype].precision)
        v, found = nearest, np.isnan(x)
        for steps in (0, -1, 1, -2, 2):
            candidate = np.where(np.isfinite(x), rounded(nearest + steps * step, dtype), x)
            hit = ~found & (_product(candidate, c, dtype) == x)
            v, found = np.where(hit, candidate, v), found | hit
    return v, found


def _product(v: NDArray[np.float64], c: float, dtype: str) -> NDArray[np.float64]:
    """Return v·c rounded once: exact in float64 for narrower formats, and float64's own product for itself."""
    y = v * c
    with np.errstate(over="ignore"):
        overflows = np.abs(y) > FORMATS[dtype].largest
    return np.where(overflows & np.isfinite(v), np.nan, rounded(y, dtype))
