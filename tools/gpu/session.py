"""The stages of a run, one after the other, and results.json after each."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.gpu.asked import CACHE, ROOT, Asked
from tools.gpu.supervisor import DONE, supervise
from tools.gpu.worker import journal_of, work

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = 1


class Stage(NamedTuple):
    """A module of this package, the seconds it may take, and for how many it may be silent."""

    module: str
    seconds: float
    patience: float


STAGES = {
    "env": Stage("environment", 25, 25),
    "kernels": Stage("kernels", 30, 30),
    "smoke": Stage("smoke", 75, 25),
    "bench": Stage("bench", 115, 40),
    "sanitizer": Stage("sanitizer", 100, 60),
    "tests": Stage("suite", 130, 130),
}
"""475 s in all. What a stage leaves of its time is the next one's."""

DRY = ("env", "smoke")
NOTHING_TO_RUN = 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_session.py", description="One run on a machine with a GPU: is it right, and how fast is it?"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu" / "results", help="folder (default .gpu/results)")
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)}")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the item of this name, or those that have it")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only one item in N")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, which is printed)")
    parser.add_argument("--dry", action="store_true", help="on a CPU: the formula in place of each kernel")
    parser.add_argument(
        "--prepare", nargs="?", type=Path, const=CACHE, metavar="FOLDER",
        help="compile here, without a GPU, what the stages launch (default folder .gpu/cache)",
    )  # fmt: skip
    parser.add_argument(
        "--nvrtc", type=Path, metavar="FOLDER",
        help="for --prepare: the compiler that pip install --target FOLDER put there, in place of the installed one",
    )  # fmt: skip
    parser.add_argument("--arch", type=int, default=90, help="compute capability for --prepare (default 90)")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.stages = tuple((found.stages or ",".join(DRY if found.dry else STAGES)).split(","))
    unknown = [name for name in found.stages if name not in STAGES]
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for. The status is 0 if all was well, 1 if something failed, 2 if nothing could run."""
    options = parse(arguments)
    missing = obstacle(needs_cuda=not (options.dry or options.prepare))
    if missing:
        print(f"tools/gpu_session.py {missing}", file=sys.stderr)
        return NOTHING_TO_RUN
    os.environ.setdefault("POLYSOFTMAX_CACHE_DIR", str(CACHE))
    # JAX stands beside the others and must leave them memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.prepare:
        from tools.gpu import kernels

        return kernels.prepare(options.prepare.resolve(), options.arch, options.case, options.nvrtc)
    if options.sanitized:
        from tools.gpu import sanitizer

        return sanitizer.sanitized(options.sanitized)
    asked = Asked(options.out.resolve(), options.seed or 0, options.case, options.every, options.dry)
    if options.worker:
        return work(STAGES[options.worker].module, asked, options.skip)
    if options.seed is None:
        asked = replace(asked, seed=int.from_bytes(os.urandom(3), "little"))
    # timeout(1) ends this process alone: those of a stage are ended on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    return run(options.stages, asked)


def obstacle(*, needs_cuda: bool) -> str:
    """Say which library is missing; empty if none is."""
    try:
        import polysoftmax  # noqa: F401
    except ImportError as error:
        return f"cannot import polysoftmax ({error}): pip install array-api-compat"
    if not find_spec("numpy"):
        return "needs NumPy: pip install numpy"
    if not find_spec("torch"):
        return f"needs PyTorch{' built for CUDA' * needs_cuda}: pip install torch"
    return ""


def run(stages: tuple[str, ...], asked: Asked) -> int:
    """Run the stages, and write ``results.json`` after each."""
    asked.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {asked.seed}", flush=True)
    results: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": asked.seed,
        "dry": asked.dry,
        "stages": {},
    }
    end, begun = time.monotonic(), time.monotonic()
    for name in stages:
        end += STAGES[name].seconds
        found = results["stages"][name] = run_stage(name, asked, end - time.monotonic())
        if name == "env":
            results |= {key: found["records"][0].pop(key, {}) for key in ("machine", "versions") if found["records"]}
        (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        journal_of(asked, STAGES[name].module).unlink(missing_ok=True)
        if name == "env" and found["summary"].get("obstacle"):
            print(f"tools/gpu_session.py has nothing to run: {found['summary']['obstacle']}", file=sys.stderr)
            return NOTHING_TO_RUN
    passed = all(stage["ok"] for stage in results["stages"].values())
    words = "everything passed" if passed else "not everything passed"
    print(f"{words}; {time.monotonic() - begun:.0f} s; results.json and logs are in {asked.out.name}/", flush=True)
    return 0 if passed else 1


def run_stage(name: str, asked: Asked, seconds: float, command: Callable[[int], list[str]] | None = None) -> Any:
    """Run a stage in its processes, and return what it found."""
    stage, begun = STAGES[name], time.monotonic()
    module = import_module(f"tools.gpu.{stage.module}")
    outcome = supervise(
        command or (lambda skip: worker(name, asked, skip)),
        journal_of(asked, stage.module),
        seconds=seconds,
        patience=stage.patience,
    )
    summary, items = module.summarize(outcome.records), len(module.names(asked))
    taken = round(time.monotonic() - begun, 1)
    count = "" if len(outcome.records) == items else f", {len(outcome.records)} of {items}"
    print(f"== {name}: {outcome.ended}{count}, {taken} s", *module.lines(summary), sep="\n   ", flush=True)
    passed = outcome.ended == DONE and all(one["ok"] for one in outcome.records)
    return {
        "ok": passed,
        "ended": outcome.ended,
        "seconds": taken,
        "items": items,
        "summary": summary,
        "records": outcome.records,
    }


def worker(name: str, asked: Asked, skip: int) -> list[str]:
    """Return the command of a stage's process."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_session.py"), "--worker", name, "--skip", str(skip)]
    command += ["--out", str(asked.out), "--seed", str(asked.seed), "--case", asked.case, "--every", str(asked.every)]
    return [*command, "--dry"] if asked.dry else command
