"""``python -m benchmarks.gpu``: the CUDA kernels against their peers and against the bandwidth of the device.

Every row is one interleaved race: ours, each peer, a copy and a read of the same bytes, on inputs of 256 MB in all,
which no cache holds, rotated. Times are those of device events, with the calls queued before the first of them runs,
so that Python is not measured; JAX runs on a stream of its own and is timed by the clock, over bursts of calls. No
figure of this file has been measured yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import PACKAGES_ON_GPU, machine, short_name, versions
from benchmarks.timing import QUICK, Effort, race, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKING_SET = 256 << 20
LENGTHS = (256, 1024, 4096, 16384, 32768, 65536, 131072, 262144)
DTYPES = ("bfloat16", "float16", "float32")
LOGITS = ((128, 128256), (64, 50257))
COPY, READ = "copy", "read"
QUEUED, HEAD_START = 16, 8_000_000
"""Calls of a burst at most, and for how many cycles the device sleeps while they are queued: about 4 ms.

That is 250 µs of Python for each. The queue itself holds about a thousand kernels.
"""
OURS = "polysoftmax"


@dataclass(frozen=True)
class Case:
    """An operation on rows; ``traffic`` is how many times the bytes of the rows have to move."""

    op: str
    rows: int
    n: int
    dtype: str
    traffic: int

    def __str__(self) -> str:
        return f"{self.op} {self.rows}x{self.n} {self.dtype}"


class OnOwnStream:
    """A call of a library that does not run on PyTorch's stream."""

    def __init__(self, call: Callable[[], Any], finish: Callable[[Any], Any]) -> None:
        self.call = call
        self.finish = finish


def cases(*, quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        size = 4 if dtype == "float32" else 2
        for op, traffic in (("softmax", 2), ("log_softmax", 2), ("logsumexp", 1), ("cross_entropy", 1)):
            for n in LENGTHS[1::3] if quick else LENGTHS:
                yield Case(op, WORKING_SET // (2 * n * size), n, dtype, traffic)
        for op in ("sample", "sample top_k=50", "sample top_p=0.9"):
            for rows, n in LOGITS:
                yield Case(op, rows, n, dtype, 1)


def inputs(torch: Any, case: Case, device: str) -> list[Any]:
    """Return as many inputs as fill the working set, and at least two."""
    size = case.rows * case.n * (4 if case.dtype == "float32" else 2)
    dtype = getattr(torch, case.dtype)
    count = max(2, -(-WORKING_SET // size))
    return [3 * torch.randn(case.rows, case.n, device=device, dtype=torch.float32).to(dtype) for _ in range(count)]


def rotated(function: Callable[[Any], Any], arrays: list[Any]) -> Callable[[], Any]:
    turn = cycle(arrays)
    return lambda: function(next(turn))


def contenders(torch: Any, case: Case, device: str) -> dict[str, Any]:
    arrays = inputs(torch, case, device)
    targets = torch.randint(case.n, (case.rows,), device=device)
    # Flat, since a row of 16-bit entries may have an odd number of them.
    buffer, words = torch.empty_like(arrays[0]), [one.view(-1).view(torch.int32) for one in arrays]
    calls: dict[str, Any] = {
        OURS: rotated(_ours(torch, case, targets), arrays),
        COPY: rotated(buffer.copy_, arrays),
        READ: rotated(lambda x: x.amax(), words),
    }
    plain = _torch(torch, case, targets)
    calls["torch"] = rotated(plain, arrays)
    if not case.op.startswith("sample"):
        calls["torch.compile"] = rotated(torch.compile(plain, dynamic=False), arrays)
    for name, peer in {"cupyx": _cupyx, "jax": _jax, "quack": _quack}.items():
        call = peer(torch, case, arrays, targets)
        if call is not None:
            calls[name] = call
    return calls


def _options(op: str) -> dict[str, Any]:
    name, _, value = op.partition(" ")[2].partition("=")
    return {name: int(value) if name == "top_k" else float(value)} if name else {}


def _ours(torch: Any, case: Case, targets: Any) -> Callable[[Any], Any]:
    import polysoftmax as ps

    if case.op == "cross_entropy":
        return lambda x: ps.cross_entropy(x, targets, reduction="none")
    if case.op.startswith("sample"):
        options, key = _options(case.op), ps.random.key(7, xp=torch, device=targets.device)
        return lambda x: ps.sample(x, key, **options)
    return getattr(ps, case.op)  # type: ignore[no-any-return]


def _torch(torch: Any, case: Case, targets: Any) -> Callable[[Any], Any]:
    functional = torch.nn.functional
    options = _options(case.op)

    def top_k(x: Any) -> Any:
        values, index = torch.topk(x, options["top_k"])
        return index.gather(-1, torch.multinomial(values.float().softmax(-1), 1))

    def top_p(x: Any) -> Any:
        ordered, index = torch.sort(x.float(), descending=True)
        p = ordered.softmax(-1)
        p[p.cumsum(-1) - p >= options["top_p"]] = 0
        return index.gather(-1, torch.multinomial(p, 1))

    return {  # type: ignore[no-any-return]
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "cross_entropy": lambda x: functional.cross_entropy(x, targets, reduction="none"),
        "sample": lambda x: torch.multinomial(x.float().softmax(-1), 1),
        "sample top_k=50": top_k,
        "sample top_p=0.9": top_p,
    }[case.op]


def _cupyx(torch: Any, case: Case, arrays: list[Any], targets: Any) -> Any:
    del targets
    if case.dtype == "bfloat16" or case.op not in ("softmax", "log_softmax", "logsumexp") or not find_spec("cupyx"):
        return None
    import cupy
    import cupyx.scipy.special

    function = getattr(cupyx.scipy.special, case.op)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call(x: Any) -> Any:
        with stream:
            return function(x, axis=-1)

    return rotated(call, [cupy.from_dlpack(one) for one in arrays])


def _jax(torch: Any, case: Case, arrays: list[Any], targets: Any) -> Any:
    del targets
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not find_spec("jax"):
        return None
    import jax

    if jax.default_backend() != "gpu":
        return None
    key = jax.random.key(7)
    functions = {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": lambda x: jax.scipy.special.logsumexp(x, axis=-1),
        "sample": lambda x: jax.random.categorical(key, x),
    }
    if case.op not in functions:
        return None
    torch.cuda.synchronize()
    call = rotated(jax.jit(functions[case.op]), [jax.dlpack.from_dlpack(one) for one in arrays])
    return OnOwnStream(call, jax.block_until_ready)


def _quack(torch: Any, case: Case, arrays: list[Any], targets: Any) -> Any:
    del torch
    if not find_spec("quack") or case.op not in ("softmax", "cross_entropy"):
        return None
    import quack

    if case.op == "softmax":
        return rotated(quack.softmax, arrays)
    return rotated(lambda x: quack.cross_entropy(x, targets, reduction="none"), arrays)


def stopwatch(torch: Any) -> Callable[[Any, int], float]:
    """Return a stopwatch that goes by device events, or by the clock for what runs on a stream of its own."""

    def time_one(call: Any, number: int) -> float:
        if isinstance(call, OnOwnStream):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                last = call.call()
            call.finish(last)
            return (time.perf_counter() - start) / number
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)  # PyTorch has no public way to keep the device busy
        begin.record()
        number = min(number, QUEUED)
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / number

    return time_one


def measure(torch: Any, case: Case, effort: Effort) -> dict[str, Any]:
    import polysoftmax as ps

    torch.compiler.reset()  # which compiles a function for eight sizes and runs it as it stands for any other
    with ps.engine("cuda"), torch.no_grad():
        samples = race(contenders(torch, case, "cuda"), stopwatch(torch), effort)
    size = case.rows * case.n * (4 if case.dtype == "float32" else 2)
    return {
        "case": asdict(case),
        "bytes": case.traffic * size,
        "seconds": {name: asdict(summary(times)) for name, times in samples.items()},
        "samples": samples,
    }


def without_kernels(torch: Any, device: str = "cuda") -> str:
    """Say why no kernel would run here, so that the formulas are not measured in their place; empty if they would."""
    import polysoftmax as ps

    try:
        with ps.engine("cuda"):
            found = ps.explain(torch.zeros(2, 8, device=device), "softmax")
    except ImportError as error:
        return str(error)
    return "" if found.engine == "cuda" else found.reason


def line(result: dict[str, Any]) -> str:
    """One row to read: milliseconds, GB/s, share of the limit, and how many times as long each peer took."""
    seconds = {name: one["median"] for name, one in result["seconds"].items()}
    ours, case = seconds[OURS], Case(**result["case"])
    limit = seconds[COPY] if case.traffic > 1 else seconds[READ]
    peers = "  ".join(f"{name} {one / ours:.2f}x" for name, one in seconds.items() if name not in (OURS, COPY, READ))
    rate = result["bytes"] / ours / 1e9
    return f"{case!s:42} {1e3 * ours:8.3f} ms {rate:7.0f} GB/s  {limit / ours:5.0%} of the limit   {peers}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw GB/s by row length for softmax, one panel a dtype, ours beside every peer and the copy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(DTYPES), 3.6), layout="constrained")
    panels = figure.subplots(1, len(DTYPES), sharey=True)
    for axes, dtype in zip(panels, DTYPES, strict=True):
        chosen = [one for one in results if one["case"]["op"] == "softmax" and one["case"]["dtype"] == dtype]
        for name in dict.fromkeys(name for one in chosen for name in one["seconds"] if name != READ):
            points = [
                (one["case"]["n"], one["bytes"] / one["seconds"][name]["median"] / 1e9)
                for one in chosen
                if name in one["seconds"]
            ]
            style = {"color": "#777777", "linestyle": "--"} if name == COPY else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), label=name, linewidth=3 if name == OURS else 1.5, **style)
        axes.set_xscale("log", base=2)
        axes.set_title(f"softmax, {dtype}")
        axes.set_xlabel("row length")
        axes.grid(visible=True, alpha=0.25)
    panels[0].set_ylabel("GB/s")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--match", default="", help="only cases with this in their names, such as 'softmax' or 'float32'"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    asked = parser.parse_args()
    if not find_spec("torch"):
        print("benchmarks.gpu needs PyTorch built for CUDA: pip install torch", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    obstacle = without_kernels(torch)
    if obstacle:
        print(f"benchmarks.gpu has nothing to measure: {obstacle}", file=sys.stderr)
        return 2
    torch.manual_seed(time.time_ns())
    effort = QUICK if asked.quick else Effort(seconds=0.5, least=9)
    chosen = [case for case in cases(quick=asked.quick) if asked.match in str(case)]
    if not chosen:
        print(f"no case matches {asked.match!r}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": machine("cuda"), "versions": versions(PACKAGES_ON_GPU), "results": []}
    folder, results = asked.results / short_name(report["machine"]), report["results"]
    folder.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        results.append(measure(torch, case, effort))
        print(line(results[-1]), flush=True)
        # After every case: a peer that fails at a later one, or the reader who has seen enough, loses nothing.
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        torch.cuda.empty_cache()
    plot(results, folder / "gpu.png")
    shares = [_share(one) for one in results]
    print(f"{len(results)} cases, median {statistics.median(shares):.0%} of the limit; written to {folder}")
    return 0


def _share(result: dict[str, Any]) -> float:
    limit = COPY if result["case"]["traffic"] > 1 else READ
    return float(result["seconds"][limit]["median"] / result["seconds"][OURS]["median"])


if __name__ == "__main__":
    sys.exit(main())
