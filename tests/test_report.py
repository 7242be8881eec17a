"""The report of the conformance kit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import CASES, _report, report

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report, "CASES", {"finite rows": CASES["finite rows"]})


@pytest.mark.usefixtures("one_case")
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["numpy"], peers=True, json=tmp_path / "errors.json") == 0
    shown = capsys.readouterr().out
    assert "numpy (portable)" in shown
    assert "scipy" in shown
    lines = json.loads((tmp_path / "errors.json").read_text())
    assert {line["op"] for line in lines} == {"softmax", "log_softmax", "logsumexp"}
    assert all(0 < line["of_bound"] <= 1 for line in lines if line["by"].startswith("numpy"))


@pytest.mark.usefixtures("one_case")
def test_a_missed_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polysoftmax, "softmax", lambda x, **_: np.full_like(x, 0.5))
    assert report(["numpy"]) == 1


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'nympy': choose from numpy"):
        report(["nympy"])
