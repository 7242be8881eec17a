"""What is drawn and what filters leave, by the definition in double precision and mpmath.

An entry stays undecided where rounding may turn the answer: a token whose score wins by less than `MARGIN`, and what
stands where the mass reaches top_p or the greatest probability min_p.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np

from polysoftmax.testing._expected import by_row
from polysoftmax.testing._reference import BITS, Given, Reference, Row, Scored, constant, exactly, split
from polysoftmax.testing._words import (
    ACCEPTS,
    BLOCKS,
    RESIDUALS,
    TOKENS,
    block_length,
    folded,
    gumbel_variates,
    uniform_of,
    words,
)

if TYPE_CHECKING:
    from polysoftmax.testing._reference import Floats

INF = math.inf
MARGIN = 2e-5
"""Scores are of the order of 20, and have some roundings of float32."""


def _best(score: Floats) -> tuple[int, float]:
    first = int(np.argmax(score))
    rest = np.delete(score, first)
    return first, float(score[first] - rest.max()) if len(rest) else INF


def draw(z: Floats, key: Any) -> tuple[int, float]:
    """Draw a token by scores that are 0 at most, and say by how much it wins."""
    n, size = len(z), block_length(len(z))
    blocks = np.append(z, np.full(-n % size, -INF)).reshape(-1, size)
    with np.errstate(divide="ignore"):
        block, first = _best(np.log(np.exp(blocks).sum(axis=1)) + gumbel_variates(key, np.arange(len(blocks)), BLOCKS))
    place, second = _best(blocks[block] + gumbel_variates(key, block * size + np.arange(size), TOKENS))
    return int(block * size + place), min(first, second)


# What filters leave of a row


def _order(x: Floats) -> list[int]:
    return [int(i) for i in np.argsort(-x, kind="stable")]


def left_of(row: Row, unit: float) -> tuple[list[int], list[int]] | None:
    """Return the tokens that filters leave for certain, and those that rounding may leave; None for a bad row."""
    filters = {name: float(row.others.get(name, off)) for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))}
    k, p, min_p = filters.values()
    x = np.where(row.exists, row.x, -INF)
    if np.isnan(x).any() or x.max(initial=-INF) == INF or not row.temperature >= 0:
        return None
    if not (k >= 0 and 0 <= p <= 1 and 0 <= min_p <= 1):
        return None
    order = [i for i in _order(x) if x[i] > -INF]
    order = order[: int(k)] if k else order
    if not order or (p == 1 and min_p == 0):
        return order, []
    s = Row(row.number, x[order], np.ones(len(order), bool), row.temperature, {})
    mass = [s.scored.p[i] for i in s.distinct[2]]
    steep = [-s.scored.z[i] if mass[j] else mpmath.mpf(0) for j, i in enumerate(s.distinct[2])]
    counts = []
    for shift in (-1, 1):
        share = p * (1 + shift * 2 * (16 + math.log2(row.n) + 2 * s.scored.mean) * unit)
        total, count = mpmath.mpf(0), 0
        while count < len(order) and (total < share or not count or p == 1):
            total, count = total + mass[count], count + 1
        edge = [min_p * (1 - shift * (3 + 2 * one) * unit) if min_p else 0 for one in steep]
        counts.append(max(1, sum(m >= e * mass[0] for m, e in zip(mass[:count], edge[:count], strict=True))))
    return order[: counts[0]], order[counts[0] : counts[1]]


def truncate(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return what is left of a row, and -inf for the rest; what stands at the edge may be either."""
    found = left_of(row, given.unit)
    if found is None:
        return (constant(np.full(row.n, math.nan)),)
    sure, edge = found
    out = constant(np.full(row.n, -INF))
    out[0, sure + edge] = row.x[sure + edge]
    out[2, edge] = INF
    return (out,)


class _Drawn:
    """The distribution that a row's tokens are drawn from."""

    def __init__(self, given: Given, row: Row) -> None:
        found = left_of(row, given.unit)
        self.n = row.n
        self.is_sure = found is None or not found[1]
        self.exists = np.zeros(row.n, bool)
        if found is not None:
            self.exists[found[0]] = True
        self.is_empty = not self.exists.any()
        self.row = row
        if not self.is_empty:
            self.scored, self.place, self.z = self._scores(self.exists)

    def _scores(self, exists: Any) -> tuple[Scored, Any, Floats]:
        """Return the scores of the tokens that exist: by distinct logits, the places of these, and for each token."""
        left = Row(self.row.number, self.row.x, exists, self.row.temperature, {})
        each, place = np.asarray([float(one) for one in left.scored.z]), left.distinct[2]
        return left.scored, place, np.where(exists, each[place], -INF)

    def log_p(self, token: int) -> tuple[Any, Any]:
        """Return the log-probability of a token, with its bound."""
        if token < 0 or (self.is_empty and self.row.exists[token]):
            return mpmath.nan, 0.0
        if not self.exists[token]:
            return mpmath.mpf("-inf"), 0.0 if self.is_sure else INF
        i = self.place[token]
        return self.scored.log_p(i), self.scored.absolute(i) if self.is_sure else INF

    def tokens(self, keys: list[Any], *, replace: bool) -> list[tuple[int, bool]]:
        """Draw with each key in turn, and say whether rounding cannot change the token."""
        drawn, exists, sure = [], self.exists.copy(), self.is_sure
        for key in keys:
            if not exists.any():
                drawn.append((-1, sure))
                continue
            # Anew from the logits: beside one of 3e38 that is drawn the others' scores are all the same.
            token, margin = draw(self._scores(exists)[2], key)
            sure = (sure if not replace else self.is_sure) and margin > MARGIN
            drawn.append((token, sure))
            exists[token] = replace
        return drawn


def _key_of(given: Given, row: Row) -> Any:
    key = given["key"]
    if not isinstance(key, np.ndarray):
        own = np.asarray([(key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF])
        main = "logits" if "logits" in given.operands else "target_logits"
        return folded(own, row.number) if given.layout(main)[2] else own  # a row without a batch has the key itself
    return row.others["key"]


def _sampled(given: Given, row: Row) -> tuple[Floats, ...]:
    d, count, key = _Drawn(given, row), given.get("draws") or 1, _key_of(given, row)
    if row.temperature == 0 and not d.is_empty:  # the lowest index of the greatest: nothing is random
        top = int(np.argmax(np.where(d.exists, row.x, -INF)))
        replace = given.get("replace", True)
        ties = [int(i) for i in np.flatnonzero(d.z == 0)] if not replace else [top] * count
        drawn = [(t, True) for t in (ties + [-1] * count)[:count]]
    else:
        keys = [key, *(folded(key, j) for j in range(1, count))]
        drawn = d.tokens(keys, replace=given.get("replace", True))
    tokens = constant([token for token, _ in drawn])
    tokens[2] = [0.0 if is_sure else INF for _, is_sure in drawn]
    if not given.get("return_logprobs"):
        return (tokens,)
    logs = split(d.log_p(token) for token, _ in drawn)
    logs[2] = np.where(tokens[2] > 0, INF, logs[2])
    return tokens, logs


def sample(given: Given) -> tuple[Reference, ...]:
    """Return tokens, and their log-probabilities where these are asked for."""
    layout = "last" if given.get("draws") else "row"
    outputs = [(layout, "index"), (layout, "compute")]
    return by_row(_sampled, *outputs[: 1 + bool(given.get("return_logprobs"))], main="logits")(given)


def _logged(given: Given, row: Row) -> tuple[Floats, ...]:
    d, tokens = _Drawn(given, row), np.atleast_1d(row.others["tokens"]).astype(int)
    logs = split(d.log_p(token) for token in tokens)
    if not given.get("return_rank"):
        return (logs,)
    if np.isnan(row.x[row.exists]).any():
        return logs, constant(np.full(len(tokens), -1))
    order = _order(np.where(row.exists, row.x, -INF))  # before any filter, whatever the temperature
    order = [i for i in order if row.exists[i]]
    return logs, constant([order.index(t) if t >= 0 and row.exists[t] else -1 for t in tokens])


def log_prob(given: Given) -> tuple[Reference, ...]:
    """Return log-probabilities of tokens, and their ranks where these are asked for."""
    layout = "along" if given["tokens"].ndim == given["logits"].ndim else "row"
    outputs = [(layout, "compute"), (layout, "index")]
    return by_row(_logged, *outputs[: 1 + bool(given.get("return_rank"))], main="logits")(given)


def _leading(given: Given, row: Row) -> tuple[Floats, ...]:
    d, k, x = _Drawn(given, row), given["k"], np.where(row.exists, row.x, -INF)
    if not x.max() < INF:
        return constant(np.full(k, math.nan)), constant(np.full(k, -1))
    order = _order(x)[:k]  # whatever the temperature
    return split(d.log_p(i) for i in order), constant(order)


top_log_probs = by_row(_leading, ("along", "compute"), ("along", "index"), main="logits")


def speculate(given: Given) -> tuple[Reference, ...]:
    """Return tokens and the numbers of drafts that are accepted."""
    target, draft = given["target_logits"], given["draft_tokens"].astype(int)
    tokens, accepted, free = np.full(target.shape[:-1], -1), np.zeros(len(target)), np.zeros(len(target), bool)
    with mpmath.workprec(BITS):
        for r, row in enumerate(target):
            own = given["key"]
            own = own[r] if isinstance(own, np.ndarray) else folded(np.asarray([0, own]), r)
            for j, x in enumerate(row):
                one = Row(r, x, np.ones(len(x), bool), float(given.get("temperature", 1.0)), _filters(given))
                q = given["draft_logits"][r, j] if "draft_logits" in given.operands and j < len(row) - 1 else None
                token, is_sure, stays = _position(
                    given, one, q, draft[r, j] if j < len(row) - 1 else -1, folded(own, j)
                )
                tokens[r, j], free[r] = token, free[r] or not is_sure
                if not stays:
                    break
                accepted[r] += 1
    return exactly(tokens, "index", free[:, None]), exactly(accepted, "index", free)


def _filters(given: Given) -> dict[str, Any]:
    return {name: given[name] for name in ("top_k", "top_p", "min_p") if name in given.operands}


def _position(given: Given, row: Row, q_logits: Any, draft: int, key: Any) -> tuple[int, bool, bool]:
    """Return the token of a position, whether rounding cannot change it, and whether it is the draft."""
    p = _Drawn(given, row)
    if "draft_logits" not in given.operands:
        token, is_sure = p.tokens([key], replace=True)[0]
        return token, is_sure, token == draft >= 0
    of_p = np.asarray([float(mpmath.exp(p.log_p(i)[0])) for i in range(row.n)])
    rest = of_p
    is_sure = p.is_sure
    if draft >= 0:
        q = _Drawn(given, Row(row.number, q_logits, row.exists, row.temperature, row.others))
        of_q = np.asarray([float(mpmath.exp(q.log_p(i)[0])) for i in range(row.n)])
        u = float(uniform_of(words(key, np.asarray([0]), ACCEPTS))[0])
        with np.errstate(divide="ignore"):
            gap = float(p.log_p(draft)[0] - q.log_p(draft)[0]) - math.log(u)
        is_sure = is_sure and q.is_sure and abs(gap) > MARGIN
        if gap > 0:
            return draft, is_sure, True
        rest = np.maximum(of_p - of_q, 0)
        rest = rest if rest.any() else of_p
    with np.errstate(divide="ignore"):
        token, margin = draw(np.log(rest / rest.max()), folded(key, 0, RESIDUALS))
    return token, is_sure and margin > 100 * MARGIN, False  # a difference of probabilities has fewer digits


def gumbel_softmax(given: Given) -> tuple[Reference, ...]:
    """Return the softmax of logits with the noise of the draw, which has an error of its own."""
    return by_row(_relaxed, ("entries", "dtype"), main="logits")(given)


def _relaxed(given: Given, row: Row) -> tuple[Floats, ...]:
    if not row.exists.any():
        return (constant(np.zeros(row.n)),)
    x = np.where(row.exists, row.x, -INF)
    if not np.isfinite(x.max()) or np.isnan(x).any():
        return (constant(np.where(row.exists, math.nan, 0.0)),)
    key, size = _key_of(given, row), block_length(row.n)
    z = np.append(x - x.max(), np.full(-row.n % size, -INF)).reshape(-1, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = (np.log(np.exp(z).sum(axis=1)) + gumbel_variates(key, np.arange(len(z)), BLOCKS))[:, None]
        noisy = z + gumbel_variates(key, np.arange(z.size), TOKENS).reshape(z.shape)
        top = noisy.max(axis=1, keepdims=True)
        v = best - noisy + np.log1p(-np.exp(noisy - top))
        shifted = (best - np.maximum(v, 0) - np.log1p(np.exp(-np.abs(v)))).reshape(-1)[: row.n]
    relaxed = Row(row.number, np.where(row.exists, shifted, -INF), row.exists, row.temperature, {})
    s, place = relaxed.scored, relaxed.distinct[2]
    if given.get("hard"):
        order = np.sort(shifted[row.exists])
        is_sure = len(order) == 1 or order[-1] - order[-2] > MARGIN
        return (_free(constant(np.arange(row.n) == np.argmax(relaxed.x)), not is_sure),)
    # Each score is a sum of these, in which the variates are float32 in every dtype; shifted is
    # -log(e^-best - e^-top + e^-noisy), which has these slopes.
    size_of_sum = np.abs(x) + np.abs(z.reshape(-1)[: row.n]) + np.abs(shifted) + _per_entry(np.abs(best), row.n)
    with np.errstate(over="ignore", invalid="ignore"):
        slopes = 1 + np.exp(shifted - noisy.reshape(-1)[: row.n]) + np.exp(shifted - _per_entry(top, row.n))
    is_soft = 0 < row.temperature < INF
    of_noise = 4 * (1 + size_of_sum) * slopes / row.temperature * 2.0**-24 / given.unit if is_soft else np.zeros(row.n)
    there = np.flatnonzero(row.exists)
    mean = mpmath.fsum(s.p[place[i]] * of_noise[i] for i in there if s.p[place[i]])
    out = constant(np.zeros(row.n))
    for i in there:
        if q := s.p[place[i]]:
            out[:, i] = split([(q, (s.relative(place[i]) + of_noise[i] + mean) * q)])[:, 0]
    return (out,)


def _per_entry(of_blocks: Floats, n: int) -> Floats:
    size = block_length(n)
    return np.asarray(np.repeat(of_blocks, size)[:n])


def _free(columns: Floats, free: bool) -> Floats:
    columns[2] = INF if free else 0.0
    return columns
