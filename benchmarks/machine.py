"""Facts about the machine and the versions: enough to read the figures by, and nothing that names a person or place."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("polysoftmax", "numpy", "scipy", "torch", "jax", "jaxlib", "array-api-compat")
PACKAGES_ON_GPU = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton", "cupy-cuda13x", "quack-kernels")


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpus": cpus(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device == "cuda":
        facts["gpu"] = _gpu_model()
    return facts


def versions(more: tuple[str, ...] = ()) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def short_name(facts: dict[str, Any]) -> str:
    """Return a word for a folder, such as ``amd-epyc-9b45-2-cpus``."""
    name = facts.get("gpu") or f"{facts['cpu']} {facts['cpus']} cpus"
    name = re.sub(r"\(r\)|\(tm\)|@.*?hz|cpu(?!s)|processor|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind == "Instruction":
            continue
        size = (index / "size").read_text().strip()
        found[f"L{(index / 'level').read_text().strip()}"] = int(size.removesuffix("K")) * 1024
    return found


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _gpu_model() -> str:
    if find_spec("torch") is not None:
        import torch

        return torch.cuda.get_device_name()
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
