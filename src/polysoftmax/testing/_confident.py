"""Rows that are certain of one class but for a little, and distributions that are nearly equal: relative errors."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np

import polysoftmax
from polysoftmax.testing._formats import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GAPS = (10.0, 17.0, 20.0, 40.0, 80.0)
"""Distances of two logits, exact in bfloat16."""

STEPS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Changes of a logit that make another distribution of one."""

_LOGITS = (0.5, -1.25, 2.0, 0.0)


@dataclass(frozen=True)
class Figure:
    """The relative error of one function on one input; 1 for an answer of 0."""

    question: str
    dtype: str
    input: float
    by: str
    error: float


def log_of_winner(gap: float) -> Any:
    """Return log p of the first of two classes."""
    return -mpmath.log1p(mpmath.exp(-mpmath.mpf(gap)))


def slope_of_winner(gap: float) -> Any:
    """Return the derivative of log p of the first of two classes by its own logit, 1 - p."""
    return 1 / (1 + mpmath.exp(mpmath.mpf(gap)))


def divergence(p: Any, q: Any) -> Any:
    """Return KL(p ‖ q) of two rows of logits."""
    p, q = ([mpmath.mpf(float(one)) for one in row] for row in (p, q))
    log_sums = [mpmath.log(mpmath.fsum(map(mpmath.exp, row))) for row in (p, q)]
    return mpmath.fsum(
        mpmath.exp(a - log_sums[0]) * ((a - log_sums[0]) - (b - log_sums[1])) for a, b in zip(p, q, strict=True)
    )


def neighbours(step: float, dtype: str) -> tuple[Any, Any]:
    """Return a row of logits and another that differs by a step in one of them."""
    p = np.asarray(_LOGITS)
    return rounded(p, dtype), rounded(p + step * np.asarray([0.0, 0.0, 1.0, 0.0]), dtype)


def _ours(dtype: str) -> dict[str, Callable[..., Any]]:
    import torch

    as_row = _tensor(dtype)

    def slope(gap: float) -> Any:
        x = as_row([gap, 0.0]).requires_grad_()
        polysoftmax.log_softmax(x, dtype=torch.float32)[0].backward()
        return x.grad[0]

    return {
        "log p": lambda gap: polysoftmax.log_softmax(as_row([gap, 0.0]), dtype=torch.float32)[0],
        "1 - p": slope,
        "KL": lambda p, q: polysoftmax.kl_divergence(as_row(p), as_row(q)),
    }


def _tensor(dtype: str) -> Callable[[Any], Any]:
    import torch

    return lambda row: torch.as_tensor(np.asarray(row)).to(getattr(torch, dtype))


def _torch(dtype: str) -> dict[str, Callable[..., Any]]:
    import torch

    as_row, functional = _tensor(dtype), torch.nn.functional

    def slope(gap: float) -> Any:
        x = as_row([gap, 0.0]).requires_grad_()
        functional.log_softmax(x, -1, dtype=torch.float32)[0].backward()
        return x.grad[0]

    def kl(p: Any, q: Any) -> Any:
        logs = (functional.log_softmax(as_row(one), -1, dtype=torch.float32) for one in (q, p))
        return functional.kl_div(*logs, reduction="sum", log_target=True)

    return {
        "log p": lambda gap: functional.log_softmax(as_row([gap, 0.0]), -1, dtype=torch.float32)[0],
        "1 - p": slope,
        "KL": kl,
    }


def _jax(dtype: str) -> dict[str, Callable[..., Any]]:
    import jax
    import jax.numpy as jnp

    def log_p(row: Any) -> Any:
        return jax.nn.log_softmax(row.astype(jnp.float32))

    def as_row(row: Any) -> Any:
        return jnp.asarray(np.asarray(row, np.float32)).astype(dtype)

    def kl(p: Any, q: Any) -> Any:
        logs = [log_p(as_row(one)) for one in (p, q)]
        return (jnp.exp(logs[0]) * (logs[0] - logs[1])).sum()

    return {
        "log p": lambda gap: log_p(as_row([gap, 0.0]))[0],
        "1 - p": lambda gap: jax.grad(lambda x: log_p(x)[0])(as_row([gap, 0.0]))[0],
        "KL": kl,
    }


def _scipy(dtype: str) -> dict[str, Callable[..., Any]]:
    from scipy import special

    del dtype  # SciPy has no bfloat16, so it gets the same numbers in float32

    def kl(p: Any, q: Any) -> Any:
        return special.rel_entr(*(special.softmax(np.asarray(one, np.float32)) for one in (p, q))).sum()

    return {"log p": lambda gap: special.log_softmax(np.asarray([gap, 0.0], np.float32))[0], "KL": kl}


_BY = {"polysoftmax": ("torch", _ours), "torch": ("torch", _torch), "jax.nn": ("jax", _jax), "scipy": ("scipy", _scipy)}


def confident(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Iterator[Figure]:
    """Measure this library on PyTorch, and the peers that are installed, against mpmath."""
    for dtype in dtypes:
        for by, (module, functions) in _BY.items():
            if find_spec(module) is None:
                continue
            for question, function in functions(dtype).items():
                for given in STEPS if question == "KL" else GAPS:
                    rows = neighbours(given, dtype) if question == "KL" else (given,)
                    with mpmath.workprec(400):
                        want = _TRUTH[question](*rows)
                        if not want:  # the step is less than half a unit of 16 bits
                            continue
                        error = float(abs((mpmath.mpf(float(function(*rows))) - want) / want))
                    yield Figure(question, dtype, given, by, error)


_TRUTH: dict[str, Callable[..., Any]] = {"log p": log_of_winner, "1 - p": slope_of_winner, "KL": divergence}


def table(figures: list[Figure]) -> str:
    """Return the figures as a table of the guide."""
    everyone = list(dict.fromkeys(one.by for one in figures))
    found = {(one.dtype, one.question, one.input, one.by): one.error for one in figures}
    lines = [f"| logits | question | at | {' | '.join(everyone)} |", "|---" * (3 + len(everyone)) + "|"]
    for dtype, question, given in dict.fromkeys(key[:3] for key in found):
        errors = [found.get((dtype, question, given, by)) for by in everyone]
        cells = ["" if one is None else f"{one:.1e}" for one in errors]
        lines.append(f"| {dtype} | {question} | {given:g} | {' | '.join(cells)} |")
    return "\n".join(lines)
