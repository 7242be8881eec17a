"""Interleaved timing: every round runs ours and each peer once, in a new order, in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Call = Any
Stopwatch = Any

BURST = 1e-3
"""Seconds that one sample lasts at least: shorter calls are repeated inside it."""

WARM_UP = 5e-3
"""Seconds of untimed calls before a sample: after a pause CPUs, too, have to be woken."""

LONG = 0.05
"""Seconds from which a call needs no untimed run before it: what the one before left behind no longer shows."""


@dataclass(frozen=True)
class Effort:
    """How long a case is measured."""

    seconds: float = 1.0
    least: int = 7
    most: int = 50


QUICK = Effort(seconds=0.12, least=3, most=20)


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def summary(values: list[float]) -> Summary:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high)


def wall(finish: Callable[[Any], Any]) -> Stopwatch:
    """Return a stopwatch that waits for each result by ``finish``."""

    def time_one(function: Call, number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            finish(function())
        return (time.perf_counter() - start) / number

    return time_one


def race(calls: dict[str, Call], stopwatch: Stopwatch, effort: Effort) -> dict[str, list[float]]:
    """Time every call in interleaved rounds, and return the seconds of each round.

    The first calls, which import, compile and fill caches, are not counted. The rounds end after
    ``effort.seconds`` once there are ``effort.least`` of them.
    """
    estimates = {}
    for name, call in calls.items():
        stopwatch(call, 1)
        once = stopwatch(call, 1)
        # One stall here would make every later sample a single call, and a stall in it would count in full.
        estimates[name] = once if once > LONG else min(once, stopwatch(call, 1), stopwatch(call, 1))
    numbers = {name: max(1, int(BURST / max(once, 1e-7))) for name, once in estimates.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + effort.seconds
        for done in range(effort.most):
            if done >= effort.least and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                samples[name].append(_sample(calls[name], numbers[name], estimates[name], stopwatch))
    finally:
        gc.enable()
    return samples


def _sample(call: Call, number: int, estimate: float, stopwatch: Stopwatch) -> float:
    if estimate < LONG:
        # The idle threads of an OpenMP pool spin after their work (8 ms here): let the last call's fall asleep.
        time.sleep(1e-2)
        stopwatch(call, max(1, int(WARM_UP / max(estimate, 1e-7))))
    return stopwatch(call, number)


def threaded_copy(x: np.ndarray, threads: int) -> Call:
    """Return a call that copies ``x``, split over threads where it is large: this machine's own speed limit."""
    source = x.reshape(-1)
    target = np.empty_like(source)
    if threads == 1 or x.nbytes < 2**20:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), parts))
