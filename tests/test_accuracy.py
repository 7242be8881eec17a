"""Every case on every backend, held to mpmath within the bounds of the numerics page."""

from __future__ import annotations

import pytest

from polysoftmax.testing import CASES, Adapter, check_case

FAMILY = ("softmax", "log_softmax", "logsumexp")


def failures(lib: Adapter, op: str, dtype: str, *, large: bool) -> str:
    every = not lib.can.compiles
    cases = [one for one in CASES.values() if op in one.ops and one.large == large and (every or one.core)]
    assert cases
    outcomes = [check_case(lib, one, op, dtype) for one in cases]
    return "\n".join(str(one) for one in outcomes if not one.excess <= 1)


@pytest.mark.parametrize("op", FAMILY)
def test_small_cases(lib: Adapter, dtype: str, op: str) -> None:
    assert not failures(lib, op, dtype, large=False)


@pytest.mark.parametrize("op", FAMILY)
def test_large_cases(lib: Adapter, dtype: str, op: str) -> None:
    assert not failures(lib, op, dtype, large=True)
