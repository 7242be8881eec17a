"""The report of the conformance kit."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import CASES, _report, report
from polysoftmax.testing._confident import Figure, confident, divergence, log_of_winner, slope_of_winner, table

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


def most(figure: Figure) -> float:
    """The relative error that is allowed; only a derivative of 16-bit logits is rounded to their dtype."""
    if figure.question == "KL":
        return 8 * 2.0**-24 / figure.input
    return 2.0**-8 if (figure.question, figure.dtype) == ("1 - p", "bfloat16") else 4 * 2.0**-24


def test_confident_rows_beside_the_peers() -> None:
    for library in ("torch", "jax", "scipy"):
        pytest.importorskip(library)
    figures = list(confident())
    ours = [one for one in figures if one.by == "polysoftmax"]
    assert len(ours) == 26
    assert not [one for one in ours if one.error > most(one)]
    assert re.search(r"^\| float32 \| log p \| 40 \| [1-9]\.\de-0[89] \| .*\|$", table(figures), re.MULTILINE)


def test_what_confident_rows_are_measured_by() -> None:
    """At a gap of 40 both are e^-40 = 4.248354255291589e-18, to all digits of a double."""
    assert -float(log_of_winner(40.0)) == float(slope_of_winner(40.0)) == 4.248354255291589e-18
    even = np.asarray([0.0, 0.0])  # KL of (1/2, 1/2) and (3/4, 1/4) is log(2/sqrt(3))
    assert float(divergence(even, np.asarray([math.log(3.0), 0.0]))) == pytest.approx(
        float(mpmath.log(2 / mpmath.sqrt(3))), rel=1e-14
    )


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
