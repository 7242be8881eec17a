"""One case on one backend: the call, and how far its answer is from the expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from polysoftmax.testing._formats import FORMATS
from polysoftmax.testing._reference import reference

if TYPE_CHECKING:
    from polysoftmax.testing._adapters import Adapter
    from polysoftmax.testing._cases import Case


@dataclass(frozen=True)
class Outcome:
    """The worst entry of an answer."""

    case: str
    op: str
    dtype: str
    excess: float
    ulps: float
    got: float
    expected: float
    index: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.op} of {self.case!r} in {self.dtype}: {self.got!r} at {self.index}, not {self.expected!r}: "
            f"{self.ulps:.3g} ulp, {self.excess:.3g} of what is allowed"
        )


def call_case(lib: Adapter, case: Case, op: str, dtype: str) -> Any:
    """Make a case's arrays, the logits and weights in a dtype, the temperature in the compute dtype, and call."""
    options: dict[str, Any] = {"axis": case.axis}
    temperature = case.temperature
    if op != "logsumexp" and temperature != 1.0:
        number = isinstance(temperature, int | float)
        options["temperature"] = temperature if number else lib.asarray(temperature, FORMATS[dtype].compute.name)
    if case.where is not None:
        options["where"] = lib.asarray(case.where, "bool")
    if case.weights is not None:
        options["weights"] = lib.asarray(case.weights, dtype)
    return lib.call(getattr(polysoftmax, op), lib.asarray(case.values(), dtype), **options)


def check_case(lib: Adapter, case: Case, op: str, dtype: str) -> Outcome:
    """Call a function on a case, see that the answer is of the right kind, and measure its error.

    Raises
    ------
    AssertionError
        If namespace, dtype, shape or device of the answer are not the input's.
    """
    want = reference(case, op, dtype, FORMATS[dtype].compute.name)
    y = call_case(lib, case, op, dtype)
    lib.require(y, want.high.shape, dtype)
    answer = lib.values(y)
    if not answer.size:
        return Outcome(case.name, op, dtype, 0.0, 0.0, 0.0, 0.0, ())
    with np.errstate(over="ignore"):  # a wrong answer may be off by any factor
        excess = want.excess(answer, dtype, FORMATS[dtype].compute.name)
        ulps = want.ulps(answer, dtype, relative=op == "softmax")
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    within = excess <= 1
    largest = float(np.max(ulps[within], initial=0.0)) if within.all() else float(ulps[worst])
    return Outcome(
        case.name, op, dtype, float(excess[worst]), largest, float(answer[worst]), float(want.high[worst]), worst
    )
