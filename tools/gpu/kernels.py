"""The kernels that the stages launch, found without a GPU, and compiled on all CPUs before they are needed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.cases import gpu_cases
from benchmarks.machine import cpus
from tools.gpu import contenders, sanitizer, smoke
from tools.gpu.cases import choose, smoke_cases
from tools.gpu.fake import fake_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from polysoftmax.engines.cuda._plan import Kernel, Machine
    from tools.gpu.asked import Asked

NOTE = "prepared.json"


def names(asked: Asked) -> list[str]:
    return [] if asked.dry else ["compile"]


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    """Return what compiles, for the device that is there, every kernel that the cache does not have."""
    import torch

    from polysoftmax.engines.cuda import _devices

    device = _devices.device_of(torch.zeros(1, device="cuda"))

    def run(_: str) -> dict[str, Any]:
        if isinstance(device, str):
            return {"ok": False, "error": device}
        return compile_all(needed(device.machine, asked.case), device.target)

    return run


def needed(machine: Machine | None = None, text: str = "") -> list[Kernel]:
    """Return the kernels of the smoke, bench and sanitizer stages; of cases with ``text`` in their names, if given."""
    import torch

    found: dict[Kernel, None] = {}
    cases = {case.name: case for case in smoke_cases()}
    benchmarks = {case.name: case for case in gpu_cases()}
    with fake_gpu(lambda plan: found.setdefault(plan.kernel), machine):
        for name in choose(list(cases), text, 1):
            case = cases[name]
            given = smoke.arguments(torch, case, 0, "cpu", normal=torch.empty)
            smoke.answer(case, given, 0, "cuda")
        for name in choose(list(benchmarks), text, 1):
            contenders.call_ours_once(torch, benchmarks[name])
        if not text:
            for check in sanitizer.SHAPES:
                sanitizer.workload(check, torch.from_numpy)
    return list(found)


def compile_all(kernels: list[Kernel], arch: int, nvrtc: Path | None = None) -> dict[str, Any]:
    """Compile what the cache does not have, in as many processes as there are CPUs."""
    begun = time.monotonic()
    # Started anew and not forked: this process may have threads of PyTorch's and a CUDA context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cpus(), max(1, len(kernels))), context, partial(_begin, nvrtc)) as pool:
        done = list(_counted(pool.map(_compile, [(kernel, arch) for kernel in kernels], chunksize=4), len(kernels)))
    failed = {kernel.name: error for kernel, (_, _, error) in zip(kernels, done, strict=True) if error}
    for name, error in failed.items():
        print(f"FAILED to compile {name}: {error}", flush=True)
    return {
        "ok": not failed,
        "kernels": len(kernels),
        "anew": sum(anew for _, anew, _ in done),
        "bytes": sum(size for size, _, _ in done),
        "seconds": round(time.monotonic() - begun, 1),
        "failed": failed,
    }


def _counted(done: Iterable[Any], number: int) -> Iterator[Any]:
    """Count what is done for whoever is watching."""
    for i, one in enumerate(done, 1):
        if sys.stderr.isatty():
            print(f"\r{i} of {number}", end="\n" if i == number else "", file=sys.stderr, flush=True)
        yield one


def _begin(nvrtc: Path | None) -> None:
    if nvrtc:
        from polysoftmax.engines.cuda.__main__ import load_nvrtc

        load_nvrtc(nvrtc)


def _compile(job: tuple[Kernel, int]) -> tuple[int, bool, str]:
    """Return the size of a kernel's machine code, whether it had to be compiled, and what went wrong."""
    from polysoftmax.engines.cuda import _cache
    from tools.gpu.worker import in_brief, new_kernels

    kernel, arch = job
    new = new_kernels()
    try:
        size = len(_cache.machine_code(kernel, arch))
    except Exception as error:  # one kernel that does not compile is a result
        return 0, True, in_brief(error)
    return size, bool(new.since_last()), ""


def prepare(folder: Path, arch: int, text: str, nvrtc: Path | None = None) -> int:
    """Compile here what the stages launch on a GPU elsewhere, into a folder that goes along.

    ``nvrtc`` is a folder with another compiler than the one installed, that of the machine elsewhere.
    """
    from polysoftmax.engines.cuda import _compile

    os.environ["POLYSOFTMAX_CACHE_DIR"] = str(folder)
    _begin(nvrtc)
    wanted = needed(text=text)
    print(f"{len(wanted)} kernels, {cpus()} at a time, by {_compile.compiler()}", flush=True)
    found = compile_all(wanted, arch, nvrtc)
    note = {"compiler": _compile.compiler(), "arch": arch, "kernels": found["kernels"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
    print(f"{lines(found)[0]}: {found['bytes'] / 2**20:.1f} MiB by {note['compiler']} for sm_{arch}")
    return 0 if found["ok"] else 1


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[0] if records else {}


def lines(summary: dict[str, Any]) -> list[str]:
    if "kernels" not in summary:
        return [summary.get("error", "nothing was compiled")]
    kept = summary["kernels"] - summary["anew"]
    anew = f"{summary['anew']} compiled in {summary['seconds']} s"
    return [f"{summary['kernels']} kernels: {kept} from the cache, {anew}"]
