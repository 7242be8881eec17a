"""The contract, line by line, on every backend; test_accuracy.py holds the values to mpmath."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter

INF, NAN = math.inf, math.nan
ELEMENTWISE = ("softmax", "log_softmax")

not_compiled = pytest.mark.backends(lambda can: "compile" not in can.how)  # compiling adds nothing to these lines
# JAX's own, in its other default dtype: the numbers of float64 are in test_accuracy.py.
in_one_width = pytest.mark.enough(lambda can: "64" not in can.how)


def unit(lib: Adapter) -> float:
    return FORMATS[lib.can.default_float].unit


@pytest.mark.op_by_op
@not_compiled
def test_integers_are_promoted_before_anything_is_subtracted(lib: Adapter) -> None:
    for dtype in lib.can.integers:
        low, high = (0, 255) if dtype.startswith("u") else (-128, 127)
        x = lib.asarray([low, high - 1, high], dtype)
        y = lib.call(polysoftmax.softmax, x)
        lib.require(y, (3,), lib.can.default_float)
        rest, most = 1 / (1 + math.e), 1 / (1 + math.exp(-1))
        np.testing.assert_allclose(lib.values(y), [0.0, rest, most], rtol=16 * unit(lib), atol=1e-30)
        y = lib.values(lib.call(polysoftmax.log_softmax, x))
        np.testing.assert_allclose(y, np.log([rest * math.exp(low - high + 1), rest, most]), rtol=16 * unit(lib))
        np.testing.assert_allclose(lib.values(lib.call(polysoftmax.logsumexp, x)), high - math.log(most), rtol=1e-6)


@not_compiled
def test_dtype_sets_the_dtype_of_the_answer(lib: Adapter) -> None:
    for given, dtype in lib.some(list(itertools.product(("float32", "int8"), lib.can.dtypes))):
        x = lib.asarray([-128, 127], given)
        for op, shape, want in (
            ("softmax", (2,), [0, 1]),
            ("log_softmax", (2,), [-255, 0]),
            ("logsumexp", (), 127),
        ):
            y = lib.call(getattr(polysoftmax, op), x, dtype=lib.dtype(dtype))
            lib.require(y, shape, dtype)
            np.testing.assert_allclose(lib.values(y), want, rtol=FORMATS[dtype].unit, atol=1e-30)


def test_a_dtype_may_be_named(lib: Adapter) -> None:
    x = lib.asarray([0.0, 1.0], "float32")
    for name in lib.can.dtypes:
        y = lib.call(polysoftmax.softmax, x, dtype=name)
        lib.require(y, (2,), name)
        np.testing.assert_allclose(lib.values(y)[1], 0.7310585786300049, rtol=2 * FORMATS[name].unit)


def test_widening_dtype_is_computed_in(lib: Adapter) -> None:
    if "float64" not in lib.can.dtypes:
        pytest.skip("the backend has no float64")
    y = lib.call(polysoftmax.softmax, lib.asarray([0.0, 1.0], "float32"), dtype=lib.dtype("float64"))
    np.testing.assert_allclose(lib.values(y)[1], 0.7310585786300049, rtol=1e-15)


@pytest.mark.op_by_op
def test_16_bits_are_summed_in_float32(lib: Adapter, dtype: str) -> None:
    y = lib.call(polysoftmax.softmax, lib.asarray(np.zeros(70_000), dtype))
    lib.require(y, (70_000,), dtype)
    np.testing.assert_allclose(lib.values(y), 1 / 70_000, rtol=2e-3 if dtype == "float16" else 4 * FORMATS[dtype].unit)


@in_one_width
@not_compiled
def test_nan_stays_in_its_row(lib: Adapter) -> None:
    x = lib.asarray([[NAN, 1.0, 2.0], [1.0, 2.0, 3.0]], lib.can.default_float)
    for op in (*ELEMENTWISE, "logsumexp"):
        y = lib.values(lib.call(getattr(polysoftmax, op), x))
        assert np.isnan(y[0]).all()
        assert np.isfinite(y[1]).all()


@in_one_width
@not_compiled
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_zero_size(lib: Adapter, shape: tuple[int, ...]) -> None:
    if lib.can.lazy and shape[-1]:
        pytest.skip("Dask's own maximum fails without rows")
    dtype = lib.can.default_float
    x = lib.asarray(np.zeros(shape), dtype)
    for op in ELEMENTWISE:
        lib.require(lib.call(getattr(polysoftmax, op), x), shape, dtype)
    y = lib.call(polysoftmax.logsumexp, x)
    lib.require(y, shape[:-1], dtype)
    assert (lib.values(y) == -INF).all()
    lib.require(lib.call(polysoftmax.logsumexp, x, keepdims=True), (*shape[:-1], 1), dtype)


@in_one_width
@not_compiled
def test_empty_axis_among_others(lib: Adapter) -> None:
    if lib.can.lazy:
        pytest.skip("Dask cannot flatten axes without entries")
    x = lib.asarray(np.zeros((2, 0, 3)), lib.can.default_float)
    assert (lib.values(lib.call(polysoftmax.logsumexp, x, axis=(1, 2))) == -INF).all()


@in_one_width
@not_compiled
def test_keepdims(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(np.zeros((2, 3, 4)), dtype)
    for axis, shape in lib.some(((1, (2, 1, 4)), (None, (1, 1, 1)), ((0, 2), (1, 3, 1)))):
        y = lib.call(polysoftmax.logsumexp, x, axis=axis, keepdims=True)
        lib.require(y, shape, dtype)
        np.testing.assert_allclose(lib.values(y), math.log(24 / math.prod(shape)), rtol=8 * unit(lib))


@pytest.mark.op_by_op
def test_temperature_shapes_are_tried_in_order(lib: Adapter) -> None:
    """A square input tells the reduced shape from one that broadcasts."""
    dtype = lib.can.default_float
    x = lib.asarray([[0.0, 1.0], [0.0, 1.0]], dtype)
    every = (([0.5, 1.0], dtype), ([[0.5], [1.0]], dtype), (1, "int32"), ([[1], [2]], "int32"))
    for temperature, one in lib.some(every):
        y = lib.values(lib.call(polysoftmax.softmax, x, temperature=lib.asarray(temperature, one)))
        first = 1 / np.broadcast_to(temperature, (2, 1) if np.ndim(temperature) != 1 else 2).ravel()
        np.testing.assert_allclose(y[:, 1], 1 / (1 + np.exp(-first)), rtol=8 * unit(lib))


@not_compiled
def test_a_parameter_array_promotes_nothing(lib: Adapter) -> None:
    if lib.can.dtypes[-1] != "float64" or lib.backend.library == "array_api_strict":
        pytest.skip("the library has no wider dtype to promote to, or refuses to mix them itself")
    x = lib.asarray([0.0, 1.0], "float32")
    lib.require(lib.call(polysoftmax.softmax, x, temperature=lib.asarray(2.0, "float64")), (2,), "float32")
    # In float32 this temperature is 0, and takes the rule for 0.
    y = lib.call(polysoftmax.softmax, x, temperature=lib.asarray(1e-60, "float64"))
    assert lib.values(y).tolist() == [0.0, 1.0]


@not_compiled
def test_tiny_temperature_does_not_overflow(lib: Adapter) -> None:
    x = lib.asarray([1000.0, 999.0, 1000.0], lib.can.default_float)
    for temperature in (1e-30, 1e-45, 1e-320):
        y = lib.values(lib.call(polysoftmax.softmax, x, temperature=temperature))
        np.testing.assert_allclose(y, [0.5, 0.0, 0.5], rtol=8 * unit(lib))


@in_one_width
@pytest.mark.op_by_op
@not_compiled
def test_what_is_masked_never_leaks(lib: Adapter) -> None:
    dtype = lib.can.default_float
    values = np.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    where = np.asarray([[True, False, True], [False, False, False]])
    for poison in (NAN, INF, -INF, 1e30):
        x = lib.asarray(np.where(where, values, poison), dtype)
        mask = lib.asarray(where, "bool")
        y = lib.values(lib.call(polysoftmax.softmax, x, where=mask))
        np.testing.assert_allclose(y[0], [1 / (1 + math.e**2), 0, 1 / (1 + math.e**-2)], rtol=8 * unit(lib))
        assert (y[1] == 0).all()
        assert (lib.values(lib.call(polysoftmax.log_softmax, x, where=mask))[~where] == -INF).all()
        assert lib.values(lib.call(polysoftmax.logsumexp, x, where=mask))[1] == -INF


@not_compiled
def test_logsumexp_near_zero_keeps_its_digits(lib: Adapter) -> None:
    y = lib.values(lib.call(polysoftmax.logsumexp, lib.asarray([0.0, -40.0], "float32")))
    np.testing.assert_allclose(y, 4.248354255291589e-18, rtol=1e-6)  # exp(-40), by any table


@pytest.mark.op_by_op
@not_compiled
def test_logsumexp_where_the_rule_for_answers_near_zero_begins(lib: Adapter) -> None:
    """The sum passes 1.25 times its greatest term, and the maximum 1 and -1, in one batch; ties are many terms."""
    dtype = lib.can.default_float
    tops = (0.0, 1e-30, 0.5, -0.5, 0.999, 1.0, 1.001, -0.999, -1.0, -1.001)
    rest = (0.0, 1e-20, 1e-9, 0.125, 0.2499, 0.2501, 0.5, 2.0)
    rows = [(top, *(top + math.log(one / 2) if one else -INF for _ in range(2))) for top in tops for one in rest]
    x = lib.asarray(rows, dtype)
    with mpmath.workprec(200):
        want = [mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(one))) for one in row)) for row in lib.values(x)]
    want = np.asarray(want, dtype=np.float64)
    # A maximum below 0 and the logarithm cancel; otherwise nothing does.
    scale = np.where(lib.values(x)[:, 0] < 0, 1.0, np.abs(want))
    y = lib.values(lib.call(polysoftmax.logsumexp, x))
    assert (np.abs(y - want) <= 64 * unit(lib) * scale).all()


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_strided_and_reversed_views(op: str, engine: str) -> None:
    base = np.random.default_rng(0).normal(size=(400, 300))
    views: list[Any] = [base[::2, ::3], base[::-1, ::-1], base.T, base[:, :1], base.T[::-2]]
    with polysoftmax.engine(engine):
        for view in views:
            for axis in (0, 1, None):
                plain = getattr(polysoftmax, op)(np.ascontiguousarray(view), axis=axis)
                np.testing.assert_allclose(getattr(polysoftmax, op)(view, axis=axis), plain, rtol=1e-13, atol=1e-300)


def test_subclasses_and_scalars_of_numpy_answer_plain_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=(2, 3))
    assert type(polysoftmax.softmax(mapped)) is np.ndarray
    y = polysoftmax.softmax(np.float32(3))
    assert (type(y), y.shape, y.dtype) == (np.ndarray, (), np.float32)


def test_nothing_warns() -> None:
    """filterwarnings = error makes a warning fail; NaN and inf rows are answers."""
    x = np.asarray([[NAN, 0.0], [INF, 0.0], [-INF, -INF], [1e308, -1e308]])
    for op in ("softmax", "log_softmax", "logsumexp", "entropy", "softmax_jacobian"):
        getattr(polysoftmax, op)(x)
    polysoftmax.softmax(x[:3].astype(np.float32), dtype=np.float16)


@pytest.mark.parametrize("op", [*ELEMENTWISE, "logsumexp"])
@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_unusual_memory(op: str, engine: str) -> None:
    """Numbers at odd addresses and in the other order of bytes."""
    x = np.random.default_rng(0).normal(size=(100, 300))
    odd = np.frombuffer(bytearray(x.nbytes + 1), dtype=x.dtype, offset=1).reshape(x.shape)
    odd[...] = x
    assert not odd.flags.aligned
    function = getattr(polysoftmax, op)
    with polysoftmax.engine(engine):
        plain = function(x)
        np.testing.assert_allclose(function(odd), plain, rtol=1e-13)
        for order in "<>":
            np.testing.assert_allclose(function(x.astype(f"{order}f8")), plain, rtol=1e-13)


@in_one_width
@not_compiled
def test_number_temperatures_of_every_kind(lib: Adapter) -> None:
    x = lib.asarray([0.0, 1.0], lib.can.default_float)
    for temperature in (2, 2.0, np.float32(2), np.int64(2)):
        y = lib.values(polysoftmax.softmax(x, temperature=temperature))
        np.testing.assert_allclose(y[1], 1 / (1 + math.exp(-0.5)), rtol=8 * unit(lib))


@in_one_width
@not_compiled
@pytest.mark.parametrize("temperature", [NAN, -1.0, -INF])
def test_a_bad_element_of_a_temperature_is_nan_in_its_row(lib: Adapter, temperature: float) -> None:
    dtype = lib.can.default_float
    x, t = lib.asarray(np.zeros((3, 2)), dtype), lib.asarray([1.0, temperature, 0.0], dtype)
    mask = lib.asarray([[True, True], [True, False], [True, True]], "bool")
    for where in (None, mask):
        y = lib.values(lib.call(polysoftmax.softmax, x, temperature=t, where=where))
        assert np.isnan(y[1, 0])
        np.testing.assert_allclose(y[[0, 2]], 0.5, rtol=8 * unit(lib))
    assert y[1, 1] == 0


@in_one_width
@not_compiled
@pytest.mark.parametrize("temperature", [NAN, -1.0, -INF])
def test_a_bad_temperature_is_nan_everywhere(lib: Adapter, temperature: float) -> None:
    dtype = lib.can.default_float
    for n in lib.some((1, 2, 3, 8, 33)):
        for op in ELEMENTWISE:
            y = lib.call(
                getattr(polysoftmax, op), lib.asarray(np.zeros(n), dtype), temperature=lib.asarray(temperature, dtype)
            )
            assert np.isnan(lib.values(y)).all(), f"{op} of {n}"


@in_one_width
@not_compiled
def test_logsumexp_and_its_weights_broadcast_against_each_other(lib: Adapter) -> None:
    """As SciPy's do: the axis is one of the shape that both broadcast to."""
    dtype = lib.can.default_float
    generator = np.random.default_rng(0)
    shapes = (((4, 1, 2, 1), (3, 1, 5)), ((3,), (2, 3)), ((2, 1), (3,)), ((), (3,)), ((2, 3), ()), ((3, 1), (1, 4)))
    slow = lib.can.compiles or lib.can.lazy
    for shape, other in shapes[:2] if slow else shapes:
        x, w = generator.normal(size=shape), generator.random(other) + 0.5
        for axis in lib.some((-1, None) if len(np.broadcast_shapes(shape, other)) < 2 else (-1, 0, None, (0, -1))):
            want = np.log(np.sum(w * np.exp(x), axis=axis))
            for keepdims in (axis != -1,) if slow else (False, True):
                y = lib.call(
                    polysoftmax.logsumexp,
                    lib.asarray(x, dtype),
                    weights=lib.asarray(w, dtype),
                    axis=axis,
                    keepdims=keepdims,
                )
                kept = np.sum(w * np.exp(x), axis=axis, keepdims=keepdims).shape
                lib.require(y, kept, dtype)
                np.testing.assert_allclose(lib.values(y), np.reshape(want, kept), rtol=2e-5, atol=2e-6)
    where = lib.asarray([[True, False], [False, False], [True, True]], "bool")
    y = lib.call(
        polysoftmax.logsumexp,
        lib.asarray([0.0, 1.0], dtype),
        weights=lib.asarray([[1.0], [2.0], [3.0]], dtype),
        where=where,
    )
    np.testing.assert_allclose(lib.values(y), [0.0, -INF, math.log(3 + 3 * math.e)], rtol=1e-6)
