"""Problems for the C++ library, given to it through its C interface."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from polysoftmax._formula import words
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from polysoftmax._arrays import Array

library = _library.load()
needs_library = [
    pytest.mark.skipif(library is None, reason=f"no C++ library: {_library.reason()}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, for NaN and inf in the formulas
]

NAMES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
CODES = {name: code for code, name in enumerate((*NAMES, "float16", "bfloat16", "float32", "float64"))}
DTYPES = (np.float32, np.float64)
OPS = words(np.empty(0), 1)
LENGTHS = (1, 3, 10, 64, 65, 100, 1000, 2500)
TOLERANCE = {np.float32: 4e-6, np.float64: 2e-14}
ABSENT = None


class Value:
    """An operand with one entry a row."""

    def __init__(self, array: Array | None) -> None:
        self.array = array


def operand(given: Array | Value | None, dimensions: int, bfloat16: frozenset[int]) -> tuple[int, list[int]]:
    """Return an operand's address, and the words that describe it."""
    row = not isinstance(given, Value)
    array = given if row else given.array
    if array is None:
        return 0, [0, CODES["float32"], 0, *[0] * dimensions]
    code = CODES["bfloat16"] if id(array) in bfloat16 else CODES[array.dtype.name]
    step, strides = (array.strides[-1], array.strides[:-1]) if row else (0, array.strides)
    return array.ctypes.data, [1, code, step, *strides]


def run(
    kernel: int,
    x: Array,
    *operands: Array | Value | None,
    options: tuple[float, ...] = (),
    compute: type = np.float32,
    bfloat16: tuple[Array, ...] = (),
) -> None:
    """Run a kernel on rows along the last axis of ``x``."""
    assert library is not None
    batch, n = x.shape[:-1], x.shape[-1]
    bits = [struct.unpack("q", struct.pack("d", o))[0] if isinstance(o, float) else int(o) for o in options]
    head = [kernel, len(batch), n, 1 + len(operands), CODES[np.dtype(compute).name]]
    words = [*head, *bits, *[0] * (8 - len(bits)), *batch]
    narrow = frozenset(map(id, bfloat16))
    addresses = []
    for one in (x, *operands):
        address, description = operand(one, len(batch), narrow)
        addresses.append(address)
        words += description
    library.run(struct.pack(f"{len(words)}q", *words), struct.pack(f"{len(addresses)}q", *addresses))


def rows(dtype: Any, n: int, seed: int = 0) -> Array:
    """Return rows of logits, most of them with values that are handled apart."""
    x = (np.random.default_rng((seed, n)).standard_normal((37, n)) * 4).astype(dtype)
    x[1] = -np.inf
    x[2, 0] = np.nan
    x[3, -1] = np.inf
    x[4] = np.inf
    x[5, 0] = -np.inf
    x[6], x[7], x[8], x[9] = 1e30, -1e30, 0.0, -3e38
    x[8, 0] = 50.0
    x[10, ::2] = -np.inf
    x[11] = np.nan
    x[12, 0], x[12, -1] = np.inf, np.nan
    return x


def temperatures(dtype: Any) -> Array:
    t = np.abs(np.random.default_rng(1).standard_normal(37)).astype(dtype) + dtype(0.1)
    t[[8, 10, 13]] = 0.0
    t[[7, 14]] = np.inf
    t[15], t[16], t[17] = np.nan, -1.0, 1e-30
    return t


def masks(n: int) -> Array:
    mask = np.random.default_rng(2).random((37, n)) < 0.6
    mask[[0, 1]], mask[13] = False, True
    return mask


def assert_close(ours: Array, formula: Array, tolerance: float) -> None:
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(formula))
    np.testing.assert_allclose(ours, formula, rtol=tolerance, atol=tolerance / 10)


cases = pytest.mark.parametrize(
    ("dtype", "n", "masked", "hot"), list(itertools.product(DTYPES, LENGTHS, (False, True), (False, True)))
)
