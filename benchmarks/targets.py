"""The targets of the design, as data: how much faster than which peer, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.cases import FORWARD, MANY

if TYPE_CHECKING:
    from benchmarks.cases import Case

MEMORY_SLACK = 16 * 2**20
"""Bytes beyond input and output that a call may take."""


@dataclass(frozen=True)
class Target:
    """The least ratio peer / ours, or the most microseconds that ours may take beyond the peer."""

    ratio: float | None = None
    slack_us: float | None = None

    def verdict(self, ours_ms: float, peer_ms: float, best_ratio: float) -> str:
        """Say ``met``, ``missed``, or ``near``: missed, but within the spread of the paired ratios."""
        if self.slack_us is not None:
            return "met" if (ours_ms - peer_ms) * 1e3 <= self.slack_us else "missed"
        assert self.ratio is not None
        if peer_ms / ours_ms >= self.ratio:
            return "met"
        return "near" if best_ratio >= self.ratio else "missed"

    def __str__(self) -> str:
        return f"≥ {self.ratio:g}×" if self.ratio is not None else f"≤ +{self.slack_us:g} µs"


def target(case: Case, peer: str) -> Target | None:
    """Return the target for a case against a peer, or None where the design sets none."""
    if case.op.startswith("sample"):
        return _sampling(case, peer)
    if case.op == "log_prob":
        return Target(1.5) if peer in ("scipy", "torch", "jax") else None
    return {"numpy": _numpy, "torch": _torch, "jax": _jax}[case.backend](case, peer)


def _numpy(case: Case, peer: str) -> Target | None:
    if case.op not in FORWARD:
        return None
    if peer == "torch, no copy":
        return Target(1.0) if case.elements >= 10_000 else None
    if case.elements <= 10:
        return {"scipy": Target(1.5), "naive": Target(0.8)}.get(peer)
    if peer != "scipy" or case.elements <= 1000:
        return None
    return Target(5.0 if case.length <= 32 else 3.0)


def _torch(case: Case, peer: str) -> Target | None:
    if peer != "torch":
        return None
    if case.elements <= 10:
        return Target(slack_us=20.0 if case.op in {"softmax_vjp", "cross_entropy_grad"} else 5.0)
    if case.op not in {*FORWARD, "cross_entropy"} or case.elements < 1000:
        return None
    return Target(3.0 if case.length <= 16 else 1.0)


def _jax(case: Case, peer: str) -> Target | None:
    if peer != "jax" or case.op not in FORWARD:
        return None
    return Target(0.7 if case.op == "logsumexp" else 1.0)


def _sampling(case: Case, peer: str) -> Target | None:
    if case.op == MANY:
        return None if peer == "copy" else Target(1.0)
    # The design's peer on NumPy is the plain Gumbel draw; the other two are shown beside it.
    if peer == "copy" or (case.backend == "numpy" and peer != "gumbel"):
        return None
    if case.op == "sample_top_k":
        return Target(1.0 if case.backend == "torch" else 3.0)
    if case.op == "sample_top_p":
        return Target(3.0)
    if case.length <= 4096:
        return Target(4.0 if case.length >= 256 else 1.0)
    return Target(25.0 if case.backend != "jax" and case.shape == (64, 50_257) else 8.0)


def gpu_target(op: str, length: int, peer: str) -> Target | None:
    """Return the target on a GPU, where the peers ``copy`` and ``read`` move the same bytes."""
    if op in {"sample", "cross_entropy"}:
        if peer == "read":
            return Target(0.85)
        return Target(5.0) if op == "sample" and peer in {"torch", "jax"} else None
    if op not in {"softmax", "log_softmax"}:
        return None
    if peer == "copy":
        return Target(0.9) if length >= 4096 else None
    return {"torch": Target(1.0), "cupyx": Target(4.0)}.get(peer)
