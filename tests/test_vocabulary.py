"""The words that formulas are written in: formulas use no others, and every library means the same by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat
import array_api_strict
import numpy as np
import pytest

from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._ops import STANDARD, Ops, ops_of
from polysoftmax._sampling import DRAW, DRAW_LEADING, LEADING, MASSES, SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.numpy import NumpyOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._formula import RowFormula

WORDS = {*STANDARD, *(name for name in vars(Ops) if not name.startswith("_")), "axis", "xp"}


class Strict:
    """The words of NumPy, and a refusal of every other."""

    def __init__(self, axis: int) -> None:
        self._ops = ops_of(NumpyOps, array_api_compat.array_namespace(np.empty(0)), axis)

    def __getattr__(self, name: str) -> Any:
        assert name in WORDS, f"{name} is no word of formulas"
        return getattr(self._ops, name)

    def along(self, axis: int) -> Strict:
        return Strict(axis)

    def call(self, formula: RowFormula, *operands: Any, **options: Any) -> Any:
        return formula.function(self, *operands, **options)


X = np.random.default_rng(0).normal(size=(3, 40))
T = np.asarray([[0.5], [0.0], [np.inf]])
MASK = X > -1
KEYS = np.arange(6, dtype=np.int32).reshape(3, 2)
LOSS = {"ignore_index": 2, "label_smoothing": 0.1, "z_loss": 0.1}
DRAWN = {"top_k": None, "is_one_key": False, "logprobs": True}

CALLS: dict[str, tuple[RowFormula, tuple[Any, ...], dict[str, Any]]] = {
    "softmax": (SOFTMAX, (X, T, MASK), {}),
    "log_softmax": (LOG_SOFTMAX, (X, T, MASK), {}),
    "logsumexp": (LOGSUMEXP, (X, X**2, MASK), {}),
    "logsumexp of rows alone": (LOGSUMEXP, (X, None, None), {}),
    "cross_entropy": (CROSS_ENTROPY, (X, np.asarray([[1], [2], [3]]), X[:1] ** 2), LOSS),
    "cross_entropy of classes alone": (
        CROSS_ENTROPY,
        (X, np.asarray([[1], [2], [3]]), None),
        {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0},
    ),
    "entropy": (ENTROPY, (X, T, MASK), {}),
    "kl_divergence": (KL_DIVERGENCE, (X, -X, T, MASK), {}),
    "truncate": (TRUNCATE, (X, T, MASK, np.full((3, 1), 5.0), 0.9, 0.01), {"top_k": None}),
    "truncate to few": (TRUNCATE, (X, 0.7, None, None, 0.9, None), {"top_k": 3}),
    "sample": (SAMPLE, (X, KEYS, T, MASK, None, None, None), DRAWN),
    "sample from few": (SAMPLE, (X, KEYS, None, None, None, 0.9, None), {**DRAWN, "top_k": 3}),
    "sample from what filters leave": (SAMPLE, (X, KEYS, None, None, None, 0.9, 0.1), DRAWN),
}


def test_every_formula_is_called() -> None:
    parts = {MASSES, DRAW, LEADING, DRAW_LEADING}  # of SAMPLE
    assert {one[0] for one in CALLS.values()} | parts == {
        *(SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE, TRUNCATE, SAMPLE),
        *parts,
    }


@pytest.mark.parametrize("name", CALLS)
@np.errstate(all="ignore")
def test_formulas_and_rules_use_no_other_words(name: str) -> None:
    formula, operands, options = CALLS[name]
    ops: Any = Strict(1)
    y = formula.function(ops, *operands, **options)
    moving = tuple(i == 0 for i in range(len(operands)))
    if formula.vjp is not None:
        formula.pullback(moving).function(ops, *operands, y, np.ones_like(y), **options)
    if formula.jvp is not None:
        formula.pushforward(moving).function(ops, *operands, np.ones_like(X), **options)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(AssertionError, match="tanh is no word"):
        _ = Strict(1).tanh


ROWS = np.asarray(
    [
        [1.0, 3.0, 3.0, -2.0, 0.5, 3.0, -np.inf, 1.0, 2.0],
        [0.0, -0.0, 0.25, 0.25, 0.25, -5.0, -5.0, -5.0, -6.0],
        [-np.inf, 1e30, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0],
    ]
)
ODD = np.asarray([[1.0, np.nan, 2.0, 0.0], [np.inf, 1.0, np.inf, 0.0], [-np.inf] * 4])

WORD_CALLS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "max": lambda ops, a: ops.max(a(ODD)),
    "min": lambda ops, a: ops.min(a(ROWS)),
    "sum": lambda ops, a: ops.sum(a(ROWS[:2, :6])),
    "sum of a long row": lambda ops, a: ops.sum(a(np.full((2, 1001), 0.5))),
    "any": lambda ops, a: ops.any(a(ROWS > 3)),
    "count": lambda ops, a: ops.count(a(ROWS > 1)),
    "argmax": lambda ops, a: ops.argmax(a(ROWS)),
    "total": lambda ops, a: ops.total(a(ROWS[1])),
    "mean": lambda ops, a: ops.mean(a(ROWS[1])),
    "where": lambda ops, a: ops.where(a(ROWS > 1), a(ROWS), -1.0),
    "where all": lambda ops, a: ops.where(None, a(ROWS), -1.0),
    "nan_unless": lambda ops, a: ops.nan_unless(a(ROWS > 1), a(ROWS), a(ROWS[:, :1])),
    "below": lambda ops, a: ops.below(a(ROWS), a(ROWS.max(1, keepdims=True))),
    "divide": lambda ops, a: ops.divide(a(ROWS), a(np.asarray([[0.5], [2.0], [4.0]]))),
    "exp": lambda ops, a: ops.exp(a(-abs(ODD) * 2000)),
    "part": lambda ops, a: ops.part(a(ROWS), 2, 5),
    "indices": lambda ops, a: ops.indices(a(ROWS)),
    "take": lambda ops, a: ops.take(a(ROWS), a(np.asarray([[3], [0], [8]]))),
    "block_of": lambda ops, a: ops.block_of(a(ROWS), a(np.asarray([[0], [2], [1]])), 4),
    "kth_greatest": lambda ops, a: ops.kth_greatest(a(ROWS), 3),
    "top_k_indices": lambda ops, a: ops.top_k_indices(a(ROWS), 3),
    "keep_first": lambda ops, a: ops.keep_first(a(ROWS > 0), a(np.asarray([[2.0], [1.0], [4.0]]))),
    "block_sums": lambda ops, a: ops.block_sums(a(ROWS[:2, :6]), 4),
    "end_of_prefix": lambda ops, a: ops.end_of_prefix(a(ROWS), ops.ones_like, lambda total: 0.5 * total),
}


def kinds() -> list[Any]:
    found = [pytest.param("numpy", "NumpyOps", id="numpy")]
    found += [pytest.param("jax", name, id=f"jax {name}") for name in ("JaxOps", "InMemoryOps")]
    names = ("TorchOps", "DifferentiatedOps", "CompiledOps", "CompiledDifferentiatedOps")
    return found + [pytest.param("torch", name, id=f"torch {name}") for name in names]


@pytest.mark.parametrize(("library", "kind"), kinds())
@pytest.mark.parametrize("word", WORD_CALLS)
@np.errstate(all="ignore")
def test_a_word_means_what_it_means_in_the_standard(library: str, kind: str, word: str) -> None:
    module = pytest.importorskip(library)
    engine = __import__(f"polysoftmax.engines.{library}", fromlist=[kind])
    xp: Any = module.numpy if library == "jax" else module

    def array(x: Any) -> Any:
        x = np.asarray(x)
        return xp.asarray(np.float32(x) if x.dtype == np.float64 else x)

    def strict(x: Any) -> Any:
        x = np.asarray(x)
        return array_api_strict.asarray(np.float32(x) if x.dtype == np.float64 else x)

    own = array_api_compat.array_namespace(array([0.0]))
    found = WORD_CALLS[word](ops_of(getattr(engine, kind), own, -1), array)
    want = WORD_CALLS[word](ops_of(Ops, array_api_strict, -1), strict)
    for a, b in zip(*(one if isinstance(one, tuple) else (one,) for one in (found, want)), strict=True):
        assert tuple(a.shape) == tuple(b.shape)
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-6)
