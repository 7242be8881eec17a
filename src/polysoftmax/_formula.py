"""The seam: a row formula, the call of one, and who runs it.

A row formula is a pure function of rows, written in the words of `Ops`. It never knows how it is run: as it stands,
under a compiler, or by a kernel that an engine has registered for it. Engines import formulas; nothing here imports an
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from polysoftmax._arrays import MOST_TYPES, Array, DType, cast, float_bits, keep, may_keep, namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polysoftmax._linear import Heads
    from polysoftmax._ops import Ops
    from polysoftmax._rows import Rows


Reduction: TypeAlias = Literal["sum", "mean"] | None


class RowFormula:
    """A pure function of rows, with its derivative rules.

    ``function(ops, x, *others, **options)`` takes operands that broadcast against the rows ``x`` (None where absent),
    all floating ones in the compute dtype. It returns something of the shape of ``x`` or with length 1 along the axis,
    or a tuple of such arrays in dtypes of their own.

    ``jvp(ops, operands, tangents, y, **options)`` returns the tangent of the answer, a tangent being None where it is
    zero. ``vjp(ops, operands, y, cotangent, wanted, **options)`` returns a gradient for each floating operand, None
    where it is not wanted. ``keeps="answer"`` says that the gradient for the rows follows from y, so that reverse mode
    need not keep the rows.

    ``numbers`` names the options that are numbers in its arithmetic and nothing else, once they are not None or 0: an
    engine that compiles may leave their values open.
    """

    __slots__ = ("_derived", "function", "jvp", "keeps", "name", "numbers", "vjp")

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        jvp: Callable[..., Array] | None = None,
        vjp: Callable[..., tuple[Array | None, ...]] | None = None,
        *,
        keeps: Literal["answer", "operands"] = "operands",
        numbers: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.function = function
        self.jvp = jvp
        self.vjp = vjp
        self.keeps = keeps
        self.numbers = numbers
        self._derived: dict[tuple[str, tuple[bool, ...]], RowFormula] = {}
        if not isinstance(function, _Pullback | _Pushforward):
            _NAMED[name] = self

    def __call__(
        self,
        rows: Rows,
        *operands: Array,
        result: DType = None,
        squeeze: bool = False,
        reduction: Reduction = None,
        **options: Any,
    ) -> Any:
        """Run the formula on ``rows`` in their library's engine.

        Where it answers one entry a row, ``squeeze`` drops the axis, and ``reduction`` returns the sum or mean of all.
        """
        call = Call(self, options, rows.axis, rows.compute, result or rows.result, squeeze, reduction)
        return (_RUNNERS.get(type(rows.x)) or runner(rows.x)).run(call, operands)

    def pullback(self, wanted: tuple[bool, ...]) -> RowFormula:
        """Return the reverse rule as a formula of ``(*operands, y, cotangent)``, for the operands that are ``wanted``.

        It computes y where that is None.
        """
        found = self._derived.get(("pullback", wanted))
        if found is None:
            name = f"pullback of {self.name} for {[i for i, one in enumerate(wanted) if one]}"
            found = self._derived["pullback", wanted] = RowFormula(name, _Pullback(self, wanted))
        return found

    def pushforward(self, moving: tuple[bool, ...]) -> RowFormula:
        """Return the forward rule as a formula of ``(*operands, *tangents)``, a tangent for each operand that moves."""
        found = self._derived.get(("pushforward", moving))
        if found is None:
            function = _Pushforward(self, moving)
            found = self._derived["pushforward", moving] = RowFormula(f"pushforward of {self.name}", function)
        return found

    def __repr__(self) -> str:
        return f"<row formula {self.name}>"

    def __reduce__(self) -> tuple[Callable[..., RowFormula], tuple[Any, ...]]:
        """Pickle the name and not the functions: engines find their kernels by the formula object of their process."""
        if isinstance(self.function, _Pullback):
            return self.function.formula.pullback, (self.function.wanted,)
        if isinstance(self.function, _Pushforward):
            return self.function.formula.pushforward, (self.function.moving,)
        return named, (self.name,)


_NAMED: dict[str, RowFormula] = {}


def named(name: str) -> RowFormula:
    """Return the formula of a name; ``LookupError`` where the module that defines it has not been imported."""
    try:
        return _NAMED[name]
    except KeyError:
        msg = f"this process has no row formula named {name!r}: import the module that defines it first"
        raise LookupError(msg) from None


class _Pullback:
    __slots__ = ("formula", "wanted")

    def __init__(self, formula: RowFormula, wanted: tuple[bool, ...]) -> None:
        self.formula, self.wanted = formula, wanted

    def __call__(self, ops: Ops, *arrays: Array, **options: Any) -> Any:
        *operands, y, cotangent = arrays
        formula = self.formula
        assert formula.vjp is not None
        y = formula.function(ops, *operands, **options) if y is None else y
        gradients = formula.vjp(ops, tuple(operands), y, cotangent, self.wanted, **options)
        asked = tuple(one for one, wanted in zip(gradients, self.wanted, strict=False) if wanted)
        return asked if len(asked) > 1 else asked[0]


class _Pushforward:
    __slots__ = ("formula", "moving")

    def __init__(self, formula: RowFormula, moving: tuple[bool, ...]) -> None:
        self.formula, self.moving = formula, moving

    def __call__(self, ops: Ops, *arrays: Array, **options: Any) -> Array:
        formula, count = self.formula, len(self.moving)
        assert formula.jvp is not None
        operands, given = arrays[:count], iter(arrays[count:])
        tangents = tuple(next(given) if moves else None for moves in self.moving)
        y = formula.function(ops, *operands, **options)
        return formula.jvp(ops, operands, tangents, y, **options)


class Call(NamedTuple):
    """A row formula with everything fixed but the arrays."""

    formula: RowFormula
    options: dict[str, Any]
    axis: int
    compute: DType
    result: DType
    squeeze: bool = False
    reduction: Reduction = None

    def evaluate(self, ops: Ops, operands: Sequence[Array]) -> Any:
        """Run the formula as it stands: the portable engine, and the definition of every other."""
        y = self.formula.function(ops, *self.widen(ops, operands), **self.options)
        return self.without_axis(y) if isinstance(y, tuple) else self._reduce(ops, self.answer(y))

    def widen(self, ops: Ops, operands: Sequence[Array]) -> Sequence[Array]:
        """Bring the rows, and every floating array beside them, to the compute dtype."""
        compute = self.compute
        for i, one in enumerate(operands):
            if one is None or isinstance(one, float) or one.dtype == compute:
                continue
            if i == 0 or float_bits(namespace(one), one.dtype):
                operands = [*operands[:i], ops.cast(one, compute), *operands[i + 1 :]]
        return operands

    def answer(self, y: Array) -> Array:
        """Bring what the formula computed to the dtype and shape that were asked for."""
        y = cast(y, self.result)
        return namespace(y).squeeze(y, self.axis) if self.squeeze else y

    def without_axis(self, several: tuple[Array, ...]) -> tuple[Array, ...]:
        """Bring several answers, in dtypes of their own, to the shape that was asked for."""
        if not self.squeeze:
            return several
        return tuple([namespace(y).squeeze(y, self.axis) for y in several])

    def in_steps(self, run: Callable[[Call, tuple[Array, ...]], Array], operands: tuple[Array, ...]) -> Array:
        """Run the call by what knows no reductions, and reduce what it answers."""
        y = run(Call(*self[:-1]), operands)  # quicker than _replace
        return self._reduce(words(y, self.axis), y)

    def _reduce(self, ops: Ops, y: Array) -> Array:
        if self.reduction is None:
            return y
        return ops.mean(y) if self.reduction == "mean" else ops.total(y)


class Runner(Protocol):
    """What an engine is to a library: a module of ``engines/``, or an object."""

    @property
    def heads(self) -> Heads:
        """How it runs formulas of a linear layer's logits."""

    def run(self, call: Call, operands: tuple[Array, ...]) -> Any:
        """Run a call."""

    def words(self, x: Array, axis: int) -> Ops:
        """Return the words in which formulas run as they stand, for rows of ``x``."""

    def explain(self, x: Array, formula: RowFormula) -> tuple[str, str]:
        """Return the engine that would run a formula along the last axis of ``x``, and why."""


_RUNNERS: dict[type, Runner] = {}
_load: Callable[[Array], Runner] | None = None


def use(load: Callable[[Array], Runner]) -> None:
    """Register the function that finds an array's engine."""
    global _load
    _load = load


def runner(x: Array) -> Runner:
    """Return the engine of an array's library."""
    found = _RUNNERS.get(type(x))
    if found is None:
        assert _load is not None, "polysoftmax.engines is imported with the package"
        found = _load(x)
        if may_keep():
            keep(_RUNNERS, type(x), found, MOST_TYPES)
    return found


def words(x: Array, axis: int = -1) -> Ops:
    """Return the words of an array's library, for rows along an axis."""
    return runner(x).words(x, axis)
