"""What the run is on, and whether kernels would run there at all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import PACKAGES_ON_GPU, machine, versions
from tools.gpu.kernels import NOTE
from tools.gpu.worker import in_brief

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.asked import Asked

QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total", "--format=csv,noheader")


def names(asked: Asked) -> list[str]:
    del asked
    return ["machine"]


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    def run(_: str) -> dict[str, Any]:
        found: dict[str, Any] = {"versions": versions(PACKAGES_ON_GPU)}
        try:
            obstacle = "" if asked.dry else without_kernels()
            found["machine"] = machine("cpu" if asked.dry or obstacle else "cuda")
        except Exception as error:  # whatever it is, it is the reason why there is nothing to run
            obstacle = in_brief(error)
        if not asked.dry:
            found |= {"smi": _smi(), "compiler": _compiler(), "cache": _cache()}
        return {"ok": not obstacle, "obstacle": obstacle, **found}

    return run


def without_kernels(device: str = "cuda") -> str:
    """Say why no kernel would run here, so that the formulas are not measured in their place; empty if they would."""
    import torch

    import polysoftmax as ps

    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        with ps.engine("cuda"):
            found = ps.explain(torch.zeros(2, 8, device=device), "softmax")
    except ImportError as error:
        return str(error)
    return "" if found.engine == "cuda" else found.reason


def _smi() -> str:
    try:
        return subprocess.run(QUERY, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"


def _compiler() -> str:
    from polysoftmax.engines.cuda import _compile

    try:
        return _compile.compiler()
    except Exception as error:  # of any kind: what it says is what the reader has to know
        return in_brief(error)


def _cache() -> dict[str, Any]:
    """Return how many files the cache has, and by whom they were compiled if they came along."""
    folder = Path(os.environ["POLYSOFTMAX_CACHE_DIR"])
    note = folder / NOTE
    prepared = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    return {"files": sum(1 for _ in folder.glob("*.cubin")), **prepared}


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[0] if records else {}


def lines(summary: dict[str, Any]) -> list[str]:
    found = [", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())]
    cache, compiler = summary.get("cache"), summary.get("compiler")
    if cache:
        by = f", prepared by {cache['compiler']}" if "compiler" in cache else ""
        found += [summary["smi"], f"{compiler}; {cache['files']} kernels in the cache{by}"]
        if cache.get("compiler", compiler) != compiler:
            found.append("which is another compiler: none of them serves, and all are compiled anew")
    return [*found, *filter(None, [summary.get("obstacle") or summary.get("error")])]
