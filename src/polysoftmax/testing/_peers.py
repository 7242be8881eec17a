"""What users would have called instead, measured like our own functions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._reference import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax.testing._cases import Case

    Peer = Callable[[str, Any, str], Any]


def _scipy(op: str, x: Any, dtype: str) -> Any:
    from scipy import special

    return getattr(special, op)(x.astype(dtype), axis=-1)


def _jax(op: str, x: Any, dtype: str) -> Any:
    import jax

    function = jax.scipy.special.logsumexp if op == "logsumexp" else getattr(jax.nn, op)
    return function(jax.numpy.asarray(x, dtype=dtype), axis=-1)


def _torch(op: str, x: Any, dtype: str) -> Any:
    import torch

    return getattr(torch, op)(torch.as_tensor(x).to(getattr(torch, dtype)), -1).double()


_PEERS: dict[str, tuple[str, Peer, tuple[str, ...]]] = {
    "scipy": ("scipy", _scipy, ("float16", "float32", "float64")),
    "jax.nn": ("jax", _jax, ("float16", "bfloat16", "float32")),
    "torch": ("torch", _torch, ("float16", "bfloat16", "float32", "float64")),
}


def installed() -> list[tuple[str, Peer, str]]:
    """Return each peer found here with each of its dtypes: its name, the call, the dtype."""
    return [
        (name, peer, dtype)
        for name, (library, peer, dtypes) in _PEERS.items()
        if find_spec(library) is not None
        for dtype in dtypes
    ]


def errors(peer: Peer, op: str, dtype: str, cases: dict[str, Case]) -> Iterator[tuple[str, float, float]]:
    """Measure a peer on the cases that it can be asked, where the answer is finite.

    Yields
    ------
    tuple of str, float, float
        The case, the largest error in ulp, and the largest in units of our own bound.
    """
    for case in cases.values():
        plain = case.axis == -1 and case.where is case.weights is None and case.temperature == 1
        if op not in case.ops or not plain or not np.ndim(case.values()):
            continue
        compute = FORMATS[dtype].compute.name
        want = reference(case, op, dtype, compute)
        finite = np.isfinite(want.high)
        with np.errstate(all="ignore"):
            answer = np.asarray(peer(op, rounded(case.values(), dtype), dtype)).astype(np.float64)
            ulps = want.ulps(answer, dtype, relative=op == "softmax")[finite]
            excess = want.excess(answer, dtype, compute)[finite]
        yield case.name, float(np.max(ulps)), float(np.max(excess))
