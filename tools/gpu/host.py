"""The host's time for a call, on rows so few that the device is never what it waits for."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.cases import Case
from tools.gpu import contenders
from tools.gpu.contenders import COPY, OURS, READ
from tools.gpu.fake import fake_gpu
from tools.gpu.worker import in_brief

if TYPE_CHECKING:
    from collections.abc import Callable

OPS = ("softmax", "log_softmax", "logsumexp", "cross_entropy_grad", "sample", "sample_top_k", "sample_top_p")
NAMES = tuple(f"host-{op}" for op in OPS)
SHAPE = (4, 1000)
CALLS, BURSTS, BURSTS_DRY, WARM_UPS = 100, 15, 1, 20
NO_LAUNCH = f"{OURS}, no launch"
"""Ours with a launcher that does nothing: the Python of a call."""


def measure(torch: Any, name: str, *, dry: bool) -> dict[str, Any]:
    """Return microseconds a call until it returns, and until a burst of calls is done, of ours and of PyTorch's."""
    import polysoftmax as ps

    case = Case(name.removeprefix("host-"), "torch", "eager", SHAPE, "bfloat16")
    engine = fake_gpu(lambda _: None) if dry else ps.engine("cuda")
    found: dict[str, Any] = {"op": case.op, "shape": case.shape, "returned": {}, "done": {}, "errors": {}}
    with engine:
        xs = [torch.randn(case.shape, device="cpu" if dry else "cuda").to(torch.bfloat16)] * 2
        calls = {key: one.call for key, one in contenders.arena(torch, case, xs).items() if key not in (COPY, READ)}
        for key, call in {NO_LAUNCH: calls[OURS], **calls}.items():
            try:
                _warm_up(calls[OURS] if key == NO_LAUNCH else call)  # with launches, which load what they need
                with _without_launches() if key == NO_LAUNCH else nullcontext():
                    found["returned"][key], found["done"][key] = _bursts(torch, call, BURSTS_DRY if dry else BURSTS)
            except Exception as error:  # one that fails leaves the others to be measured
                found["errors"][key] = in_brief(error)
    return {"ok": OURS in found["returned"], **found}


def _without_launches() -> Any:
    from polysoftmax.engines.cuda import _launch

    return patch.object(_launch, "launch", lambda *_: None)


def _warm_up(call: Callable[[], Any]) -> None:
    for _ in range(WARM_UPS):
        call()


def _bursts(torch: Any, call: Callable[[], Any], number: int) -> tuple[float, float]:
    """Return the medians, in microseconds a call, of the time to return and of the time until all is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    returned, done = [], []
    for _ in range(number):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        returned.append(time.perf_counter() - start)
        wait()
        done.append(time.perf_counter() - start)
    return tuple(round(1e6 * statistics.median(one) / CALLS, 2) for one in (returned, done))  # type: ignore[return-value]


def line(name: str, found: dict[str, Any]) -> str:
    times = [f"{key} {found['returned'][key]:.1f} us ({found['done'][key]:.1f})" for key in found["returned"]]
    failed = [f"{key}: {error}" for key, error in found["errors"].items()]
    return "  ".join([f"{name:24}", *times, *failed])
