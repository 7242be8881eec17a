"""Cubed: plans of bounded memory, with the tokens of NumPy, and without an order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polysoftmax as ps

cubed = pytest.importorskip("cubed")

ROWS = (3 * np.random.default_rng(0).normal(size=(6, 300))).astype(np.float32)
TOKENS = np.arange(6)

FUNCTIONS: dict[str, Any] = {
    "softmax": lambda x, i: ps.softmax(x, temperature=0.7),
    "entropy": lambda x, i: ps.entropy(x),
    "cross_entropy": lambda x, i: ps.cross_entropy(x, i, label_smoothing=0.1),
    "log_prob": lambda x, i: ps.log_prob(x, i, temperature=0.7),
    "sample": lambda x, i: ps.sample(x, 7),
    "min_p": lambda x, i: ps.sample(x, 7, min_p=0.1, temperature=1.5),
    "draws": lambda x, i: ps.sample(x, 7, draws=3),
    "keys": lambda x, i: ps.sample(x, ps.random.key(i)),
    "rank": lambda x, i: ps.log_prob(x, i, return_rank=True)[1],
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # in Cubed's threads, as NumPy computes
@pytest.mark.parametrize("chunks", [(3, 300), (2, 100)], ids=["whole rows", "spread rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_answers_are_those_of_numpy(name: str, chunks: tuple[int, int]) -> None:
    y = FUNCTIONS[name](cubed.from_array(ROWS, chunks=chunks), cubed.from_array(TOKENS, chunks=chunks[:1]))
    found, want = np.asarray(y.compute()), FUNCTIONS[name](ROWS, TOKENS)
    assert (y.shape, y.dtype) == (np.shape(want), want.dtype)
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(found, want)
    else:
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}])
def test_what_needs_an_order_says_what_to_do(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"Cubed cannot order rows.*logits.compute\(\)"):
        ps.sample(cubed.from_array(ROWS, chunks=(3, 300)), 7, **options)
