"""Calls worth testing of what is not the softmax family itself, as data."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._cases import Case, case, normal

if TYPE_CHECKING:
    from collections.abc import Iterable

# Rows, one an idea: huge, tied, almost certain, impossible classes
ROWS = np.asarray(
    [
        [1.0, 2.0, 3.0, 0.5],
        [1000.0, 1001.0, -inf, 999.0],
        [-2.0, -2.0, -2.0, -2.0],
        [0.25, -1.5, 4.0, 0.0],
        [1e30, -1e30, 0.0, 1e30],
        [0.0, -40.0, -41.0, -38.0],
        [-inf, 7.0, -inf, -inf],
        [3.0, 1.0, 3.0, 3.0],
        [88.5, 88.25, -88.5, 0.0],
    ]
)
MASK = np.asarray([[True] * 4, [True, False, True, True], [False] * 4] * 3)
NO_ROW = np.asarray([[nan, 1.0, 2.0, 0.0], [inf, 0.0, 1.0, 2.0], [-inf] * 4, [1.0, 2.0, 3.0, 0.0]])
HUGE = np.asarray([[3.4e38, 0.0, 56.0, 57.0], [3.4e38, -1.0, 3.4e38, 0.5]])
TEMPERATURES = np.asarray([1.0, 0.5, 2.0, 0.0, inf, 1.0, 0.25, 3.0, 1.0])


def vectors(*shape: int, seed: int = 3) -> Any:
    return np.round(8 * np.random.default_rng(seed).standard_normal(shape)) / 8


def rows_and(name: str, second: str = "", **more: Any) -> list[Case]:
    """Return cases of a function of rows, with a second operand of their shape if it has one."""

    def two(x: Any) -> dict[str, Any]:
        return {name: x} | ({second: vectors(*np.shape(x))} if second else {})

    wide = np.round(16 * normal(5, 301)()) / 16
    return [
        case("rows", **two(ROWS), **more, core=True),
        case("masked rows", **two(ROWS), where=MASK, **more),
        case("rows, T=0.5", **two(ROWS), temperature=0.5, **more),
        case("a temperature a row", **two(ROWS), temperature=TEMPERATURES, **more, core=True),
        case("axis 0", **two(ROWS[:4, :3]), axis=0, **more),
        case("normal rows", **two(wide), **more, core=True),
        case("a row of 5000", **two(np.round(16 * normal(2, 5000)()) / 16), **more),
    ]


def near_the_winner(vector: str) -> list[Case]:
    """Return a case whose vector hardly differs from its entry at a class with most of the probability."""
    given: dict[str, Any] = {"x": ((0.0, 20.0), (-15.0, 5.0)), vector: ((-3.0, -3.25), (-8.0, -7.75))}
    return [case("near the winner's", **given, temperature=1.05)]


def small_and_whole(cases: Iterable[Case]) -> list[Case]:
    return [one for one in cases if "where" not in one.given and np.shape(one.operand("x"))[-1] < 100]


CLASSES = np.asarray([2, 1, 3, 0, 0, 0, 1, 3, 2])
_Q = np.asarray([[0.5, 0.25, 0.25, 0.0], [0.25, 0.75, 0.0, 0.0], [0.25] * 4] * 3)
_Q[[4, 6]] = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
_WEIGHT = np.asarray([0.5, 2.0, 1.0, 0.25])
_FINITE = ROWS[[0, 1, 2, 3, 5, 7, 8]]
_TARGETS = CLASSES[[0, 1, 2, 3, 5, 7, 8]]


def losses() -> list[Case]:
    rows: dict[str, Any] = {"logits": _FINITE, "targets": _TARGETS}
    wide: dict[str, Any] = {
        "logits": np.round(16 * normal(5, 301)()) / 16,
        "targets": np.asarray([0, 300, 17, 255, 64]),
    }
    every: dict[str, Any] = {"weight": _WEIGHT, "label_smoothing": 0.125, "z_loss": 0.25}
    return [
        case("classes", **rows, reduction="none", core=True),
        case("the mean", **rows, ignore_index=3, core=True),
        case("the sum", **rows, reduction="sum"),
        case("every option", **rows, reduction="none", **every, core=True),
        case("the mean with every option", **rows, **every),
        case("probabilities", logits=ROWS, targets=_Q, reduction="none", core=True),
        case("probabilities with every option", logits=_FINITE, targets=_Q[:7] * (-inf < _FINITE), **every),
        case("axis 0", logits=_FINITE.T, targets=_TARGETS, axis=0, reduction="none"),
        case("a class that is impossible", logits=ROWS[:2], targets=np.asarray([0, 2]), reduction="none"),
        case("no row counts", logits=_FINITE[:2], targets=np.asarray([-1, -1]), ignore_index=-1),
        case("rows that are no distribution", logits=NO_ROW, targets=np.asarray([1, 0, 2, 3]), reduction="none"),
        case("normal rows", **wide, reduction="none", core=True),
    ]


def divergences() -> list[Case]:
    x = normal(5, 301, scale=2.0)
    near = np.round(64 * x()) / 64
    return [
        case("rows", logits_p=ROWS, logits_q=np.where(-inf < ROWS, ROWS + vectors(9, 4), ROWS), core=True),
        case("other rows", logits_p=_FINITE, logits_q=_FINITE[::-1]),
        case("masked rows", logits_p=ROWS, logits_q=np.roll(ROWS, 1, axis=1), where=MASK),
        case("rows, T=0.5", logits_p=_FINITE, logits_q=_FINITE + vectors(7, 4), temperature=0.5),
        case("impossible targets", logits_p=_FINITE, logits_q=np.where(_FINITE == 3.0, -inf, _FINITE)),
        case("axis 0", logits_p=_FINITE[:3], logits_q=vectors(3, 4), axis=0),
        case("near rows", logits_p=near, logits_q=near + np.round(4 * vectors(5, 301)) / 256, core=True),
        case("rows that are no distribution", logits_p=NO_ROW, logits_q=vectors(4, 4)),
    ]


FILTERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05, "temperature": 1.5},
    "all": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "greedy": {"temperature": 0.0, "top_k": 3},
    "T=inf": {"temperature": inf, "top_p": 0.5},
    "parameters a row": {
        "temperature": np.asarray([0.0, 0.5, 1.0, inf, nan, 2.0, 1.0, 0.25]),
        "top_k": np.asarray([0, 3, 20, 1, 5, 0, 7, 2]),
        "top_p": np.asarray([1.0, 0.5, 0.9, 0.75, 0.5, 0.0, 0.95, 1.0]),
        "min_p": np.asarray([0.0, 0.25, 0.01, 0.0, 0.0, 0.5, 0.0, 1.0]),
    },
}
_CORE = ("nothing", "all")


def logits(rows: int, n: int, seed: int = 0) -> Any:
    return np.round(16 * normal(rows, n, seed=seed)()) / 16


def keys(rows: int, seed: int = 7) -> Any:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, 2))


def truncations() -> list[Case]:
    return [
        *(case(name, logits=logits(8, 37), **one, core=name in _CORE) for name, one in FILTERS.items()),
        case("ties", logits=ROWS[[2, 7, 4]], top_k=2),
        case("no filter, a bad temperature", logits=ROWS[:2], temperature=np.asarray(-1.0)),
        case("axis 0", logits=logits(11, 3), axis=0, top_k=4),
        case("bad rows", logits=NO_ROW, top_k=2, core=True),
        case("long rows", logits=logits(2, 5000), top_k=50, top_p=0.9),
    ]


def samples() -> list[Case]:
    x, eight = logits(8, 37), keys(8)
    drawn: dict[str, Any] = {"logits": x, "key": eight}
    mask = np.random.default_rng(1).random((8, 37)) < 0.7
    return [
        *(case(name, **drawn, **one, return_logprobs=True, core=name in _CORE) for name, one in FILTERS.items()),
        case("tokens alone", **drawn, core=True),
        case("one seed", logits=x, key=2026),
        case("masked rows", **drawn, where=mask, return_logprobs=True),
        case("four draws", **drawn, top_p=0.9, draws=4, return_logprobs=True),
        case("distinct draws", logits=logits(8, 5), key=eight, draws=6, replace=False),
        case("distinct draws beside a huge logit", logits=HUGE, key=keys(2), draws=3, replace=False),
        case("one seed, all axes", logits=logits(3, 5), key=7, axis=None),
        case("axis 0", logits=logits(11, 3), key=keys(3), axis=0),
        case("bad rows", logits=NO_ROW, key=keys(4), return_logprobs=True, core=True),
        case("many rows", logits=logits(300, 10), key=keys(300)),
        case("long rows", logits=logits(3, 5000), key=keys(3), top_k=50, return_logprobs=True),
        case("long rows, all tokens", logits=logits(3, 5000), key=keys(3)),
    ]


def log_probs() -> list[Case]:
    x = logits(8, 37)
    tokens = np.argsort(-x, axis=-1, kind="stable")[:, [0, 2, 10]]
    tokens[0, 1] = -1
    mask = np.random.default_rng(1).random((8, 37)) < 0.7
    return [
        *(case(name, logits=x, tokens=tokens[:, 0], **one, core=name in _CORE) for name, one in FILTERS.items()),
        case("several tokens", logits=x, tokens=tokens, temperature=0.7, top_k=5, core=True),
        case("ranks", logits=x, tokens=tokens, return_rank=True),
        case("ranks before filters", logits=x, tokens=tokens, top_k=2, return_rank=True),
        case("masked rows", logits=x, tokens=tokens[:, 0], where=mask),
        case("masked tokens of bad rows", logits=NO_ROW, tokens=np.asarray([1, 1, 1, 1]), where=NO_ROW != 1.0),
        case("axis 0", logits=logits(11, 3), tokens=np.asarray([0, 10, 5]), axis=0),
        case("bad rows", logits=NO_ROW, tokens=np.asarray([1, 0, 2, 2])),
        case("long rows", logits=logits(2, 5000), tokens=np.asarray([4999, 17])),
    ]


def named(cases: list[Case], *names: str) -> list[Case]:
    return [one for one in cases if one.name in names]


def heads(cases: list[Case]) -> list[Case]:
    """Return cases whose logits are those of a head, exactly: its hidden states are the rows of a unit matrix."""
    return [
        case(one.name, **one.given, hidden=np.eye(len(one.operand("logits"))), chunk_size=3, core=one.core)
        for one in cases
    ]


def losses_of_heads(*, gradients: bool = False) -> list[Case]:
    given: dict[str, Any] = {"logits": logits(7, 37), "targets": np.asarray([0, 36, 5, 3, 17, 3, 1])}
    if gradients:
        return heads([case("rows", **given, core=True)])
    return heads(
        [
            case("the sum", **given, reduction="sum", core=True),
            case("each row", **given, reduction="none", core=True),
            case("the mean", **given, ignore_index=3, label_smoothing=0.125, z_loss=0.25),
        ]
    )


def speculations() -> list[Case]:
    target, draft = logits(40, 4 * 11).reshape(40, 4, 11), logits(40, 3 * 11, seed=5).reshape(40, 3, 11)
    near: dict[str, Any] = {"target_logits": target, "draft_logits": target[:, :3] + np.round(4 * draft) / 16}
    # Half of the drafts are the target's most likely tokens.
    drafts = np.where(np.arange(40)[:, None] % 2 == 0, target[:, :3].argmax(-1), draft.argmax(-1))
    drafts[3, 1] = -1
    given: dict[str, Any] = {"draft_tokens": drafts, "key": keys(40)}
    return [
        case("the target's draws", **given, target_logits=target, core=True),
        case("filtered draws", **given, target_logits=target, temperature=0.6, top_k=3, core=True),
        case("one seed", draft_tokens=drafts, target_logits=target, key=11),
        case("rejection", **given, **near, core=True),
        case("rejection under filters", **given, **near, temperature=1.5, top_k=6),
    ]


def relaxations() -> list[Case]:
    x = np.clip(logits(6, 37), -8, 8)
    mask = np.random.default_rng(2).random((6, 37)) < 0.8
    given: dict[str, Any] = {"logits": x, "key": keys(6)}
    return [
        case("rows", **given, temperature=0.5, core=True),
        case("T=1", **given),
        case("hard", **given, hard=True, core=True),
        case("masked rows", **given, temperature=2.0, where=mask),
        case("one seed", logits=x, key=5),
        case("bad rows", logits=NO_ROW, key=keys(4)),
        case("axis 0", logits=np.clip(logits(11, 3), -8, 8), key=keys(3), axis=0),
        case("rows of 700", logits=np.clip(logits(2, 700), -8, 8), key=keys(2)),
    ]


def parts() -> list[Case]:
    return [
        case("rows", x=ROWS, core=True),
        case("masked rows", x=ROWS, where=MASK),
        case("rows, T=0.5", x=ROWS[:4], temperature=0.5),
        case("axis 0", x=_FINITE[:4, :2], axis=0),
        case("normal rows", x=logits(5, 301), core=True),
        case("a row of 5000", x=logits(1, 5000)),
    ]


def plain_parts() -> list[Case]:
    return [one for one in parts() if "where" not in one.given and "axis" not in one.given]


def pairs() -> list[Case]:
    return [
        case("rows", left=ROWS, right=np.roll(ROWS, 4, axis=0), core=True),
        case("rows, T=0.5", left=ROWS[:4], right=_FINITE[3:7], temperature=0.5),
        case("normal rows", left=logits(5, 301), right=logits(5, 301, seed=1), core=True),
    ]


def outputs() -> list[Case]:
    lse = np.asarray([0.0, 1000.0, -inf, -inf, -3.5]), np.asarray([1.5, 999.0, 2.0, -inf, -80.0])
    out: dict[str, Any] = {"out_a": vectors(5, 3), "out_b": vectors(5, 3, seed=4)}
    return [case("rows", lse_a=lse[0], lse_b=lse[1], **out, core=True)]


SEEDS = np.asarray([0, 7, 2**31 - 1, 12345])
SHAPES = [case("keys", key=keys(3), shape=(2, 5), core=True), case("many words", key=keys(1)[0], shape=(1000,))]
