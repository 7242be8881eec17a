from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def targets() -> Any:
    pytest.importorskip("rich")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import cases, targets

        yield cases, targets


def test_one_quick_case_from_the_command_to_its_files(tmp_path: Path) -> None:
    for name in ("matplotlib", "rich", "scipy"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "benchmarks", "--quick", "--backend", "numpy", "--op", "logsumexp", "--no-memory"]
    subprocess.run([*command, "--threads", "2", "--out", tmp_path], cwd=ROOT, check=True, capture_output=True)

    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"machine", "versions", "options", "cases", "memory", "dropped"} <= result.keys()
    assert {"python", "numpy", "scipy", "polysoftmax"} <= result["versions"].keys()
    assert {"cpu", "cpus", "caches"} <= result["machine"].keys()
    assert result["options"]["threads"] == 2
    assert [10] in [case["shape"] for case in result["cases"]]
    for case in result["cases"]:
        assert case["ours"]["quartiles_ms"][0] <= case["ours"]["ms"] <= case["ours"]["quartiles_ms"][1]
        assert {"scipy", "naive", "copy"} <= {peer["name"] for peer in case["peers"]}
        for peer in case["peers"]:
            assert peer["ratio"] == pytest.approx(peer["ms"] / case["ours"]["ms"], rel=1e-4)
    # A run names no folder, user or host.
    assert str(ROOT) not in json.dumps(result)

    for name in ("ratio-numpy.png", "throughput-numpy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "## logsumexp" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_errors_from_the_command_to_its_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("mpmath", "rich", "scipy", "torch"):
        pytest.importorskip(name)
    from benchmarks import accuracy

    monkeypatch.setattr(accuracy, "ROWS", {name: accuracy.ROWS[name] for name in ("confident", "cancelling")})
    monkeypatch.setattr(accuracy, "CHECKS", {name: accuracy.CHECKS[name] for name in accuracy.OPS})
    accuracy.main(["--backend", "numpy", "--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert str(ROOT) not in json.dumps(result)
    found = {
        (one["function"], one["rows"], one["by"]): one["ulps"] for one in result["rows"] if one["dtype"] == "float32"
    }
    # Where the answer is close to 0, SciPy has none of its digits for a confident row, and nobody where it cancels.
    assert found["log_softmax", "confident", "ours, numpy"] < 2
    assert found["log_softmax", "confident", "scipy"] > 1e6
    assert found["logsumexp", "cancelling", "ours, numpy"] > 1e6
    assert {(one["function"], one["dtype"]) for one in result["functions"]} == {
        (name, dtype) for name in accuracy.OPS for dtype in accuracy.DTYPES
    }
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| log_softmax | bfloat16 | confident | 0.4 | – |" in text
    assert text.count("\n| softmax |") == 7


def test_wrong_answers_stop_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mpmath")
    import polysoftmax
    from benchmarks import accuracy

    monkeypatch.setattr(polysoftmax, "softmax", polysoftmax.log_softmax)
    with pytest.raises(AssertionError, match="softmax of 'moderate' in float32"):
        next(accuracy.errors(["numpy"]))


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_peers_answer_the_same_question(targets: tuple[ModuleType, ModuleType], backend: str) -> None:
    pytest.importorskip(backend)
    pytest.importorskip("scipy")
    from benchmarks import peers

    cases = targets[0]
    for op in cases.available(cases.OPS):
        # In programs, as JAX is raced, too: op by op, each of a peer's would be one to compile.
        case = cases.Case(op, backend, "jit" if backend == "jax" else "eager", (5, 60))
        arguments = peers.operands(case)
        results = {name: np.asarray(call()) for name, call in peers.contestants(case, arguments).items()}
        ours = results.pop(peers.OURS)
        assert results
        for name, theirs in results.items():
            assert theirs.shape == ours.shape, (op, name)
            if op in cases.SAMPLING:
                assert ((theirs >= 0) & (theirs < 60)).all(), (op, name)
            else:
                np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6, err_msg=f"{op} {name}")


@pytest.mark.parametrize(
    ("backend", "op", "shape", "peer", "text"),
    [
        ("numpy", "softmax", (10,), "scipy", "≥ 1.5×"),
        ("numpy", "softmax", (10,), "naive", "≥ 0.8×"),
        ("numpy", "softmax", (100,), "scipy", None),
        ("numpy", "softmax", (1000, 1000), "scipy", "≥ 3×"),
        ("numpy", "softmax", (50_000, 32), "scipy", "≥ 5×"),
        ("numpy", "softmax", (90, 100), "torch, no copy", None),
        ("numpy", "softmax", (1000, 1000), "torch, no copy", "≥ 1×"),
        ("numpy", "softmax", (8192, 8192), "naive", None),
        ("torch", "log_softmax", (10,), "torch", "≤ +5 µs"),
        ("torch", "cross_entropy_grad", (10,), "torch", "≤ +20 µs"),
        ("torch", "cross_entropy", (100_000, 10), "torch", "≥ 3×"),
        ("torch", "softmax", (64, 50_257), "torch", "≥ 1×"),
        ("jax", "logsumexp", (64, 50_257), "jax", "≥ 0.7×"),
        ("numpy", "sample", (64, 50_257), "gumbel", "≥ 25×"),
        ("jax", "sample", (64, 50_257), "jax", "≥ 8×"),
        ("torch", "sample", (4096, 1000), "torch", "≥ 4×"),
        ("torch", "sample", (30_000, 10), "torch", "≥ 1×"),
        ("torch", "sample_top_k", (64, 50_257), "torch", "≥ 1×"),
        ("jax", "sample_top_p", (64, 50_257), "jax", "≥ 3×"),
        ("numpy", "sample", (100_000, 2), "gumbel", "≥ 1×"),
        ("numpy", "sample_many", (999,), "choice", "≥ 1×"),
        ("torch", "sample_many", (50_257,), "torch", "≥ 1×"),
    ],
)
def test_targets_are_those_of_the_design(
    targets: tuple[ModuleType, ModuleType],
    backend: str,
    op: str,
    shape: tuple[int, ...],
    peer: str,
    text: str | None,
) -> None:
    cases, module = targets
    found = module.target(cases.Case(op, backend, "eager", shape), peer)
    assert (str(found) if found else None) == text


def test_a_ratio_under_its_target_is_marked(targets: tuple[ModuleType, ModuleType]) -> None:
    target = targets[1].Target
    assert target(ratio=3.0).verdict(1.0, 3.0, 3.2) == "met"
    assert target(ratio=3.0).verdict(1.0, 2.9, 3.1) == "near"
    assert target(ratio=3.0).verdict(1.0, 2.9, 2.95) == "missed"
    assert target(slack_us=10.0).verdict(0.012, 0.003, 0.3) == "met"
    assert target(slack_us=10.0).verdict(0.014, 0.003, 0.3) == "missed"


@pytest.mark.parametrize(
    ("op", "backend", "bytes_of_answer"),
    [("cross_entropy", "torch", 4), ("logsumexp", "torch", 2), ("sample", "torch", 8), ("sample", "jax", 4)],
)
def test_traffic_counts_answers_in_their_own_dtype(
    op: str, backend: str, bytes_of_answer: int, targets: tuple[ModuleType, ModuleType]
) -> None:
    cases, _ = targets
    assert cases.Case(op, backend, "eager", (5, 60), "bfloat16").traffic == 5 * 60 * 2 + 5 * bytes_of_answer
