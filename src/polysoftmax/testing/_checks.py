"""What is checked: every public function, how it is called, what it is to answer, and on which cases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing import _calls as calls
from polysoftmax.testing import _drawn, _expected, _words
from polysoftmax.testing._cases import LOGSUMEXP, PROBABILITIES, Case, case
from polysoftmax.testing._expected import by_row

if TYPE_CHECKING:
    from polysoftmax.testing._expected import Expect


@dataclass(frozen=True, eq=False)
class Check:
    """A function by its name in polysoftmax, the operands that it takes by position, the expectation, and the cases.

    ``call`` is the expression that calls it, in which ``{f}`` is the function, ``{args}`` what goes by position and
    ``{options}`` the rest; it is what runs, and what a reproducer shows. ``main`` is the operand whose rows are the
    rows of the answer, if there are any. Unless ``is_relative``, the unit of an answer between -1 and 1 is that of 1.
    """

    function: str
    positional: tuple[str, ...]
    expect: Expect
    cases: tuple[Case, ...]
    call: str = "{f}({args}{options})"
    main: str = ""
    is_relative: bool = False
    has_dtypes: bool = True
    is_eager: bool = False
    frozen: tuple[int, ...] = ()

    def expression(self, given: dict[str, Any], f: str) -> str:
        """Return the call of some operands as Python, in which arrays stand by name."""
        shown = {name: name if is_array(value) else repr(value) for name, value in given.items()}
        args = ", ".join(shown[name] for name in self.positional if name in shown)
        options = [f", {name}={value}" for name, value in shown.items() if name not in self.positional]
        return self.call.format(f=f, args=args, options="".join(options))


def is_array(value: Any) -> bool:
    """Whether an operand stands for an array of the library."""
    return isinstance(value, np.ndarray) or callable(value)


def _random(function: str, positional: tuple[str, ...], expect: Expect, cases: list[Case], **how: Any) -> Check:
    return Check(f"random.{function}", positional, expect, tuple(cases), has_dtypes=False, **how)


def _slopes(function: str, vector: str, answer: Any, *, is_relative: bool) -> Check:
    expect = by_row(answer, ("entries", "dtype"))
    cases = (*calls.rows_and("x", vector), *calls.near_the_winner(vector))
    return Check(function, ("x", vector), expect, cases, main="x", is_relative=is_relative)


_STATISTICS = (("kept", "compute"),) * 3

_EVERY = (
    Check(
        "softmax",
        ("x",),
        by_row(_expected.softmax, ("entries", "dtype")),
        tuple(PROBABILITIES),
        main="x",
        is_relative=True,
    ),
    Check("log_softmax", ("x",), by_row(_expected.log_softmax, ("entries", "dtype")), tuple(PROBABILITIES), main="x"),
    Check("logsumexp", ("x",), by_row(_expected.logsumexp, ("row", "dtype")), tuple(LOGSUMEXP), main="x"),
    _slopes("softmax_jvp", "tangent", _expected.softmax_product["tangent"], is_relative=False),
    _slopes("softmax_vjp", "cotangent", _expected.softmax_product["cotangent"], is_relative=False),
    _slopes("log_softmax_jvp", "tangent", _expected.log_softmax_jvp, is_relative=False),
    _slopes("log_softmax_vjp", "cotangent", _expected.log_softmax_vjp, is_relative=False),
    *(
        Check(
            name,
            ("x",),
            by_row(answer, ("matrix", "dtype")),
            tuple(calls.small_and_whole(calls.rows_and("x"))),
            main="x",
        )
        for name, answer in (
            ("softmax_jacobian", _expected.softmax_jacobian),
            ("log_softmax_jacobian", _expected.log_softmax_jacobian),
        )
    ),
    Check("cross_entropy", ("logits", "targets"), _expected.cross_entropy, tuple(calls.losses()), main="logits"),
    Check("entropy", ("x",), by_row(_expected.entropy, ("row", "compute")), tuple(calls.rows_and("x")), main="x"),
    Check(
        "kl_divergence",
        ("logits_p", "logits_q"),
        by_row(_expected.kl_divergence, ("row", "compute"), main="logits_p"),
        tuple(calls.divergences()),
        main="logits_p",
    ),
    Check(
        "partial",
        ("x",),
        by_row(_expected.partial, *_STATISTICS),
        tuple(calls.parts()),
        "{f}({args}{options})[:3]",
        main="x",
    ),
    *(
        Check(f"Partial.{name}", ("x",), expect, tuple(cases), call, main="x", is_relative=name == "softmax")
        for name, expect, cases, call in (
            (
                "logsumexp",
                by_row(_expected.logsumexp_of_scores, ("kept", "compute")),
                [calls.rows_and("x")[5], case("rows, T=0.5", x=calls.ROWS[:4], temperature=0.5, core=True)],
                "{f}(polysoftmax.partial({args}{options}))",
            ),
            (
                "softmax",
                by_row(_expected.softmax, ("entries", "dtype")),
                calls.plain_parts(),
                "{f}(polysoftmax.partial({args}{options}), {args})",
            ),
            (
                "log_prob",
                by_row(_expected.log_softmax, ("entries", "compute")),
                calls.plain_parts(),
                "{f}(polysoftmax.partial({args}{options}), {args})",
            ),
        )
    ),
    Check(
        "merge",
        ("left", "right"),
        by_row(_expected.merged, *_STATISTICS, main="left"),
        tuple(calls.pairs()),
        "{f}(polysoftmax.partial(left{options}), polysoftmax.partial(right{options}))[:3]",
        main="left",
    ),
    Check(
        "merge_outputs",
        ("lse_a", "out_a", "lse_b", "out_b"),
        by_row(_expected.merged_outputs, ("row", "compute"), ("entries", "dtype"), main="out_a"),
        tuple(calls.outputs()),
        "{f}((lse_a, out_a), (lse_b, out_b))",
        main="out_a",
    ),
    Check(
        "linear_cross_entropy",
        ("logits", "hidden", "targets"),
        _expected.cross_entropy,
        tuple(calls.losses_of_heads()),
        "{f}(hidden, logits.T, targets{options})",
    ),
    Check(
        "linear_cross_entropy_value_and_grad",
        ("logits", "hidden", "targets"),
        by_row(_expected.loss_slopes, ("entries", "dtype"), main="logits"),
        tuple(calls.losses_of_heads(gradients=True)),
        "{f}(hidden, logits.T, targets, reduction='sum'{options})[1].weight.T",
    ),
    Check(
        "linear_log_prob",
        ("logits", "hidden", "tokens"),
        _drawn.log_prob,
        tuple(calls.heads(calls.named(calls.log_probs(), "nothing", "all", "several tokens", "masked rows"))),
        "{f}(hidden, logits.T, tokens{options})",
    ),
    *(
        Check(
            f"streaming.{name}",
            ("logits", *more),
            expect,
            tuple(calls.named(cases, *names)),
            "{f}([logits[..., :2], logits[..., 2:]]" + "".join(f", {one}" for one in (*more, *last)) + "{options})",
            main="logits",
        )
        for name, more, last, expect, cases, names in (
            (
                "logsumexp",
                (),
                (),
                by_row(_expected.logsumexp_of_scores, ("row", "compute"), main="logits"),
                [case("rows", logits=calls.ROWS, core=True), case("T=0.5", logits=calls.ROWS[:4], temperature=0.5)],
                ("rows", "T=0.5"),
            ),
            ("log_prob", ("tokens",), (), _drawn.log_prob, calls.log_probs(), ("nothing", "bad rows", "long rows")),
            (
                "cross_entropy",
                ("targets",),
                (),
                _expected.cross_entropy,
                calls.losses(),
                ("classes", "the mean", "no row counts", "normal rows"),
            ),
            (
                "sample",
                ("key",),
                ("logits.shape[-1]",),
                _drawn.sample,
                calls.samples(),
                ("nothing", "tokens alone", "bad rows", "many rows", "long rows, all tokens"),
            ),
        )
    ),
    Check(
        "truncate",
        ("logits",),
        by_row(_drawn.truncate, ("entries", "dtype"), main="logits"),
        tuple(calls.truncations()),
        main="logits",
    ),
    Check("sample", ("logits", "key"), _drawn.sample, tuple(calls.samples()), main="logits"),
    Check("log_prob", ("logits", "tokens"), _drawn.log_prob, tuple(calls.log_probs()), main="logits"),
    Check(
        "top_log_probs",
        ("logits", "k"),
        _drawn.top_log_probs,
        (
            case("rows", logits=calls.ROWS, k=2, core=True),
            case("normal rows", logits=calls.logits(5, 301), k=7, temperature=0.5, core=True),
            case("masked rows", logits=calls.ROWS, k=3, where=calls.MASK),
            case("bad rows", logits=calls.NO_ROW, k=2),
            case("bad temperatures", logits=calls.ROWS[:3], k=2, temperature=(-1.0, math.nan, 1.0)),
        ),
        main="logits",
    ),
    Check(
        "speculate",
        ("draft_tokens", "target_logits", "key"),
        _drawn.speculate,
        tuple(calls.speculations()),
        main="target_logits",
        frozen=(1,),
    ),
    Check("gumbel_softmax", ("logits", "key"), _drawn.gumbel_softmax, tuple(calls.relaxations()), main="logits"),
    Check(
        "unpack_mask",
        ("words", "n"),
        _words.mask_bits,
        (case("words", words=calls.keys(3), n=50, core=True),),
        main="words",
        has_dtypes=False,
    ),
    _random("key", ("seed",), _words.key, [case("seeds", seed=calls.SEEDS, core=True)]),
    _random(
        "split", ("key", "num"), _words.keys_split, [case("keys", key=calls.keys(3), num=4, core=True)], main="key"
    ),
    _random(
        "fold_in",
        ("key", "data"),
        _words.folded_in,
        [
            case("keys", key=calls.keys(4), data=calls.SEEDS, core=True),
            case("a number of 64 bits", key=calls.keys(2), data=2**40 + 5),
        ],
    ),
    _random("bits", ("key", "shape"), _words.bits, calls.SHAPES),
    _random("uniform", ("key", "shape"), _words.uniform, calls.SHAPES),
    _random("gumbel", ("key", "shape"), _words.gumbel, calls.SHAPES),
    _random(
        "threefry2x32",
        ("key_words", "counter_words"),
        _words.blocks,
        [case("blocks", key_words=calls.keys(3), counter_words=calls.keys(3, seed=8), core=True)],
    ),
    Check(
        "engine",
        ("x",),
        _words.flags("portable inside", "unchanged outside"),
        (case("a choice", x=calls.ROWS[:1], core=True),),
        "[{f}('portable')(polysoftmax.explain)({args}, 'softmax').engine == 'portable',"
        " polysoftmax.explain({args}, 'softmax') == polysoftmax.explain({args}, 'softmax')]",
        is_eager=True,
        has_dtypes=False,
    ),
    Check(
        "explain",
        ("x",),
        _words.flags("operation", "shape", "portable"),
        (case("softmax", x=calls.ROWS[:1], core=True),),
        "[{f}({args}, 'softmax').op == 'softmax', {f}({args}, 'softmax').shape == (1, 4),"
        " polysoftmax.engine('portable')({f})({args}, 'softmax').engine == 'portable']",
        is_eager=True,
        has_dtypes=False,
    ),
    Check(
        "set_num_threads",
        ("n",),
        _words.flags("asked for", "set back"),
        (case("five threads", n=5, core=True),),
        "[({f}(k) or polysoftmax.engines._library.num_threads()) == k"
        " for k in ({args}, polysoftmax.engines._library.num_threads())]",
        is_eager=True,
        has_dtypes=False,
    ),
)
CHECKS = {one.function: one for one in _EVERY}
"""Every check by the name of its function."""

DTYPES = {
    "where": "bool",
    "temperature": "compute",
    "top_p": "compute",
    "min_p": "compute",
    "key": "int32",
    "words": "int32",
    "key_words": "int32",
    "counter_words": "int32",
}
"""The dtypes of arrays that are not the logits' own, or the library's index dtype if they hold integers."""


def dtype_of(name: str, value: Any, dtype: str, compute: str, index: str) -> str:
    """Return the dtype of an array that is given by a name."""
    kind = DTYPES.get(name, "dtype" if np.asarray(value).dtype.kind == "f" else "index")
    return {"dtype": dtype, "compute": compute, "index": index}.get(kind, kind)
