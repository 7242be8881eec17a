"""The one fixture of the test matrix: a backend, a way of running it, an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from polysoftmax.testing import Adapter, Backend, missing, open_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKED = "POLYSOFTMAX_TEST_BACKENDS"


def _asked() -> list[Backend]:
    names = [name.strip() for name in os.environ.get(_ASKED, "").split(",") if name.strip()]
    known = {one.value: one for one in Backend}
    unknown = sorted(set(names) - set(known))
    if unknown:
        msg = f"{_ASKED} names {', '.join(unknown)}: choose from {', '.join(known)}"
        raise pytest.UsageError(msg)
    return [known[name] for name in names]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(keep, reason): which backends a test of the `lib` fixture runs on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that takes `lib` each backend in each of its engines."""
    if "lib" not in metafunc.fixturenames:
        return
    asked = _asked()
    params = []
    for backend in asked or Backend:
        for engine in backend.capability.engines:
            marks = [pytest.mark.gpu] if backend.capability.gpu else []
            params.append(pytest.param((backend, engine), id=f"{backend.value}-{engine}", marks=marks))
    metafunc.parametrize("lib", params, indirect=True)


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    """An open backend. Marks say where a test makes no sense; `Capability` says why."""
    backend, engine = request.param
    for mark in request.node.iter_markers("backends"):
        keep, reason = mark.args
        if not keep(backend.capability):
            pytest.skip(reason)
    absent = missing(backend)
    if absent and backend in _asked():
        pytest.fail(f"{_ASKED} asks for {backend.value}: {absent}")
    if absent:
        pytest.skip(absent)
    with open_backend(backend, engine) as adapter:
        yield adapter
