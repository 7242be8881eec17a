"""Speculative decoding: what is drawn instead of a draft that is rejected, and how far drafts are accepted.

p is the target's distribution, q that of the draft, u a uniform number. A draft is accepted where u < p / q, and else
replaced by a draw from max(p - q, 0), so what comes out has the distribution p. Source: Leviathan, Kalman and Matias,
"Fast inference from transformers via speculative decoding", ICML 2023.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import cast, device_for, namespace
from polysoftmax._formula import RowFormula
from polysoftmax._threefry import ACCEPTS, RESIDUALS, fold_in_domain, uniform_of, words

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops

INF = math.inf


def residual_of_rows(ops: Ops, p: Array, q: Array, is_drafted: Array) -> Array:
    """Logits to draw from in place of a draft: log max(p - q, 0), and log p where there is no draft.

    Where rounding rejects a draft though p is q, nothing is left of the difference, and p itself is drawn from.
    """
    rest = ops.where(is_drafted & (p > q), p - q, 0.0)
    return ops.log(ops.where(ops.max(rest) > 0, rest, p))


RESIDUAL = RowFormula("residual", residual_of_rows)


def residual_keys(k: Array) -> Array:
    """Return keys whose variates are independent of all that was drawn with the given ones."""
    return fold_in_domain(k, RESIDUALS)


def is_accepted(k: Array, log_p: Array, log_q: Array) -> Array:
    """Return whether u < p / q, with one key a draft; always where p is q."""
    xp = namespace(k)
    index = xp.zeros_like(k[..., 0:1])
    u = xp.squeeze(uniform_of(words(k[..., 0:1], k[..., 1:2], index, ACCEPTS)), axis=-1)
    return xp.log(cast(u, log_p.dtype)) < log_p - log_q


def settle(accepts: Array, draft: Array, drawn: Array) -> tuple[Array, Array]:
    """Return the tokens up to the first that replaces a draft, then -1; and how many drafts stand before it."""
    xp = namespace(drawn)
    fails = xp.cumulative_sum(xp.astype(~accepts, drawn.dtype), axis=-1)
    count = xp.sum(xp.astype(fails == 0, drawn.dtype), axis=-1, keepdims=True)
    place = xp.arange(drawn.shape[-1], dtype=drawn.dtype, device=device_for(drawn))
    here = xp.concat([xp.where(fails == 0, draft, drawn[..., :-1]), drawn[..., -1:]], axis=-1)
    return xp.where(place <= count, here, -1), xp.squeeze(count, axis=-1)
