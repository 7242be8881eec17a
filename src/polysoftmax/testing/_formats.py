"""Floating formats: their unit roundoff and range, and rounding to them in NumPy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Format:
    """A binary floating format with ``precision`` significant bits and exponents from ``emin`` to ``emax``."""

    name: str
    precision: int
    emin: int
    emax: int

    @property
    def unit(self) -> float:
        """Unit roundoff u = 2^-p, the largest relative error of one rounding."""
        return 2.0**-self.precision

    @property
    def tiny(self) -> float:
        """The smallest normal number."""
        return 2.0**self.emin

    @property
    def smallest(self) -> float:
        """The smallest positive number; below float64's the spacing of its subnormals."""
        return math.ldexp(1.0, self.emin - self.precision + 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2.0 - 2.0 ** (1 - self.precision), self.emax)

    @property
    def compute(self) -> Format:
        """The format that the contract computes in when it answers in this one."""
        return FORMATS["float32"] if self.precision < 24 else self


FORMATS = {
    one.name: one
    for one in (
        Format("float16", 11, -14, 15),
        Format("bfloat16", 8, -126, 127),
        Format("float32", 24, -126, 127),
        Format("float64", 53, -1022, 1023),
    )
}


def rounded(values: ArrayLike, dtype: str) -> NDArray[np.float64]:
    """Round values to a dtype and return them as float64, which holds them exactly.

    What is finite stays finite: it is clipped to the range of the dtype, so that one case with ±1e30 in it
    serves every format. Integer dtypes must already hold the values.
    """
    exact = np.asarray(values, dtype=np.float64)
    if dtype not in FORMATS:
        return exact
    largest = FORMATS[dtype].largest
    clipped = np.where(np.isfinite(exact), np.clip(exact, -largest, largest), exact)
    if dtype != "bfloat16":
        return clipped.astype(dtype).astype(np.float64)
    bits = clipped.astype(np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(clipped), nearest.view(np.float32), clipped).astype(np.float64)
