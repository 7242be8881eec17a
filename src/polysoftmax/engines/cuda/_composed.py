"""A draw as several launches: the formula that is made of formulas, each of which has a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax import _formula
from polysoftmax._formula import Call
from polysoftmax._truncation import TRUNCATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array
    from polysoftmax._formula import RowFormula


class Composed:
    """The words for a call of such a formula: those of its library, but for the formulas that it calls.

    Its rows are not widened, since the kernels take 16 bits.
    """

    def __init__(
        self, call: Call, operands: tuple[Array, ...], run: Callable[[Call, tuple[Array, ...]], Any], axis: int = -1
    ) -> None:
        self._call, self._operands, self._run = call, operands, run
        self.axis = axis

    def __getattr__(self, name: str) -> Any:
        return getattr(_formula.words(self._operands[0], self.axis), name)

    def along(self, axis: int) -> Composed:
        """Return the words for rows along another axis."""
        return self if axis == self.axis else Composed(self._call, self._operands, self._run, axis)

    def call(self, formula: RowFormula, *operands: Any, **options: Any) -> Any:
        """Run a formula by its kernel."""
        result = operands[0].dtype if formula is TRUNCATE else self._call.compute
        return self._run(Call(formula, options, operands[0].ndim - 1, self._call.compute, result), operands)

    def answer(self) -> Array:
        """Return what the call answers."""
        return self._call.answer(self.answer_of_rows())

    def answer_of_rows(self) -> Array:
        """Return what the formula answers, with the axis."""
        return self._call.formula.function(self, *self._operands, **self._call.options)
