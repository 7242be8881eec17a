"""speculate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import (
    cast,
    default_index,
    device_for,
    in_native_order,
    is_array,
    is_kind,
    is_number,
    namespace,
    quietly,
    require_same_library,
)
from polysoftmax._rows import last_rows, rows
from polysoftmax._speculation import RESIDUAL, is_accepted, residual_keys, settle
from polysoftmax._threefry import fold
from polysoftmax.engines._keys import jitted
from polysoftmax.functions.probability import log_prob
from polysoftmax.functions.sampling import sample
from polysoftmax.functions.softmax import softmax
from polysoftmax.functions.truncation import truncate
from polysoftmax.random import as_key

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Number, Rows


def speculate(
    draft_tokens: Array,
    target_logits: Array,
    key: Array | int | object,
    /,
    *,
    draft_logits: Array | None = None,
    temperature: Array | Number = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | Number | None = None,
    min_p: Array | Number | None = None,
    where: Array | None = None,
) -> tuple[Array, Array]:
    r"""Accept or replace draft tokens, so that what comes out is distributed as if the target had drawn it.

    Parameters
    ----------
    draft_tokens : array of int
        K tokens a request that another model has proposed, of shape (..., K); -1 where there is no draft.
    target_logits : array
        Real, of shape (..., K + 1, n): entry j of a request stands for the token after j drafts.
    key : int, key or generator
        As for `sample`: one key, which is folded with each request's number, or one key a request, of shape (..., 2).
    draft_logits : array, optional
        Of shape (..., K, n), the logits from which the drafts were drawn by `sample` with the same options. Without
        them the drafts may come from anywhere.
    temperature, top_k, top_p, min_p : number or array, optional
        As for `sample`, for the target and the drafts: a number, or an array with one entry a request, of shape (...),
        or one a position, of shape (..., K + 1).
    where : array of bool, optional
        Broadcasts against ``target_logits``. Tokens under False do not exist.

    Returns
    -------
    tokens : array
        Of shape (..., K + 1), in the library's default index dtype: the drafts that were accepted, then one token of
        the target, then -1.
    accepted : array
        Of shape (...), how many drafts were accepted.

    Raises
    ------
    TypeError
        If an input is not an array, tokens are no integers, or arrays of two libraries or devices are mixed.
    ValueError
        If a shape does not fit, there is no token, or a parameter given as a number is out of range.
    NotImplementedError
        For top_k and top_p on Dask, which cannot sort lazily.

    Notes
    -----
    Without ``draft_logits`` the target draws at each position j with the request's key folded with j, and a draft is
    accepted while it equals that draw. The tokens are therefore exactly those of decoding one by one with
    ``sample(target_logits[..., j, :], random.fold_in(request_key, j))``, whatever the drafts were.

    With ``draft_logits`` a draft is accepted with probability min(1, p / q), where p and q are its probabilities under
    the target and the draft, and else replaced by a draw from max(p - q, 0); if p is q, it is always accepted. The
    uniform numbers and the draws come from domains of their own, independent of what the draft model has drawn with the
    same keys. Give each step keys of its own, such as ``random.fold_in(key, step)``.

    A position without a token that is possible has -1. Source: Leviathan, Kalman and Matias, "Fast inference from
    transformers via speculative decoding", ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> target = np.log([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    >>> polysoftmax.speculate(np.asarray([1, 1]), target, 7, temperature=0.0)
    (array([ 1,  0, -1]), array(1))
    """
    r = last_rows(target_logits, -1)
    r.require_entries("speculate", "token")
    draft = _draft_tokens(r, draft_tokens)
    count = draft.shape[-1]
    keys = _position_keys(r, as_key(key, like=r.x), count + 1)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = {name: _of_positions(r, value) for name, value in given.items()}
    if draft_logits is None:
        drawn = sample(target_logits, keys, where=where, **options)
        return jitted(settle, (draft >= 0) & (draft == drawn[..., :count]), draft, drawn)  # type: ignore[no-any-return]
    q_rows = rows(draft_logits, -1)
    require_same_library(r.x, draft_logits, "draft_logits")
    if q_rows.shape != (*r.shape[:-2], count, r.shape[-1]):
        msg = f"draft_logits must have the shape {(*r.shape[:-2], count, r.shape[-1])}, got {q_rows.shape}"
        raise ValueError(msg)
    drafted = {name: _of_drafts(r, value) for name, value in options.items()}
    mask = where if where is None else _of_drafts(r, where)
    log_p = log_prob(target_logits[..., :count, :], draft, where=mask, **drafted)
    log_q = log_prob(draft_logits, draft, where=mask, **drafted)
    with quietly(log_p):
        accepts = jitted(is_accepted, keys[..., :count, :], log_p, log_q)
    p = _probabilities(r, target_logits, where, options)
    q = _probabilities(r, draft_logits, mask, drafted)
    xp = r.xp
    q = xp.concat([q, xp.zeros_like(p[..., count:, :])], axis=-2)
    is_drafted = xp.concat([draft, xp.full_like(cast(keys[..., count:, 0], draft.dtype), -1)], axis=-1) >= 0
    rest = RESIDUAL(rows(p, -1), p, q, xp.expand_dims(is_drafted, axis=-1))
    return jitted(settle, accepts, draft, sample(rest, jitted(residual_keys, keys)))  # type: ignore[no-any-return]


def _draft_tokens(r: Rows, tokens: Array) -> Array:
    require_same_library(r.x, tokens, "draft_tokens")
    tokens = in_native_order(tokens)
    if not is_kind(r.xp, tokens.dtype, "integral"):
        msg = f"draft_tokens must be integers, got dtype {tokens.dtype}"
        raise TypeError(msg)
    shape = tuple(tokens.shape)
    if len(r.shape) < 2 or len(shape) != len(r.shape) - 1 or (*shape[:-1], shape[-1] + 1) != r.shape[:-1]:
        msg = (
            f"target_logits must have the shape (..., K + 1, n) for drafts of shape (..., K), got {r.shape} for {shape}"
        )
        raise ValueError(msg)
    return cast(tokens, default_index(r.xp))


def _position_keys(r: Rows, keys: Array, count: int) -> Array:
    batch = r.shape[:-2]
    if keys.ndim > 1 and tuple(keys.shape[:-1]) != batch:
        msg = f"keys must be one, of shape (2,), or one a request, of shape {(*batch, 2)}, got {tuple(keys.shape)}"
        raise ValueError(msg)
    if keys.ndim == 1 and batch:
        keys = jitted(fold, keys, _numbers(keys, math.prod(batch), (*batch, 1)))
    return jitted(fold, namespace(keys).expand_dims(keys, axis=-2), _numbers(keys, count, (count, 1)))


def _numbers(keys: Array, count: int, shape: tuple[int, ...]) -> Array:
    xp = namespace(keys)
    return xp.reshape(xp.arange(count, dtype=xp.int32, device=device_for(keys)), shape)


def _of_positions(r: Rows, value: Any) -> Any:
    """Return a parameter as `sample` takes it, where one entry a request is for all of its positions."""
    if value is None or is_number(value) or not is_array(value) or not value.ndim or value.shape != r.shape[:-2]:
        return value
    return r.xp.reshape(value, (*value.shape, 1, 1))


def _of_drafts(r: Rows, value: Any) -> Any:
    """Return a parameter or mask without what it has for the last position."""
    if value is None or is_number(value) or not is_array(value):
        return value
    count = r.shape[-2] - 1
    if value.shape == r.shape[:-1]:
        return value[..., :count]
    return value[..., :count, :] if value.ndim > 1 and value.shape[-2] == count + 1 > 1 else value


def _probabilities(r: Rows, x: Array, where: Array | None, options: dict[str, Any]) -> Array:
    x = x if where is None else r.xp.where(where, x, -math.inf)
    return softmax(truncate(x, **options), temperature=options["temperature"], where=where, dtype=r.compute)
