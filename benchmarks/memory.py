"""Peak memory of one call, measured in a fresh process; Linux only.

The system is asked to forget the process's high-water mark just before the call, so the figure is what the call
itself took at its worst, beyond what was there before it and beyond its result. Buffers that a library keeps
between calls are in neither.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.cases import FORWARD, Case, available
from benchmarks.targets import MEMORY_SLACK

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = (8192, 8192)
SMALL = (4096, 4096)
OPS = (*FORWARD, "cross_entropy", "cross_entropy_grad", "sample")


def supported() -> bool:
    return Path("/proc/self/clear_refs").exists()


def cases(backends: tuple[str, ...], ops: tuple[str, ...], *, quick: bool) -> list[Case]:
    shape = SMALL if quick else LARGE
    chosen = ("softmax",) if quick else available(OPS)
    return [
        Case(op, backend, "jit" if backend == "jax" else "eager", shape)
        for op in chosen
        if op in ops
        for backend in (backends[:1] if quick else backends)
    ]


def measure(case: Case, *, threads: int) -> dict[str, Any]:
    """Return the peak of ours and of the first peer, each from a process of its own."""
    entry = asdict(case) | {"runner": case.runner, "input_mib": case.nbytes / 2**20}
    for name in (peers.OURS, next(iter(peers.library(case.backend).PEERS[case.op]))):
        order = json.dumps({"case": asdict(case), "name": name, "threads": threads})
        command = [sys.executable, "-m", "benchmarks.memory", order]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        extra = json.loads(answer.stdout.splitlines()[-1])
        if name == peers.OURS:
            entry |= {"extra_mib": extra / 2**20, "verdict": "met" if extra <= MEMORY_SLACK else "missed"}
        else:
            entry |= {"peer": name, "peer_extra_mib": extra / 2**20}
    return entry


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak(case: Case, name: str) -> int:
    """Return the bytes that a call takes at its worst, beyond its arguments and its result."""
    arguments = peers.operands(case)
    time_one = peers.library(case.backend).stopwatch()
    call = peers.contestants(case, arguments)[name]
    time_one(call, 1)  # imports and compiles
    result_bytes = _result_bytes(call, time_one)
    gc.collect()
    time.sleep(0.5)  # JAX lets go of a buffer in a thread of its own
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    time_one(call, 1)
    return _status("VmHWM") - before - result_bytes


def _result_bytes(call: Callable[[], Any], time_one: Callable[..., float]) -> int:
    result = call()
    time_one(lambda: result, 1)  # where calls are asynchronous, it is there only now
    return int(getattr(result, "nbytes", 0))


def _main() -> None:
    order = json.loads(sys.argv[1])
    case = Case(**order["case"] | {"shape": tuple(order["case"]["shape"])})
    peers.set_threads(order["threads"])
    print(peak(case, order["name"]))


if __name__ == "__main__":
    _main()
