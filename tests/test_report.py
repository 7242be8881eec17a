"""The report of the conformance kit."""

from __future__ import annotations

import json
import math
import re
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
    assert "numpy, engine portable" in shown
    assert re.search(r"softmax +float32( +[\d.]+){6} +finite rows", shown)  # three of them are peers
    assert "All 24 bounds are kept." in shown
    lines = json.loads((tmp_path / "errors.json").read_text())
    assert {line["op"] for line in lines} == {"softmax", "log_softmax", "logsumexp"}
    assert {line["by"] for line in lines} == {"numpy (auto)", "numpy (portable)", "scipy", "jax.nn", "torch"}
    assert all(0 < line["of_bound"] <= 1 for line in lines if line["by"].startswith("numpy"))


@pytest.mark.usefixtures("one_case")
def test_a_missed_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(polysoftmax, "softmax", lambda x, **_: np.full_like(x, math.nan))
    assert report(["numpy"], json=tmp_path / "errors.json") == 1
    shown = capsys.readouterr().out
    assert "8 of 24 bounds are missed." in shown
    assert re.search(r"softmax +float32 +wrong +wrong +finite rows", shown)
    lines = json.loads((tmp_path / "errors.json").read_text(), parse_constant=pytest.fail)
    assert [line["ulps"] for line in lines if line["op"] == "softmax"] == [None] * 8


@pytest.mark.usefixtures("one_case")
def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert report(["numpy:readonly"]) == 0
    assert re.search(r"│ softmax +│ float32 +│ [\d.]+ +│ [\d.]+ +│ finite rows", capsys.readouterr().out)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'nympy': choose from numpy"):
        report(["nympy"])
