"""The matrix itself: what is asked for by name and missing is an error, never a quiet skip."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from polysoftmax.testing import CAPABILITIES, FORMATS, Backend, missing, rounded
from polysoftmax.testing._work import unmultiplied

TESTS = Path(__file__).parent


def run(asked: str) -> subprocess.CompletedProcess[str]:
    """Run one test for the backends that are asked for."""
    test = f"{TESTS / 'test_peers.py'}::test_softmax_of_int8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    environment = {**os.environ, "POLYSOFTMAX_TEST_BACKENDS": asked}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)


def test_only_what_is_asked_for_runs() -> None:
    shown = run("numpy, array_api_strict")
    assert "3 passed" in shown.stdout, shown.stdout


@pytest.mark.skipif(missing(Backend.CUPY) is None, reason="CuPy is here")
def test_what_is_asked_for_and_missing_is_an_error() -> None:
    shown = run("numpy,cupy")
    assert shown.returncode != 0
    assert "POLYSOFTMAX_TEST_BACKENDS asks for cupy: cupy" in shown.stdout
    assert "2 passed" in shown.stdout
    alone = run("cupy")
    assert alone.returncode != 0
    assert "need a GPU: cupy" in alone.stderr


def test_unknown_names_are_an_error() -> None:
    shown = run("numpy,nympy")
    assert shown.returncode != 0
    assert "POLYSOFTMAX_TEST_BACKENDS names nympy: choose from numpy, " in shown.stderr


def test_every_backend_says_what_it_can() -> None:
    assert list(CAPABILITIES) == list(Backend)


@pytest.mark.parametrize("dtype", FORMATS)
def test_products_of_the_fused_backend_round_to_the_values(dtype: str) -> None:
    rng = np.random.default_rng(list(dtype.encode()))
    is_narrow = dtype not in ("float32", "float64")
    largest = FORMATS[dtype].largest if is_narrow else 1000  # which no factor below 1 reaches
    x = rounded(np.append(10 * rng.normal(size=1000), [0, 1, -2, np.inf, -np.inf, np.nan, largest]), dtype)
    v, c = unmultiplied(x, dtype)
    assert isinstance(c, float) != is_narrow
    np.testing.assert_array_equal(rounded(v * c, dtype), x)
    triples = zip(v, np.broadcast_to(c, x.shape), x, strict=True)
    exact = [Fraction(a) * Fraction(b) == Fraction(y) for a, b, y in triples if np.isfinite(y)]
    assert sum(exact) < 0.1 * len(exact)
