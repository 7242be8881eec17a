"""The pytest plugin, used from a project that is not this one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from polysoftmax.testing import Backend, missing

if TYPE_CHECKING:
    from pathlib import Path

CONFTEST = 'pytest_plugins = ["polysoftmax.testing.pytest_plugin"]\n'
TESTS = """
import numpy as np
import pytest

def double(x):
    return x + x

def spoil(x):
    x[...] = 0
    return x

def test_double(lib, dtype):
    y = lib.call(double, lib.asarray([1.0, 2.0], dtype))
    lib.require(y, (2,), dtype)
    assert lib.values(y).tolist() == [2.0, 4.0]

@pytest.mark.backends(lambda can: can.mutable)
def test_spoil(lib):
    with pytest.raises(AssertionError, match="spoil wrote to its input"):
        lib.call(spoil, lib.asarray([1.0], "float32"))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_double.py").write_text(TESTS, encoding="utf-8")
    return tmp_path


def run(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-v", *options]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_each_library_in_each_dtype(project: Path) -> None:
    shown = run(project, "--lib", "numpy,array_api_strict")
    assert shown.returncode == 0, shown.stdout
    for name in ("numpy-bfloat16", "numpy-float64", "array_api_strict-float32"):
        assert f"test_double[{name}] PASSED" in shown.stdout
    assert "test_spoil[numpy] PASSED" in shown.stdout
    assert "8 passed" in shown.stdout


def test_settings_name_libraries(project: Path) -> None:
    (project / "pytest.ini").write_text("[pytest]\nlib = numpy\n", encoding="utf-8")
    assert "5 passed" in run(project).stdout


def test_unknown_names_are_an_error(project: Path) -> None:
    shown = run(project, "--lib", "nympy")
    assert shown.returncode != 0
    assert "unknown array library 'nympy': choose from numpy, " in shown.stderr


@pytest.mark.skipif(missing(Backend.CUPY) is None, reason="CuPy is here")
def test_what_is_asked_for_and_missing_fails(project: Path) -> None:
    shown = run(project, "--lib", "cupy")
    assert shown.returncode != 0
    assert "cupy was asked for: cupy is not installed" in shown.stdout
