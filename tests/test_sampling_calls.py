"""How a draw is called: keys, batches, axes, transformations, log-probabilities, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax import random
from tests.sampling_cases import INF, compiled, draws, eager, logits, reference, shares, tokens

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

__all__ = ["compiled"]  # a fixture

# Keys.


@eager
def test_one_key_is_folded_with_each_row(lib: Adapter) -> None:
    x = np.stack([logits(30, seed) for seed in range(6)])
    y = tokens(lib, lib.asarray(x.reshape(2, 3, 30), "float32"), 77)
    expected = [reference(x[i], random.fold_in(77, i)[None])[0] for i in range(6)]
    assert np.ravel(y).tolist() == expected
    assert tokens(lib, lib.asarray(x[:1], "float32"), 77) == expected[:1]
    assert tokens(lib, lib.asarray(x[0], "float32"), 77) == reference(x[0], random.key(77)[None])[0]


@eager
@pytest.mark.usefixtures("compiled")
def test_keys_with_leading_dimensions(lib: Adapter) -> None:
    x = np.stack([logits(30, seed) for seed in range(3)])
    rows = lib.asarray(x, "float32")
    keys = random.split(5, 12).reshape(4, 3, 2)
    y = tokens(lib, rows, lib.asarray(keys, "int32"))
    assert y == [[reference(x[j], keys[i, j : j + 1])[0] for j in range(3)] for i in range(4)]
    shared = tokens(lib, rows, lib.asarray(keys[:, :1], "int32"))
    assert shared == [[reference(x[j], keys[i, :1])[0] for j in range(3)] for i in range(4)]
    assert tokens(lib, rows, lib.asarray(keys[0], "int32")) == y[0]


def test_keys_of_other_libraries(lib: Adapter, *, everything: bool) -> None:
    x = lib.asarray(np.stack([logits(30, seed) for seed in range(3)]), "float32")
    expected = lib.values(polysoftmax.sample(x, 7)).tolist()
    keys: list[Any] = [random.key(7), random.key(7).view(np.uint32), np.int64(7)]
    keys.extend(random.key(7, xp=pytest.importorskip(one)) for one in ("jax.numpy", "torch", "array_api_strict"))
    keys.append(pytest.importorskip("jax").random.key(7))
    for key in keys[-1:] if lib.can.lazy and not everything else keys:  # a graph each, of two words of NumPy's
        assert lib.values(polysoftmax.sample(x, key)).tolist() == expected


def test_generators(lib: Adapter, *, everything: bool) -> None:
    torch = pytest.importorskip("torch")
    x = lib.asarray(logits(1000) / 100, "float32")
    makes = (lambda: np.random.default_rng(3), lambda: torch.Generator().manual_seed(3))
    for make in makes[: 1 if lib.can.lazy and not everything else 2]:  # three graphs each, of two words of NumPy's
        generator = make()
        first, second = (int(lib.values(polysoftmax.sample(x, generator))) for _ in range(2))
        assert int(lib.values(polysoftmax.sample(x, make()))) == first
        assert first != second, "the generator did not move on"


# A row's token depends on its key and its logits, and on nothing around it.


@eager
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}], ids=str)
@pytest.mark.usefixtures("compiled")
def test_batches_do_not_matter(lib: Adapter, options: dict[str, float]) -> None:
    if lib.can.compiles and "top_p" not in options:
        pytest.skip("the slowest option shows it where each is seven compilations")
    x = np.stack([logits(120, seed) for seed in range(40)])
    keys = random.split(13, 40)

    def drawn(rows: np.ndarray, keys: np.ndarray, **more: Any) -> np.ndarray:
        return np.asarray(tokens(lib, lib.asarray(rows, "float32"), lib.asarray(keys, "int32"), **options, **more))

    y = drawn(x, keys)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(drawn(x[order], keys[order]), y[order])
    np.testing.assert_array_equal(drawn(x[7:20], keys[7:20]), y[7:20])
    np.testing.assert_array_equal(drawn(x[11], keys[11]), y[11])
    extended, extra = np.concatenate([x, x[::-1] + 1]), np.concatenate([keys, random.split(14, 40)])
    np.testing.assert_array_equal(drawn(extended, extra)[:40], y)
    np.testing.assert_array_equal(drawn(x.T, keys, axis=0), y)
    shaped = np.moveaxis(x.reshape(8, 5, 120), -1, 1)
    np.testing.assert_array_equal(drawn(shaped, keys.reshape(8, 5, 2), axis=1), y.reshape(8, 5))


@eager
def test_several_axes_are_flattened(lib: Adapter) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32)
    rows = np.moveaxis(x, 1, 0).reshape(4, 15)
    keys = random.split(15, 4)
    y = tokens(lib, lib.asarray(x, "float32"), lib.asarray(keys, "int32"), axis=(2, 0))
    assert y == tokens(lib, lib.asarray(rows, "float32"), lib.asarray(keys, "int32"))
    whole = tokens(lib, lib.asarray(x, "float32"), lib.asarray(keys[0], "int32"), axis=None)
    assert whole == tokens(lib, lib.asarray(x.ravel(), "float32"), lib.asarray(keys[0], "int32"))
    assert tokens(lib, lib.asarray(2.0, "float32"), 3) == 0


def test_threads_do_not_matter() -> None:
    x = np.random.default_rng(1).standard_normal((300, 2000)).astype(np.float32)
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
        answers = []
        for count in (1, 3):
            polysoftmax.set_num_threads(count)
            answers.append(polysoftmax.sample(x, 3, **options))
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.01}], ids=str)
def test_transformations(options: dict[str, float]) -> None:
    x, keys = np.stack([logits(120, seed) for seed in range(6)]), random.split(13, 6)
    expected = polysoftmax.sample(x, keys, **options).tolist()
    jax = pytest.importorskip("jax")
    one = jax.jit(lambda row, key: polysoftmax.sample(row, key, **options))
    assert jax.vmap(one)(jax.numpy.asarray(x), jax.numpy.asarray(keys)).tolist() == expected
    if not options:
        typed = jax.random.wrap_key_data(jax.numpy.asarray(keys.view(np.uint32)))
        assert jax.vmap(one)(jax.numpy.asarray(x), typed).tolist() == expected
    torch = pytest.importorskip("torch")
    mapped = torch.func.vmap(lambda row, key: polysoftmax.sample(row, key, **options))
    assert mapped(torch.asarray(x), torch.asarray(keys)).tolist() == expected


def test_libraries_agree_on_a_real_vocabulary() -> None:
    """Tokens differ only where two scores lie within rounding: fewer than one in a million draws."""
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    x = np.random.default_rng(4).standard_normal((40, 50_257)).astype(np.float32) * 3
    keys = random.split(16, 40 * 250).reshape(250, 40, 2)
    expected = polysoftmax.sample(x, keys, temperature=0.8)
    assert len(np.unique(expected)) > 1000
    on_jax = polysoftmax.sample(jax.numpy.asarray(x), keys, temperature=0.8)
    with polysoftmax.engine("portable"):
        on_torch = polysoftmax.sample(torch.asarray(x), keys, temperature=0.8)
    assert (np.asarray(on_jax) != expected).sum() <= 1
    assert (on_torch.numpy() != expected).sum() <= 1


# Log-probabilities.


@draws
@pytest.mark.usefixtures("compiled")
def test_log_probabilities(lib: Adapter, dtype: str) -> None:
    x = np.random.default_rng(6).standard_normal((30, 100)).astype(np.float16).astype(float)
    options: dict[str, Any] = {"temperature": 0.7}
    if not lib.can.lazy:
        options |= {"top_k": 20, "top_p": 0.9}
    rows = lib.asarray(x, dtype)
    y, logprobs = lib.call(polysoftmax.sample, rows, 3, return_logprobs=True, **options)
    lib.require(y, (30,), lib.can.default_index)
    lib.require(logprobs, (30,), dtype if dtype == "float64" else "float32")
    # By NumPy, and not in another program of each library: test_edges.py compares what each of them leaves.
    wide = lib.values(rows).astype(dtype if dtype == "float64" else "float32")
    left = polysoftmax.truncate(wide, **options).astype(np.float64)
    expected = []
    for row, token in zip(left, lib.values(y), strict=True):
        with mpmath.workdps(30):
            total = mpmath.fsum(mpmath.exp(mpmath.mpf(one) / mpmath.mpf(0.7)) for one in row if one > -INF)
            expected.append(float(mpmath.mpf(row[token]) / mpmath.mpf(0.7) - mpmath.log(total)))
    np.testing.assert_allclose(lib.values(logprobs), expected, rtol=0, atol=1e-5 if dtype != "float64" else 1e-13)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.97}], ids=str)
def test_gradient_of_log_probabilities(options: dict[str, float]) -> None:
    """It is 1 at the token less the probabilities of what is left, all over the temperature; 0 for what is gone."""
    x = np.asarray([[1.0, 3.0, -INF, 2.0, -1.0, -2.0, -3.0, -4.0, -5.0]], np.float32)
    left = polysoftmax.truncate(x, temperature=0.5, **options)
    y = int(polysoftmax.sample(x, 3, temperature=0.5, **options)[0])
    expected = (np.eye(9)[y] - shares(left[0], 0.5)) / 0.5

    def logprob(x: Any) -> Any:
        return polysoftmax.sample(x, 3, temperature=0.5, return_logprobs=True, **options)[1].sum()

    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    np.testing.assert_allclose(jax.jit(jax.grad(logprob))(jax.numpy.asarray(x))[0], expected, rtol=1e-5, atol=1e-6)
    leaf = torch.tensor(x, requires_grad=True)
    logprob(leaf).backward()
    np.testing.assert_allclose(leaf.grad[0], expected, rtol=1e-5, atol=1e-6)
    assert not polysoftmax.sample(leaf, 3, **options).requires_grad


@draws
def test_integer_logits(lib: Adapter, *, everything: bool) -> None:
    # All integers are promoted in one place, which the contract takes through each: one, where it is a program.
    slow = lib.can.compiles or lib.can.lazy
    for dtype in lib.can.integers[: 1 if slow and not everything else None]:
        y, logprobs = lib.call(polysoftmax.sample, lib.asarray([0, 100, 7], dtype), 0, return_logprobs=True)
        lib.require(y, (), lib.can.default_index)
        lib.require(logprobs, (), lib.can.default_float)
        assert lib.values(y) == 1


@pytest.mark.parametrize(
    ("x", "key", "options", "error", "message"),
    [
        (np.zeros((2, 0)), 0, {}, ValueError, r"sample needs at least one token, got logits of shape \(2, 0\)"),
        (np.zeros((0, 3)), 0, {"axis": 0}, ValueError, "at least one token.*axis=0"),
        (np.zeros((3, 4)), np.zeros((2, 2), np.int32), {}, ValueError, r"\(2, 2\) do not match rows of shape \(3,\)"),
        (np.zeros((3, 4)), np.zeros((3, 5, 2), np.int32), {}, ValueError, r"keys of shape \(3, 5, 2\) do not match"),
        (np.zeros(3), np.zeros(3, np.int32), {}, TypeError, "two 32-bit words along the last axis"),
        (np.zeros(3), 0.5, {}, TypeError, "a key must be an int seed.*got float"),
        (np.zeros(3), "seed", {}, TypeError, "a key must be an int seed.*got str"),
        (np.zeros(3), True, {}, TypeError, "got bool"),
        (np.zeros(3), None, {}, TypeError, "got NoneType"),
        (np.zeros(3), np.random.RandomState(0), {}, TypeError, "got RandomState"),
        (np.zeros((2, 3)), 0, {"where": np.ones((2, 3))}, TypeError, "where must be a boolean array"),
    ],
)
def test_errors(x: Any, key: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        polysoftmax.sample(x, key, **options)


def test_no_rows_give_no_tokens(lib: Adapter) -> None:
    if lib.can.lazy:
        pytest.skip("Dask's own maximum fails without rows")
    y = polysoftmax.sample(lib.asarray(np.zeros((0, 3)), "float32"), 0)
    lib.require(y, (0,), lib.can.default_index)
