"""top-k, top-p and min-p, against the rules followed one token at a time in high precision."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing import Adapter

INF, NAN = math.inf, math.nan

ordered = pytest.mark.backends(lambda can: not can.lazy)  # Dask cannot order rows lazily
eager = pytest.mark.backends(lambda can: not can.lazy and not can.traced and "64" not in can.how)  # nor does Dask sort

# What is special is in the numbers: torch.compile gives them to the operations of eager PyTorch, and XLA to its own.
numbers = pytest.mark.enough(lambda can: "compile" not in can.how)


@functools.cache
def survivors(
    x: tuple[float, ...], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    """Follow the rules: filters in their order, each over what the one before left, by logit and then index."""
    order = sorted((i for i in range(len(x)) if x[i] > -INF), key=lambda i: (-x[i], i))
    if top_k:
        order = order[:top_k]
    if not order:
        return []
    with mpmath.workdps(40):
        mass = [_mass(x[i], x[order[0]], temperature) for i in order]
        if top_p < 1:
            target, reached, count = mpmath.mpf(top_p) * mpmath.fsum(mass), mpmath.mpf(0), 0
            while count == 0 or reached < target:
                reached += mass[count]
                count += 1
                assert abs(reached - target) > 3e-6 * target or reached == target, "too close to tell in float32"
            order, mass = order[:count], mass[:count]
        return sorted(i for i, m in zip(order, mass, strict=True) if m >= min_p)


def _mass(x: float, top: float, temperature: float) -> mpmath.mpf:
    if temperature == 0:
        return mpmath.mpf(x == top)
    return mpmath.exp((mpmath.mpf(x) - mpmath.mpf(top)) / mpmath.mpf(temperature))


def kept(lib: Adapter, y: Any) -> list[int]:
    return np.flatnonzero(lib.values(y) > -INF).tolist()


def batches() -> list[np.ndarray]:
    """Return rows that are spread out, crowded with ties, holed by -inf; short ones, and long enough for every way."""
    generator = np.random.default_rng(8)
    made = []
    for n in (40, 700):
        rows = np.stack([generator.standard_normal(n) * 3, generator.integers(-3, 3, n), generator.standard_normal(n)])
        rows[2, ::3] = -INF
        made.append(rows.astype(np.float32))
    return [np.float32([[2.0, 1.0]]), *made]


PARAMETERS = (
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.5},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.91, "temperature": 1.7},
    {"top_p": 0.41, "temperature": 0.0},
    {"top_p": 0.413, "temperature": INF},
    {"min_p": 0.2, "temperature": 2.5},
    {"min_p": 0.5, "temperature": 0.0},
    {"top_k": 20, "top_p": 0.83, "min_p": 0.04, "temperature": 0.8},
    {"top_k": 4, "top_p": 0.66, "temperature": INF},
)


def check_survivors(lib: Adapter, rows: np.ndarray, parameters: dict[str, float]) -> None:
    y = lib.call(polysoftmax.truncate, lib.asarray(rows, "float32"), **parameters)
    lib.require(y, rows.shape, "float32")
    expected = np.full(rows.shape, -INF)
    for row, answer in zip(rows, expected, strict=True):
        chosen = survivors(tuple(row.tolist()), **parameters)
        answer[chosen] = row[chosen]
    np.testing.assert_array_equal(lib.values(y), expected)


@eager
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_survivors(lib: Adapter, parameters: dict[str, float], *, everything: bool) -> None:
    if lib.can.compiles and len(parameters) == 1 and not everything:
        pytest.skip("with a temperature it is the same program and one operation more")
    for rows in batches()[-1 if lib.can.compiles else 0 :]:
        check_survivors(lib, rows, parameters)


@pytest.mark.parametrize("parameters", [{"top_k": 13}, {"top_k": 3, "top_p": 0.7}, {"top_p": 0.8}], ids=str)
def test_jax_searches_rows_in_parts(parameters: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two and of three rows, the last of them not full, of logits with ties at the end."""
    jnp = pytest.importorskip("jax.numpy")
    from polysoftmax.engines import jax as jax_engine

    rows = np.float32(np.random.default_rng(5).integers(-8, 8, (2, 4, 50)) / 4)
    expected = np.full(rows.shape, -INF)
    for i in np.ndindex(2, 4):
        chosen = survivors(tuple(rows[i].tolist()), **parameters)
        expected[i][chosen] = rows[i][chosen]
    for most in (100, 150):
        monkeypatch.setattr(jax_engine, "_CACHED", most)
        jax_engine._compiled.cache_clear()
        jax_engine._search.clear_cache()
        np.testing.assert_array_equal(polysoftmax.truncate(jnp.asarray(rows), **parameters), expected)
    jax_engine._search.clear_cache()  # other tests shall not find its small parts


@ordered
def test_all_filters_at_once(lib: Adapter) -> None:
    check_survivors(lib, batches()[1], {"top_k": 20, "top_p": 0.83, "min_p": 0.04, "temperature": 0.8})


@eager
def test_dtypes_keep_their_bits(lib: Adapter, dtype: str) -> None:
    row = [1.0, 2.5, -0.5, 2.5, 0.25]
    y = lib.call(polysoftmax.truncate, lib.asarray(row, dtype), temperature=0.3, top_k=3, top_p=0.97)
    lib.require(y, (5,), dtype)
    assert lib.values(y).tolist() == [-INF, 2.5, -INF, 2.5, -INF]


@eager
def test_integers_become_floating(lib: Adapter, *, everything: bool) -> None:
    # All are promoted in one place, which the contract takes through each.
    for dtype in lib.can.integers[: 1 if lib.can.compiles and not everything else None]:
        y = lib.call(polysoftmax.truncate, lib.asarray([3, 100, 7], dtype), top_k=2)
        lib.require(y, (3,), lib.can.default_float)
        assert lib.values(y).tolist() == [-INF, 100.0, 7.0]


@ordered
@numbers
def test_ties_go_to_the_lowest_index(lib: Adapter) -> None:
    for n in (300, 4)[: 1 if lib.can.compiles else 2]:
        x = lib.asarray(np.zeros(n), "float32")
        assert kept(lib, lib.call(polysoftmax.truncate, x, top_k=3)) == [0, 1, 2]
        assert kept(lib, lib.call(polysoftmax.truncate, x, top_p=0.5)) == list(range(n // 2))
    x = lib.asarray([0.0, -0.0, 1.0, -0.0, 0.0], "float32")
    assert kept(lib, lib.call(polysoftmax.truncate, x, top_k=3)) == [0, 1, 2]
    assert kept(lib, lib.call(polysoftmax.truncate, x, top_p=0.5)) == [0, 2]


@eager
def test_the_crossing_token_is_kept(lib: Adapter) -> None:
    x = lib.asarray(np.log([0.05, 0.5, 0.15, 0.3]), "float32")
    shares = ((0.79, [1, 3]), (0.4, [1]), (0.55, [1, 3]), (0.96, [0, 1, 2, 3]), (0.81, [1, 2, 3]))
    for p, indices in lib.some(shares):
        assert kept(lib, lib.call(polysoftmax.truncate, x, top_p=p)) == indices
    halves = lib.asarray([0.0, 0.0], "float32")
    assert kept(lib, lib.call(polysoftmax.truncate, halves, top_p=0.5)) == [0]


@eager
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 1e6, INF])
def test_the_most_likely_token_always_survives(lib: Adapter, temperature: float) -> None:
    x = lib.asarray([0.0, 1.0, 3.0, 2.0, 3.0], "float32")
    every = ({"top_p": 0.0}, {"top_k": 1}, {"top_p": 1e-30}, {"top_k": 1, "top_p": 0.0, "min_p": 1.0})
    for parameters in lib.some(every):
        y = lib.call(polysoftmax.truncate, x, temperature=temperature, **parameters)
        assert kept(lib, y) == [2]


@eager
def test_order_is_by_logit_where_probabilities_are_equal(lib: Adapter) -> None:
    """At a high temperature the probabilities of different logits round to the same number."""
    x = lib.asarray([1e-7, 2e-7, 3e-7, 0.5], "float32")
    assert kept(lib, lib.call(polysoftmax.truncate, x, temperature=1e4, top_p=0.6)) == [1, 2, 3]


@eager
def test_filters_act_on_what_is_left(lib: Adapter) -> None:
    """Half of the mass is out of top_k's reach: top_p counts shares of the rest."""
    x = lib.asarray(np.log([0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1]), "float32")
    assert kept(lib, lib.call(polysoftmax.truncate, x, top_k=3, top_p=0.39)) == [0]
    assert kept(lib, lib.call(polysoftmax.truncate, x, top_k=3, top_p=0.42)) == [0, 1]
    assert kept(lib, lib.call(polysoftmax.truncate, x, top_p=0.42)) == [0, 1, 2]


@pytest.mark.parametrize(
    "parameters", [{}, {"top_k": None, "top_p": None, "min_p": None}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}]
)
def test_switched_off(lib: Adapter, parameters: dict[str, float]) -> None:
    row = [1.0, -1e30, 2.0, -INF]
    y = lib.call(polysoftmax.truncate, lib.asarray(row, "float32"), **parameters)
    assert lib.values(y).tolist() == np.asarray(row, np.float32).tolist()


@ordered
def test_parameters_for_each_row(lib: Adapter) -> None:
    x = np.random.default_rng(3).standard_normal((2, 4, 60)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])
    given = {
        "temperature": [[1.0, 0.5, 0.0, INF], [2.0, 0.25, 1.0, 1.0]],
        "top_k": [[0, 3, 200, 60], [1, 10, 0, 59]],
        "top_p": [[0.813, 1.0, 0.37, 0.511], [0.0, 0.9, 0.97, 1.0]],
        "min_p": [[0.0, 0.01, 1.0, 0.3], [0.5, 0.0, 0.07, 0.0]],
    }
    arrays = {name: lib.asarray(value, "int32" if name == "top_k" else "float32") for name, value in given.items()}
    expected = [
        [survivors(tuple(x[i, j].tolist()), **{name: value[i][j] for name, value in given.items()}) for j in range(4)]
        for i in range(2)
    ]
    y = lib.call(polysoftmax.truncate, lib.asarray(x, "float32"), **arrays)
    assert [[np.flatnonzero(row > -INF).tolist() for row in block] for block in lib.values(y)] == expected
    if lib.can.traced:
        return  # the same program, transposed
    turned = lib.asarray(np.moveaxis(x, -1, 0), "float32")
    y = lib.call(polysoftmax.truncate, turned, axis=0, **arrays)
    moved = np.moveaxis(lib.values(y), 0, -1)
    assert [[np.flatnonzero(row > -INF).tolist() for row in block] for block in moved] == expected


@eager
def test_axes(lib: Adapter) -> None:
    x = np.random.default_rng(4).permutation(24).reshape(2, 3, 4).astype(np.float32)
    y = lib.values(lib.call(polysoftmax.truncate, lib.asarray(x, "float32"), axis=(0, 2), top_k=2))
    for j in range(3):
        np.testing.assert_array_equal(np.sort(y[:, j].ravel())[-3:], [-INF, *np.sort(x[:, j].ravel())[-2:]])
    y = lib.values(lib.call(polysoftmax.truncate, lib.asarray(x, "float32"), axis=None, top_k=5))
    np.testing.assert_array_equal(y, np.where(x >= 19, x, -INF))
    lib.require(lib.call(polysoftmax.truncate, lib.asarray(3.0, "float32"), top_k=1), (), "float32")


@eager
def test_bad_rows_are_nan(lib: Adapter) -> None:
    x = lib.asarray([[0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [0.0, 2.0, 1.0]], "float32")
    every = ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.2}, {"top_k": 2, "top_p": 0.9, "min_p": 0.2})
    for parameters in lib.some(every):
        y = lib.values(lib.call(polysoftmax.truncate, x, **parameters))
        assert np.isnan(y[:2]).all(), parameters
        assert (y[2] == -INF).all()
        assert y[3, 1] == 2.0


@ordered
@pytest.mark.enough(lambda can: can.traced or not can.compiles)  # eagerly, JAX goes on in another program
@pytest.mark.parametrize("parameters", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_bad_rows_have_no_probabilities(lib: Adapter, parameters: dict[str, float], *, everything: bool) -> None:
    """A program that goes on from the answer must see NaN, too."""
    if "compile" in lib.can.how and "top_p" not in parameters and not everything:
        pytest.skip("torch.compile runs PyTorch's operations, which see NaN in every test; XLA has left it out")

    def probabilities(x: Any) -> Any:
        return polysoftmax.softmax(polysoftmax.truncate(x, **parameters))

    for n in lib.some((2, 4, 16)):
        rows = np.zeros((3, n))
        rows[0, 0], rows[1, 1] = NAN, INF
        y = lib.values(lib.call(probabilities, lib.asarray(rows, "float32")))
        assert np.isnan(y[:2]).all()
        np.testing.assert_allclose(y[2].sum(), 1.0, rtol=1e-6)


@eager
@pytest.mark.parametrize(
    ("name", "bad"),
    [("temperature", [-1.0, NAN]), ("top_k", [-1.0, NAN]), ("top_p", [-0.1, 1.5]), ("min_p", [2.0, NAN])],
)
def test_a_bad_element_of_a_parameter(lib: Adapter, name: str, bad: list[float]) -> None:
    x = lib.asarray([[0.0, 1.0]] * 3, "float32")
    y = lib.values(
        lib.call(polysoftmax.truncate, x, **{name: lib.asarray([*bad, 0.5 if name != "top_k" else 2], "float32")})
    )
    assert np.isnan(y[:2]).all()
    assert y[2, 1] == 1.0


@pytest.mark.backends(lambda can: can.lazy)
def test_dask_orders_nothing(lib: Adapter) -> None:
    x = lib.asarray([[0.0, 1.0, 2.0]], "float32")
    for parameters in ({"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(NotImplementedError, match=r"Dask cannot order rows lazily.*rechunk"):
            lib.call(polysoftmax.truncate, x, **parameters)
    assert kept(lib, lib.call(polysoftmax.truncate, x, min_p=0.3)[0]) == [1, 2]


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"top_k": -1}, ValueError, r"top_k must be 0 \(off\) or greater, got -1"),
        ({"top_k": 2.5}, TypeError, "top_k must be a whole number of tokens, got 2.5"),
        ({"top_k": np.float64(2)}, TypeError, "top_k must be a whole number"),
        ({"top_k": True}, TypeError, "got bool"),
        ({"top_p": -0.1}, ValueError, r"top_p must lie in \[0, 1\], got -0.1"),
        ({"top_p": 1.1}, ValueError, r"top_p must lie in \[0, 1\], got 1.1"),
        ({"top_p": NAN}, ValueError, "top_p must lie in .* got nan"),
        ({"min_p": 2}, ValueError, r"min_p must lie in \[0, 1\], got 2.0"),
        ({"min_p": np.float32(-1)}, ValueError, "min_p must lie in"),
        ({"min_p": [0.1]}, TypeError, "min_p must be an int, a float or an array"),
        ({"temperature": -1}, ValueError, "temperature must be 0 or greater, got -1.0"),
        ({"temperature": NAN}, ValueError, "temperature must be 0 or greater, got nan"),
        ({"top_p": np.ones(5)}, ValueError, r"top_p has shape \(5,\); for an input of shape \(2, 3\)"),
        ({"axis": 2}, IndexError, "axis 2 is out of bounds"),
    ],
)
@pytest.mark.parametrize("function", [polysoftmax.truncate, lambda x, **options: polysoftmax.sample(x, 0, **options)])
def test_errors(function: Callable[..., Any], parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(np.zeros((2, 3)), **parameters)


def test_derivatives() -> None:
    """What survives moves with its logit, and nothing else does."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray([3.0, 1.0, 2.0, 0.0])

    def total(x: Any) -> Any:
        y = polysoftmax.truncate(x, top_k=3, top_p=0.8, min_p=0.01)
        return jax.numpy.where(y > -INF, y, 0.0).sum()

    assert jax.jit(jax.grad(total))(x).tolist() == [1.0, 0.0, 1.0, 0.0]
    torch = pytest.importorskip("torch")
    leaf = torch.tensor([3.0, 1.0, 2.0, 0.0], requires_grad=True)
    y = polysoftmax.truncate(leaf, top_k=3, top_p=0.8, min_p=0.01)
    y[y > -INF].sum().backward()
    assert leaf.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
