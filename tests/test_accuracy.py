"""Every case on every backend, held to mpmath within the bounds of the numerics page."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from polysoftmax.testing import CASES, FORMATS, Adapter, Backend, Case, Reference, call_case, reference, report

if TYPE_CHECKING:
    from pathlib import Path

cached_reference = functools.lru_cache(maxsize=1024)(reference)

SMALL = [one for one in CASES.values() if not one.large]
LARGE = [one for one in CASES.values() if one.large]
# One compiled program a case is dear; what compilation could change does not depend on the case.
COMPILED = (
    "finite rows",
    "special rows",
    "a temperature a row",
    "masked rows, T=0.5",
    "weighted rows",
    "axes (0, 2), T of the reduced shape",
)

FAMILY = ("softmax", "log_softmax", "logsumexp")


def expected(case: Case, op: str, dtype: str) -> Reference:
    return cached_reference(case, op, dtype, FORMATS[dtype].compute.name)


def check(lib: Adapter, case: Case, op: str, dtype: str) -> None:
    want = expected(case, op, dtype)
    y = call_case(lib, case, op, dtype)
    lib.require(y, want.high.shape, dtype)
    answer = lib.values(y)
    excess = want.excess(answer, dtype, FORMATS[dtype].compute.name)
    if excess.size:
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        assert excess[worst] <= 1, (
            f"{op} of {case.name!r} in {dtype} at {worst}: {answer[worst]!r}, "
            f"not {want.high[worst]!r}; {excess[worst]:.3g} of the bound"
        )


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", SMALL, ids=lambda one: one.name)
def test_small(lib: Adapter, case: Case, dtype: str, op: str) -> None:
    if op not in case.ops:
        pytest.skip("not a case of this function")
    if dtype not in lib.can.dtypes:
        pytest.skip("the backend has no such dtype")
    if lib.backend is Backend.TORCH_COMPILE and (case.name not in COMPILED or dtype == "float16"):
        pytest.skip("one compiled program a case is dear, and the case makes no other program")
    check(lib, case, op, dtype)


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", LARGE, ids=lambda one: one.name)
def test_large(lib: Adapter, case: Case, dtype: str, op: str) -> None:
    if dtype not in lib.can.dtypes:
        pytest.skip("the backend has no such dtype")
    if lib.backend in (Backend.TORCH_FUNC, Backend.TORCH_COMPILE, Backend.STRICT_2025):
        pytest.skip("the same formula as on the eager backend")
    check(lib, case, op, dtype)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from polysoftmax.testing import _report

    monkeypatch.setattr(_report, "CASES", {"finite rows": CASES["finite rows"]})
    assert report(["numpy"], peers=True, json=tmp_path / "errors.json") == 0
    shown = capsys.readouterr().out
    assert "numpy (portable)" in shown
    assert "scipy" in shown
    lines = json.loads((tmp_path / "errors.json").read_text())
    assert {line["op"] for line in lines} == set(FAMILY)
    assert all(0 < line["of_bound"] <= 1 for line in lines if line["by"].startswith("numpy"))


def test_report_tells_a_missed_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import polysoftmax
    from polysoftmax.testing import _report

    monkeypatch.setattr(_report, "CASES", {"finite rows": CASES["finite rows"]})
    monkeypatch.setattr(polysoftmax, "softmax", lambda x, **_: np.full_like(x, 0.5))
    assert report(["numpy"]) == 1


def test_report_of_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'nympy': choose from numpy"):
        report(["nympy"])
