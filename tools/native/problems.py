"""Random problems for every kernel of the C++ library: shapes, dtypes, strides, broadcasting, bad values."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polysoftmax.engines._library import Library

INTEGER = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = ("bool", *INTEGER, "float16", "bfloat16", "float32", "float64")
STORED = [np.dtype("uint16" if name == "bfloat16" else name) for name in DTYPES]
INT32, INT64, BFLOAT16, FLOAT32, FLOAT64 = map(DTYPES.index, ("int32", "int64", "bfloat16", "float32", "float64"))
FLOATS = range(DTYPES.index("float16"), FLOAT64 + 1)
INTEGERS = range(1, 1 + len(INTEGER))

LENGTHS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 66, 100, 127, 128, 129, 255, 257, 1000, 1023, 1025, 4097]
UNWRITTEN = 0xFB  # as in driver.cpp


# `rows` are full rows of any real dtype, `floats` full rows of a float dtype, `value` is one value a row; `given`,
# `tokens`, `logprobs` and `slopes` are several tokens, or numbers for them, a row. What has a `?` may be
# absent; an output with `?N` is absent if operand N is.
SIGNATURES = [
    ("softmax", "rows temperature? mask? -> floats"),
    ("log_softmax", "rows temperature? mask? -> floats"),
    ("logsumexp", "rows floats? mask? -> value"),
    ("softmax_pull", "rows temperature? mask? floats? floats -> floats? value?1"),
    ("log_softmax_pull", "rows temperature? mask? floats? floats -> floats? value?1"),
    ("softmax_push", "rows temperature? mask? floats -> floats"),
    ("log_softmax_push", "rows temperature? mask? floats -> floats"),
    ("logsumexp_pull", "rows floats? mask? value -> floats? floats?1"),
    ("cross_entropy", "rows targets classes? -> value"),
    ("cross_entropy_pull", "rows targets classes? value -> floats"),
    ("entropy", "rows temperature? mask? -> value"),
    ("entropy_pull", "rows temperature? mask? value -> floats value?1"),
    ("kl_divergence", "rows rows temperature? mask? -> value"),
    ("kl_divergence_pull", "rows rows temperature? mask? value -> floats? floats? value?2"),
    ("truncate", "rows temperature? mask? count? share? share? -> floats"),
    ("sample", "rows keys temperature? mask? count? share? share? -> tokens"),
    ("words", "integers integers integers integers -> words words"),
    ("log_prob", "rows given temperature? mask? count? share? share? -> logprobs"),
    ("log_prob_pull", "rows given temperature? mask? count? share? share? slopes -> floats value?2"),
    ("ranks", "rows given mask? -> tokens"),
    ("leading", "rows mask? -> tokens"),
    ("partial", "rows temperature? mask? -> value value value"),
]
KERNELS = [name for name, _ in SIGNATURES]

WITH_TOKENS = ("sample", "log_prob", "log_prob_pull", "ranks", "leading")
"""The kernels of rows that have a token at least, and take or give a number of them."""


@dataclass
class Operand:
    """Entries in memory: ``values`` has the batch's dimensions and then the row's, 1 where it is broadcast."""

    kind: str
    dtype: int
    values: Any
    is_output: bool
    strides: tuple[int, ...] = ()  # in bytes: along the row, then of the batch
    size: int = 0
    origin: int = 0
    offset: int = 0
    ignored_stride: int = 0

    @property
    def entries(self) -> int:
        return int(self.values.shape[-1])

    def memory(self) -> np.ndarray[Any, Any]:
        """Return the bytes; between the entries of an input stands what would be NaN or True."""
        buffer = np.full(self.size, UNWRITTEN if self.is_output else 0xFF, dtype=np.uint8)
        if self.size and not self.is_output:
            places = np.ndarray(
                self.values.shape, STORED[self.dtype], buffer, self.origin, (*self.strides[1:], self.strides[0])
            )
            places[...] = self.values
        return buffer

    def result(self, buffer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return an output's entries, with one NaN for all."""
        stored = STORED[self.dtype]
        y = np.ndarray(self.values.shape, stored, buffer, self.origin, (*self.strides[1:], self.strides[0])).copy()
        if self.dtype == BFLOAT16:
            y[(y & 0x7FFF) > 0x7F80] = 0x7FFF
        elif self.dtype in FLOATS:
            y[np.isnan(y)] = np.nan
        return y


@dataclass
class Problem:
    """What the library is asked, and what it should say to it."""

    kernel: int
    batch: tuple[int, ...]
    n: int
    compute: int
    operands: list[Operand | None]
    options: list[int] = field(default_factory=lambda: [0] * 8)
    threads: int = 1
    row: int = 0  # the one whose hash is compared with the row's alone
    status: int = 0
    rows_are_alone: bool = True

    def words(self) -> bytes:
        words = [self.kernel, len(self.batch), self.n, len(self.operands), self.compute, *self.options, *self.batch]
        for one in self.operands:
            if one is None:
                words += [0] * (3 + len(self.batch))
            else:
                along = one.strides[0] if one.kind in ROWS else one.strides[0] or one.ignored_stride
                words += [1, one.dtype, along, *one.strides[1:]]
        return struct.pack(f"{len(words)}q", *words)

    def file(self) -> bytes:
        """Return the problem as driver.cpp reads it."""
        words = self.words()
        parts = [struct.pack("3q", self.threads, self.row, len(words) // 8), words]
        for one in filter(None, self.operands):
            parts.append(struct.pack("5q", one.size, one.offset, one.origin, one.is_output, one.entries))
            if not one.is_output:
                parts.append(one.memory().tobytes())
        return b"".join(parts)

    def run(self, library: Library) -> str:
        """Return a hash of the outputs, computed in this process."""
        buffers = [None if one is None else one.memory() for one in self.operands]
        # An empty operand may have no address, and must not look like one that is absent.
        placed = zip(self.operands, buffers, strict=True)
        addresses = [0 if one is None else (buffer.ctypes.data or 8) + one.origin for one, buffer in placed]
        library.run(self.words(), struct.pack(f"{len(addresses)}q", *addresses))
        digest = hashlib.sha256()
        for one, buffer in zip(self.operands, buffers, strict=True):
            if one is not None and one.is_output:
                digest.update(np.ascontiguousarray(one.result(buffer)).tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        def show(one: Operand | None) -> str:
            if one is None:
                return "-"
            arrow = "->" if one.is_output else ""
            return f"{arrow}{one.kind}:{DTYPES[one.dtype]}{list(one.strides)}" + f"+{one.offset}" * bool(one.offset)

        operands = " ".join(map(show, self.operands))
        return (
            f"{KERNELS[self.kernel] if 0 <= self.kernel < len(KERNELS) else self.kernel} {DTYPES[self.compute]} "
            f"{list(self.batch)}x{self.n} threads={self.threads} options={self.options[:4]} {operands}"
        )

    def contiguous(self) -> Problem:
        """Return the same problem with every operand in C order, and one thread."""
        operands = [one and contiguous(one, (*self.batch, one.entries)) for one in self.operands]
        for i, one in enumerate(self.operands):
            if one is not None and one.entries == 1 and one.kind in ROWS:
                operands[i] = contiguous(one, (*self.batch, self.n))
        return replace(self, operands=operands, threads=1)

    def alone(self) -> Problem:
        """Return the chosen row's problem, as if there were no others."""
        index = np.unravel_index(self.row, self.batch)
        operands = [
            one and contiguous(replace(one, values=one.values[index]), (one.entries,))
            for one in self.contiguous().operands
        ]
        return replace(self, batch=(), operands=operands, threads=1, row=0)


ROWS = {"rows", "floats", "mask", "classes", "integers", "words", "probabilities"}
"""What has as many entries a row as the row; the others have 1, or a number of their own."""


def contiguous(one: Operand, shape: tuple[int, ...]) -> Operand:
    values = np.broadcast_to(one.values, shape)
    return laid_out(replace(one, values=np.ascontiguousarray(values)), list(range(len(shape))), [1] * len(shape), 0)


def laid_out(one: Operand, order: Sequence[int], steps: Sequence[int], pad: int) -> Operand:
    """Lay an operand out: axes in an order, the outermost first, each in steps of so many times its place."""
    width = STORED[one.dtype].itemsize + pad
    strides = [0] * one.values.ndim
    place = width
    for axis in reversed(order):
        strides[axis] = steps[axis] * place
        place *= max(one.values.shape[axis], 1) * max(abs(steps[axis]), 1)
    reach = [(size - 1) * stride for size, stride in zip(one.values.shape, strides, strict=True)]
    is_empty = one.values.size == 0
    low = 0 if is_empty else sum(min(one, 0) for one in reach)
    high = 0 if is_empty else sum(max(one, 0) for one in reach)
    size = 0 if is_empty else high - low + STORED[one.dtype].itemsize
    return replace(one, strides=(strides[-1], *strides[:-1]), size=size, origin=-low, offset=0)


class Maker:
    """Makes the problem of a number; equal seeds and numbers make equal problems."""

    def __init__(self, seed: int, number: int, *, most: int = 60_000) -> None:
        self.rng = np.random.default_rng((seed, number))
        self.most = most
        self.kernel = number % len(KERNELS)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def problem(self) -> Problem:
        rng, name = self.rng, KERNELS[self.kernel]
        self.n = 0 if self.chance(0.03) and name not in WITH_TOKENS else int(self.pick(LENGTHS))
        if self.chance(0.02):
            self.n = int(self.pick([65535, 65536, 65537, 140_001]))
        self.batch = tuple(int(self.pick([1, 2, 3, 4, 7, 17])) for _ in range(rng.integers(5)))
        if self.chance(0.02):
            self.batch = (*self.batch[:1], 0, *self.batch[1:])
        elif self.chance(0.1):
            self.batch = (int(rng.integers(1, 200)), *self.batch[:1])
        while np.prod(self.batch, dtype=int) * max(self.n, 1) > self.most and self.batch:
            self.batch = self.batch[:-1]
        first = FLOATS if name != "words" and self.chance(0.8) else range(13)
        self.x_dtype = int(self.pick(first))
        is_wide = self.x_dtype == FLOAT64 or self.chance(0.2)
        self.compute = FLOAT64 if is_wide and name != "words" else FLOAT32
        self.tokens = int(self.pick([1, 1, 2, 5])) if name in WITH_TOKENS else 0
        if name == "leading":
            self.tokens = min(self.tokens, self.n)
        self.keys = 1  # of a row
        options = self.options(name)
        rows = int(np.prod(self.batch, dtype=int))
        return Problem(
            self.kernel,
            self.batch,
            self.n,
            self.compute,
            self.operands(SIGNATURES[self.kernel][1], one_key=name == "sample" and bool(options[2])),
            options,
            threads=int(self.pick([1, 1, 2, 3])),
            row=int(rng.integers(rows)) if rows else 0,
            rows_are_alone=rows > 0 and not (name == "sample" and options[2]),
        )

    def options(self, name: str) -> list[int]:
        options = [0] * 8
        if name.startswith("cross_entropy"):
            options[0] = int(self.chance(0.3))
            options[1] = int(self.pick([-1, 0, -100]))
            for i, value in ((2, self.pick([0.0, 0.0, 0.1, 1.0])), (3, self.pick([0.0, 0.0, 1e-4]))):
                (options[i],) = struct.unpack("q", struct.pack("d", value))
        if name in ("truncate", "sample", "log_prob", "log_prob_pull") and self.chance(0.5):
            options[0] = int(self.rng.integers(self.n + 3))
        if name == "sample":
            is_one_key, with_each_key = self.chance(0.3), int(self.pick([1, 1, 2, 7, 70]))
            self.keys = 1 if is_one_key else self.tokens
            self.tokens = self.keys * with_each_key
            options[2:5] = [int(is_one_key), with_each_key, int(self.chance(0.3))]
        if name in WITH_TOKENS:
            options[1] = self.tokens
        return options

    def operands(self, signature: str, *, one_key: bool) -> list[Operand | None]:
        inputs, outputs = (part.split() for part in signature.split(" -> "))
        made: list[Operand | None] = []
        for i, what in enumerate((*inputs, *outputs)):
            kind, may_be_absent, other = what.partition("?")
            if may_be_absent and (self.chance(0.5) or (other and made[int(other)] is None)):
                made.append(None)
            elif i < len(inputs):
                made.append(self.input(kind, one_key=one_key))
            else:
                made.append(self.output(kind))
        if not any(one is not None and one.is_output for one in made):
            made[len(inputs)] = self.output("floats")
        return made

    def output(self, kind: str) -> Operand:
        entries = {"value": 1, "tokens": self.tokens, "logprobs": self.tokens}.get(kind, self.n)
        floats = self.compute if self.chance(0.7) else int(self.pick(FLOATS))
        dtype = {"tokens": INT64, "words": INT32}.get(kind, floats)
        one = Operand(kind, dtype, np.zeros((*self.batch, entries), STORED[dtype]), is_output=True)
        return self.anyhow(one)

    def input(self, kind: str, *, one_key: bool) -> Operand:
        dtype, entries = self.compute, self.n
        if kind in ("temperature", "count", "share", "value"):
            entries = 1
        if kind == "rows":
            dtype = self.x_dtype
        elif kind in ("floats", "value", "logprobs", "slopes") and self.chance(0.3):
            dtype = int(self.pick([one for one in FLOATS if one <= self.compute]))
        elif kind == "mask":
            dtype = 0
        elif kind in ("integers", "keys"):
            dtype = INT32
        elif kind == "given":
            dtype = int(self.pick([INT32, INT64, INT64]))
        if kind == "keys":
            entries = 2 * self.keys
        if kind in ("given", "logprobs", "slopes"):
            entries = self.tokens
        if kind == "targets":
            if self.chance(0.7):
                dtype, entries = int(self.pick([INT32, INT64, INT64])), 1
            else:
                kind = "probabilities"
        spread = [1 if self.chance(0.15) else size for size in self.batch]
        if kind == "classes" or (one_key and kind == "keys"):
            spread = [1] * len(self.batch)
        if 0 in self.batch:
            spread = list(self.batch)
        if kind in ROWS and kind != "classes" and self.chance(0.05) and entries:
            entries = 1
        values = self.values(kind, dtype, (*spread, entries))
        one = self.anyhow(Operand(kind, dtype, values, is_output=False))
        # A length of 1 that stands for more is broadcast.
        sizes = (self.n if kind in ROWS else entries, *self.batch)
        shape = (one.values.shape[-1], *one.values.shape[:-1])
        strides = tuple(
            0 if has == 1 and size != 1 else stride for has, size, stride in zip(shape, sizes, one.strides, strict=True)
        )
        return replace(one, strides=strides)

    def values(self, kind: str, dtype: int, shape: tuple[int, ...]) -> Any:
        rng = self.rng
        if kind == "mask":
            return rng.random(shape) < self.pick([0.0, 0.5, 0.9, 1.0])
        if kind == "targets":
            y = rng.integers(-1, max(self.n, 1), shape)
            wild = rng.integers(-(2**31), 2**31 - 1, shape)
            return np.where(rng.random(shape) < (0.05 if self.chance(0.3) else 0), wild, y).astype(STORED[dtype])
        if kind == "given":
            return rng.integers(-2, self.n + 2, shape).astype(STORED[dtype])
        if dtype in INTEGERS:
            limits = np.iinfo(STORED[dtype])
            if self.chance(0.5):
                return rng.integers(limits.min, limits.max, shape, STORED[dtype], endpoint=True)
            return rng.integers(0 if limits.min == 0 else -20, 20, shape).astype(STORED[dtype])
        if dtype == 0:
            return rng.random(shape) < 0.5
        return as_stored(self.floats(kind, shape), dtype)

    def floats(self, kind: str, shape: tuple[int, ...]) -> Any:
        rng = self.rng
        if kind == "temperature":
            y = rng.choice([0.5, 1.0, 2.0, 0.0, 1e-30, np.inf], shape, p=[0.3, 0.3, 0.3, 0.05, 0.025, 0.025])
            bad = [np.nan, -1.0]
        elif kind == "share":
            y, bad = rng.choice([0.0, 0.05, 0.5, 0.9, 0.999, 1.0], shape), [np.nan, -0.5, 1.5]
        elif kind == "count":
            y, bad = rng.integers(0, self.n + 3, shape).astype(float), [np.nan, -1.0, np.inf, 1e30]
        elif kind in ("probabilities", "classes"):
            y, bad = rng.random(shape), [np.nan, 0.0]
        else:
            y = rng.normal(size=shape) * self.pick([1, 1, 10, 300, 1e30])
            if self.chance(0.3):
                y = np.round(y)  # ties
            bad = [np.nan, np.inf, -np.inf, -np.inf, -0.0]
        if self.chance(0.25):
            y = np.where(rng.random(shape) < self.pick([0.01, 0.3, 1.0]), rng.choice(bad, shape), y)
        return y

    def anyhow(self, one: Operand) -> Operand:
        """Lay an operand out in some way."""
        axes = list(range(one.values.ndim))
        if self.chance(0.4):
            return replace(laid_out(one, axes, [1] * len(axes), 0), ignored_stride=int(self.pick([0, 1 << 40])))
        order = list(self.rng.permutation(axes)) if self.chance(0.6) else axes
        steps = [int(self.pick([1, 1, 1, -1, 2, -3])) for _ in axes]
        made = laid_out(one, order, steps, int(self.pick([0, 0, 0, 1, 4])))
        return replace(made, offset=int(self.pick([0, 0, 1, 2, 4, 8, 20])))


def as_stored(y: Any, dtype: int) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != BFLOAT16:
            return y.astype(STORED[dtype])
        return (y.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def malformed(seed: int) -> list[Problem]:
    """Return problems that the library must reject."""
    good = Maker(seed, 0).problem().contiguous()
    wrong = [replace(good, kernel=kernel) for kernel in (-1, len(KERNELS), 1 << 40)]
    wrong += [replace(good, compute=compute) for compute in (0, 5)]
    return [replace(one, status=2, rows_are_alone=False) for one in wrong]


def problems(seed: int, numbers: Sequence[int], *, most: int = 60_000) -> list[Problem]:
    return [Maker(seed, number, most=most).problem() for number in numbers]


def huge() -> list[Problem]:
    """Return problems with more than 2**31 entries, of one row broadcast, so that indices need 64 bits."""
    rows, n, made = 2**21 + 3, 1024, []
    for name in ("logsumexp", "cross_entropy", "entropy", "kl_divergence"):
        kernel = KERNELS.index(name)
        operands: list[Operand | None] = []
        for what in SIGNATURES[kernel][1].partition(" -> ")[0].split():
            kind, may_be_absent, _ = what.partition("?")
            dtype, values = (INT64, np.asarray([n - 1])) if kind == "targets" else (FLOAT32, np.arange(n) / n)
            one = Operand(kind, dtype, values.astype(STORED[dtype])[np.newaxis], is_output=False)
            one = contiguous(one, one.values.shape)
            operands.append(None if may_be_absent else replace(one, strides=(one.strides[0], 0)))
        result = Operand("value", FLOAT32, np.zeros((rows, 1), np.float32), is_output=True)
        operands.append(contiguous(result, result.values.shape))
        made.append(Problem(kernel, (rows,), n, FLOAT32, operands, threads=2, row=rows - 1))
    return made
