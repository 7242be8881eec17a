from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_small_job_loses_nothing_with_a_worker(tmp_path: Path) -> None:
    """It is written on threads and by processes of which one is killed, and the program compares both with NumPy."""
    for name in ("dask", "distributed", "psutil", "zarr"):
        pytest.importorskip(name)
    size = ["--gigabytes", "0.0004", "--vocabulary", "1000", "--chunk", "8"]
    command = [sys.executable, "-m", "benchmarks.out_of_core", *size, "--scratch", tmp_path, "--out", tmp_path / "out"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    threads, processes = result["cases"]
    assert threads["rows"] == processes["rows"] == 100
    assert threads["chunks"] == processes["chunks"] == 13
    assert threads["digests"] == processes["digests"]
    assert processes["killed_at"] >= 0.5
    assert "| two processes, one killed |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]  # what it wrote to Zarr is gone
    assert str(ROOT) not in json.dumps(result)
