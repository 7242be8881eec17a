"""The conformance kit: cases as data, expectations from mpmath, libraries and ways of running, a report.

It needs no test runner. `check` measures every public function, or one of your own, on every library it finds, or
on one of your own.
"""

from __future__ import annotations

try:
    import ml_dtypes  # noqa: F401 (asked for here, so that its absence is explained)
    import mpmath  # noqa: F401
    import numpy  # noqa: F401, ICN001
except ImportError as error:
    msg = f"polysoftmax.testing needs {error.name}, which is not installed: pip install numpy mpmath ml-dtypes"
    raise ImportError(msg) from error

from polysoftmax.testing._adapters import Adapter, adapt
from polysoftmax.testing._backends import CAPABILITIES, Backend, Capability, missing
from polysoftmax.testing._cases import Case
from polysoftmax.testing._check import Outcome, call_case, check_case, reference
from polysoftmax.testing._checks import CHECKS, Check
from polysoftmax.testing._formats import FORMATS, Format, rounded
from polysoftmax.testing._libraries import open_backend
from polysoftmax.testing._reference import Reference
from polysoftmax.testing._report import report
from polysoftmax.testing._results import Failure, Report, Result
from polysoftmax.testing._run import check

__all__ = [
    "CAPABILITIES",
    "CHECKS",
    "FORMATS",
    "Adapter",
    "Backend",
    "Capability",
    "Case",
    "Check",
    "Failure",
    "Format",
    "Outcome",
    "Reference",
    "Report",
    "Result",
    "adapt",
    "call_case",
    "check",
    "check_case",
    "missing",
    "open_backend",
    "reference",
    "report",
    "rounded",
]
