"""One rule, however a call says it: numbers and arrays of one value, and the three ways to a derivative."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = math.inf, math.nan

LOGITS = (
    (1.0, 2.0, 3.0, 0.5, -4.0, 3.0),
    (0.25, -1.5, 4.0, 0.0, -INF, 3.75),
    (-2.0,) * 6,
    (7.0, 0.0, 6.5, 6.0, 5.0, 1.0),
)
OTHER = ((0.0, 1.0, 0.5, 2.0, -1.0, 0.25),) * 4
VECTORS = ((1.0, -2.0, 0.5, 3.0, 0.25, -1.0),) * 4

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": polysoftmax.softmax,
    "log_softmax": polysoftmax.log_softmax,
    "softmax_jvp": lambda x, **t: polysoftmax.softmax_jvp(x[0], x[2], **t),
    "softmax_vjp": lambda x, **t: polysoftmax.softmax_vjp(x[0], x[2], **t),
    "log_softmax_jvp": lambda x, **t: polysoftmax.log_softmax_jvp(x[0], x[2], **t),
    "log_softmax_vjp": lambda x, **t: polysoftmax.log_softmax_vjp(x[0], x[2], **t),
    "softmax_jacobian": polysoftmax.softmax_jacobian,
    "log_softmax_jacobian": polysoftmax.log_softmax_jacobian,
    "entropy": polysoftmax.entropy,
    "kl_divergence": lambda x, **t: polysoftmax.kl_divergence(x[0], x[1], **t),
    "truncate": lambda x, **t: polysoftmax.truncate(x, top_p=0.75, **t),
    "sample": lambda x, **t: polysoftmax.sample(x, 7, **t),
}
OF_SEVERAL = ("softmax_jvp", "softmax_vjp", "log_softmax_jvp", "log_softmax_vjp", "kl_divergence")

# Below its smallest normal number, and above its largest, a dtype has T = 0 and T = inf.
TEMPERATURES = (0.7, 0.0, 1.0, 3.0, 1e-30, 1e-39, 1e38, INF)


def call(lib: Adapter, name: str, x: Any, *others: Any, **options: Any) -> Any:
    given = (x, *others) if name in OF_SEVERAL else x
    return lib.values(FUNCTIONS[name](given, **options))


@pytest.mark.enough(lambda can: not can.compiles)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_temperature_as_a_number_and_as_arrays(lib: Adapter, name: str) -> None:
    if lib.can.lazy and name == "truncate":
        pytest.skip("Dask cannot order rows lazily")
    dtype = lib.can.default_float
    arrays = [lib.asarray(one, dtype) for one in (LOGITS, OTHER, VECTORS)]
    for t in lib.some(TEMPERATURES):
        given: list[Any] = [t]
        given += [lib.asarray(np.full(shape, t), dtype) for shape in ((), (4,), (4, 1), (1, 1))]
        first, *rest = (call(lib, name, *arrays, temperature=one) for one in given)
        for y in rest:
            np.testing.assert_allclose(y, first, rtol=8 * FORMATS[dtype].unit, atol=0, err_msg=f"temperature {t}")


FILTERS = (("top_k", (1, 2, 4, 6)), ("top_p", (0.1, 0.5, 0.9, 1.0)), ("min_p", (0.0, 0.1, 0.5, 1.0)))


@pytest.mark.backends(lambda can: not can.lazy)
@pytest.mark.enough(lambda can: not can.compiles)
@pytest.mark.parametrize(("name", "values"), FILTERS)
def test_filters_as_numbers_and_as_arrays(lib: Adapter, name: str, values: tuple[float, ...]) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(LOGITS, dtype)
    for value in lib.some(values):
        kind = lib.can.default_index if name == "top_k" else dtype
        given: list[Any] = [value]
        given += [lib.asarray(np.full(shape, value), kind) for shape in ((), (4,), (4, 1), (1, 1))]
        for function in (polysoftmax.truncate, lambda x, **p: polysoftmax.sample(x, 7, **p)):
            first, *rest = (lib.values(function(x, **{name: one})) for one in given)
            for y in rest:
                np.testing.assert_array_equal(y, first, err_msg=f"{name} {value}")


ROWS = (
    (1.0, 2.0, 3.0, 0.5),
    (NAN, 1.0, 2.0, 0.0),
    (INF, 1.0, 2.0, 0.0),
    (-INF, 1.0, 2.0, 0.0),
    (-INF,) * 4,
    (1e30, -1e30, 0.0, 1e30),
    (40.0, 0.0, 1.0, -1.0),
)
EVERY_TEMPERATURE = (1.0, 0.5, 3.0, 0.0, INF, -1.0, NAN)


# JAX in its programs: eagerly, each call is one to compile.
@pytest.mark.enough(lambda can: can.traced or not can.compiles)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_the_jacobian_and_its_products(lib: Adapter, op: str) -> None:
    """NaN where the row, or its temperature, has no answer, in all of the three; otherwise 0 at the limits."""
    dtype = lib.can.default_float
    pairs = list(itertools.product(ROWS, EVERY_TEMPERATURE))
    rows, temperatures = np.asarray([row for row, _ in pairs]), np.asarray([t for _, t in pairs])
    v = np.asarray([(1.0, -2.0, 0.5, 3.0)] * len(pairs))
    x, t, vector = lib.asarray(rows, dtype), lib.asarray(temperatures, dtype), lib.asarray(v, dtype)

    def answers(x: Any, vector: Any, t: Any) -> Any:
        jvp, vjp = getattr(polysoftmax, f"{op}_jvp"), getattr(polysoftmax, f"{op}_vjp")
        matrix = getattr(polysoftmax, f"{op}_jacobian")(x, temperature=t)
        return matrix, jvp(x, vector, temperature=t), vjp(x, vector, temperature=t)

    matrix, pushed, pulled = map(lib.values, lib.program(answers)(x, vector, t))
    undefined = np.isnan(rows).any(-1) | (rows == INF).any(-1) | (rows == -INF).all(-1)
    still = (temperatures == 0) | (temperatures == INF)
    bad = undefined | ~(temperatures >= 0)
    with np.errstate(invalid="ignore"):
        by_matrix = np.einsum("rij,rj->ri", matrix, v), np.einsum("rij,ri->rj", matrix, v)
    for got, want in zip((pushed, pulled), by_matrix, strict=True):
        assert np.isnan(got[bad]).all()
        assert (got[still & ~bad] == 0).all()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# JAX in its programs: eagerly, each call is one to compile.
@pytest.mark.enough(lambda can: can.traced or not can.compiles)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_products_under_a_mask(lib: Adapter, op: str) -> None:
    """What is masked moves nothing and is not moved, also in a row without an answer."""
    dtype = lib.can.default_float
    x, v = lib.asarray(ROWS, dtype), lib.asarray([(1.0, -2.0, NAN, 3.0)] * len(ROWS), dtype)
    where = lib.asarray([(True, True, False, True)] * len(ROWS), "bool")
    undefined = [False, True, True, False, True, False, False]
    for way in ("jvp", "vjp"):
        y = lib.values(lib.call(getattr(polysoftmax, f"{op}_{way}"), x, v, where=where))
        assert (y[:, 2] == 0).all()
        np.testing.assert_array_equal(np.isnan(y[:, [0, 1, 3]]).all(-1), undefined)
        np.testing.assert_array_equal(np.isnan(y[:, [0, 1, 3]]).any(-1), undefined)


@pytest.mark.enough(lambda can: can.traced or not can.compiles)
def test_distances_that_overflow(lib: Adapter) -> None:
    """Finite logits that lie farther apart than the largest number."""
    x = lib.asarray((3e38, -3e38, 0.0), "float32")
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(lib.values(lib.call(polysoftmax.softmax, x, temperature=INF)), third, rtol=1e-6)
    terms = np.exp([0.0, -6.0, -3.0])
    want = terms / terms.sum()
    for t in (1e38, lib.asarray(1e38, "float32")):
        np.testing.assert_allclose(lib.values(lib.call(polysoftmax.softmax, x, temperature=t)), want, rtol=3e-6)
        y = lib.values(lib.call(polysoftmax.log_softmax, x, temperature=t))
        np.testing.assert_allclose(y, np.log(want), rtol=3e-6)
    entropy = lib.call(polysoftmax.entropy, x, temperature=INF)
    np.testing.assert_allclose(lib.values(entropy), math.log(3), rtol=1e-6)


@pytest.mark.enough(lambda can: not can.traced)
def test_draws_at_distances_that_overflow(lib: Adapter) -> None:
    x = lib.asarray((3e38, -3e38, 0.0), "float32")
    keys = polysoftmax.random.split(polysoftmax.random.key(5), 300)
    if lib.backend.library != "numpy":
        keys = lib.asarray(keys, "int32")
    for t in (INF, 1e38):
        tokens = lib.values(lib.call(polysoftmax.sample, x, keys, temperature=t))
        assert {0, 1, 2} >= set(tokens.tolist()) >= ({0, 1, 2} if t == INF else {0, 2})


def test_shares_of_distances_that_overflow(lib: Adapter) -> None:
    if lib.can.lazy:
        pytest.skip("Dask cannot order rows lazily")
    x = lib.asarray((3e38, -3e38, 0.0), "float32")
    for t, kept in ((INF, (True, True, True)), (1e38, (True, False, True))):
        y = lib.values(lib.call(polysoftmax.truncate, x, temperature=t, top_p=0.99))
        np.testing.assert_array_equal(y > -INF, kept)
