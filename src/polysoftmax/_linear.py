"""A formula of the logits of a linear layer, x = h·Wᵀ + b, which stand in memory for a few rows at a time.

With g the gradient for the logits, those for h, W and b are g·W, gᵀ·h and Σ g; a softcap, x = c·tanh(x' / c), takes
1 - (x / c)² of g first. Whoever needs a gradient computes the logits again. Source: E. Wijmans and others, "Cut Your
Losses in Large-Vocabulary Language Models", arXiv 2411.09009, 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._arrays import cast, float_bits, is_number, namespace
from polysoftmax._formula import runner, words
from polysoftmax._rows import rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polysoftmax._arrays import Array
    from polysoftmax._formula import RowFormula
    from polysoftmax._softmax import Maybe


class Head(NamedTuple):
    """A linear layer and a formula of its logits, with everything fixed but the arrays.

    These are the hidden states (n, d), the weight (v, d), the bias (1, v) or None, and the formula's operands. Along
    the first axis an operand has n entries, one for each row, or 1 for all.
    """

    formula: RowFormula
    options: tuple[tuple[str, Any], ...]
    softcap: float | None
    squeeze: bool
    size: int
    """How many rows of logits stand in memory at once."""

    def logits(self, hidden: Array, weight: Array, bias: Maybe) -> Array:
        """Return logits in the dtype of the layer."""
        x = runner(weight).heads.product(hidden, weight)
        if bias is not None:
            x = x + bias
        return x if self.softcap is None else self.softcap * namespace(x).tanh(x / self.softcap)

    def __call__(self, hidden: Array, weight: Array, bias: Maybe, *operands: Any) -> Array:
        """Return what the formula answers for each row, from all of the logits at once."""
        return self.answer(self.logits(hidden, weight, bias), operands)

    def answer(self, logits: Array, operands: tuple[Any, ...]) -> Array:
        """Return what the formula answers for each row of logits."""
        r = rows(logits, -1)
        return self.formula(r, r.x, *operands, result=r.compute, squeeze=self.squeeze, **dict(self.options))

    def slopes(
        self, logits: Array, operands: tuple[Any, ...], cotangent: Array, wanted: tuple[bool, ...]
    ) -> tuple[Array, tuple[Maybe, ...]]:
        """Return the gradient for what the layer answers, in its dtype, and those for the operands that are wanted."""
        r = rows(logits, -1)
        if self.squeeze:
            cotangent = r.xp.expand_dims(cotangent, axis=-1)
        pull = self.formula.pullback((True, *wanted))
        found = pull(r, r.x, *operands, None, cotangent, result=r.compute, **dict(self.options))
        slope, *others = found if isinstance(found, tuple) else (found,)
        if self.softcap is not None:
            ratio = cast(logits, r.compute) / self.softcap
            slope = slope * (1.0 - ratio * ratio)
        given = iter(others)
        return cast(slope, logits.dtype), tuple(next(given) if one else None for one in wanted)


def has_rows(operand: Any) -> bool:
    """Whether an operand has an entry for each row."""
    return operand is not None and not is_number(operand) and operand.ndim > 0 and operand.shape[0] != 1


def chunks(size: int, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Cut hidden states, and what has an entry for each of them, into a few rows at a time."""
    n = arrays[0].shape[0]
    for start in range(0, max(1, n), size):
        few = slice(start, min(start + size, n))
        yield tuple(one[few, ...] if has_rows(one) else one for one in arrays)


class Gradients:
    """The gradients for what a head takes, to which those of a few rows at a time are added."""

    def __init__(self, head: Head, arrays: tuple[Any, ...], wanted: tuple[bool, ...]) -> None:
        self.head, self.arrays, self.wanted = head, arrays, wanted
        self.by_rows: list[list[Array]] = [[] for _ in arrays]
        self.sums: list[Maybe] = [None for _ in arrays]

    def add(self, logits: Array, hidden: Array, operands: tuple[Any, ...], cotangent: Array) -> None:
        """Add those of a few rows, whose cotangent is that of their answers."""
        xp, weight = namespace(hidden), self.arrays[1]
        slope, others = self.head.slopes(logits, operands, cotangent, self.wanted[3:])
        if self.wanted[0]:
            self.by_rows[0].append(xp.matmul(slope, weight))
        if self.wanted[1]:
            self.sums[1] = runner(weight).heads.add_product(self._sum(1), slope, hidden)
        if self.wanted[2]:
            self._add(2, slope)
        for place, one in enumerate(others, 3):
            if one is None:
                continue
            if has_rows(self.arrays[place]):
                self.by_rows[place].append(one)
            else:
                self._add(place, one)

    def _sum(self, place: int) -> Array:
        """Return a sum as far as it goes, in float32 or wider: 16 bits would lose what a chunk adds to many."""
        found, like = self.sums[place], self.arrays[place]
        if found is not None:
            return found
        xp = namespace(like)
        return xp.zeros_like(like, dtype=xp.float32 if float_bits(xp, like.dtype) == 16 else like.dtype)

    def _add(self, place: int, of_rows: Array) -> None:
        total = self._sum(place)
        summed = words(of_rows, 0).sum(cast(of_rows, total.dtype))
        if not total.ndim:  # a number for all entries of all rows
            summed = words(of_rows).total(summed)
        elif total.shape[-1] == 1:
            summed = words(of_rows, 1).sum(summed)
        self.sums[place] = total + summed

    def all(self) -> tuple[Maybe, ...]:
        """Return the gradient for each array, None where it is not wanted."""
        xp = namespace(self.arrays[0])
        found: list[Maybe] = []
        for like, parts, total in zip(self.arrays, self.by_rows, self.sums, strict=True):
            one = xp.concat(parts, axis=0) if len(parts) > 1 else parts[0] if parts else total
            found.append(None if one is None else cast(one, like.dtype))
        return tuple(found)


class Heads:
    """How heads are run where a library has no better way; one that differentiates keeps each chunk's logits."""

    def answers(self, head: Head, *arrays: Any) -> Array:
        """Return what the formula answers for each row."""
        hidden, weight, bias, *operands = arrays
        found = [head(few, weight, bias, *theirs) for few, *theirs in chunks(head.size, hidden, *operands)]
        return found[0] if len(found) == 1 else namespace(hidden).concat(found, axis=0)

    def total(self, head: Head, cotangent: Array, *arrays: Any) -> Array:
        """Return the sum of the answers, each times its cotangent."""
        y = self.answers(head, *arrays)
        return words(y, 0).total(y * cotangent)

    def product(self, hidden: Array, weight: Array) -> Array:
        """Return h·Wᵀ."""
        xp = namespace(hidden)
        return xp.matmul(hidden, xp.matrix_transpose(weight))

    def add_product(self, total: Array, slope: Array, hidden: Array) -> Array:
        """Return the sum of a total, which may be written to, and gᵀ·h."""
        xp = namespace(total)
        return total + cast(xp.matmul(xp.matrix_transpose(slope), hidden), total.dtype)


class WholeHeads(Heads):
    """The heads of a library that makes a graph, and decides itself what stands in memory at once."""

    def answers(self, head: Head, *arrays: Any) -> Array:
        return head(*arrays)


def gradients(head: Head, cotangent: Array, arrays: tuple[Any, ...], wanted: tuple[bool, ...]) -> tuple[Maybe, ...]:
    """Return the gradients for hidden states, weight, bias and operands, None where they are not wanted."""
    found = Gradients(head, arrays, wanted)
    hidden, weight, bias, *operands = arrays
    for few, theirs, *others in chunks(head.size, hidden, cotangent, *operands):
        found.add(head.logits(few, weight, bias), few, tuple(others), theirs)
    return found.all()


def answers_and_gradients(
    head: Head, cotangent: Array, arrays: tuple[Any, ...], wanted: tuple[bool, ...]
) -> tuple[Array, tuple[Maybe, ...]]:
    """Return also what the formula answers, from logits that are computed once for both."""
    found, answers = Gradients(head, arrays, wanted), []
    hidden, weight, bias, *operands = arrays
    for few, theirs, *others in chunks(head.size, hidden, cotangent, *operands):
        logits = head.logits(few, weight, bias)
        answers.append(head.answer(logits, tuple(others)))
        found.add(logits, few, tuple(others), theirs)
    return namespace(hidden).concat(answers, axis=0), found.all()
