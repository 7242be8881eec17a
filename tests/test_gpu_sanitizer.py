"""NVIDIA's compute-sanitizer on the CUDA kernels: errors of memory, races and barriers, in about two minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polysoftmax.testing import Backend, missing

pytestmark = pytest.mark.gpu

# Every family, and every way of sharing out a row; few rows, since a checked kernel takes some hundred times as long.
# Run after the others of `test_gpu`, these find their kernels compiled.
REDUCED = """float32 and (
    test_forward and (129 or 4097 or 50257)
    or test_vjp and 4097
    or test_cross_entropy and 129
    or (test_sample_draws or test_filters_leave) and 200-1000
)"""


def library() -> str:
    """CuPy where there is one: the kernels are the same, and PyTorch takes longer to load under a sanitizer."""
    absent = {"cupy": missing(Backend.CUPY), "torch": missing(Backend.TORCH_CUDA)}
    usable = [name for name, reason in absent.items() if not reason]
    if not usable:
        pytest.skip("; ".join(absent.values()))
    return usable[0]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "regex=_b[0-9]+_p[0-9]+_c[0-9]"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["-k", " ".join(f"{library()} and {REDUCED}".split()), str(Path(__file__).with_name("test_gpu.py"))]
    # Without its pool, PyTorch's allocations end where the arrays do.
    changes = {"POLYSOFTMAX_SANITIZED": tool, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment = {**os.environ, **changes}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout
