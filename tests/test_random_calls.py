"""A few random calls on NumPy and eager PyTorch, the same in every run; `python -m tests.random_calls` makes many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings

import polysoftmax
from polysoftmax.testing import CHECKS, Backend, Case, open_backend
from tests import random_calls as many
from tests.call_strategies import FUNCTIONS, LAYOUTS, RandomCall, random_calls

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

quick = settings(many.every, derandomize=True, max_examples=8)


@pytest.mark.backends(lambda can: can.how == "eager" and not can.gpu and not can.compiles)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_calls(lib: Adapter, function: str) -> None:
    said: list[str | None] = []

    @quick
    @given(random_calls(functions=(function,)))
    def of_each(call: RandomCall) -> None:
        said.append(many.try_call(call, lib))

    of_each()
    assert [one for one in said if one] == []
    assert "" in said


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_arrays_lie_in_memory_as_asked(layout: str) -> None:
    call = RandomCall(CHECKS["softmax"], Case("rows", {}), "float64", layout)
    with open_backend(Backend.NUMPY) as lib:
        other = many.laid_out(lib, call)
        assert other is not None
        x, plain = (one.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]) for one in (other, lib))
    assert (x == plain).all()
    found = (x.flags.c_contiguous, x.flags.aligned, x.flags.writeable, x.dtype.isnative, x.strides[1] < 0)
    assert found != (True, True, True, True, False)


def test_a_bug_is_found_and_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right: Any = polysoftmax.softmax

    def wrong(x: Any, **options: Any) -> Any:
        y = right(x, **options)
        return y * 1.5 if "where" in options else y

    arguments = ["--backend", "numpy", "--function", "softmax", "--examples", "40"]
    assert many.main(arguments) == 0
    assert "0 of " in capsys.readouterr().out
    monkeypatch.setattr(polysoftmax, "softmax", wrong)
    assert many.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "y = polysoftmax.softmax(x, where=where)" in shown
    assert "calls failed (seed 0)" in shown


def test_jax_gets_calls_of_a_few_shapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    from jax._src import compiler

    shapes, compile_as_users_do = set(), compiler.get_compile_options
    right = many.try_call

    def noted(call: RandomCall, lib: Adapter) -> str | None:
        shapes.add(call.case.operand("x").shape)
        return right(call, lib)

    monkeypatch.setattr(many, "try_call", noted)
    assert many.main(["--backend", "jax", "--function", "softmax", "--examples", "12", "--quickly"]) == 0
    assert "jax                portable  softmax " in capsys.readouterr().out
    assert shapes <= set(many._FEW_SHAPES)
    assert compiler.get_compile_options is compile_as_users_do
