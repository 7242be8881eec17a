"""The words that formulas are written in: formulas know no others, and every library means the same by them."""

from __future__ import annotations

import importlib
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from polysoftmax._arrays import namespace
from polysoftmax._formula import words
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._ops import STANDARD, Ops
from polysoftmax._partial import (
    LOG_PROB_OF_PARTIAL,
    LOGSUMEXP_OF_PARTIAL,
    MERGE,
    MERGE_OUTPUTS,
    PARTIAL,
    SOFTMAX_OF_PARTIAL,
)
from polysoftmax._probability import LOG_PROB, RANKS, TOP_LOG_PROBS
from polysoftmax._sampling import GUMBEL_SOFTMAX, PEAK, SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax._formula import RowFormula

strict = pytest.importorskip("array_api_strict")

HOW = {"replace", "replacements"}
"""What engines and `replaceable` ask an Ops for; formulas have no use for it."""

WORDS = {name for name in vars(Ops) if not name.startswith("_")} - HOW | set(STANDARD)


@pytest.fixture(autouse=True)
def standard_alone() -> Iterator[None]:
    flags = strict.ArrayAPIStrictFlags(
        api_version="2024.12", boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )
    with flags, np.errstate(all="ignore"):
        yield


# Formulas know no other words


class Guard:
    """The words, for arrays of the standard alone: a formula cannot reach past them, for a namespace say."""

    replacements: dict[Any, Any] = {}  # noqa: RUF012

    def __init__(self, axis: int, said: set[str]) -> None:
        self.axis, self._said = axis, said

    def __getattr__(self, name: str) -> Any:
        assert name in WORDS, f"a formula says {name!r}, which is no word of Ops"
        self._said.add(name)
        return getattr(Ops(strict, self.axis), name)

    # What hands the words on to a function of rows hands on these.

    def along(self, axis: int) -> Guard:
        return Guard(axis, self._said)

    def call(self, formula: RowFormula, *operands: Any, **options: Any) -> Any:
        return formula.function(self, *operands, **options)

    def apply_where(self, mask: Any, function: Any, operands: tuple[Any, ...], otherwise: Any) -> Any:
        ops = Ops(strict, self.axis)
        return ops.apply_where(mask, lambda _, *given: function(self, *given), operands, otherwise)


class Case(NamedTuple):
    formula: RowFormula
    operands: tuple[Any, ...]
    options: dict[str, Any]


GENERATOR = np.random.default_rng(0)
X, OTHER = GENERATOR.normal(size=(2, 6, 300), scale=3.0)
X[1, 1:] -= 60.0  # one term outweighs the others
X[2, 5] = X[2, 8] = 9.0
X[3, ::3] = -math.inf
MASK = GENERATOR.random(X.shape) < 0.7
WEIGHTS = np.where(MASK, GENERATOR.random(X.shape), 0.0)
TEMPERATURES = np.asarray([0.5, 2.0, 1.0, 0.0, math.inf, 3.0])[:, None]
KEYS = GENERATOR.integers(-(2**31), 2**31, (6, 6)).astype(np.int32)
CLASSES = np.asarray([0, 5, 7, -1, 299, 17])[:, None]
SHARES = SOFTMAX.function(words(OTHER), OTHER, None, None)
PARAMETERS = [(None, None), (0.7, MASK), (TEMPERATURES, None), (TEMPERATURES, MASK)]
FILTERS: list[tuple[tuple[Any, ...], int | None]] = [
    ((None, None, None), 5),
    ((None, None, None), 100),
    ((None, 0.8, 0.01), 5),
    ((None, 0.8, None), 100),
    ((None, 0.8, 0.01), None),
    ((np.asarray([0.0, 1.0, 7.0, 299.0, 300.0, 2.0])[:, None], None, None), None),
    ((None, np.asarray([0.0, 0.5, 0.9, 0.99, 1.0, 0.3])[:, None], TEMPERATURES / 8), None),
]
FORMULAS = (SOFTMAX, LOG_SOFTMAX, ENTROPY, KL_DIVERGENCE, TRUNCATE, SAMPLE, LOGSUMEXP, CROSS_ENTROPY)
FORMULAS += (LOG_PROB, RANKS, TOP_LOG_PROBS, GUMBEL_SOFTMAX, PEAK)
FORMULAS += (PARTIAL, MERGE, LOGSUMEXP_OF_PARTIAL, SOFTMAX_OF_PARTIAL, LOG_PROB_OF_PARTIAL, MERGE_OUTPUTS)


def _cases() -> Iterator[Case]:
    for t, where in PARAMETERS:
        for formula in (SOFTMAX, LOG_SOFTMAX, ENTROPY):
            yield Case(formula, (X, t, where), {})
        yield Case(KL_DIVERGENCE, (X, OTHER, t, where), {})
        for filters, top_k in FILTERS:
            yield Case(TRUNCATE, (X, t, where, *filters), {"top_k": top_k})
            how = {"top_k": top_k, "is_one_key": False, "draws": 1, "replace": True}
            yield Case(SAMPLE, (X, KEYS[:, :2], t, where, *filters), how)
            yield Case(LOG_PROB, (X, CLASSES, t, where, *filters), {"top_k": top_k})
        for keys, is_one_key in ((KEYS[:, :2], False), (KEYS, False), (KEYS[0, :2], True)):
            for draws, replace in ((1, True), (3, True), (3, False)):
                how = {"top_k": None, "is_one_key": is_one_key, "draws": draws, "replace": replace}
                yield Case(SAMPLE, (X, keys, t, where, None, None, None), how)
        yield Case(LOG_PROB, (X, KEYS % 400 - 50, t, where, None, None, None), {"top_k": None})
        yield Case(PEAK, (X, t, where), {})
        yield Case(PARTIAL, (X, t, where), {})
        part, other = (PARTIAL.function(words(X), x, t, where) for x in (X, OTHER))
        yield Case(MERGE, (*part, *other, t), {})
        yield Case(LOGSUMEXP_OF_PARTIAL, (*part, t), {})
        for finish in (SOFTMAX_OF_PARTIAL, LOG_PROB_OF_PARTIAL):
            yield Case(finish, (X, *part, t, where), {})
    yield Case(MERGE_OUTPUTS, (X, X[:, :1], OTHER, OTHER[:, :1]), {})
    for where in (None, MASK):
        yield Case(RANKS, (X, CLASSES, where), {})
        yield Case(TOP_LOG_PROBS, (X, where), {"count": 7})
        yield Case(GUMBEL_SOFTMAX, (X, KEYS[:, :2], where), {"is_one_key": False})
    for w in (None, WEIGHTS):
        for where in (None, MASK):
            yield Case(LOGSUMEXP, (X, w, where), {})
    for targets in (CLASSES, SHARES):
        for weight in (None, WEIGHTS[:1]):
            for ignored, smoothing, z_loss in ((None, 0.0, 0.0), (-1, 0.0, 0.1), (-1, 0.1, 0.0)):
                ignore_index = None if targets is SHARES else ignored
                options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "z_loss": z_loss}
                yield Case(CROSS_ENTROPY, (X, targets, weight), options)


def _with_derivatives(case: Case) -> Iterator[Case]:
    """Return a case and its derivatives, for the rows alone and for whatever can be differentiated."""
    yield case
    floating = tuple(isinstance(one, np.ndarray) and one.dtype.kind == "f" for one in case.operands)
    for moves in sorted({(True, *(False,) * (len(floating) - 1)), floating}):
        if case.formula.jvp is not None:
            tangents = [np.ones_like(one) for one, moving in zip(case.operands, moves, strict=True) if moving]
            yield case._replace(formula=case.formula.pushforward(moves), operands=(*case.operands, *tangents))
        if case.formula.vjp is not None:
            answer = case.formula.function(words(X), *case.operands, **case.options)
            for y in (None, answer):
                operands = (*case.operands, y, np.ones_like(answer))
                yield case._replace(formula=case.formula.pullback(moves), operands=operands)


def _along(one: Any, axis: int) -> Any:
    """Bring an operand, whose rows lie along the last axis, to the standard, with rows along an axis."""
    if not isinstance(one, np.ndarray):
        return one
    return strict.asarray(np.ascontiguousarray(np.moveaxis(one, -1, axis) if one.ndim > 1 else one))


def _run_guarded(case: Case, axis: int, said: set[str]) -> Any:
    operands = [_along(one, axis) for one in case.operands]
    return case.formula.function(Guard(axis, said), *operands, **case.options)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
def test_formulas_know_no_other_words(formula: RowFormula, axis: int) -> None:
    """And answer in them what they do in NumPy's."""
    for case in (one for whole in _cases() if whole.formula is formula for one in _with_derivatives(whole)):
        found = _run_guarded(case, axis, set())
        expected = case.formula.function(words(X), *case.operands, **case.options)
        each = zip(*(one if isinstance(one, tuple) else (one,) for one in (found, expected)), strict=True)
        for ours, theirs in each:
            values = np.asarray(ours)
            values = np.moveaxis(values, axis, -1) if values.ndim > 1 else values
            np.testing.assert_allclose(values, theirs, rtol=1e-11, atol=1e-13)


def test_every_formula_is_among_the_cases() -> None:
    assert {one.formula for one in _cases()} == set(FORMULAS)


def test_every_function_of_the_standard_among_the_words_is_used() -> None:
    said: set[str] = set()
    for case in (one for whole in _cases() for one in _with_derivatives(whole)):
        _run_guarded(case, 0, said)
    assert set(STANDARD) <= said


@pytest.mark.parametrize("name", ["xp", "tanh", "_flat_sum", "replace"])
def test_what_is_no_word_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=f"says '{name}'"):
        getattr(Guard(-1, set()), name)


# Every library means the same by them

KINDS = {
    "numpy.NumpyOps": "numpy",
    "jax.JaxOps": "jax.numpy",
    "jax.InMemoryOps": "jax.numpy",
    "_torch_words.TorchOps": "torch",
    "_torch_words.DifferentiatedOps": "torch",
    "_torch_words.CompiledOps": "torch",
    "_torch_words.CompiledDifferentiatedOps": "torch",
    "dask.DaskOps": "dask.array",
    "ndonnx.NdonnxOps": "ndonnx",
}
OPTIONAL = {"cubed.CubedOps": "cubed", "mlx.MlxOps": "mlx.core"}
KINDS |= {name: library for name, library in OPTIONAL.items() if find_spec(library.partition(".")[0])}

INF, NAN = math.inf, math.nan
ENTRIES = np.asarray(
    [
        [0.5, 1.0, 1.0, -2.0, 3.0],
        [2.0, 2.0, -INF, 0.0, 1.5],
        [-INF, -INF, -INF, -INF, -INF],
        [INF, 0.25, INF, 1.0, 0.5],
        [NAN, 1.0, 2.0, INF, -1.0],
        [1e-3, 1e30, 1.0, 7.0, 0.5],
    ],
    np.float32,
)
ROWS = np.stack([ENTRIES, ENTRIES[::-1], np.roll(ENTRIES, 1, axis=1)])
"""With ties, infinite numbers and NaN along every axis."""

ORDERED = np.where(np.isnan(ROWS), np.float32(-1.0), ROWS)
"""The same without NaN, which has no place in an order."""

POSITIVE = np.random.default_rng(1).gamma(2.0, size=(5, 700)).astype(np.float32)
LONG = np.round(np.random.default_rng(2).normal(size=(5, 700), scale=40.0)).astype(np.float32) / 8
"""Few different numbers, so that most stand in a row more than once."""
LONG[1, 100:] = -INF
LONG[2] = 0.25
LONG[3, ::2] = -INF
LONG[4, 13] = INF


class Arrays:
    """The words of one library along an axis, and its arrays, made of NumPy's."""

    def __init__(self, kind: type[Ops], xp: Any, make: Callable[[Any], Any], axis: int) -> None:
        self.ops, self.axis, self._make = kind(xp, axis), axis, make

    def __call__(self, values: Any, dtype: str | None = None) -> Any:
        return self._make(np.array(values, dtype=dtype))

    def first(self, values: Any) -> Any:
        """Make an array of the first entry of each row."""
        return self(np.take(values, [0], axis=self.axis))

    @property
    def place(self) -> Any:
        """The index of an entry in every row of `ROWS`."""
        shape = list(ROWS.shape)
        n, shape[self.axis] = shape[self.axis], 1
        return self(np.resize(np.random.default_rng(3).permutation(n), shape), "int64")


def _shift(ops: Ops, x: Any, by: Any) -> Any:
    return x + ops.max(by)


def _is_there(ops: Ops, entries: Any) -> Any:
    return ops.where(entries > -INF, ops.ones_like(entries), 0.0)


def _power(ops: Ops, entries: Any) -> Any:
    return ops.exp(entries / 16.0)


def _ends(a: Arrays) -> Any:
    """Return ends of prefixes whose masses lie far from the target, for its rounding is a library's own."""
    return tuple(
        a.ops.end_of_prefix(
            a(LONG[:4]), lambda entries, of=mass_of: of(a.ops, entries), lambda total, of=share: of * total
        )
        for mass_of in (_is_there, _power)
        for share in (1e-4, 0.30103, 0.90007, 0.9999)
    )


def _entries_of_block(a: Arrays) -> Any:
    """Return the entries of a block and their indices: what stands beside them is a library's own affair."""
    block = np.asarray([[0], [2], [1], [43], [10]])
    entries, index = np.broadcast_arrays(*map(_values, a.ops.block_of(a(LONG), a(block, "int64"), 16)))
    inside = (index // 16 == block) & (index < LONG.shape[-1])
    return tuple(np.asarray([entries[i][inside[i]], index[i][inside[i]]]) for i in range(len(block)))


def _crossing(a: Arrays) -> Any:
    sums = a.ops.running_sum(a.ops.block_sums(a(POSITIVE), 256), a.ops.xp.float32)
    block, _, inside = a.ops.find_crossing(
        a(POSITIVE), sums, lambda entries: a.ops.where(entries > 0, entries, 0.0), sums[..., -1:] * 0.61803
    )
    return block, inside


ALONG_ANY: dict[str, Callable[[Arrays], Any]] = {
    "along": lambda a: a.ops.along(1).max(a(ROWS)),
    "max": lambda a: a.ops.max(a(ROWS)),
    "min": lambda a: a.ops.min(a(ROWS)),
    "sum": lambda a: (a.ops.sum(a(np.abs(ROWS))), a.ops.sum(a(np.moveaxis(POSITIVE[None], -1, a.axis)))),
    "any": lambda a: (a.ops.any(None), a.ops.any(a(ROWS > 2.0))),
    "any_of": lambda a: a.ops.any_of(a(ROWS > 2.0)),
    "count": lambda a: a.ops.count(a(ROWS > 0.5)),
    "argmax": lambda a: a.ops.argmax(a(ORDERED)),
    "total": lambda a: (a.ops.total(a(POSITIVE)), a.ops.total(a(ROWS)), a.ops.total(a(ROWS[:0]))),
    "mean": lambda a: (a.ops.mean(a(POSITIVE)), a.ops.mean(a(ROWS)), a.ops.mean(a(ROWS[:0]))),
    "where": lambda a: (
        a.ops.where(None, a(ROWS), 0.0),
        a.ops.where(a(ROWS > 0.5), a(ROWS), 0.25),
        a.ops.where(a.first(ROWS > 0.5), a(ROWS), a.first(ROWS)),
    ),
    "apply_where": lambda a: tuple(
        a.ops.apply_where(a(mask), _shift, (a(ROWS), a(ORDERED)), a(ROWS))
        for mask in (ROWS > 0.5, ROWS > 1e38, np.zeros_like(ROWS, bool))
    ),
    "nan_unless": lambda a: (
        a.ops.nan_unless(a(ROWS > 0.5), a(ROWS), a(np.ones_like(ROWS))),
        a.ops.nan_unless(a.first(ROWS > 0.5), a(ROWS), a.first(ROWS)),
    ),
    "below": lambda a: a.ops.below(a(ROWS), a.ops.max(a(ROWS))),
    "cast": lambda a: (a.ops.cast(a(CLASSES, "int32"), a.ops.xp.float32), a.ops.cast(a(ROWS), a.ops.xp.float32)),
    "is_floating": lambda a: tuple(
        np.asarray(a.ops.is_floating(a(ORDERED > 0, dtype))) for dtype in ("float32", "int32", "bool")
    ),
    "index_dtype": lambda a: a.ops.astype(a(CLASSES, "int32"), a.ops.index_dtype),
    "int32": lambda a: a.ops.astype(a.place, a.ops.int32),
    "constant": lambda a: a.ops.constant(a(ROWS)),
    "divide": lambda a: tuple(a.ops.divide(a(ROWS), a(t, "float32")) for t in (0.5, 3.0, 1e-30, 1e30)),
    "computed_first": lambda a: a.ops.computed_first(a(ROWS)),
    "steady": lambda a: a.ops.where(a(ROWS > 0.5), a.ops.steady(a(ROWS), a(ROWS > 0.5)), 0.0),
    "with_slope_of": lambda a: a.ops.with_slope_of(a(ROWS), lambda: a(np.ones_like(ROWS))),
    "length": lambda a: np.asarray(a.ops.length(a(ROWS))),
    "broadcast_like": lambda a: a.ops.broadcast_like(a.first(ROWS), a(ROWS)),
    "part": lambda a: (a.ops.part(a(ROWS), 1, 3), a.ops.part(a(ROWS), 1, None), a.ops.part(a(ROWS), 0, 0)),
    "side_by_side": lambda a: (a.ops.side_by_side([a(ROWS)]), a.ops.side_by_side([a(ROWS), a(ORDERED)])),
    "arange": lambda a: tuple(a.ops.arange(n, a.ops.int32, a(ROWS)) for n in (0, 5)),
    "indices": lambda a: (a.ops.indices(a(ROWS)), a.ops.indices(a(ROWS), a.ops.index_dtype)),
    "take": lambda a: a.ops.take(a(ROWS), a.place),
    "call": lambda a: a.ops.call(LOGSUMEXP, a(ROWS), None, None),
}

ALONG_LAST: dict[str, Callable[[Arrays], Any]] = {
    "row_numbers": lambda a: a.ops.row_numbers(a(ROWS)),
    "descending": lambda a: a.ops.descending(a(LONG)),
    "descending_indices": lambda a: a.ops.descending_indices(a(LONG)),
    "kth_greatest": lambda a: tuple(a.ops.kth_greatest(a(LONG), k) for k in (1, 4, 100, 700)),
    "top_k_indices": lambda a: tuple(a.ops.top_k_indices(a(LONG), k) for k in (1, 2, 4, 100, 700)),
    "end_of_prefix": _ends,
    "ranked": lambda a: tuple(a.ops.ranked(a(LONG), a([[1], [4], [9], [2], [7]], "int64"), most) for most in (9, None)),
    "keep_first": lambda a: tuple(
        a.ops.keep_first(a(LONG > -1.0), a([[3], [1], [5], [300], [2]], dtype)) for dtype in ("float32", "int64")
    ),
    "find_crossing": _crossing,
    "running_sum": lambda a: a.ops.running_sum(a(POSITIVE), a.ops.xp.float32),
    "block_sums": lambda a: tuple(
        a.ops.block_sums(a(POSITIVE[:, :n]), size) for n in (700, 512, 3) for size in (2, 256)
    ),
    "sum_of_blocks": lambda a: a.ops.sum_of_blocks(a(POSITIVE.reshape(5, 7, 100))),
    "block_of": _entries_of_block,
}

OF_THE_STANDARD: dict[str, Callable[[Arrays], Any]] = {
    "abs": lambda a: a.ops.abs(a(ROWS)),
    "astype": lambda a: a.ops.astype(a(ROWS > 0.5), a.ops.xp.float32),
    "broadcast_to": lambda a: a.ops.broadcast_to(a(ENTRIES), ROWS.shape),
    "expm1": lambda a: (a.ops.expm1(a(ROWS)), a.ops.expm1(a([-1e-6, -80.0, -math.inf], "float32"))),
    "exp": lambda a: (a.ops.exp(a(ROWS)), a.ops.exp(a([-80.0, -1e4, -1e30], "float32"))),
    "expand_dims": lambda a: a.ops.expand_dims(a(ROWS), axis=-2),
    "floor": lambda a: a.ops.floor(a(ROWS)),
    "isfinite": lambda a: a.ops.isfinite(a(ROWS)),
    "log": lambda a: a.ops.log(a(np.abs(ROWS))),
    "log1p": lambda a: a.ops.log1p(a(np.abs(ROWS))),
    "maximum": lambda a: a.ops.maximum(a(ROWS), a(ROWS[::-1])),
    "moveaxis": lambda a: a.ops.moveaxis(a(ROWS), -1, 0),
    "ones_like": lambda a: a.ops.ones_like(a(ROWS)),
    "reshape": lambda a: a.ops.reshape(a(ROWS), (-1, 5)),
    "squeeze": lambda a: a.ops.squeeze(a(ROWS[:1]), axis=0),
    "zeros_like": lambda a: a.ops.zeros_like(a(ROWS)),
}

EVERY = {**ALONG_ANY, **ALONG_LAST, **OF_THE_STANDARD}

UNORDERED = ("descending", "descending_indices", "kth_greatest", "ranked", "top_k_indices", "end_of_prefix")
"""Words that Dask and Cubed cannot answer."""

BEHIND_UNORDERED = ("keep_first", "find_crossing")
"""Words that follow one of those, and are never reached with Dask or Cubed."""


def _values(y: Any) -> Any:
    if type(y).__module__.startswith("cubed."):
        from cubed.runtime.create import create_executor

        return np.asarray(y.compute(executor=create_executor("single-threaded")))  # other threads warn
    for name in ("compute", "detach", "unwrap_numpy"):  # of Dask, PyTorch and ndonnx
        y = getattr(y, name)() if hasattr(y, name) else y
    return np.asarray(y)


def _kinds_below(kind: type[Ops]) -> Iterator[type[Ops]]:
    for one in kind.__subclasses__():
        yield one
        yield from _kinds_below(one)


def test_every_word_and_every_kind_is_compared() -> None:
    assert set(EVERY) == WORDS
    for name, library in KINDS.items():
        pytest.importorskip(library)
        importlib.import_module(f"polysoftmax.engines.{name.partition('.')[0]}")
    found = {f"{one.__module__}.{one.__name__}" for one in _kinds_below(Ops) if not one.__name__.startswith("_")}
    found = {one for one in found if "_torch_spread" not in one}  # which takes several processes
    found -= {"polysoftmax.engines._chunked.ChunkedOps"}  # what Dask and Cubed share
    found -= {f"polysoftmax.engines.{name}" for name in OPTIONAL if name not in KINDS}  # imported for another test
    assert {one for one in found if one.startswith("polysoftmax.")} == {f"polysoftmax.engines.{one}" for one in KINDS}


def _words_of(name: str, axis: int) -> Arrays:
    xp = pytest.importorskip(KINDS[name])
    make = {"torch": "from_numpy", "dask.array": "from_array"}.get(KINDS[name], "asarray")
    module, _, kind = name.partition(".")
    engine = importlib.import_module(f"polysoftmax.engines.{module}")
    make_array = getattr(xp, make)
    return Arrays(getattr(engine, kind), namespace(make_array(np.zeros(1, np.float32))), make_array, axis)


def _compare(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple):
        for one, other in zip(ours, theirs, strict=True):
            _compare(one, other)
        return
    if theirs is None:
        assert ours is None
        return
    ours, theirs = _values(ours), _values(theirs)
    assert (ours.shape, ours.dtype.kind) == (theirs.shape, theirs.dtype.kind)
    if ours.dtype.kind == "f":
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=0)  # roundings of sums, exponentials and logarithms
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:numpy.core.numeric is deprecated:DeprecationWarning")  # Cubed's moveaxis
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("word", "axis"), [(word, axis) for word in EVERY for axis in ((0, 1, -1) if word in ALONG_ANY else (-1,))]
)
def test_every_library_means_the_same(name: str, word: str, axis: int) -> None:
    ours, standard = _words_of(name, axis), Arrays(Ops, strict, strict.asarray, axis)
    is_chunked = name in ("dask.DaskOps", "cubed.CubedOps")
    if is_chunked and word in UNORDERED:
        with pytest.raises(NotImplementedError, match="cannot order rows"):
            EVERY[word](ours)
    elif is_chunked and word in BEHIND_UNORDERED:
        pytest.skip("follows a word that it cannot answer")
    else:
        _compare(EVERY[word](ours), EVERY[word](standard))
