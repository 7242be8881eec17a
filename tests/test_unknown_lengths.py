"""Dask: arrays whose number of rows is not known before they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polysoftmax

da = pytest.importorskip("dask.array")

X = np.random.default_rng(0).normal(size=(6, 5))
KEPT = np.asarray([True, False, True, True, False, True])
TARGETS = np.asarray([0, 4, 2, 1, 3, 3])


def unknown(x: Any) -> Any:
    """Return the rows that are kept; Dask does not count them."""
    return da.from_array(x, chunks=(3,) * x.ndim)[da.from_array(KEPT, chunks=3)]


def test_rows_of_unknown_number() -> None:
    x, known = unknown(X), X[KEPT]
    targets, classes = unknown(TARGETS), TARGETS[KEPT]
    t = 0.5 + np.arange(6.0)
    calls = (
        lambda x, targets, t: polysoftmax.softmax(x, temperature=t),
        lambda x, targets, t: polysoftmax.log_softmax(x, where=x > -1),
        lambda x, targets, t: polysoftmax.logsumexp(x, weights=x * x),
        lambda x, targets, t: polysoftmax.softmax_vjp(x, 2 * x),
        lambda x, targets, t: polysoftmax.entropy(x),
        lambda x, targets, t: polysoftmax.kl_divergence(x, -x, temperature=t),
        lambda x, targets, t: polysoftmax.truncate(x, min_p=0.2),
        lambda x, targets, t: polysoftmax.cross_entropy(x, targets, reduction="none"),
        lambda x, targets, t: polysoftmax.cross_entropy(x, targets),
        lambda x, targets, t: polysoftmax.cross_entropy(x, targets, ignore_index=3),
        lambda x, targets, t: polysoftmax.cross_entropy(x, polysoftmax.softmax(-x)),
    )
    for call in calls:
        y, want = call(x, targets, unknown(t)), call(known, classes, t[KEPT])
        np.testing.assert_allclose(y.compute(scheduler="sync"), want, rtol=1e-12)


def test_classes_of_unknown_number() -> None:
    x = unknown(X)
    with pytest.raises(ValueError, match=r"got logits of shape \(nan, 5\) with axis=0: .*compute_chunk_sizes\(\)"):
        polysoftmax.cross_entropy(x, da.zeros(5, dtype=np.int64), axis=0)
    with pytest.raises(ValueError, match=r"shape \(nan, 5\): call the compute_chunk_sizes\(\) of the input first"):
        polysoftmax.sample(x, 1, axis=0)
    with pytest.raises(ValueError, match=r"shape \(nan, 5\): call the compute_chunk_sizes\(\) of the input first"):
        polysoftmax.softmax(x, axis=None)


def test_rows_are_drawn_from_once_they_are_counted() -> None:
    with pytest.raises(ValueError, match=r"\(nan, .*: call the compute_chunk_sizes\(\) of the input first"):
        polysoftmax.sample(unknown(X), 1)
    tokens = polysoftmax.sample(unknown(X).compute_chunk_sizes(), 1)
    np.testing.assert_array_equal(tokens.compute(scheduler="sync"), polysoftmax.sample(X[KEPT], 1))
