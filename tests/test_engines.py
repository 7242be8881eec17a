"""Choosing an engine, asking which one would run, and the same answers from all."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import polysoftmax
from polysoftmax.engines import ENGINES, _library, chosen, native

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_nested_choices_are_undone() -> None:
    before = chosen()
    with polysoftmax.engine("portable"):
        with polysoftmax.engine("auto"):
            assert chosen() == "auto"
        assert chosen() == "portable"
        with pytest.raises(KeyError), polysoftmax.engine("auto"):
            raise KeyError
        assert chosen() == "portable"
    assert chosen() == before


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=f"unknown engine 'fast': choose one of {', '.join(ENGINES)}"):
        polysoftmax.engine("fast")  # before it is entered


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_blocks_end_in_any_order(order: tuple[int, ...]) -> None:
    """The last to begin of those that are left decides, and nothing is left of a choice when its block has ended."""
    before = chosen()
    names = ["portable", "auto", "portable"]
    blocks = [polysoftmax.engine(name) for name in names]
    for one in blocks:
        one.__enter__()
    left = [0, 1, 2]
    for i in order:
        blocks[i].__exit__(None, None, None)
        left.remove(i)
        assert chosen() == (names[left[-1]] if left else before)


def test_one_block_may_be_entered_again() -> None:
    before = chosen()
    block = polysoftmax.engine("portable")
    for _ in range(2):
        with block:
            with block:
                assert chosen() == "portable"
            assert chosen() == "portable"
        assert chosen() == before


def test_a_generator_shares_its_block_with_its_caller() -> None:
    """As long as it waits inside: it has no context of its own. Whichever ends first, nothing is left behind."""

    def steps() -> Iterator[str]:
        with polysoftmax.engine("portable"):
            yield chosen()

    before = chosen()
    first = steps()
    assert (next(first), chosen()) == ("portable", "portable")
    with polysoftmax.engine("auto"):
        assert (chosen(), list(first), chosen()) == ("auto", [], "auto")
    assert chosen() == before
    second = steps()
    with polysoftmax.engine("auto"):
        assert (next(second), chosen()) == ("portable", "portable")
    assert (chosen(), list(second), chosen()) == ("portable", [], before)


def test_a_block_that_ends_in_another_context_changes_nothing_there() -> None:
    block, before = polysoftmax.engine("portable"), chosen()
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    assert chosen() == before


def test_functions_are_decorated() -> None:
    @polysoftmax.engine("portable")
    def names(depth: int) -> list[str]:
        return [chosen(), *(names(depth - 1) if depth else [])]

    before = chosen()
    assert names(2) == ["portable"] * 3
    assert chosen() == before


def test_what_runs_after_its_call_is_not_decorated() -> None:
    def steps() -> Iterator[str]:
        yield chosen()

    async def task() -> str:
        return chosen()

    for function in (steps, task):
        with pytest.raises(TypeError, match=f"{function.__name__} only runs after the call, .* use a `with` block"):
            polysoftmax.engine("portable")(function)


def test_an_engine_that_is_not_used_warns() -> None:
    before = chosen()
    with pytest.warns(
        RuntimeWarning, match=r'engine\("portable"\) chooses nothing by itself: use it in a `with`'
    ) as seen:
        polysoftmax.engine("portable")
    assert chosen() == before
    assert [one.filename for one in seen] == [__file__]


def test_threads_do_not_see_the_choice() -> None:
    seen = []
    with polysoftmax.engine("portable"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == [os.environ.get("POLYSOFTMAX_ENGINE") or "auto"]


def test_tasks_do_not_see_each_others_choice() -> None:
    async def run(name: str, barrier: asyncio.Barrier) -> str:
        with polysoftmax.engine(name):
            await barrier.wait()  # both have chosen by now
            return chosen()

    async def both() -> list[str]:
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(run("portable", barrier), run("auto", barrier))

    assert asyncio.run(both()) == ["portable", "auto"]


def test_explain() -> None:
    x = np.zeros((1000, 1000), np.float32)
    found = polysoftmax.explain(x, "softmax")
    assert (found.op, found.library, found.dtype, found.shape) == ("softmax", "numpy", "float32", (1000, 1000))
    assert found.reason in str(found)
    with polysoftmax.engine("portable"):
        assert polysoftmax.explain(x, "softmax").engine == "portable"
    with pytest.raises(ValueError, match=r"unknown operation 'softmin': choose one of .*softmax"):
        polysoftmax.explain(x, "softmin")
    with pytest.raises(TypeError, match="got list"):
        polysoftmax.explain([1.0], "softmax")


@pytest.fixture
def no_plans() -> Iterator[None]:
    """Let no plan outlive a test that replaces what it holds, nor one from before be found in it."""
    native.PLANS.clear()
    yield
    native.PLANS.clear()


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_explain_says_what_runs(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    xp = pytest.importorskip(name)
    x = xp.zeros((3, 4), dtype=getattr(xp, dtype))
    library = _library.load()
    if library is None:
        pytest.skip(_library.reason())
    solve, solved = library.solve, []
    monkeypatch.setattr(library, "solve", lambda *problem: solved.append(problem) or solve(*problem))
    for engine, runs, count in (("auto", "native", 1), ("native", "native", 2), ("portable", "portable", 2)):
        with polysoftmax.engine(engine):
            polysoftmax.softmax(x)
            found = polysoftmax.explain(x, "softmax")
        assert (found.engine, len(solved)) == (runs, count)
        assert (library.level in found.reason) == (runs == "native")


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_without_a_library_formulas_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_found", None)
    monkeypatch.setattr(_library, "_reason", "there was no C++ compiler")
    x = pytest.importorskip(name).asarray([1.0, 2.0, 3.0])
    with polysoftmax.engine("auto"):
        found = polysoftmax.explain(x, "softmax")
        assert (found.engine, "there was no C++ compiler" in found.reason) == ("portable", True)
        np.testing.assert_allclose(polysoftmax.softmax(x), [0.09003057, 0.24472847, 0.66524096], rtol=1e-6)
    with pytest.raises(ImportError, match='engine "native" cannot run: there was no C'), polysoftmax.engine("native"):
        pass


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble])
def test_explain_says_why_no_kernel_runs(dtype: type) -> None:
    """Where there is a library, too, because of the array: formulas run for what the kernels do not know."""
    if _library.load() is None:
        pytest.skip(_library.reason())
    x = np.zeros((3, 4), dtype)
    with polysoftmax.engine("auto"):
        found = polysoftmax.explain(x, "softmax")
        y = polysoftmax.softmax(x)
    assert (y.dtype, y.tolist()) == (x.dtype, np.full((3, 4), 0.25).tolist())
    is_known = x.itemsize <= 8  # as long doubles are where they are doubles
    assert found.engine == ("native" if is_known else "portable")
    assert ("do not know" in found.reason) != is_known


def test_explain_of_jax() -> None:
    jax = pytest.importorskip("jax")
    with polysoftmax.engine("auto"):
        assert polysoftmax.explain(jax.numpy.zeros(3), "softmax").engine == "jit"
        engines = []
        jax.make_jaxpr(lambda x: engines.append(polysoftmax.explain(x, "softmax").engine) or x)(jax.numpy.zeros(3))
    assert engines == ["portable"]


@pytest.mark.parametrize(("value", "shown"), [("portable", "portable"), ("", "auto"), ("fastest", "unknown engine")])
def test_environment(value: str, shown: str) -> None:
    code = "from polysoftmax.engines import chosen; print(chosen())"
    environment = {**os.environ, "POLYSOFTMAX_ENGINE": value}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert shown in (ran.stdout or ran.stderr)


def test_gradients_are_computed_by_the_engine_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from polysoftmax.engines import torch as torch_engine

    gradients, seen = torch_engine.gradients, []
    monkeypatch.setattr(torch_engine, "gradients", lambda *given: seen.append(chosen()) or gradients(*given))
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for name in ("portable", "auto"):
        with polysoftmax.engine(name):
            y = polysoftmax.softmax(x, temperature=2.0)
        y[0].backward()
    assert seen == ["portable", "auto"]
    np.testing.assert_allclose(x.grad, [2 / 9, -1 / 9, -1 / 9], rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(300, 100), (5000, 3), (2, 40_000), (100_000,)])
def test_engines_agree(shape: tuple[int, ...], dtype: type) -> None:
    x = np.random.default_rng(0).normal(size=shape, scale=4).astype(dtype)
    unit = 2.0**-11 if dtype is np.float16 else np.finfo(dtype).eps
    for axis in range(x.ndim):
        for op in ("softmax", "log_softmax", "logsumexp", "entropy"):
            with polysoftmax.engine("portable"):
                plain = getattr(polysoftmax, op)(x, axis=axis)
            answer = getattr(polysoftmax, op)(x, axis=axis)
            assert (answer.dtype, answer.shape) == (plain.dtype, plain.shape)
            np.testing.assert_allclose(answer, plain, rtol=64 * unit, atol=64 * unit if op != "softmax" else 1e-7)


@pytest.mark.parametrize("rows", ["usual", "near 0", "odd"])
@pytest.mark.parametrize("op", ["logsumexp", "cross_entropy"])
def test_losses_near_0_agree_with_the_formulas(op: str, rows: str) -> None:
    """Forward and backward, at tiny losses and rows without an answer."""
    torch = pytest.importorskip("torch")
    inf, nan = np.inf, np.nan
    every = {
        "usual": [[0.5, -1.0, 2.0], [1.0, 1.0, 1.0], [-3.0, 4.0, 4.0]],
        "near 0": [[0.0, -40.0, -45.0], [-9.0, -30.0, 0.0], [-2.0, 0.0, -1.0]],
        "odd": [[-inf, -inf, -inf], [0.0, inf, 1.0], [nan, 0.0, 1.0], [inf, inf, 0.0], [-inf, 0.0, -inf]],
    }
    targets = torch.as_tensor([0, 2, 1, 1, 0][: len(every[rows])])

    def answers(engine: str) -> tuple[np.ndarray, np.ndarray]:
        x = torch.tensor(every[rows], dtype=torch.float64, requires_grad=True)
        with polysoftmax.engine(engine):
            if op == "logsumexp":
                y = polysoftmax.logsumexp(x)
            else:
                y = polysoftmax.cross_entropy(x, targets, reduction="none")
            (gradient,) = torch.autograd.grad(y.sum(), x)
        return y.detach().numpy(), gradient.numpy()

    for found, want in zip(answers("auto"), answers("portable"), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *(("float32", shape) for shape in [(12, 20_000), (3, 5), (9, 5), (33, 20_000)]),
        *((dtype, shape) for dtype in ("bfloat16", "int16") for shape in [(12, 20_000), (3, 5)]),
    ],
)
@pytest.mark.parametrize("axis", [0, -1])
def test_jax_reduces_short_rows_and_many_columns_as_numpy_does(dtype: str, shape: tuple[int, ...], axis: int) -> None:
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.asarray(np.random.default_rng(0).normal(scale=3.0, size=shape)).astype(dtype)
    wide = np.asarray(x.astype("float32")).astype(np.float64)
    result = jnp.float32 if dtype == "int16" else x.dtype
    tolerance = 2e-6 if result == jnp.float32 else 2.0**-8
    for op in (polysoftmax.softmax, polysoftmax.log_softmax, polysoftmax.logsumexp, polysoftmax.truncate):
        y = op(x, axis=axis)
        assert y.dtype == result
        with polysoftmax.engine("portable"):
            expected = op(wide, axis=axis)
        np.testing.assert_allclose(np.asarray(y.astype("float32")), expected, rtol=tolerance, atol=tolerance)
