"""What is measured: operations, shapes, dtypes and axes, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

Shape = tuple[int, ...]

FORWARD = ("softmax", "log_softmax", "logsumexp")
DERIVED = ("softmax_vjp", "cross_entropy", "cross_entropy_grad")
MANY = "sample_many"
"""Many draws of one row, or few of each of several."""

SAMPLING = ("sample", "sample_top_k", "sample_top_p", MANY)
OPS = (*FORWARD, *DERIVED, "log_prob", *SAMPLING)

# One row length, sizes from 40 bytes to 256 MB: the ladder along which the plots draw their lines.
LADDER: tuple[Shape, ...] = (
    (10,),
    (100,),
    (1000,),
    (10, 1000),
    (100, 1000),
    (1000, 1000),
    (4096, 4096),
    (8192, 8192),
)
SHORT: tuple[Shape, ...] = ((1000, 10), (100_000, 10), (1_000_000, 3), (100_000, 16), (50_000, 32), (10_000, 256))
LONG: tuple[Shape, ...] = ((64, 50_257), (8, 128_256), (1, 1_000_000), (4, 16_777_216))
CORE: tuple[Shape, ...] = ((10,), (1000, 1000), (100_000, 10), (50_000, 32), (64, 50_257), (8192, 8192))
DRAWS: tuple[Shape, ...] = (
    (100_000, 2),
    (100_000, 10),
    (30_000, 32),
    (1, 1000),
    (4096, 1000),
    (256, 32_000),
    (64, 50_257),
    (1, 128_256),
)
MANY_DRAWS: dict[Shape, int] = {(10,): 100_000, (999,): 20_000, (1001,): 20_000, (50_257,): 5_000}
PICKED: tuple[Shape, ...] = ((64, 50_257), (2048, 32_000))
"""Rows of which a token's log-probability is asked for."""

FILTERED: tuple[Shape, ...] = ((4096, 1000), (256, 32_000), (64, 50_257), (1, 128_256))
FIRST: tuple[Shape, ...] = ((10, 100_000), (256, 10_000), (50_257, 64), (4096, 4096))
NARROW: tuple[Shape, ...] = ((100_000, 10), (10_000, 256), (64, 50_257))

QUICK: tuple[Shape, ...] = ((10,), (1000, 1000), (100_000, 10), (64, 50_257))
QUICK_DRAWS: tuple[Shape, ...] = ((1, 128_256),)

GPU_LENGTHS = (256, 1024, 4096, 16_384, 32_768, 131_072, 262_144)
GPU_LENGTHS_OF_OTHERS = (4096, 32_768, 131_072)
GPU_DRAWS: tuple[Shape, ...] = ((128, 128_256), (64, 50_257))
GPU_BYTES = 128 * 2**20
GPU_WORKING_SET = 320 * 2**20
"""Bytes of the inputs that take turns: more than any cache holds."""

MOST_NOISE = 2**28
"""Bytes of the variates that a peer draws for every token of every draw."""

SHORT_DTYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Case:
    """One operation on one input of one library, eagerly or inside ``jit``."""

    op: str
    backend: str
    mode: str
    shape: Shape
    dtype: str = "float32"
    axis: int = -1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Number of entries in a row."""
        return self.shape[self.axis]

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def traffic(self) -> int:
        """Bytes that any implementation has to move: every input read once, every result written once."""
        if self.op == "softmax_vjp":
            return 3 * self.nbytes
        if self.op in {"softmax", "log_softmax", "cross_entropy_grad"}:
            return 2 * self.nbytes
        return self.nbytes + self.elements // self.length * self._bytes_of_answer

    @property
    def _bytes_of_answer(self) -> int:
        """Bytes of an answer with one entry a row: losses are float32 at least, and tokens are indices."""
        if self.op in SAMPLING:
            return 4 if self.backend == "jax" else 8
        return max(4, ITEMSIZE[self.dtype]) if self.op in {"cross_entropy", "log_prob"} else ITEMSIZE[self.dtype]

    @property
    def draws(self) -> int:
        """Number of draws from each row, where there are many."""
        return MANY_DRAWS.get(self.shape, 100)

    @property
    def runner(self) -> str:
        """Library and mode in one word, as tables and plots name them."""
        return self.backend if self.mode == "eager" else f"{self.backend} {self.mode}"

    @property
    def name(self) -> str:
        """Name to choose a case by, in letters that a command line takes as they are."""
        return "-".join([self.op, self.dtype, "x".join(map(str, self.shape))])

    def __str__(self) -> str:
        size = "×".join(str(n) for n in self.shape)
        first = " axis 0" if self.axis == 0 else ""
        return f"{size} {SHORT_DTYPE[self.dtype]}{first}"


def has_sampling() -> bool:
    return find_spec("polysoftmax._sampling") is not None


def available(ops: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of ``ops`` that the installed library has."""
    return ops if has_sampling() else tuple(op for op in ops if op not in SAMPLING)


def cpu_cases(backend: str, ops: tuple[str, ...], *, quick: bool) -> list[Case]:
    modes = ("eager", "jit") if backend == "jax" else ("eager",)
    cases = [case for op in ops for mode in modes for case in _of(op, backend, mode, quick=quick)]
    return list(dict.fromkeys(cases))


def _of(op: str, backend: str, mode: str, *, quick: bool) -> list[Case]:
    shapes = _shapes(op, quick=quick)
    cases = [Case(op, backend, mode, shape) for shape in shapes]
    if op == MANY and backend == "jax":
        cases = [case for case in cases if case.elements * case.draws * 4 <= MOST_NOISE]
    if quick or op in SAMPLING or op == "log_prob":
        return cases
    half = {"numpy": ("float16",), "torch": ("float16", "bfloat16"), "jax": ("bfloat16",)}[backend]
    # JAX computes in float64 only after a global switch, which would change every other row of the run.
    double = () if backend == "jax" else ("float64",)
    cases += [Case(op, backend, mode, shape, dtype) for dtype in (*double, *half) for shape in NARROW]
    if op in FORWARD:
        cases += [Case(op, backend, mode, shape, axis=0) for shape in FIRST]
    return cases


def _shapes(op: str, *, quick: bool) -> tuple[Shape, ...]:
    if op == MANY:
        return tuple(MANY_DRAWS)[:1] if quick else tuple(MANY_DRAWS)
    if op == "log_prob":
        return PICKED[:1] if quick else PICKED
    if op in SAMPLING:
        return QUICK_DRAWS if quick else DRAWS if op == "sample" else FILTERED
    if quick:
        return QUICK if op in FORWARD else QUICK[2:]
    return LADDER + SHORT + LONG if op in FORWARD else CORE


def gpu_cases() -> list[Case]:
    """Return what is measured on a GPU: a constant number of bytes over the row lengths, and draws of tokens."""
    cases = []
    for dtype in ("bfloat16", "float32"):
        for op in (*FORWARD, "cross_entropy", "cross_entropy_grad"):
            lengths = GPU_LENGTHS if op == "softmax" else GPU_LENGTHS_OF_OTHERS
            shapes = [(GPU_BYTES // (n * ITEMSIZE[dtype]), n) for n in lengths]
            cases += [Case(op, "torch", "eager", shape, dtype) for shape in shapes]
        cases += [Case(op, "torch", "eager", shape, dtype) for op in SAMPLING if op != MANY for shape in GPU_DRAWS]
    return cases


def dropped(backends: tuple[str, ...], ops: tuple[str, ...]) -> list[str]:
    """Say what is not measured, and why."""
    reasons = ["inputs above 256 MB: results and peers' temporaries would not fit beside them on a small machine"]
    if "jax" in backends:
        reasons.append("jax, 5,000 draws of 50,257 tokens: its own way takes a variate a token and draw, 1 GB")
        reasons.append("jax float64: needs the global x64 switch, which would change every other row of the run")
    if "numpy" in backends:
        reasons.append("numpy bfloat16: SciPy and NumPy have no such dtype of their own")
    if any(op in SAMPLING for op in ops) and not has_sampling():
        reasons.append("sampling: the installed library has none")
    return reasons
