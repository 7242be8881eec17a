"""The matrix of array libraries for the tests of other projects.

With ``pytest_plugins = ["polysoftmax.testing.pytest_plugin"]`` in the conftest.py at the root, a test that takes
``lib`` runs once on each library found, and one that takes ``dtype``, too, once in each of its floating dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from polysoftmax.testing._backends import Backend, missing
from polysoftmax.testing._libraries import open_backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polysoftmax.testing._adapters import Adapter

_NAMES = ", ".join(one.value for one in Backend)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the setting that choose libraries."""
    said = f"array libraries, by commas, that tests of `lib` run on, of {_NAMES}; one that is missing fails"
    parser.addoption("--lib", metavar="NAMES", help=said)
    parser.addini("lib", "array libraries that tests of `lib` run on, unless --lib names others", type="args")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, and see that names are known."""
    config.addinivalue_line("markers", "backends(keep): on which libraries a test runs, as a function of Capability")
    _asked(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test each library, and each of its dtypes."""
    if "lib" not in metafunc.fixturenames:
        return
    keep = [mark.args[0] for mark in metafunc.definition.iter_markers("backends")]
    chosen = _asked(metafunc.config) or [one for one in Backend if not missing(one)]
    libraries = [one for one in chosen if all(can(one.capability) for can in keep)]
    if "dtype" in metafunc.fixturenames:
        pairs = [(one, dtype) for one in libraries for dtype in one.capability.dtypes]
        names = [f"{one.value}-{dtype}" for one, dtype in pairs]
        metafunc.parametrize(("lib", "dtype"), pairs, ids=names, indirect=["lib"])
    else:
        metafunc.parametrize("lib", libraries, ids=[one.value for one in libraries], indirect=True)


def _asked(config: pytest.Config) -> list[Backend]:
    option = config.getoption("--lib")
    names = option.split(",") if option else config.getini("lib")
    known = {one.value: one for one in Backend}
    for name in names:
        if name not in known:
            msg = f"unknown array library {name!r}: choose from {_NAMES}"
            raise pytest.UsageError(msg)
    return [known[name] for name in names]


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    """Open an array library for the length of a test, as a `polysoftmax.testing.Adapter`."""
    if reason := missing(request.param):
        pytest.fail(f"{request.param.value} was asked for: {reason}")
    with open_backend(request.param) as adapter:
        yield adapter
