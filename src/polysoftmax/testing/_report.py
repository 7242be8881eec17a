"""The largest error of every function on every backend, against mpmath, with the peers beside it."""

from __future__ import annotations

import json as json_module
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._backends import Backend, missing
from polysoftmax.testing._cases import CASES
from polysoftmax.testing._check import check_case
from polysoftmax.testing._formats import rounded
from polysoftmax.testing._reference import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


OPS = ("softmax", "log_softmax", "logsumexp")


@dataclass
class Line:
    """The largest errors of one function in one dtype, by one way of computing it."""

    op: str
    dtype: str
    by: str
    ulps: float = 0.0
    of_bound: float = 0.0
    case: str = ""

    def add(self, case: str, ulps: float, of_bound: float) -> None:
        """Take the error of one answer into account."""
        self.ulps = max(self.ulps, ulps)
        if of_bound >= self.of_bound:
            self.of_bound, self.case = of_bound, case


def measure(backend: Backend, engine: str) -> Iterator[Line]:
    """Measure every function and dtype on one backend in one engine."""
    from polysoftmax.testing._adapters import open_backend

    with open_backend(backend, engine) as lib:
        for op in OPS:
            for dtype in backend.capability.dtypes:
                line = Line(op, dtype, f"{backend.value} ({engine})")
                for case in CASES.values():
                    if op in case.ops:
                        outcome = check_case(lib, case, op, dtype)
                        line.add(case.name, outcome.ulps, outcome.excess)
                yield line


def _peers() -> dict[str, Callable[[str, Any, str], Any]]:
    """Return what users would have called instead, by the name of its library, where that is installed."""
    found: dict[str, Callable[[str, Any, str], Any]] = {}
    if not missing(Backend.NUMPY) and _installed("scipy"):
        from scipy import special

        found["scipy"] = lambda op, x, dtype: getattr(special, op)(x.astype(dtype), axis=-1)
    if not missing(Backend.JAX):
        import jax

        def by_jax(op: str, x: Any, dtype: str) -> Any:
            function = jax.scipy.special.logsumexp if op == "logsumexp" else getattr(jax.nn, op)
            return np.asarray(function(jax.numpy.asarray(x, dtype=dtype), axis=-1)).astype(np.float64)

        found["jax.nn"] = by_jax
    if not missing(Backend.TORCH):
        import torch

        def by_torch(op: str, x: Any, dtype: str) -> Any:
            return getattr(torch, op)(torch.as_tensor(x).to(getattr(torch, dtype)), -1).double().numpy()

        found["torch"] = by_torch
    return found


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def measure_peers() -> Iterator[Line]:
    """Measure the peers on the finite cases that they can be asked."""
    plain = [
        one for one in CASES.values() if one.axis == -1 and one.where is one.weights is None and one.temperature == 1
    ]
    for name, peer in _peers().items():
        for op in OPS:
            for dtype in ("float32",) if name == "jax.nn" else ("float32", "float64"):
                line = Line(op, dtype, name)
                for case in plain:
                    if op in case.ops and np.ndim(case.values()):
                        want = reference(case, op, dtype, dtype)
                        with np.errstate(all="ignore"):
                            answer = np.asarray(peer(op, rounded(case.values(), dtype), dtype), dtype=np.float64)
                            ulps = want.ulps(answer, dtype, relative=op == "softmax")
                        line.add(case.name, float(np.max(ulps)), float(np.max(want.excess(answer, dtype, dtype))))
                yield line


def report(backends: list[str] | None = None, *, peers: bool = False, json: Path | None = None) -> int:
    """Print the largest error of every function, dtype, backend and engine against mpmath.

    Parameters
    ----------
    backends : list of str, optional
        Values of `Backend`; by default every backend that can be opened here.
    peers : bool
        Whether scipy, jax.nn and torch are measured too, on the cases that they can be asked.
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
    lines: list[Line] = []
    _print(("function", "dtype", "computed by", "ulp", "of the bound", "worst case"))
    for backend in _chosen(backends):
        for engine in backend.capability.engines:
            for line in measure(backend, engine):
                lines.append(line)
                _print_line(line)
    missed = [line for line in lines if not line.of_bound <= 1]
    if peers:
        for line in measure_peers():
            lines.append(line)
            _print_line(line)
    if json is not None:
        json.write_text(json_module.dumps([asdict(line) for line in lines], indent=1) + "\n")
    print(f"\n{len(missed)} of {len(lines)} bounds missed" if missed else "\nevery bound is kept")
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


def _print_line(line: Line) -> None:
    ulps = "wrong" if math.isinf(line.ulps) else f"{line.ulps:.3g}"
    share = "wrong" if math.isinf(line.of_bound) else f"{line.of_bound:.3f}"
    _print((line.op, line.dtype, line.by, ulps, share, line.case))


def _print(cells: tuple[str, ...]) -> None:
    function, dtype, by, ulps, share, case = cells
    print(f"{function:<12} {dtype:<9} {by:<34} {ulps:>9} {share:>13}  {case}", flush=True)
