"""The conformance kit: cases as data, expectations from mpmath, backends and ways of running, a report.

It needs no test runner: ``polysoftmax.testing.report()`` prints the largest error of softmax, log_softmax
and logsumexp on every backend it finds. The extra ``polysoftmax[check]`` installs what it needs.
"""

from __future__ import annotations

try:
    import mpmath  # noqa: F401 (asked for here, so that its absence is explained)
    import numpy  # noqa: F401, ICN001
except ImportError as error:
    msg = "polysoftmax.testing needs NumPy and mpmath: pip install 'polysoftmax[check]'"
    raise ImportError(msg) from error

from polysoftmax.testing._adapters import Adapter, open_backend
from polysoftmax.testing._backends import CAPABILITIES, Backend, Capability, missing
from polysoftmax.testing._cases import CASES, Case
from polysoftmax.testing._check import Outcome, call_case, check_case
from polysoftmax.testing._formats import FORMATS, Format, rounded
from polysoftmax.testing._reference import Reference, reference
from polysoftmax.testing._report import report

__all__ = [
    "CAPABILITIES",
    "CASES",
    "FORMATS",
    "Adapter",
    "Backend",
    "Capability",
    "Case",
    "Format",
    "Outcome",
    "Reference",
    "call_case",
    "check_case",
    "missing",
    "open_backend",
    "reference",
    "report",
    "rounded",
]
