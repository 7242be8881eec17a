"""Dask: chunks of whole rows run in the engine of NumPy, lazily, with the filters too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polysoftmax as ps

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

ROWS = (3 * np.random.default_rng(0).normal(size=(6, 4, 50))).astype(np.float32)
WHERE = np.random.default_rng(1).random((4, 50)) < 0.8
TOKENS = np.random.default_rng(2).integers(0, 50, (6, 4, 2))
T = np.linspace(0.0, 2.0, 24, dtype=np.float32).reshape(6, 4)

FUNCTIONS: dict[str, Any] = {
    "softmax": lambda x, m, i, t: ps.softmax(x, where=m, temperature=t),
    "log_softmax": lambda x, m, i, t: ps.log_softmax(x, temperature=0.7),
    "first axis": lambda x, m, i, t: ps.softmax(x, axis=0),
    "logsumexp": lambda x, m, i, t: ps.logsumexp(x, axis=1, keepdims=True),
    "entropy": lambda x, m, i, t: ps.entropy(x, where=m),
    "cross_entropy": lambda x, m, i, t: ps.cross_entropy(x, i[..., 0], label_smoothing=0.1),
    "softmax_vjp": lambda x, m, i, t: ps.softmax_vjp(x, x * 2),
    "truncate": lambda x, m, i, t: ps.truncate(x, top_k=7, top_p=0.8),
    "log_prob": lambda x, m, i, t: ps.log_prob(x, i, temperature=t + 1, top_p=0.9, where=m),
    "rank": lambda x, m, i, t: ps.log_prob(x, i[..., 0], return_rank=True)[1],
    "top_log_probs": lambda x, m, i, t: ps.top_log_probs(x, 3)[1],
    "sample": lambda x, m, i, t: ps.sample(x, 7, temperature=t, where=m),
    "draws": lambda x, m, i, t: ps.sample(x, 7, top_p=0.9, draws=3, replace=False),
    "keys": lambda x, m, i, t: ps.sample(x, ps.random.key(i[..., 0]), min_p=0.1, return_logprobs=True)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_of_whole_rows_have_the_answers_of_numpy(name: str) -> None:
    """To the bit, in chunks of whole rows along each axis that is reduced."""
    axis = {"first axis": 0, "logsumexp": 1}.get(name, 2)
    chunks = [2, 3, 20]
    chunks[axis] = -1

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("computed before the values were asked for")

    given = (
        da.from_array(ROWS, tuple(chunks)),
        da.from_array(WHERE, (2, 25)),
        da.from_array(TOKENS, (3, 2, 1)),
        da.from_array(T, (2, 4)),
    )
    with dask.config.set(scheduler=refuse):
        y = FUNCTIONS[name](*given)
    want = FUNCTIONS[name](ROWS, WHERE, TOKENS, T)
    assert (y.shape, y.dtype) == (np.shape(want), want.dtype)
    found = y.compute(scheduler="sync")
    if name == "cross_entropy":  # Dask adds the rows up
        np.testing.assert_allclose(found, want, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, want)


def test_a_draw_of_whole_rows_makes_no_array_of_variates() -> None:
    """Its graph holds a task or two for each chunk, where the formula alone would be hundreds."""
    x = da.from_array(np.zeros((8, 1000), np.float32), (2, 1000))
    assert len(ps.sample(x, ps.random.key(da.arange(8, chunks=2))).dask) < 200
    assert ps.explain(x, "sample").reason.endswith("for each chunk") or ps.explain(x, "softmax").engine == "portable"


def test_rows_that_are_spread_over_chunks() -> None:
    x = da.from_array(ROWS, (2, 2, 20))
    assert ps.explain(x, "softmax").engine == "portable"
    np.testing.assert_allclose(ps.softmax(x).compute(), ps.softmax(ROWS), rtol=1e-5, atol=1e-7)
    found = ps.log_prob(x, da.from_array(TOKENS, (2, 2, 2)), return_rank=True)
    for one, want in zip(found, ps.log_prob(ROWS, TOKENS, return_rank=True), strict=True):
        np.testing.assert_allclose(one.compute(), want, rtol=1e-5)
    with pytest.raises(NotImplementedError, match=r"Dask cannot order rows.*logits.rechunk\({axis: -1}\)"):
        ps.sample(x, 7, top_k=3)
    with ps.engine("portable"), pytest.raises(NotImplementedError, match="Dask cannot order rows"):
        ps.sample(x.rechunk({2: -1}), 7, top_k=3)
