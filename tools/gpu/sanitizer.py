"""compute-sanitizer on each family and layout once: a few rows, in allocations of their own size."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.gpu.asked import ROOT
from tools.gpu.worker import without_folders

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.asked import Asked

SECONDS = {"memcheck": 40, "racecheck": 35, "synccheck": 20}
SHAPES = {
    "memcheck": ((5, 3), (5, 129), (3, 1001), (3, 4097), (2, 20_001), (2, 140_001)),
    "racecheck": ((5, 129), (2, 4097), (2, 20_001)),
    "synccheck": ((5, 129), (2, 4097), (2, 20_001)),
}
FILTERED = range(1001, 50_000)
"""Lengths of rows that are filtered, too: a sanitizer takes a minute for longer ones."""

USUAL_PLACE = "/usr/local/cuda/bin/compute-sanitizer"
FOUND_AN_ERROR = 9


def names(asked: Asked) -> list[str]:
    return [] if asked.dry else [name for name in SECONDS if asked.case in name]


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    tool = shutil.which("compute-sanitizer") or USUAL_PLACE
    # Without its pool, PyTorch's allocations end where the arrays do; CuPy's pool is turned off in the process.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(check: str) -> dict[str, Any]:
        command = [tool, "--tool", check, "--error-exitcode", str(FOUND_AN_ERROR)]
        if check == "memcheck":
            # The bindings ask the driver for functions that it may not have, and no more is wrong with that.
            command += ["--report-api-errors", "no"]
        command += [sys.executable, str(ROOT / "tools" / "gpu_session.py"), "--sanitized", check]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS[check], check=False
            )
        except subprocess.TimeoutExpired as error:
            text, found = (error.stdout or b"").decode(errors="replace"), {"error": f"not done in {SECONDS[check]} s"}
        except OSError:
            return {"ok": False, "error": "compute-sanitizer is not installed"}
        else:
            text, found = done.stdout + done.stderr, verdict(done.returncode, done.stdout + done.stderr)
        (asked.out / f"{check}.txt").write_text(text[-200_000:], encoding="utf-8")
        found = {"ok": not found.get("error"), **found}
        print(f"{check}: {found.get('error') or 'no errors'}", flush=True)
        return found

    return run


def verdict(code: int, text: str) -> dict[str, Any]:
    """Read what a sanitizer said at its end."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if code == 0 and DONE in text:
        return {}
    said = (summary or text.strip().splitlines() or ["no output"])[-1]
    return {"error": without_folders(f"exit status {code}: {said}")}


DONE = "every call was made"


def sanitized(check: str) -> int:
    """Make the calls that a sanitizer watches, in CuPy if it is there: PyTorch takes ten times as long to load."""
    if importlib.util.find_spec("cupy"):
        import cupy as cp

        cp.cuda.set_allocator(None)
        workload(check, cp.asarray)
        cp.cuda.Device().synchronize()
    else:
        import torch

        workload(check, lambda x: torch.from_numpy(x).cuda())
        torch.cuda.synchronize()
    print(DONE)
    return 0


def workload(check: str, asarray: Callable[[Any], Any]) -> None:
    import polysoftmax as ps

    rng = np.random.default_rng(0)
    with ps.engine("cuda"):
        for rows, n in SHAPES[check]:
            for dtype in ("float32", "float16"):
                x, cotangent = (asarray(rng.normal(size=(rows, n)).astype(dtype)) for _ in range(2))
                where = asarray(rng.random((rows, n)) < 0.8)
                for function in (ps.softmax, ps.log_softmax, ps.logsumexp):
                    function(x)
                ps.softmax(x, where=where, temperature=0.7)
                ps.softmax_vjp(x, cotangent)
                ps.log_softmax_vjp(x, cotangent)
                ps.cross_entropy(x, asarray(np.zeros(rows, np.int64)), reduction="none")
                ps.sample(x, 3)
                ps.sample(x, 3, where=where, temperature=0.5)
                if n in FILTERED:
                    ps.truncate(x, top_k=20)
                    ps.truncate(x, top_p=0.9)
                    ps.sample(x, 3, top_k=20)


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["name"]: one.get("error", "no errors") for one in records}


def lines(summary: dict[str, Any]) -> list[str]:
    return [f"{check}: {found}" for check, found in summary.items()]
