"""The largest error of the functions with a bound on every backend, against mpmath, with the peers beside it."""

from __future__ import annotations

import json as json_module
import math
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._adapters import open_backend, x64
from polysoftmax.testing._backends import Backend, missing
from polysoftmax.testing._cases import CASES
from polysoftmax.testing._check import check_case
from polysoftmax.testing._confident import confident, table
from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._reference import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polysoftmax.testing._cases import Case


OPS = ("softmax", "log_softmax", "logsumexp")


@dataclass
class Line:
    """The largest errors of one function in one dtype, by one way of computing it."""

    op: str
    dtype: str
    by: str
    ulps: float = 0.0
    plain_ulps: float = 0.0
    of_bound: float = 0.0
    case: str = ""

    def add(self, case: Case, ulps: float, of_bound: float) -> None:
        """Take the error of one answer into account."""
        self.ulps = max(self.ulps, ulps)
        if _plain(case):
            self.plain_ulps = max(self.plain_ulps, ulps)
        if of_bound >= self.of_bound:
            self.of_bound, self.case = of_bound, case.name


def _plain(case: Case) -> bool:
    """Whether every peer can be asked, and means the same: rows with a finite maximum and no options."""
    if case.axis != -1 or case.where is not None or case.weights is not None or case.temperature != 1:
        return False
    x = case.values()
    return x.ndim > 0 and bool(np.isfinite(x.max(axis=-1)).all())


def measure(backend: Backend, engine: str) -> Iterator[Line]:
    """Measure every function and dtype on one backend in one engine."""
    with open_backend(backend, engine) as lib:
        for op in OPS:
            for dtype in backend.capability.dtypes:
                line = Line(op, dtype, f"{backend.value} ({engine})")
                for case in CASES.values():
                    # Peers are asked all plain cases, so ours are, too, even where each costs a compilation.
                    if op in case.ops and (case.core or not backend.capability.compiles or _plain(case)):
                        outcome = check_case(lib, case, op, dtype)
                        line.add(case, outcome.ulps, outcome.excess)
                yield line


def _scipy(op: str, x: Any, dtype: str) -> Any:
    from scipy import special

    return getattr(special, op)(x.astype(dtype), axis=-1)


def _jax(op: str, x: Any, dtype: str) -> Any:
    import jax

    function = jax.scipy.special.logsumexp if op == "logsumexp" else getattr(jax.nn, op)
    with x64(enabled=dtype == "float64"):
        return function(jax.numpy.asarray(x, dtype=dtype), axis=-1)


def _torch(op: str, x: Any, dtype: str) -> Any:
    import torch

    return getattr(torch, op)(torch.as_tensor(x).to(getattr(torch, dtype)), -1).double().numpy()


@dataclass(frozen=True)
class Peer:
    """What users would have called instead."""

    name: str
    module: str
    call: Callable[[str, Any, str], Any]
    dtypes: tuple[str, ...] = tuple(FORMATS)


PEERS = (
    Peer("scipy", "scipy", _scipy, ("float16", "float32", "float64")),
    Peer("jax.nn", "jax", _jax),
    Peer("torch", "torch", _torch),
)


def measure_peers() -> Iterator[Line]:
    """Measure the peers that are installed, on the plain cases."""
    plain = [one for one in CASES.values() if _plain(one)]
    for peer in PEERS:
        if find_spec(peer.module) is None:
            continue
        for op in OPS:
            for dtype in peer.dtypes:
                line = Line(op, dtype, peer.name)
                for case in plain:
                    if op in case.ops:
                        line.add(case, *_error_of_peer(peer, case, op, dtype))
                yield line


def _error_of_peer(peer: Peer, case: Case, op: str, dtype: str) -> tuple[float, float]:
    compute = FORMATS[dtype].compute.name
    want = reference(case, op, dtype, compute)
    with np.errstate(all="ignore"):
        answer = np.asarray(peer.call(op, rounded(case.values(), dtype), dtype)).astype(np.float64)
        ulps = want.ulps(answer, dtype, relative=op == "softmax")
        return float(np.max(ulps)), float(np.max(want.excess(answer, dtype, compute)))


def report(backends: list[str] | None = None, *, peers: bool = False, json: Path | None = None) -> int:
    """Print the largest error of softmax, log_softmax and logsumexp against mpmath, by dtype, backend and engine.

    Parameters
    ----------
    backends : list of str, optional
        Values of `Backend`; by default every backend that can be opened here.
    peers : bool
        Whether scipy, jax.nn and torch stand beside it, on the cases that they can be asked.
    json : Path, optional
        File that every figure is written to.

    Returns
    -------
    int
        0 if every answer keeps its bound, else 1. Peers are not judged.

    Raises
    ------
    ValueError
        If there is no backend of a name, or it cannot be opened here.
    """
    chosen = _chosen(backends)
    beside = list(measure_peers()) if peers else []
    lines: list[Line] = []
    for backend in chosen:
        for engine in backend.capability.engines:
            if absent := missing(backend, engine):
                print(f"{backend.value}, engine {engine}: left out, since {absent}", flush=True)
                continue
            print(f"{backend.value}, engine {engine}", flush=True)
            found = list(measure(backend, engine))
            _show(found, beside)
            lines += found
    if peers:
        print(
            f"Relative errors where a row is all but certain, or two rows nearly equal:\n\n{table(list(confident()))}\n"
        )
        print("Peers, and the column before them: the same cases, without options and with a finite maximum a row.")
    missed = sum(not line.of_bound <= 1 for line in lines)
    print("Errors are in units in the last place: of the answer for softmax, of max(1, |answer|) for the logarithms.")
    print(f"{missed} of {len(lines)} bounds are missed." if missed else f"All {len(lines)} bounds are kept.")
    if json is not None:
        # JSON has no infinity: an answer that is wrong by itself, such as NaN for a number, is null there.
        figures = [{k: None if v == math.inf else v for k, v in asdict(line).items()} for line in lines + beside]
        json.write_text(json_module.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


def _chosen(names: list[str] | None) -> list[Backend]:
    if names is None:
        return [one for one in Backend if not missing(one)]
    known = {one.value: one for one in Backend}
    for name in names:
        if name not in known:
            msg = f"unknown backend {name!r}: choose from {', '.join(known)}"
            raise ValueError(msg)
        absent = missing(known[name])
        if absent:
            msg = f"backend {name!r} cannot be opened here: {absent}"
            raise ValueError(msg)
    return [known[name] for name in names]


def _show(lines: list[Line], beside: list[Line]) -> None:
    peers = sorted({line.by for line in beside})
    error = {(line.by, line.op, line.dtype): _figure(line.ulps) for line in beside}
    columns = ("function", "dtype", "ulp", "of the bound", *(("plain ulp", *peers) if peers else ()), "worst case")
    rows = [
        (
            *(line.op, line.dtype, _figure(line.ulps), _figure(line.of_bound)),
            *((_figure(line.plain_ulps),) if peers else ()),
            *(error.get((peer, line.op, line.dtype), "") for peer in peers),
            line.case,
        )
        for line in lines
    ]
    # A file or a pipe gets lines of any length, which a table for a terminal would wrap.
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


def _figure(value: float) -> str:
    return "wrong" if math.isinf(value) else f"{value:.3g}"
