"""What is JAX's own: what is compiled and kept, strict modes, symbolic shapes, subnormal numbers, and devices."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._sampling import SAMPLE
from polysoftmax._truncation import TRUNCATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._formula import RowFormula

jax = pytest.importorskip("jax")
jnp = jax.numpy
INF = float("inf")


def logits(*shape: int, dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


# What is compiled, and kept


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Callable[[RowFormula], list[Any]]:
    """Return a function that watches a formula, and returns the list of its traces, one for each program."""

    def watch(formula: RowFormula) -> list[Any]:
        function, seen = formula.function, []

        def watched(ops: Any, x: Any, *operands: Any, **options: Any) -> Any:
            seen.append(x.shape)
            return function(ops, x, *operands, **options)

        monkeypatch.setattr(formula, "function", watched)
        return seen

    return watch


def test_new_numbers_of_a_loss_compile_nothing(traces: Callable[[RowFormula], list[Any]]) -> None:
    x, targets, seen = logits(3, 11), jnp.asarray([1, 5, 2]), traces(CROSS_ENTROPY)
    for ignored, smoothing, z_loss in ((1, 0.1, 1e-4), (5, 0.2, 1e-3), (-100, 1.0, 2.0)):
        options = {"ignore_index": ignored, "label_smoothing": smoothing, "z_loss": z_loss, "reduction": "none"}
        y = ps.cross_entropy(x, targets, **options)
        assert len(seen) == 1
        np.testing.assert_allclose(y, ps.cross_entropy(np.asarray(x), np.asarray(targets), **options), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("n", [13, 701])
def test_a_number_top_k_compiles_once_for_a_power_of_two(
    n: int, options: dict[str, float], traces: Callable[[RowFormula], list[Any]]
) -> None:
    x, truncations, draws = logits(3, n), traces(TRUNCATE), traces(SAMPLE)
    for k in (5, 6, 7, 8):
        ps.truncate(x, top_k=k, **options)
    assert len(truncations) == 1
    for k in (5, 6, 7, 8):
        ps.sample(x, 7, top_k=k, return_logprobs=True, **options)
    assert len(draws) == 1
    for k in (5, 6, 7, 8):
        y, theirs = (ps.truncate(one, top_k=k, **options) for one in (x, np.asarray(x)))
        np.testing.assert_array_equal(y, theirs)
        found, want = (ps.sample(one, 7, top_k=k, return_logprobs=True, **options) for one in (x, np.asarray(x)))
        np.testing.assert_array_equal(found[0], want[0])
        np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-6)


def test_programs_are_kept_up_to_a_bound() -> None:
    """Of many shapes the last ones are kept, and JAX keeps no program of the others."""
    from polysoftmax.engines import jax as jax_engine

    def programs() -> int:
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    assert jax_engine._compiled.cache_parameters()["maxsize"] == 256
    jax_engine._compiled.cache_clear()
    before = programs()
    for n in range(20, 25):
        ps.softmax(logits(2, n))
    assert jax_engine._compiled.cache_info().currsize == 5
    assert programs() >= before + 5
    jax_engine._compiled.cache_clear()
    assert programs() <= before


# Strict modes

MODES = {
    "dtypes": {"numpy_dtype_promotion": "strict"},
    "ranks": {"numpy_rank_promotion": "raise"},
    "no jit": {"disable_jit": True},
    "infinities": {"debug_infs": True},
}


def some_of_each(dtype: str) -> list[Any]:
    """Return answers of all functions, with every option, none of which is infinite."""
    wide = "float64" if dtype == "float64" else "float32"
    x, other = logits(2, 3, 600, dtype=dtype), logits(2, 3, 600, dtype=dtype)[..., ::-1]
    t = jnp.asarray([[0.5, 1.0, 0.0], [2.0, INF, 0.7]], wide)
    where = jnp.arange(600) % 3 > 0
    targets = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    weights = jnp.asarray(np.arange(600) % 4, dtype)
    keys = ps.random.split(ps.random.key(jnp.asarray([1, 2])), 3)
    short = x[..., :5]
    answers = [
        ps.softmax(x, temperature=t, where=where),
        ps.softmax(x, axis=(0, 1)),
        ps.log_softmax(x, temperature=t[..., None][..., :2, :, :][:, :, :] if False else 0.5),
        ps.logsumexp(x, weights=weights, where=where),
        ps.logsumexp(short, weights=weights[:5]),
        *(getattr(ps, f"{op}_jacobian")(short, temperature=t) for op in ("softmax", "log_softmax")),
        *(getattr(ps, f"{op}_{way}")(x, other, temperature=t, where=where) for op in ("softmax", "log_softmax") for way in ("jvp", "vjp")),
        ps.cross_entropy(x, targets, ignore_index=3, weight=weights, z_loss=0.1),
        ps.cross_entropy(x, targets, label_smoothing=0.1),
        ps.cross_entropy(x, ps.softmax(other), weight=weights),
        ps.entropy(x, temperature=t, where=where),
        ps.kl_divergence(x, other, temperature=t, where=where),
    ]
    return answers
