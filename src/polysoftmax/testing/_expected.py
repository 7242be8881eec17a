"""What the contract answers to one row: the softmax family, its derivatives, losses, and rows in parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np

from polysoftmax.testing._formats import FORMATS
from polysoftmax.testing._reference import BITS, Given, Reference, Row, constant, exponential, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing._reference import Floats

    Answer = Callable[[Given, Row], tuple[Floats, ...]]
    Expect = Callable[[Given], tuple[Reference, ...]]

INF = math.inf


def by_row(answer: Answer, *outputs: tuple[str, str], main: str = "x") -> Expect:
    """Make the expectation of a call from that of a row, given the layout and the dtype of each output."""

    def expect(given: Given) -> tuple[Reference, ...]:
        with mpmath.workprec(BITS):
            answers = [answer(given, row) for row in given.rows(main)]
        columns = zip(*answers, strict=True) if answers else [()] * len(outputs)
        return tuple(given.shaped(main, list(one), *how) for one, how in zip(columns, outputs, strict=True))

    return expect


# The softmax family


def softmax(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return probabilities."""
    del given
    if not row.exists.any():
        return (constant(np.zeros(row.n)),)
    if row.is_undefined:
        return (row.everywhere(constant(np.full(len(row.distinct[0]), math.nan)), 0.0),)
    s = row.scored
    return (row.everywhere(split((q, s.relative(i) * q) for i, q in enumerate(s.p)), 0.0),)


def log_softmax(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return logarithms of probabilities."""
    del given
    if not row.exists.any():
        return (constant(np.full(row.n, -INF)),)
    if row.is_undefined:
        return (row.everywhere(constant(np.full(len(row.distinct[0]), math.nan)), -INF),)
    s = row.scored
    return (row.everywhere(split((s.log_p(i), s.absolute(i)) for i in range(len(s.z))), -INF),)


def logsumexp(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return one answer a row; the condition number of a sum with signs enters its bound."""
    del given
    values, counts, _ = row.distinct
    weights = [1.0] * len(values)
    if "weights" in row.others:
        values, weights = row.x[row.exists].tolist(), row.others["weights"][row.exists].tolist()
        counts = [1] * len(values)
    entries = [e for e in zip(values, counts, weights, strict=True) if e[2] != 0]
    if not entries:
        return (constant(-INF),)
    values = [v for v, _, _ in entries]
    top = max(values)
    if any(map(math.isnan, values)) or not math.isfinite(top):
        return (constant(math.nan if any(map(math.isnan, values)) else top),)
    d = [mpmath.mpf(top) - mpmath.mpf(v) for v in values]
    terms = [k * mpmath.mpf(w) * exponential(-one) for (_, k, w), one in zip(entries, d, strict=True)]
    total = mpmath.fsum(terms)
    if total <= 0:
        return (constant(math.nan if total < 0 else -INF),)
    y = mpmath.mpf(top) + mpmath.log(total)
    size = mpmath.fsum(abs(t) for t in terms)
    mean = mpmath.fsum(abs(t) * one for t, one in zip(terms, d, strict=True) if t) / total
    return (split([(y, (16 + math.log2(row.n)) * size / total + mean + abs(y))]),)


# Derivatives. What the greatest class has above one half of the probability comes from the other classes, so a vector
# is measured from its entry there.


class _Slopes:
    """Probabilities of every place of a row, with their bounds, and a vector's distances from that of the winner."""

    def __init__(self, row: Row, vector: str) -> None:
        s, place = row.scored, row.distinct[2]
        self.there = [i for i in range(row.n) if row.exists[i]]
        self.p = {i: s.p[place[i]] for i in self.there}
        self.relative = {i: s.relative(place[i]) for i in self.there}
        self.t = mpmath.mpf(row.temperature)
        self.v = {i: mpmath.mpf(float(row.others[vector][i])) for i in self.there} if vector else {}
        self.winner = next((i for i in self.there if self.p[i] > 0.5), None)
        origin = self.v.get(self.winner, mpmath.mpf(0)) if self.winner is not None else mpmath.mpf(0)
        self.far = {i: self.v[i] - origin for i in self.v}
        # With a temperature v / T is rounded before the winner's is subtracted.
        is_rounded = self.winner is not None and row.temperature != 1
        self.quotients = {i: abs(v) + abs(origin) if is_rounded and i != self.winner else 0 for i, v in self.v.items()}
        self.mean = mpmath.fsum(self.p[i] * self.far[i] for i in self.v)  # of v, less the origin: it may be 1e-90
        self.of_mean = mpmath.fsum(
            self.p[i] * (2 * self.relative[i] * abs(self.far[i]) + self.quotients[i]) for i in self.v
        )


def _derivative(vector: str, of_row: Callable[[_Slopes, Row], dict[int, tuple[Any, Any]]]) -> Answer:
    def answer(given: Given, row: Row) -> tuple[Floats, ...]:
        del given
        if not row.exists.any() or row.temperature in (0, INF):
            return (constant(np.zeros(row.n)),)
        found = of_row(_Slopes(row, vector), row)
        return (split(found.get(i, (mpmath.mpf(0), 0.0)) for i in range(row.n)),)

    return answer


def _softmax_product(s: _Slopes, row: Row) -> dict[int, tuple[Any, Any]]:
    del row
    found = {}
    for i in s.there:
        q = s.p[i] / s.t
        y = q * (s.far[i] - s.mean)
        found[i] = y, s.relative[i] * abs(y) + q * (4 * abs(s.far[i]) + s.quotients[i] + s.of_mean)
    return found


def _log_softmax_push(s: _Slopes, row: Row) -> dict[int, tuple[Any, Any]]:
    del row
    return {i: ((s.far[i] - s.mean) / s.t, (4 * abs(s.far[i]) + s.quotients[i] + s.of_mean) / s.t) for i in s.there}


def _log_softmax_pull(s: _Slopes, row: Row) -> dict[int, tuple[Any, Any]]:
    total, size = mpmath.fsum(s.v.values()), mpmath.fsum(map(abs, s.v.values()))
    steps = 4 + math.log2(row.n)
    found = {
        i: (
            (s.v[i] - s.p[i] * total) / s.t,
            (4 * abs(s.v[i]) + s.p[i] * (s.relative[i] * abs(total) + steps * size)) / s.t,
        )
        for i in s.there
    }
    if s.winner is not None:
        others = [i for i in s.there if i != s.winner]
        of_others = mpmath.fsum(s.p[i] for i in others) * s.v[s.winner]
        y = (of_others - s.p[s.winner] * mpmath.fsum(s.v[i] for i in others)) / s.t
        found[s.winner] = y, 8 * abs(y) + 2 * mpmath.fsum(units for i, (_, units) in found.items() if i != s.winner)
    return found


softmax_product = {one: _derivative(one, _softmax_product) for one in ("tangent", "cotangent")}
log_softmax_jvp = _derivative("tangent", _log_softmax_push)
log_softmax_vjp = _derivative("cotangent", _log_softmax_pull)


def softmax_jacobian(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return p_i (δ_ij - p_j) / T; the diagonal is p_i Σ p_j over the others."""
    del given
    return (_matrix(row, lambda s, i: (s.p[i] / s.t, s.relative[i])),)


def log_softmax_jacobian(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return (δ_ij - p_j) / T."""
    del given
    return (_matrix(row, lambda s, i: (1 / s.t, 0.0 * i)),)


def _matrix(row: Row, scale: Callable[[_Slopes, int], tuple[Any, float]]) -> Floats:
    if row.temperature in (0, INF):
        return constant(np.zeros(row.n**2))
    s = _Slopes(row, "")
    found = []
    for i in range(row.n):
        factor, units = scale(s, i)
        others = mpmath.fsum(s.p[j] for j in s.p if j != i)
        of_others = mpmath.fsum(s.relative[j] * s.p[j] for j in s.p if j != i)
        for j in range(row.n):
            y = factor * (others if i == j else -s.p[j])
            found.append((y, (units + 8) * abs(y) + factor * (of_others if i == j else s.relative[j] * s.p[j])))
    return split(found)


# Losses


def entropy(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return -Σ p log p."""
    del given
    if not row.exists.any():
        return (constant(0.0),)
    if row.is_undefined:
        return (constant(math.nan),)
    s, counts = row.scored, row.distinct[1]
    terms = [
        (k, s.p[i], s.log_p(i), s.relative(i) * abs(s.log_p(i)) + s.absolute(i)) for i, k in enumerate(counts) if s.p[i]
    ]
    y = -mpmath.fsum(k * p * log_p for k, p, log_p, _ in terms)
    return (split([(y, mpmath.fsum(k * p * units for k, p, _, units in terms) + math.log2(row.n) * abs(y))]),)


def kl_divergence(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return Σ p·(r + expm1(-r)) and the q of classes whose p is 0; with r = log p - log q its slope in r is p - q."""
    if not row.exists.any():
        return (constant(0.0),)
    other = Row(row.number, row.others["logits_q"], row.exists, row.temperature, {})
    if row.is_undefined or other.is_undefined:
        return (constant(math.nan),)
    (s, where_p), (o, where_q) = ((one.scored, one.distinct[2]) for one in (row, other))
    # An error that all logarithms of a row have in common cancels, as p - q adds up to 0; what is left of that of r are
    # the roundings of each score and logarithm.
    y, units = mpmath.mpf(0), mpmath.mpf(0)
    for i in np.flatnonzero(row.exists):
        a, b = where_p[i], where_q[i]
        p, q = s.p[a], o.p[b]
        if p and not q and o.z[b] == -mpmath.inf:
            return (constant(INF),)
        if p:
            if -o.log_p(b) > FORMATS[given.compute].largest:
                return (split([(INF, INF)]),)  # a logarithm that is too large may stay so in a product that is not
            r = s.log_p(a) - o.log_p(b)
            own = abs(s.log_p(a)) + abs(o.log_p(b)) - s.roundings * (s.z[a] + o.z[b]) + 4 * abs(r)
            term = p * (r + mpmath.expm1(-r))
            y += term
            both = mpmath.mpf(s.absolute(a) + o.absolute(b))
            units += s.relative(a) * term + abs(p - q) * own + p * both**2 * given.unit
        else:
            y += q
            units += q * (o.relative(b) + 4)
    return (split([(y, units + math.log2(row.n) * abs(y))]),)


def _row_loss(given: Given, row: Row) -> tuple[Any, Any, Any]:
    """Return a row's loss, its bound, and its share of the mean's denominator."""
    targets, weight = row.others["targets"], given.get("weight")
    w = [1.0] * row.n if weight is None else weight.tolist()
    smoothing, z_loss = given.get("label_smoothing", 0.0), given.get("z_loss", 0.0)
    if np.ndim(targets) == 0:
        if targets == given.get("ignore_index"):
            return mpmath.mpf(0), 0.0, 0.0
        q = [float(i == targets) for i in range(row.n)]
        share = w[int(targets)]
    else:
        q, share = targets.tolist(), 1.0
    if row.is_undefined:
        return mpmath.nan, 0.0, share
    s, place = row.scored, row.distinct[2]
    possible = [i for i in range(row.n) if s.z[place[i]] > -mpmath.inf]
    loss, units = mpmath.mpf(0), mpmath.mpf(0)
    for i in range(row.n):
        k = (1 - smoothing) * q[i] * w[i] + (smoothing * w[i] / len(possible) if i in possible else 0)
        if k:
            log_p = s.log_p(place[i])
            if log_p == -mpmath.inf:
                return mpmath.inf, 0.0, share
            loss -= k * log_p
            # A logarithm that is too large may stay so in a product that is not.
            is_too_large = -log_p > FORMATS[given.compute].largest
            units += INF if is_too_large else k * (s.absolute(place[i]) + 4 * abs(log_p))
    total = mpmath.mpf(max(row.x.tolist())) + s.log_total
    of_total = 16 + math.log2(row.n) + s.mean + abs(total)
    steps = math.log2(row.n) * abs(loss)
    return loss + z_loss * total**2, units + steps + z_loss * abs(total) * (2 * of_total + 4 * abs(total)), share


def cross_entropy(given: Given) -> tuple[Reference, ...]:
    """Return the losses of rows, their sum or their mean."""
    with mpmath.workprec(BITS):
        losses = [_row_loss(given, row) for row in given.rows("logits")]
        if given.get("reduction", "mean") == "none":
            return (given.shaped("logits", [split([one[:2]]) for one in losses], "row", "compute"),)
        y, units = mpmath.fsum(one[0] for one in losses), mpmath.fsum(one[1] for one in losses)
        count = mpmath.fsum(one[2] for one in losses) if given.get("reduction", "mean") == "mean" else 1
        y, units = (y / count, units / count) if count else (mpmath.mpf(0), 0.0)
        steps = (4 + math.log2(len(losses))) * (mpmath.fsum(abs(one[0]) for one in losses) / count if count else 0)
        high, low, bound = split([(y, 0.0 if mpmath.isinf(y) else units + steps)])[:, 0]
    return (Reference(np.asarray(high), np.asarray(low), np.asarray(bound), given.compute, given.compute),)


def loss_slopes(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return p - onehot, the slopes of a row's loss; that of its class is what the others have."""
    del given
    s, place, target = row.scored, row.distinct[2], int(row.others["targets"])
    terms = [(s.p[i], s.relative(i) * s.p[i]) for i in place]
    others = [one for i, one in enumerate(terms) if i != target]
    of_target = -mpmath.fsum(y for y, _ in others), mpmath.fsum(units for _, units in others) + math.log2(row.n)
    return (split(of_target if i == target else one for i, one in enumerate(terms)),)


# Rows in parts


def partial(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return the maximum of a row, how many entries are equal to it, and Σ exp((x - max) / T) of the others."""
    del given
    return _statistics(row)


def merged(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return the statistics of two parts."""
    del given
    x = np.concatenate([row.x, row.others["right"]])
    return _statistics(Row(row.number, x, np.ones(len(x), bool), row.temperature, {}))


def _statistics(row: Row) -> tuple[Floats, ...]:
    if not row.exists.any():
        return constant(-INF), constant(0.0), constant(0.0)
    values, counts, _ = row.distinct
    s, top = row.scored, max(values)
    below = [(i, k) for i, k in enumerate(counts) if values[i] != top]
    terms = {i: k * exponential(s.z[i]) for i, k in below}
    bound = mpmath.fsum((16 + math.log2(row.n) - s.roundings * s.z[i]) * e for i, e in terms.items() if e)
    return constant(top), constant(counts[values.index(top)]), split([(mpmath.fsum(terms.values()), bound)])


def logsumexp_of_scores(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return log Σ exp(x / T)."""
    del given
    s, top = row.scored, mpmath.mpf(max(row.distinct[0])) / mpmath.mpf(row.temperature)
    y = top + s.log_total
    return (split([(y, 16 + math.log2(row.n) + s.roundings * s.mean + abs(y) + 2 * abs(top))]),)


def merged_outputs(given: Given, row: Row) -> tuple[Floats, ...]:
    """Return log(e^a + e^b), and the outputs weighted by both."""
    del given
    a, b = (mpmath.mpf(float(row.others[name])) for name in ("lse_a", "lse_b"))
    top = max(a, b)
    if top == -mpmath.inf:
        return constant(-INF), constant(np.zeros(row.n))
    of_a, of_b = exponential(a - top), exponential(b - top)
    total, gap = of_a + of_b, min(abs(a - b), mpmath.mpf(1000))
    lse = top + mpmath.log(total)
    out = []
    for x, y in zip(row.x.tolist(), row.others["out_b"].tolist(), strict=True):
        terms = [k * mpmath.mpf(one) / total for k, one in ((of_a, x), (of_b, y)) if k]
        out.append((mpmath.fsum(terms), (16 + gap) * mpmath.fsum(map(abs, terms))))
    return split([(lse, 16 + abs(lse))]), split(out)
