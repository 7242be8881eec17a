"""One run: every case, timed and judged, as a dictionary that goes to JSON as it is."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from benchmarks import machine, memory, peers, timing
from benchmarks.cases import Case, cpu_cases, dropped
from benchmarks.targets import target
from polysoftmax.engines import FORMULAS

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = 1
DIGITS = 5


@dataclass(frozen=True)
class Options:
    """What to run and how."""

    backends: tuple[str, ...]
    ops: tuple[str, ...]
    quick: bool = False
    compiled: bool = False
    memory: bool = True
    threads: int = 1


def cases(options: Options) -> list[Case]:
    return [case for backend in options.backends for case in cpu_cases(backend, options.ops, quick=options.quick)]


def memory_cases(options: Options) -> list[Case]:
    wanted = options.memory and memory.supported()
    return memory.cases(options.backends, options.ops, quick=options.quick) if wanted else []


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; ``report`` is told what comes next."""
    peers.set_threads(options.threads)
    facts = machine.machine("cpu")
    timed, weighed = [], []
    for case in cases(options):
        report(f"{case.op}  {case.runner}  {case}")
        timed.append(measure(case, options))
    for case in memory_cases(options):
        report(f"memory of {case.op}  {case.runner}  {case}")
        weighed.append(memory.measure(case, threads=options.threads))
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).date().isoformat(),
        "options": asdict(options),
        "machine": facts,
        "versions": machine.versions(),
        "cases": timed,
        "memory": weighed,
        "dropped": dropped(options.backends, options.ops),
    }


def measure(case: Case, options: Options) -> dict[str, Any]:
    """Time a case, ours and its peers in interleaved rounds, and set the targets beside the ratios."""
    arguments = peers.operands(case)
    lib = peers.library(case.backend)
    calls = peers.contestants(case, arguments, compiled=options.compiled)
    calls["copy"] = timing.threaded_copy(np.ones(case.nbytes, np.uint8), options.threads)
    effort = timing.QUICK if options.quick else timing.Effort()
    samples = timing.race(calls, lib.stopwatch(), effort)
    engine = _engine(case, arguments[0])
    ours = samples.pop(peers.OURS)
    entry = asdict(case) | {
        "runner": case.runner,
        "label": str(case),
        "length": case.length,
        "elements": case.elements,
        "nbytes": case.nbytes,
        "engine": engine,
        "rounds": len(ours),
        "ours": _times(ours),
        "gb_per_s": _significant(case.traffic / statistics.median(ours) / 1e9),
        "copy_gb_per_s": _significant(2 * case.nbytes / statistics.median(samples["copy"]) / 1e9),
        "peers": [],
    }
    for name, theirs in samples.items():
        aim = target(case, name)
        paired = timing.summary([b / a for a, b in zip(ours, theirs, strict=True)])
        peer = {"name": name, **_times(theirs)}
        peer["gb_per_s"] = _significant(case.traffic / statistics.median(theirs) / 1e9)
        peer["ratio"] = _significant(peer["ms"] / entry["ours"]["ms"])
        peer["ratio_quartiles"] = [_significant(paired.low), _significant(paired.high)]
        peer["target"] = asdict(aim) | {"text": str(aim)} if aim else None
        peer["verdict"] = aim.verdict(entry["ours"]["ms"], peer["ms"], paired.high) if aim else None
        entry["peers"].append(peer)
    return entry


def _times(seconds: list[float]) -> dict[str, Any]:
    found = timing.summary([1e3 * one for one in seconds])
    return {"ms": _significant(found.median), "quartiles_ms": [_significant(found.low), _significant(found.high)]}


def _significant(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _engine(case: Case, x: Any) -> str:
    if case.mode == "jit":
        return "the caller's jit"
    if case.axis == 0:
        return ""  # explain knows the last axis alone
    formula = {"softmax_vjp": "softmax", "cross_entropy_grad": "cross_entropy"}.get(case.op, case.op)
    return polysoftmax.explain(x, formula).engine if formula in FORMULAS else ""
