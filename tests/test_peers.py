"""What peers answer wrongly today, each line of the table in the numerics page: here it is right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import mpmath
import numpy as np
import pytest

import polysoftmax

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

INF = math.inf


def test_softmax_of_int8(lib: Adapter) -> None:
    y = lib.values(lib.call(polysoftmax.softmax, lib.asarray([-128, 127], "int8")))
    np.testing.assert_allclose(y, [float(mpmath.exp(-255)), 1.0], rtol=1e-5, atol=1e-38)


def test_softmax_of_many_zeros_in_float16(lib: Adapter) -> None:
    if "float16" not in lib.can.dtypes:
        pytest.skip("the backend has no float16")
    y = lib.values(lib.call(polysoftmax.softmax, lib.asarray(np.zeros(70_000), "float16")))
    assert (y == float(np.float16(1 / 70_000))).all()


def _gradient(lib: Adapter, x: list[float]) -> np.ndarray:
    values = lib.asarray(x, "float32")
    if lib.backend.library == "jax":
        import jax

        return lib.values(jax.jit(jax.grad(polysoftmax.logsumexp))(values))
    values = values.requires_grad_()
    polysoftmax.logsumexp(values).backward()
    return lib.values(values.grad)


@pytest.mark.backends(lambda can: can.autodiff and not can.traced)
@pytest.mark.parametrize(("x", "slope"), [([1000.0, 0.0], [1.0, 0.0]), ([-INF, -INF], [0.0, 0.0])])
def test_gradient_of_logsumexp(lib: Adapter, x: list[float], slope: list[float]) -> None:
    assert _gradient(lib, x).tolist() == slope


def test_probability_0_on_an_impossible_class(lib: Adapter) -> None:
    x, q = lib.asarray([[1.0, -INF]], "float32"), lib.asarray([[1.0, 0.0]], "float32")
    assert lib.values(lib.call(polysoftmax.cross_entropy, x, q)) == 0.0


def test_every_target_ignored(lib: Adapter) -> None:
    x, targets = lib.asarray([[1.0, 2.0]], "float32"), lib.asarray([-1], lib.can.default_index)
    assert lib.values(lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1)) == 0.0


@pytest.mark.backends(lambda can: "func" not in can.how)  # indices have no gradient
@pytest.mark.enough(lambda can: can.traced or not can.compiles)  # test_sampling.py has such rows in JAX's own calls
def test_nothing_left_to_draw(lib: Adapter) -> None:
    """A second draw without replacement from [1, 0, 0] has no token; neither has a row of -inf, or with a NaN."""
    x = lib.asarray([[-INF, -INF, -INF], [0.0, math.nan, 0.0], [0.0, -INF, -INF]], "float32")
    assert lib.values(lib.call(polysoftmax.sample, x, 0)).tolist() == [-1, -1, 0]
