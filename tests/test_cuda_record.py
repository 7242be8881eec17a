"""Where "auto" runs the CUDA kernels: on GPUs on which a run on record has found them right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._record import PASSED, Passed
from tests.test_cuda import FakeDevice, device
from tools.gpu.cases import smoke_cases
from tools.gpu.fake import fake_gpu

__all__ = ["device"]  # a fixture

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ON_RECORD, ANOTHER = 90, 100
RUNS = frozenset(PASSED.values())
X = np.zeros((8, 300), np.float32)


@pytest.fixture(autouse=True)
def one_on_record(monkeypatch):
    monkeypatch.setitem(PASSED, ON_RECORD, Passed("NVIDIA H200", "2026-11-27-gpu-nvidia-h200"))


@pytest.mark.parametrize("run", {*RUNS, Passed("NVIDIA H200", "2026-11-27-gpu-nvidia-h200")})
def test_a_run_on_record_passed_every_smoke_case_on_that_gpu(run):
    """And so did one that is not on record because kernels have changed since, with fewer cases."""
    gpu, folder = run
    found = json.loads((RESULTS / folder / "results.json").read_text("utf-8"))
    smoke = found["stages"]["smoke"]
    assert (found["machine"]["gpu"], found["dry"], smoke["ended"]) == (gpu, False, "done")
    assert found["date"] == folder[:10]
    names = {one["name"] for one in smoke["records"] if one["ok"]}
    assert len(names) == len(smoke["records"]) == smoke["items"]
    missing = {case.name for case in smoke_cases()} - names
    assert not missing or run not in RUNS


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_auto_runs_the_kernels_on_a_gpu_on_record(device, monkeypatch, engine):
    monkeypatch.setattr("polysoftmax.engines._known", lambda name: name)  # there may be no native library
    with ps.engine(engine):
        ps.softmax(X)
        ps.sample(X, 3)
        found = ps.explain(X, "softmax")
    assert [plan.formula for plan, _ in device.launched] == ["softmax", "sample_masses", "sample_draw"]
    assert found.engine == "cuda"
    assert "a row" in found.reason
    assert "all smoke cases passed on an NVIDIA H200, of the same compute capability, on 2026-11-27" in found.reason


def test_elsewhere_auto_runs_the_formulas_and_says_how_to_turn_the_kernels_on(device):
    device.arch = ANOTHER
    with ps.engine("auto"):
        np.testing.assert_allclose(ps.softmax(X), 1 / 300, rtol=1e-6)
        found = ps.explain(X, "softmax")
    assert not device.launched
    assert (found.engine, "not been tested on compute capability 10.0" in found.reason) == ("portable", True)
    assert 'engine("cuda") turns them on' in found.reason
    ps.softmax(X)  # under engine("cuda")
    assert len(device.launched) == 1
    assert "smoke" not in ps.explain(X, "softmax").reason


def test_what_cupy_compiles_itself_is_not_on_record(device):
    device.by_cuda_core = False
    with ps.engine("auto"):
        ps.softmax(X)
        found = ps.explain(X, "softmax")
    assert not device.launched
    assert (found.engine, "have not been tested without cuda.core" in found.reason) == ("portable", True)


def test_portable_runs_the_formulas_on_a_gpu_on_record(device):
    with ps.engine("portable"):
        np.testing.assert_allclose(ps.softmax(X), 1 / 300, rtol=1e-6)
        assert ps.explain(X, "softmax").engine == "portable"
    assert not device.launched


def test_without_cuda_core_auto_runs_the_formulas_and_says_why(device, monkeypatch):
    monkeypatch.setattr(_devices, "device_of", lambda _: "no CUDA kernels here: cuda.core is not installed")
    with ps.engine("auto"):
        np.testing.assert_allclose(ps.softmax(X), 1 / 300, rtol=1e-6)
        found = ps.explain(X, "softmax")
    assert (found.engine, found.reason[-26:]) == ("portable", "cuda.core is not installed")


@pytest.mark.parametrize(
    ("arch", "kernels"), [(ON_RECORD, ["softmax", "softmax_pullback"]), (ANOTHER, [])], ids=["on record", "another"]
)
def test_gradients_of_tensors_follow(arch, kernels):
    torch = pytest.importorskip("torch")
    launched = []
    with fake_gpu(lambda plan: launched.append(plan.formula)) as gpu, ps.engine("auto"):
        gpu.arch = arch
        x = torch.zeros(4, 100, requires_grad=True)
        ps.softmax(x).backward(torch.ones(4, 100))
    assert launched == kernels
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("engine", "arch", "expected"),
    [
        ("auto", ON_RECORD, "cuda"),
        ("auto", ANOTHER, "portable"),
        ("cuda", ANOTHER, "cuda"),
        ("portable", ON_RECORD, "portable"),
    ],
)
def test_the_engine_of_compiled_code_follows(monkeypatch, engine, arch, expected):
    pytest.importorskip("torch")
    operator = pytest.importorskip("polysoftmax.engines._operator")
    found = FakeDevice()
    found.arch = arch
    asked = []
    monkeypatch.setattr(operator, "torch_device", lambda ordinal: asked.append(ordinal) or found)
    monkeypatch.setattr("polysoftmax.engines._known", lambda name: name)
    with ps.engine(engine):
        assert operator._engine("cuda", 1) == expected
    assert asked == [1] * (engine != "portable")
