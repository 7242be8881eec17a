"""MLX: the tokens of NumPy, eager and compiled, and gradients by MLX's own rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polysoftmax as ps

mx = pytest.importorskip("mlx.core")

ROWS = (3 * np.random.default_rng(0).normal(size=(64, 1000))).astype(np.float32)
TOKENS = np.arange(64)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 1.5}, {"min_p": 0.1}, {"draws": 3, "replace": False}],
    ids=str,
)
@pytest.mark.parametrize("wrap", [lambda f: f, mx.compile], ids=["eager", "compiled"])
def test_tokens_are_those_of_numpy(options: dict[str, Any], wrap: Any) -> None:
    found = wrap(lambda x: ps.sample(x, 7, **options))(mx.array(ROWS))
    np.testing.assert_array_equal(np.asarray(found), ps.sample(ROWS, 7, **options))


def test_gradients() -> None:
    slope = mx.grad(lambda x: ps.cross_entropy(x, mx.array(TOKENS), reduction="sum"))(mx.array(ROWS))
    want = ps.softmax(ROWS) - (np.arange(1000) == TOKENS[:, None])
    np.testing.assert_allclose(np.asarray(slope), want, atol=3e-6)


def test_keys_and_words() -> None:
    np.testing.assert_array_equal(np.asarray(ps.random.bits(7, (3, 4), xp=mx)), ps.random.bits(7, (3, 4)))
    np.testing.assert_array_equal(np.asarray(ps.random.key(mx.arange(3))), ps.random.key(np.arange(3)))
