"""The benchmark: ours against a copy, a read and every peer, in rounds; and the host's time for a call."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case, gpu_cases
from benchmarks.timing import summary
from tools.gpu import contenders, host
from tools.gpu.cases import choose
from tools.gpu.clocks import CLOCK, ROUNDS, can_capture, race, round_of
from tools.gpu.contenders import COPY, OURS, READ
from tools.gpu.worker import in_brief, new_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.asked import Asked
    from tools.gpu.clocks import Contender, Round

BESIDE_PEERS = {"softmax": (4096, 32_768, 131_072), "cross_entropy_grad": (4096, 32_768, 131_072), "sample": (50_257,)}
"""Row lengths at which the other libraries run: their compilers take seconds for each."""

BESIDE_PEERS_OTHERWISE = (32_768,)
ROWS_DRY, LONGEST_DRY, ROUNDS_DRY = 2, 5000, 2


def names(asked: Asked) -> list[str]:
    cases = [case for case in gpu_cases() if not asked.dry or case.length <= LONGEST_DRY]
    beside = [f"{case.name}-peers" for case in cases if case.length in _lengths_beside(case.op)]
    # First what no later run can do without: ours, the limits, and PyTorch.
    return choose([*(case.name for case in cases), *host.NAMES, *beside], asked.case, asked.every)


def _lengths_beside(op: str) -> tuple[int, ...]:
    return BESIDE_PEERS.get(op, BESIDE_PEERS_OTHERWISE)


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    """Return what measures an item; a dry run does so on the CPU, by the clock, and on two rows."""
    # One kernel at a time is compiled, and a pool of compilers takes longer to start than that.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    import polysoftmax as ps

    torch.manual_seed(asked.seed)
    if asked.dry:
        torch.set_num_threads(1)
    cases = {case.name: case for case in gpu_cases()}
    if not asked.dry:
        new_kernels()
    # A capture may begin with a collection, which then does not go through all that the imports have made.
    gc.freeze()

    def run(name: str) -> dict[str, Any]:
        if name in host.NAMES:
            found = host.measure(torch, name, dry=asked.dry)
            print(host.line(name, found), flush=True)
            return found
        case = cases[name.removesuffix("-peers")]
        with ps.engine("portable" if asked.dry else "cuda"):
            found = measure(torch, case, others=name.endswith("-peers"), dry=asked.dry)
        print(line(found), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return found if asked.dry else {**found, **new_kernels().since_last()}

    return run


def measure(torch: Any, case: Case, *, others: bool, dry: bool = False) -> dict[str, Any]:
    """Race a case, and return the median and quartiles of each contender, and what kept one from running."""
    if dry:
        case = replace(case, shape=(ROWS_DRY, case.length))
    xs = contenders.inputs(torch, case, *(("cpu", 2) if dry else ("cuda", contenders.enough(case))))
    makers: dict[str, Callable[[], Contender]] = {
        name: partial(_same, one) for name, one in contenders.arena(torch, case, xs).items()
    }
    if others:
        makers |= contenders.peers(torch, case, xs)
    if dry:
        makers.pop(contenders.COMPILED, None)
    how, rounds, errors = _entered(torch, makers, 2 * len(xs), dry=dry)
    samples = race(rounds, ROUNDS_DRY if dry else ROUNDS)
    return {
        "ok": OURS in rounds,
        "op": case.op,
        "dtype": case.dtype,
        "shape": case.shape,
        "traffic": case.traffic,
        "seconds": {name: asdict(summary(times)) for name, times in samples.items()},
        "how": how,
        "errors": errors,
        # A capture that broke off can leave PyTorch's allocator in the middle of it.
        "restart": bool(errors) and not dry and not can_capture(torch),
    }


def _same(contender: Contender) -> Contender:
    return contender


def _entered(
    torch: Any, makers: dict[str, Callable[[], Contender]], number: int, *, dry: bool
) -> tuple[dict[str, str], dict[str, Round], dict[str, str]]:
    """Return of each contender how it is timed and what does so, or the error that keeps it out of the race."""
    how: dict[str, str] = {}
    rounds: dict[str, Round] = {}
    errors: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contender = make()._replace(how=CLOCK) if dry else make()
            how[name], rounds[name] = round_of(torch, contender, number)
        except Exception as error:  # a peer of any kind that fails leaves the others to be measured
            errors[name] = in_brief(error)
    return how, rounds, errors


def limit(found: dict[str, Any]) -> str:
    """Return which of the two limits a case has: a copy if its answer has the size of its input, else a read."""
    return READ if found["op"] in ("logsumexp", "cross_entropy") or found["op"].startswith("sample") else COPY


def line(found: dict[str, Any]) -> str:
    """One row to read: time, GB/s, share of the limit, and how many times as long each peer took."""
    seconds = {name: one["median"] for name, one in found["seconds"].items()}
    rows, n = found["shape"]
    label = f"{found['op']:18} {found['dtype']:8} {rows:7}x{n:<6}"
    failed = [f"{name}: {error}" for name, error in found["errors"].items()]
    if OURS not in seconds:
        return "  ".join([label, *failed])
    mine = seconds[OURS]
    share = seconds.get(limit(found), 0.0) / mine
    peers = [f"{name} {one / mine:.2f}x" for name, one in seconds.items() if name not in (OURS, COPY, READ)]
    rate = f"{1e6 * mine:9.1f} us {found['traffic'] / mine / 1e9:6.0f} GB/s {share:5.0%} of {limit(found)}"
    return "  ".join([label, rate, *peers, *failed])


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [one["name"] for one in records if not one["ok"]]
    return {"cases": len(records), "failed": failed, "compiled": sum(one.get("new", 0) for one in records)}


def lines(summary: dict[str, Any]) -> list[str]:
    found, failed = summary["cases"], summary["failed"]
    return [f"{found} cases, {len(failed)} failed, {summary['compiled']} kernels compiled meanwhile", *failed]
