"""The smoke cases: every family of kernels in every layout, aligned or not, held or read twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = ("bfloat16", "float16", "float32", "float64")
LENGTHS = (1, 3, 33, 129, 1000, 1024, 4097, 4096, 16384, 32768, 50257, 65536, 131072, 262144, 700_001)
LENGTHS_WITH_OPTIONS = (3, 129, 4097, 50257, 131072)
LENGTHS_OF_DERIVATIVES = (3, 129, 4096, 50257, 131072)
SHAPES_OF_DRAWS = ((300, 3), (64, 1000), (33, 50257), (8, 131072))
FORWARD = ("softmax", "log_softmax", "logsumexp")
DERIVATIVES = ("softmax_vjp", "log_softmax_vjp", "softmax_gradient", "log_softmax_gradient")
LOSSES = ("cross_entropy", "cross_entropy_gradient")
OF_FEW_CALLS = ("entropy", "entropy_gradient", "logsumexp_gradient", "log_prob_gradient")
"""Formulas that share the kernels of others."""

SMOOTHED = {"label_smoothing": 0.1}
FILTERS: tuple[dict[str, Any], ...] = (
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 400, "top_p": 0.8},
)


class Case(NamedTuple):
    """A call. ``where`` and ``temperature`` stand for arrays; ``_gradient`` goes through autograd."""

    function: str
    dtype: str
    rows: int
    n: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        options = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.function, self.dtype, f"{self.rows}x{self.n}", *options])

    @property
    def entries(self) -> int:
        return self.rows * self.n

    @property
    def base(self) -> str:
        """Name of the function that is called."""
        return self.function.removesuffix("_gradient")

    @property
    def is_derivative(self) -> bool:
        return self.function.endswith(("_vjp", "_gradient"))


def smoke_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from _forward(dtype)
        for n in LENGTHS_OF_DERIVATIVES:
            for function in (*DERIVATIVES, *LOSSES):
                yield Case(function, dtype, 9, n, {})
            yield Case("log_prob", dtype, 9, n, {"top_k": 2})
            yield Case("log_prob", dtype, 9, n, {"where": True, "temperature": True})
            for function in OF_FEW_CALLS:
                yield Case(function, dtype, 9, n, {})
            for function in LOSSES:
                yield Case(function, dtype, 9, n, SMOOTHED)
        yield from _draws(dtype)
    # So many rows that clusters do not grow.
    yield Case("softmax", "bfloat16", 2000, 32768, {})
    yield Case("softmax", "float32", 600, 65536, {})
    # So long that most of a row is in shared memory.
    for dtype in ("bfloat16", "float16", "float32"):
        yield Case("log_softmax", dtype, 300, 131_071, {})
        yield Case("softmax", dtype, 300, 131_072, {})


def _forward(dtype: str) -> Iterator[Case]:
    for n in LENGTHS:
        rows = 5 if n > 5000 else 37
        for function in FORWARD:
            yield Case(function, dtype, rows, n, {})
            if n in LENGTHS_WITH_OPTIONS:
                scaled = {} if function == "logsumexp" else {"temperature": True}
                yield Case(function, dtype, rows, n, {"where": True, **scaled})


def _draws(dtype: str) -> Iterator[Case]:
    for rows, n in SHAPES_OF_DRAWS:
        yield Case("sample", dtype, rows, n, {"return_logprobs": True})
        yield Case("sample", dtype, rows, n, {"where": True, "temperature": True})
        if n >= 1000:
            for options in FILTERS:
                yield Case("truncate", dtype, rows, n, options)
                yield Case("sample", dtype, rows, n, options)


def choose(names: list[str], text: str, every: int) -> list[str]:
    """Return the item of this name, else those with ``text`` in their names, one in ``every`` of them."""
    if not text:
        return names[::every]
    found = [text] if text in names else [name for name in names if text in name]
    return found[::every]
