"""Every check on every library, and on libraries and functions of others."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from polysoftmax.engines import FORMULAS
from polysoftmax.testing._adapters import Adapter, adapt
from polysoftmax.testing._backends import Backend, missing
from polysoftmax.testing._check import check_case, has_rows, reference, row_that_differs, same_bits
from polysoftmax.testing._checks import CHECKS
from polysoftmax.testing._libraries import open_backend
from polysoftmax.testing._results import Failure, Report, Result
from polysoftmax.testing._shrink import reproducer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from polysoftmax.testing._cases import Case
    from polysoftmax.testing._check import Function, Outcome
    from polysoftmax.testing._checks import Check

    Answers = dict[tuple[str, str, str], tuple[str, bool, tuple[Any, ...]]]


def check(
    function: Function = None,
    name: str | None = None,
    /,
    *,
    xp: Any = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
) -> Report:
    """Check a function of yours, a library of yours, or polysoftmax, against the contract and its bounds.

    Parameters
    ----------
    function : callable, optional
        A function that is called as one of polysoftmax is, such as ``my_softmax(x, axis=-1)``; by default every
        function of polysoftmax is checked.
    name : str, optional
        The function that it is measured as, such as ``"softmax"``; by default its own name.
    xp : namespace or Adapter, optional
        The array library that is called with: any eager namespace of the array API standard. For a library that needs
        more, derive from `Adapter`.
    backends : sequence of str, optional
        Values of `Backend` in place of ``xp``. By default, for polysoftmax's own functions, all that are found.
    dtypes : sequence of str, optional
        The floating dtypes, of those that the library has.
    quick : bool
        Whether only the most telling cases are tried, in float32 and one 16-bit dtype.

    Returns
    -------
    Report
        True if all is right; ``raise_failures()`` raises what is not, ``results`` has the figures.

    Raises
    ------
    ValueError
        If there is no function or no backend of a name, or it cannot be opened here.
    TypeError
        If it is not said which library a function takes.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import testing
    >>> def softmax(x, axis=-1):
    ...     return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)
    >>> report = testing.check(softmax, xp=np, dtypes=["float32"], quick=True)
    >>> bool(report), report.failures[0].message.split(":")[0]
    (False, "softmax of 'finite rows' in float32, numpy")
    """
    if function is not None and xp is None and backends is None:
        msg = "say which library the function takes: xp=numpy, or backends=['numpy', 'torch']"
        raise TypeError(msg)
    checks = [named_check(name or function.__name__)] if function is not None else list(CHECKS.values())
    report = Report()
    for lib, engines in _libraries(xp, backends):
        # A function of somebody else's knows no engines.
        for engine in engines if function is None else ("auto",):
            report.results += run(lib, engine, checks, dtypes=dtypes, quick=quick, function=function)
    return report


def named_check(name: str) -> Check:
    """Return the check of a function by its name."""
    if name not in CHECKS:
        msg = f"there is no check of {name!r}: choose from {', '.join(CHECKS)}"
        raise ValueError(msg)
    return CHECKS[name]


def chosen(names: Sequence[str] | None) -> list[Backend]:
    """Return the backends of some names, or all that can be opened here.

    Raises
    ------
    ValueError
        If there is no backend of a name, or it cannot be opened here.
    """
    if names is None:
        return [one for one in Backend if not missing(one)]
    known = {one.value: one for one in Backend}
    for name in names:
        if name not in known:
            msg = f"unknown backend {name!r}: choose from {', '.join(known)}"
            raise ValueError(msg)
        if absent := missing(known[name]):
            msg = f"backend {name!r} cannot be opened here: {absent}"
            raise ValueError(msg)
    return [known[name] for name in names]


_KNOWN = {"numpy": "numpy", "jax.numpy": "jax", "torch": "torch", "cupy": "cupy", "dask.array": "dask"}


def _libraries(xp: Any, names: Sequence[str] | None) -> Iterator[tuple[Backend | Adapter, Sequence[str]]]:
    """Yield a library that is given, or each backend, with the engines that it has here."""
    if isinstance(xp, Adapter):
        yield xp, ("auto",)
    elif xp is not None:
        own = getattr(xp, "__name__", "").removeprefix("array_api_compat.")
        yield Backend(_KNOWN[own]) if own in _KNOWN else adapt(xp), ("auto",)
    else:
        for backend in chosen(names):
            yield backend, [one for one in backend.capability.engines if not missing(backend, one)]


def run(
    backend: Backend | Adapter,
    engine: str,
    checks: Iterable[Check],
    *,
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
    function: Function = None,
    others: Answers | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Run checks on one library in one engine.

    ``others`` holds the answers of the first library, which others are compared with; ``tell`` is called before each
    function with its name.
    """
    results = []
    with open_backend(backend, engine) as lib, np.errstate(all="ignore"):
        for one in checks:
            for dtype in dtypes_of(lib.can.dtypes, dtypes, quick=quick) if one.has_dtypes else [""]:
                tell(f"{lib.name} ({engine}) {one.function}")
                results.append(_measure(lib, engine, one, dtype, quick, function, {} if others is None else others))
    return results


def dtypes_of(has: Sequence[str], asked: Sequence[str] | None, *, quick: bool) -> list[str]:
    """Return the dtypes to check, of those that a library has."""
    if asked is not None:
        return [one for one in asked if one in has]
    if not quick:
        return list(has)
    narrow = [one for one in ("bfloat16", "float16") if one in has][:1]
    return narrow + [one for one in ("float32", "float64") if one in has][:1]


def _measure(
    lib: Adapter, engine: str, one: Check, dtype: str, quick: bool, function: Function, others: Answers
) -> Result:
    result = Result(one.function, dtype, lib.name, engine)
    is_own = function is None
    has_one_answer = is_own and _is_native(lib, dtype, "softmax")
    is_native = is_own and _is_native(lib, dtype, one.function)
    for case in _cases(lib, one, quick=quick, function=function):
        if function is not None and not _takes(function, one, case):
            result.left_out += 1
            continue
        outcome = check_case(lib, one, case, dtype, function)
        _add(result, outcome)
        if not outcome.is_right:
            _fail(result, lib, one, case, function, str(outcome))
            continue
        if has_one_answer and has_rows(one, outcome):
            row = row_that_differs(lib, one, outcome, function)
            result.rows_alone = row is None and result.rows_alone is not False
            if row is not None:
                which = f"{one.function} of {case.name!r} in {outcome.dtype}"
                message = f"{which}: row {row} has other bits alone than in the batch"
                _fail(result, lib, one, case, function, message, bits=True)
        if is_own and outcome.answers:
            _compare(result, lib, one, outcome, others, is_native=is_native)
    return result


def _cases(lib: Adapter, one: Check, *, quick: bool, function: Function) -> Iterator[Case]:
    for case in one.cases:
        if (quick and (case.large or not case.core)) or (lib.can.compiles and not case.core):
            continue
        has_axis = function is not None and "axis" in (_parameters(function) or ())
        yield replace(case, given={"axis": -1, **case.given}) if has_axis else case  # another default is no fault


def _add(result: Result, outcome: Outcome) -> None:
    result.cases += 1
    result.seconds += outcome.seconds
    result.ulps = max(result.ulps, math.inf if outcome.problem else outcome.ulps)
    if outcome.excess >= result.of_bound:
        result.of_bound, result.worst_case = outcome.excess, outcome.case.name


def _fail(
    result: Result, lib: Adapter, one: Check, case: Case, function: Function, message: str, *, bits: bool = False
) -> None:
    """Keep a failure; the first of each function is shrunk."""
    result.failed += 1
    how = f", {lib.name}" + (f", engine {result.engine}" if result.engine != "auto" else "")
    if any(failure.code for failure in result.failures):
        return
    code = reproducer(lib, result.engine, one, case, result.dtype, function, bits=bits)
    result.failures.append(Failure(_with(message, how), code))


def _with(message: str, how: str) -> str:
    head, colon, rest = message.partition(": ")
    return f"{head}{how}{colon}{rest}"


def _is_native(lib: Adapter, dtype: str, function: str) -> bool:
    """Whether the kernels run that promise a row the same bits in every batch, and from NumPy and PyTorch."""
    if lib.source is None or lib.can.gpu or function not in FORMULAS:
        return False
    return polysoftmax.explain(lib.asarray([0.0], dtype or "float32"), function).engine == "native"


def _compare(result: Result, lib: Adapter, one: Check, outcome: Outcome, others: Answers, *, is_native: bool) -> None:
    key = (one.function, outcome.case.name, result.dtype)
    by, was_native, answers = others.setdefault(key, (lib.name, is_native, outcome.answers))
    if answers is outcome.answers:
        return
    wants = reference(one, outcome.case, result.dtype or "float32")
    for want, mine, other in zip(wants, outcome.answers, answers, strict=True):
        if mine.size:
            there = other.astype(np.float64)
            near = replace(want, high=there, low=np.zeros_like(there))
            distance = float(np.max(near.ulps(mine.astype(np.float64), relative=one.is_relative)))
            result.apart = max(result.apart or 0.0, distance)
    if is_native and was_native and not same_bits(outcome.answers, answers):
        message = f"{one.function} of {outcome.case.name!r} in {outcome.dtype}, {lib.name}: other bits than on {by}"
        result.failed += 1
        result.failures.append(Failure(message, ""))


@functools.cache
def _parameters(function: Function) -> frozenset[str] | None:
    """Return the options that a function takes by name; None for all."""
    with contextlib.suppress(ValueError):  # a function of C without a signature takes what it says, and not by name
        parameters = inspect.signature(function).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return None
        return frozenset(one.name for one in parameters if one.kind is not one.POSITIONAL_ONLY)
    return frozenset()


def _takes(function: Function, one: Check, case: Case) -> bool:
    names = _parameters(function)
    return names is None or all(name in names for name in case.given if name not in one.positional)
