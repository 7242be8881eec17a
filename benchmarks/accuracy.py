"""Measure errors in ulp, of every public function and, on hard rows, beside the peers: python -m benchmarks.accuracy.

Expected values are the conformance kit's, from mpmath. `make figures` draws what is written here, and fills the tables
of docs/accuracy.md with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine import machine, versions
from polysoftmax.testing import CHECKS, Backend, Case, check_case, missing, open_backend, reference
from polysoftmax.testing._formats import rounded
from polysoftmax.testing._peers import OPS, PEERS
from polysoftmax.testing._run import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BACKENDS = ("numpy", "torch", "jax")
DTYPES = ("float32", "bfloat16", "float16")
LONG = 100_000
KEPT = ("function", "dtype", "library", "cases", "failed", "ulps", "of_bound", "worst_case")


def _normal(*shape: int, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(20261127).standard_normal(shape)


def _long() -> np.ndarray:
    # Sixty-fourths: the terms have a few hundred values, which mpmath can add up exactly.
    return np.clip(np.round(64 * _normal(2, LONG)) / 64, -12, 12)


def _with_impossible() -> np.ndarray:
    x = _normal(16, 256)
    return np.where(np.random.default_rng(1).random(x.shape) < 0.5, x, -np.inf)


_INF = np.inf
ROWS: dict[str, list[np.ndarray]] = {
    "moderate": [_normal(16, 256)],
    "near overflow": [
        np.asarray([[88.7, 88.6, -88.7, 0.0], [11.0, 10.9, -11.0, 0.0], [65504.0, 65504.0, 65440.0, 0.0]]),
        np.asarray([[3.4e38, 3.4e38, 1.0, 0.0], [3.4e38, -3.4e38, 0.0, 3.4e38], [1e30, -1e30, 1e30, 1e30]]),
    ],
    "confident": [np.asarray([[0.0, -gap, -gap - 0.5, -gap - 3.0] for gap in (4, 7, 10, 17, 20, 40, 80)])],
    "100,000 entries": [_long()],
    "all equal": [np.full((1, n), value) for n in (3, 1000, LONG) for value in (0.0, 3.0)],
    "with -inf": [_with_impossible(), np.asarray([[5.0, -_INF, 4.0], [-_INF, -_INF, 7.0], [-_INF, 0.0, -2.0]])],
    "cancelling": [np.log(np.asarray([[1 / 2, 1 / 3, 1 / 6], [0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]))],
}
"""Rows that are hard in some way, by name. The last have a logsumexp close to 0: a difference of two equal numbers."""


@dataclass(frozen=True)
class Error:
    """The largest error of a function on some rows, in ulp of each answer, however small that is."""

    function: str
    dtype: str
    rows: str
    by: str
    ulps: float


def errors(backends: Sequence[str]) -> Iterator[Error]:
    """Measure polysoftmax on some backends, and the peers that are installed, on the hard rows."""
    peers = [one for one in PEERS if find_spec(one.module)]
    for function in OPS:
        for dtype in DTYPES:
            for rows, arrays in ROWS.items():
                cases = [Case(rows, {"x": x}) for x in arrays]
                for backend in backends:
                    yield Error(function, dtype, rows, f"ours, {backend}", _of_ours(backend, function, cases, dtype))
                for peer in peers:
                    if dtype in peer.dtypes:
                        answers = [peer.call(function, rounded(x, dtype), dtype) for x in arrays]
                        yield Error(function, dtype, rows, peer.name, _largest(function, cases, dtype, answers))


def _of_ours(backend: str, function: str, cases: list[Case], dtype: str) -> float:
    with open_backend(backend) as lib:
        outcomes = [check_case(lib, CHECKS[function], case, dtype) for case in cases]
    assert all(one.is_right for one in outcomes), "\n".join(map(str, outcomes))
    return _largest(function, cases, dtype, [one.answers[0] for one in outcomes])


def _largest(function: str, cases: list[Case], dtype: str, answers: list[Any]) -> float:
    wants = [reference(CHECKS[function], case, dtype)[0] for case in cases]
    each = [want.ulps(np.asarray(y).astype(np.float64), relative=True) for want, y in zip(wants, answers, strict=True)]
    return max(float(np.max(one)) for one in each)


def functions(backends: Sequence[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every public function whose answers have errors, on the kit's own cases."""
    for backend in backends:
        print(f"every function on {backend}", file=sys.stderr)
        for one in run(backend, "auto", CHECKS.values(), dtypes=DTYPES, quick=quick):
            if one.dtype and one.ulps:
                kept = {name: value for name, value in asdict(one).items() if name in KEPT}
                yield {**kept, "of_bound": round(one.of_bound, 3)}


def measure(backends: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """Return all figures, infinite errors as text: JSON has no number for them."""
    with np.errstate(all="ignore"):
        found = {
            "date": date.today().isoformat(),
            "machine": machine("cpu"),
            "versions": versions(("mpmath", "ml-dtypes")),
            "rows": [asdict(one) for one in errors(backends)],
            "functions": list(functions(backends, quick=quick)),
        }
    for one in (*found["rows"], *found["functions"]):
        one["ulps"] = float(f"{one['ulps']:.3g}") if np.isfinite(one["ulps"]) else "inf"
    return found


def shown(ulps: float) -> str:
    """Return an error in three digits at most, and powers of ten from 10,000 on."""
    if ulps == np.inf:
        return "wrong"
    return f"{ulps:.2g}" if ulps < 100 else f"{ulps:.0f}" if ulps < 1e4 else f"{ulps:.0e}"


def table_of_rows(results: dict[str, Any]) -> str:
    """Return the errors on the hard rows as Markdown, a line for each function, dtype and kind of rows."""
    found = {(one["function"], one["dtype"], one["rows"], one["by"]): float(one["ulps"]) for one in results["rows"]}
    everyone = list(dict.fromkeys(key[-1] for key in found))
    lines = [f"| function | dtype | rows | {' | '.join(everyone)} |", "|---" * (3 + len(everyone)) + "|"]
    for key in dict.fromkeys(key[:3] for key in found):
        cells = [shown(found[*key, by]) if (*key, by) in found else "–" for by in everyone]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def table_of_functions(results: dict[str, Any]) -> str:
    """Return the errors of every function as Markdown, with the largest share of a bound on any backend."""
    each = results["functions"]
    found = {(one["function"], one["library"], one["dtype"]): float(one["ulps"]) for one in each}
    columns = list(dict.fromkeys((one["library"], one["dtype"]) for one in each))
    columns.sort(key=lambda one: (BACKENDS.index(one[0]), DTYPES.index(one[1])))
    heads = [f"{library} {dtype}" for library, dtype in columns]
    lines = [f"| function | {' | '.join(heads)} | share of the bound |", "|---" * (2 + len(heads)) + "|"]
    for function in dict.fromkeys(one["function"] for one in each):
        cells = [shown(found[function, *one]) if (function, *one) in found else "–" for one in columns]
        share = max(one["of_bound"] for one in each if one["function"] == function)
        lines.append(f"| {' | '.join((function, *cells, f'{share:.2f}'))} |")
    return "\n".join(lines) + "\n"


def text(results: dict[str, Any]) -> str:
    """Return everything as a page."""
    facts, found = results["machine"], results["versions"]
    return "\n".join(
        [
            f"# Errors in ulp, {results['date']}\n",
            f"{facts['cpu']}; {', '.join(f'{name} {version}' for name, version in found.items())}\n",
            "## On hard rows\n",
            table_of_rows(results),
            "## Every function\n",
            table_of_functions(results),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results.json and table.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0])
    found = [one for one in BACKENDS if not missing(Backend(one))]
    parser.add_argument("--backend", nargs="+", default=found, choices=found, help="where polysoftmax is measured")
    parser.add_argument("--quick", action="store_true", help="of the kit's cases for every function only the core ones")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/DATE-accuracy)")
    asked = parser.parse_args(arguments)
    results = measure(asked.backend, quick=asked.quick)
    out = asked.out or Path(__file__).parent / "results" / f"{results['date']}-accuracy"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text(results), encoding="utf-8")
    print(f"results.json and table.md are in {out}")


if __name__ == "__main__":
    main()
