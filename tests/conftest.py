"""The one fixture of the test matrix: a backend, a way of running it, an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

# JAX would take three quarters of a GPU's memory with its first array, and leave the others too little.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from polysoftmax.testing import Adapter, Backend, missing, open_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKED = "POLYSOFTMAX_TEST_BACKENDS"

_OP_BY_OP = "test_contract"
"""The one file of tests in which a library that compiles runs formulas as they stand, one operation after another.

Each operation is a compilation then, and the formula is the one that it compiles whole everywhere else.
"""


def _asked() -> list[Backend]:
    names = [name.strip() for name in os.environ.get(_ASKED, "").split(",") if name.strip()]
    known = {one.value: one for one in Backend}
    unknown = sorted(set(names) - set(known))
    if unknown:
        msg = f"{_ASKED} names {', '.join(unknown)}: choose from {', '.join(known)}"
        raise pytest.UsageError(msg)
    return [known[name] for name in names]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(keep): on which backends a test runs, as a function of Capability")
    asked = _asked()
    if asked and all(one.capability.gpu for one in asked):
        absent = list(filter(None, map(missing, asked)))
        if len(absent) == len(asked):
            pytest.exit(f"these tests need a GPU: {'; '.join(absent)}", 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `lib` each backend in each of its engines, and one that takes `dtype` its dtypes."""
    if "lib" not in metafunc.fixturenames:
        return
    keep = [mark.args[0] for mark in metafunc.definition.iter_markers("backends")]
    with_dtype = "dtype" in metafunc.fixturenames
    params = []
    for backend in _asked() or Backend:
        can = backend.capability
        if not all(one(can) for one in keep):
            continue
        marks = [pytest.mark.gpu] if can.gpu else []
        for engine in can.engines:
            if can.compiles and engine == "portable" and metafunc.module.__name__.rpartition(".")[2] != _OP_BY_OP:
                continue
            for dtype in can.dtypes if with_dtype else ("",):
                values = ((backend, engine), dtype) if with_dtype else ((backend, engine),)
                name = "-".join(filter(None, (backend.value, engine, dtype)))
                params.append(pytest.param(*values, id=name, marks=marks))
    metafunc.parametrize(("lib", "dtype") if with_dtype else ("lib",), params, indirect=["lib"])


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    """An open backend, in an engine. Keep to those that can do what a test needs with ``@pytest.mark.backends``.

    The mark takes a function of `polysoftmax.testing.Capability`.
    """
    backend, engine = request.param
    absent = missing(backend, engine)
    if absent and backend in _asked():
        pytest.fail(f"{_ASKED} asks for {backend.value}: {absent}")
    if absent:
        pytest.skip(absent)
    with open_backend(backend, engine) as adapter:
        yield adapter
