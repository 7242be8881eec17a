"""The results of a run as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.table import MARKS
from benchmarks.targets import gpu_target
from tools.gpu.bench import limit
from tools.gpu.cases import DTYPES
from tools.gpu.clocks import CLOCK, EVENTS, HOW
from tools.gpu.contenders import COPY, OURS, READ
from tools.gpu.host import NO_LAUNCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NOTES = {CLOCK: "by the clock", EVENTS: "by events"}
EMPTY = "–"


def text(results: dict[str, Any]) -> str:
    stages = results["stages"]
    sections = [*_heading(results), *_stages(stages)]
    raced = records(results, "bench")
    if raced:
        sections += _bench([one for one in raced if "seconds" in one])
        sections += _host([one for one in raced if "returned" in one])
    if "smoke" in stages:
        sections += _smoke(stages["smoke"])
    return "\n".join(sections) + "\n"


def records(results: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return what a stage has found, without the items that crashed or hung."""
    found = results["stages"].get(stage, {}).get("records", [])
    return [one for one in found if "op" in one]


def _heading(results: dict[str, Any]) -> Iterator[str]:
    facts, environment = results.get("machine") or {}, results["stages"].get("env", {}).get("summary", {})
    where = facts.get("gpu") or facts.get("cpu") or "unknown machine"
    yield f"# {where}, {results['date']}\n"
    if results.get("dry"):
        yield "**A dry run on a CPU: formulas in place of kernels. No figure here means anything.**\n"
    said = [environment.get("smi"), environment.get("compiler"), f"seed {results['seed']}"]
    yield "; ".join(filter(None, said)) + "  "
    yield ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()) + "\n"


def _stages(stages: dict[str, Any]) -> Iterator[str]:
    yield "## What ran\n"
    rows = []
    for name, one in stages.items():
        done = f"{len(one['records'])} of {one['items']}"
        passed = sum(bool(record["ok"]) for record in one["records"])
        rows.append((name, one["ended"], done, str(passed), f"{one['seconds']:.0f}"))
    yield from _table(("stage", "how it ended", "items", "passed", "seconds"), rows)
    for name in ("kernels", "bench", "sanitizer", "tests"):
        summary = stages.get(name, {}).get("summary", {})
        said = [f"{key} {value}" for key, value in summary.items() if value and key not in ("name", "ok")]
        if said:
            yield f"{name}: {', '.join(said)}\n"


def _bench(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Time on the device\n"
    yield (
        "Medians of interleaved rounds, on inputs that no cache holds together. GB/s counts every input and answer "
        "once. The share is that of a copy or a read of the same bytes. A peer's column is its time over ours, in "
        "the same rounds: above 1× ours is faster. ✓ and ✗: the design's target, met or missed.\n"
    )
    yield from (f"- {how}: {words}" for how, words in HOW.items())
    yield ""
    for op in dict.fromkeys(one["op"] for one in found):
        yield f"### {op}\n"
        mine = [one for one in found if one["op"] == op]
        peers = list(dict.fromkeys(name for one in mine for name in one["how"] if name not in (OURS, COPY, READ)))
        peers += [name for one in mine for name in one["errors"] if name not in (*peers, OURS, COPY, READ)]
        peers = list(dict.fromkeys(peers))
        cases = dict.fromkeys((one["dtype"], tuple(one["shape"])) for one in mine)
        rows = [_row([one for one in mine if (one["dtype"], tuple(one["shape"])) == case], peers) for case in cases]
        yield from _table(("dtype", "rows × length", "µs", "GB/s", "share", *peers), rows)
    yield from _errors(found)


def _row(same: list[dict[str, Any]], peers: list[str]) -> tuple[str, ...]:
    """Return the row of a case, which was raced once or, with other libraries beside it, twice."""
    first, last = same[0], same[-1]
    label = (first["dtype"], "×".join(f"{size:,}" for size in first["shape"]))
    if OURS not in first["seconds"]:
        return (*label, "failed", *[EMPTY] * (2 + len(peers)))
    mine = first["seconds"][OURS]["median"]
    share = EMPTY
    if limit(first) in first["seconds"]:
        ratio = first["seconds"][limit(first)]["median"] / mine
        share = f"{ratio:.0%} of {limit(first)}{_mark(first, limit(first), ratio)}"
    times = (f"{1e6 * mine:,.1f}", f"{first['traffic'] / mine / 1e9:,.0f}", share)
    return (*label, *times, *(_ratio(first if name in first["seconds"] else last, name) for name in peers))


def _ratio(one: dict[str, Any], name: str) -> str:
    if name not in one["seconds"] or OURS not in one["seconds"]:
        return "failed" if name in one["errors"] else EMPTY
    ratio = one["seconds"][name]["median"] / one["seconds"][OURS]["median"]
    note = NOTES.get(one["how"][name])
    return f"{ratio:.2f}×{_mark(one, name, ratio)}" + (f" ({note})" if note else "")


def _mark(one: dict[str, Any], peer: str, ratio: float) -> str:
    target = gpu_target(one["op"], one["shape"][-1], peer)
    if target is None:
        return ""
    return f" {MARKS['met' if ratio >= (target.ratio or 0) else 'missed']}"


def _errors(found: list[dict[str, Any]]) -> Iterator[str]:
    errors = dict.fromkeys((name, error) for one in found for name, error in one["errors"].items())
    yield from (f"- {name} failed: {error}" for name, error in errors)
    if errors:
        yield ""


def _host(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    shape = "×".join(map(str, found[0]["shape"]))
    yield "## Time on the host\n"
    yield (
        f"Microseconds a call on {shape} entries of bfloat16, medians of bursts: until a call returns, and in brackets "
        "until the device is done, by then. Without a launch it is the Python of a call.\n"
    )
    names = list(dict.fromkeys(name for one in found for name in one["returned"]))
    names.sort(key=lambda name: (name != NO_LAUNCH, name != OURS))
    rows = []
    for one in found:
        times = [
            f"{one['returned'][name]:.1f} ({one['done'][name]:.1f})" if name in one["returned"] else EMPTY
            for name in names
        ]
        rows.append((one["op"], *times))
    yield from _table(("call", *names), rows)


def _smoke(stage: dict[str, Any]) -> Iterator[str]:
    worst = stage["summary"]["worst"]
    yield "## Accuracy\n"
    yield "The worst error of the smoke cases as a share of its bound: 1 is the most that is allowed.\n"
    functions = dict.fromkeys(key.split("/")[0] for key, share in worst.items() if share)
    rows = [(one, *(f"{worst.get(f'{one}/{dtype}', 0):.2f}" for dtype in DTYPES)) for one in functions]
    yield from _table(("function", *DTYPES), rows)
    for one in stage["records"]:
        if not one["ok"]:
            said = ", ".join(f"{key} {value}" for key, value in one.items() if key not in ("name", "ok"))
            yield f"- **failed**: `{one['name']}`: {said}"


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    columns = tuple(columns)
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
