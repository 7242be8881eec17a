"""The report on a run on a GPU, drawn from figures that are made up: there is nothing to take real ones from."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from benchmarks.cases import gpu_cases
from tools.gpu import bench, host, smoke
from tools.gpu.cases import smoke_cases

if TYPE_CHECKING:
    from pathlib import Path

for name in ("matplotlib", "rich"):
    pytest.importorskip(name)

COPY_RATE = 3.0e12
RATES = {
    "polysoftmax": 0.92,
    "copy": 1.0,
    "read": 1.02,
    "torch": 0.7,
    "torch.compile": 0.8,
    "cupyx": 0.2,
    "jax": 0.6,
    "liger": 0.75,
}
"""Bandwidth as a share of a copy's."""


def raced(case, *, others):
    fade = 1 - 0.05 * (case.length / 262_144)
    names = RATES if others else list(RATES)[:4]
    draw = case.op.startswith("sample")
    seconds = {}
    for name in names:
        slow = (20 if draw else 1 + case.length / 1e5) if name not in ("polysoftmax", "copy", "read") else 1 / fade
        took = slow * case.traffic / (RATES[name] * COPY_RATE)
        seconds[name] = {"median": took, "low": 0.98 * took, "high": 1.03 * took}
    how = {one: {"jax": "clock", "cupyx": "events"}.get(one, "graph") for one in names}
    return {
        "name": case.name + "-peers" * others,
        "ok": True,
        "op": case.op,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "traffic": case.traffic,
        "seconds": seconds,
        "how": how,
        "errors": {"quack": "RuntimeError: no kernel"} if others and case.op == "softmax" else {},
    }


def called(name):
    times = {host.NO_LAUNCH: 14.0, "polysoftmax": 18.5, "torch": 6.2}
    return {
        "name": name,
        "ok": True,
        "op": name.removeprefix("host-"),
        "shape": list(host.SHAPE),
        "returned": times,
        "done": {one: 1.2 * took for one, took in times.items()},
        "errors": {},
    }


def stage(records, module=None, **changes):
    summary = module.summarize(records) if module else {}
    found = {"ok": True, "ended": "done", "seconds": 31.2, "items": len(records), "summary": summary}
    return found | {"records": records} | changes


@pytest.fixture
def results():
    smoked = [{"name": case.name, "ok": True, "share_of_bound": 0.4} for case in smoke_cases()]
    smoked[3] = {"name": smoked[3]["name"], "ok": False, "nan": 17, "kernels": ["a_kernel"]}
    cases = gpu_cases()
    measured = [raced(case, others=False) for case in cases]
    measured += [called(name) for name in host.NAMES]
    measured += [raced(case, others=True) for case in cases if case.length in (4096, 32_768, 131_072, 50_257)]
    measured.append({"name": "softmax-float32-1x1", "ok": False, "error": "hung: nothing happened for 40 s"})
    return {
        "format": 1,
        "date": "2026-01-02",
        "seed": 7,
        "dry": False,
        "machine": {"cpu": "A CPU", "cpus": 16, "caches": {}, "gpu": "NVIDIA Made-up 80GB"},
        "versions": {"python": "3.12.3", "torch": "2.11.0"},
        "stages": {
            "env": stage([], summary={"smi": "NVIDIA Made-up, 580.0", "compiler": "NVRTC 13.0"}),
            "smoke": stage(smoked, smoke, ok=False),
            "bench": stage(measured, bench, ok=False),
            "sanitizer": stage([], summary={"memcheck": "no errors"}),
        },
    }


def report(results, folder: Path) -> Path:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    from tools import gpu_report

    assert gpu_report.main([str(folder), "--into", str(folder / "into")]) == 0
    (found,) = (folder / "into").iterdir()
    return found


def test_one_command_makes_a_folder_with_json_a_table_and_plots(results, tmp_path):
    found = report(results, tmp_path)
    assert found.name == "2026-01-02-gpu-nvidia-made-up-80gb"
    names = {"results.json", "table.md", "bandwidth.svg", "draws.svg", "host.svg"}
    assert {one.name for one in found.iterdir()} == names
    assert json.loads((found / "results.json").read_text(encoding="utf-8")) == results
    shown = {
        "bandwidth.svg": ("softmax, bfloat16", "NVIDIA Made-up 80GB, 2026-01-02", "the limit"),
        "draws.svg": ("sample, 64×50257 float32", "µs on the device"),
        "host.svg": ("polysoftmax, no launch", "µs until a call returns"),
    }
    for name, words in shown.items():
        text = (found / name).read_text(encoding="utf-8")
        assert [one for one in words if one not in text] == []
        assert "currentColor" in text
        assert "#ffffff" not in text


def test_the_plots_of_runs_on_record_are_up_to_date(tmp_path):
    from tools import gpu_report

    for kept in (gpu_report.ROOT / "benchmarks" / "results").glob("*-gpu-*"):
        assert gpu_report.main([str(kept), "--into", str(tmp_path)]) == 0
        for one in sorted((tmp_path / kept.name).glob("*.svg")):
            digests = [re.findall("<dc:description>.*", (where / one.name).read_text()) for where in (kept, one.parent)]
            assert digests[0] == digests[1], f"run: make gpu-report ARGS=benchmarks/results/{kept.name}"


def test_the_table_says_what_was_measured_and_how(results):
    from tools.gpu import tables

    text = tables.text(results)
    lines = text.splitlines()
    row = lines[lines.index("### softmax") + 6]
    # 128 MiB read and written at 0.92 of 3 TB/s, less the fade of long rows; the columns are those of the peers.
    label = ["bfloat16", "16,384×4,096", "97.3", "2,758", "92% of copy ✓"]
    assert [one.strip() for one in row.split("|")][1:7] == [*label, "1.37× ✓"]
    assert "4.78× ✓ (by events) | 1.59× (by the clock) | 1.28× | failed |" in row
    assert "- quack failed: RuntimeError: no kernel" in lines
    assert "| bench | done | " in text
    assert "| softmax | 14.0 (16.8) | 18.5 (22.2) | 6.2 (7.4) |" in lines
    assert "- **failed**: `softmax-bfloat16-37x3`: nan 17, kernels ['a_kernel']" in lines


def test_a_run_that_ended_early_is_reported_as_far_as_it_came(results, tmp_path):
    del results["stages"]["bench"], results["stages"]["sanitizer"]
    found = report(results, tmp_path)
    assert {one.name for one in found.iterdir()} == {"results.json", "table.md"}


def test_no_results_are_told_so(tmp_path, capsys):
    from tools import gpu_report

    assert gpu_report.main([str(tmp_path)]) == 2
    assert "there are no results to report on" in capsys.readouterr().err
