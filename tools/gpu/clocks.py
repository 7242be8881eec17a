"""How a call is timed on a GPU: by a CUDA graph, by events, or by the clock; and races of calls in rounds."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    Round = Callable[[], float]

ROUNDS, UNCOUNTED = 9, 2
WARM_UPS = 3
HEAD_START = 8_000_000
"""Cycles, about 4 ms, for which the device sleeps while a burst is queued: 250 µs of Python for each of 16 calls."""

QUEUED = 16
"""Calls of such a burst at most; the queue itself holds about a thousand kernels."""

GRAPH, EVENTS, CLOCK = "graph", "events", "clock"
HOW = {
    GRAPH: "a CUDA graph of some calls is replayed between two events: no Python is in the figure",
    EVENTS: "calls are queued while the device sleeps, between two events: no Python is in it, unless a call waits",
    CLOCK: "the wall clock over a burst of calls, until the last has answered: what Python adds is in the figure",
}


class Contender(NamedTuple):
    """A call, how it is to be timed, and what waits for its answer if the clock does it."""

    call: Callable[[], Any]
    how: str = GRAPH
    finish: Callable[[Any], Any] = lambda _: None


def round_of(torch: Any, contender: Contender, number: int) -> tuple[str, Round]:
    """Return how a contender is timed, and what times ``number`` calls once, in seconds a call."""
    call, how, finish = contender
    if how == GRAPH and _waits(torch, call):
        how, finish = CLOCK, lambda _: torch.cuda.synchronize()
    if how == GRAPH:
        return how, _by_graph(torch, call, number)
    if how == EVENTS:
        return how, _by_events(torch, call, min(number, QUEUED))
    return how, _by_clock(torch, call, number, finish)


def race(rounds: dict[str, Round], number: int = ROUNDS) -> dict[str, list[float]]:
    """Run every contender once a round, in a new order each time, and return the seconds of each round."""
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    order, shuffle = list(rounds), random.Random(0).shuffle
    for done in range(UNCOUNTED + number):
        shuffle(order)
        for name in order:
            seconds = rounds[name]()
            if done >= UNCOUNTED:
                samples[name].append(seconds)
    return samples


def _waits(torch: Any, call: Callable[[], Any]) -> bool:
    """Whether a call waits for the device, which no graph can hold. PyTorch raises where it would."""
    for _ in range(WARM_UPS):  # what is compiled on the first call may wait
        call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _by_graph(torch: Any, call: Callable[[], Any], number: int) -> Round:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(number):
            call()
    return lambda: _between_events(torch, graph.replay) / number


def can_capture(torch: Any) -> bool:
    """Whether a graph can still be captured, after something went wrong."""
    try:
        _by_graph(torch, torch.zeros(1, device="cuda").neg, 1)()
    except RuntimeError:
        return False
    return True


def _by_events(torch: Any, call: Callable[[], Any], number: int) -> Round:
    for _ in range(WARM_UPS):
        call()

    def burst() -> None:
        for _ in range(number):
            call()

    def one() -> float:
        torch.cuda._sleep(HEAD_START)  # PyTorch has no public way to keep the device busy
        return _between_events(torch, burst) / number

    return one


def _between_events(torch: Any, run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _by_clock(torch: Any, call: Callable[[], Any], number: int, finish: Callable[[Any], Any]) -> Round:
    for _ in range(WARM_UPS):
        finish(call())

    def one() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(number):
            last = call()
        finish(last)
        return (time.perf_counter() - start) / number

    return one
