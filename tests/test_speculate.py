"""Speculative decoding: the target's own tokens, or its very distribution, and nothing after a rejection."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

import polysoftmax as ps
from polysoftmax import random
from polysoftmax.engines import portable

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

here = pytest.mark.backends(lambda can: not can.lazy and "func" not in can.how)
quick = pytest.mark.backends(lambda can: can.gpu or not (can.compiles or can.traced or can.lazy))
MANY = 40_000


def logits(*shape: int, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture
def compiled(lib: Adapter) -> None:
    """Leave JAX without an engine out: it compiles each operation."""
    if lib.backend.library == "jax" and portable():
        pytest.skip("too slow")


def fits(seen: np.ndarray, expected: np.ndarray) -> bool:
    """Whether counts are as expected, by chi-square over those that are expected often."""
    often = expected > 5
    scale = seen[often].sum() / expected[often].sum()
    return often.sum() == 1 or stats.chisquare(seen[often], expected[often] * scale).pvalue > 1e-4


@here
@pytest.mark.usefixtures("compiled")
def test_drafts_change_no_token(lib: Adapter) -> None:
    """Whatever is proposed, what comes out is what is drawn one by one."""
    target, key = logits(5, 4, 11), random.key(3)
    alone = np.asarray(
        [
            [
                ps.sample(row, random.fold_in(random.fold_in(key, i), j), temperature=0.7, top_k=6)
                for j, row in enumerate(one)
            ]
            for i, one in enumerate(target)
        ]
    )
    drafts = alone[:, :3].copy()
    drafts[1, 1] += 1
    drafts[2] = -1
    drafts[3, 2] = (drafts[3, 2] + 5) % 11
    options = {"temperature": 0.7, "top_k": 6}
    tokens, accepted = lib.call(
        ps.speculate, lib.asarray(drafts, "int32"), lib.asarray(target, "float32"), lib.asarray(key, "int32"), **options
    )
    assert lib.values(accepted).tolist() == [3, 1, 0, 2, 3]
    expected = [
        [t if j <= count else -1 for j, t in enumerate(row)] for row, count in zip(alone, [3, 1, 0, 2, 3], strict=True)
    ]
    assert lib.values(tokens).tolist() == expected


@here
@pytest.mark.usefixtures("compiled")
def test_a_draft_from_the_target_is_always_accepted(lib: Adapter) -> None:
    options = {"top_p": 0.9}
    target = logits(50, 3, 9)
    keys = random.split(5, 50)
    drafts = ps.sample(target[:, :2], random.split(6, 100).reshape(50, 2, 2), **options)
    tokens, accepted = lib.call(
        ps.speculate,
        lib.asarray(drafts, "int32"),
        lib.asarray(target, "float32"),
        lib.asarray(keys, "int32"),
        draft_logits=lib.asarray(target[:, :2], "float32"),
        **options,
    )
    assert (lib.values(accepted) == 2).all()
    assert (lib.values(tokens)[:, :2] == drafts).all()


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.3},
)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_tokens_have_the_probabilities_of_the_target(count: int, number: int) -> None:
    """Also where the drafts were drawn with the very keys of the call."""
    options, n = OPTIONS[number], 6
    target, draft = logits(count + 1, n, seed=number), logits(count, n, seed=number + 10)
    draft = target[:count] + draft / 4
    many = {"target": np.broadcast_to(target, (MANY, count + 1, n)), "draft": np.broadcast_to(draft, (MANY, count, n))}
    keys = random.split(count, MANY)
    own = np.stack([random.fold_in(keys, np.full(MANY, j)) for j in range(count)], axis=1)
    drafts = ps.sample(many["draft"], own, **options)
    tokens, accepted = ps.speculate(drafts, many["target"], keys, draft_logits=many["draft"], **options)
    t = options.get("temperature", 1.0)
    p = ps.softmax(ps.truncate(target.astype(np.float64), **options), temperature=t)
    for j in range(count + 1):
        reached = accepted >= j
        assert (tokens[~reached, j] == -1).all()
        if reached.sum() > 2000:
            seen, expected = np.bincount(tokens[reached, j], minlength=n), p[j] * reached.sum()
            assert not seen[expected == 0].any()
            assert fits(seen, expected)
    assert accepted.mean() > 0.5 * min(count, 3)


def test_more_is_accepted_the_nearer_the_draft_is() -> None:
    target = logits(MANY, 2, 5)
    counts = []
    for distance in (0.0, 0.3, 1.0, 3.0):
        draft = target[:, :1] + distance * logits(MANY, 1, 5, seed=1)
        drafts = ps.sample(draft, random.split(8, MANY)[:, None])
        p, q = ps.softmax(target[:, :1]), ps.softmax(draft)
        _, accepted = ps.speculate(drafts, target, 9, draft_logits=draft)
        overlap = np.minimum(p, q).sum(-1).mean()  # the share that is accepted of an exact method
        assert abs(accepted.mean() - overlap) < 4 * math.sqrt(0.25 / MANY)
        counts.append(accepted.mean())
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 1


@quick
def test_parameters_of_requests_and_of_positions(lib: Adapter) -> None:
    target, drafts, keys = logits(3, 3, 7), np.zeros((3, 2), int), random.split(1, 3)
    t = np.asarray([0.0, 0.5, 2.0])
    given = [lib.asarray(drafts, "int32"), lib.asarray(target, "float32"), lib.asarray(keys, "int32")]
    where = np.ones((3, 1, 7), bool)
    where[0, 0, target[0, 0].argmax()] = False
    for draft in (None, target[:, :2]):
        q = None if draft is None else lib.asarray(draft, "float32")
        of_requests = lib.call(
            ps.speculate,
            *given,
            draft_logits=q,
            temperature=lib.asarray(t, "float32"),
            where=lib.asarray(where, "bool"),
        )
        spread = lib.asarray(np.broadcast_to(t[:, None], (3, 3)), "float32")
        of_positions = lib.call(
            ps.speculate, *given, draft_logits=q, temperature=spread, where=lib.asarray(where, "bool")
        )
        for one, other in zip(of_requests, of_positions, strict=True):
            np.testing.assert_array_equal(lib.values(one), lib.values(other))
        assert lib.values(of_requests[0])[0, 0] not in (-1, target[0, 0].argmax())


def test_rows_without_a_token_and_without_drafts() -> None:
    target = logits(2, 2, 4)
    target[0, 0] = np.nan
    for draft in (None, logits(2, 1, 4, seed=3)):
        tokens, accepted = ps.speculate(np.asarray([[0], [-1]]), target, 3, draft_logits=draft)
        assert (accepted == 0).all()
        assert tokens[0].tolist() == [-1, -1]
        assert tokens[1, 0] >= 0
        assert tokens[1, 1] == -1
    tokens, accepted = ps.speculate(np.zeros((2, 0), int), target[:, 1:], 3)
    assert (tokens.shape, accepted.tolist()) == ((2, 1), [0, 0])
    tokens, _ = ps.speculate(np.zeros((2, 0), int), target[:, 1:], 3, draft_logits=np.zeros((2, 0, 4), np.float32))
    assert (tokens >= 0).all()


def test_bad_input() -> None:
    target = logits(2, 3, 4)
    for drafts, message in (
        (np.zeros((2, 3), int), r"must have the shape \(\.\.\., K \+ 1, n\)"),
        (np.zeros(2, int), "for drafts of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ps.speculate(drafts, target, 3)
    with pytest.raises(TypeError, match="draft_tokens must be integers"):
        ps.speculate(np.zeros((2, 2)), target, 3)
    with pytest.raises(ValueError, match="draft_logits must have the shape"):
        ps.speculate(np.zeros((2, 2), int), target, 3, draft_logits=target)
    with pytest.raises(ValueError, match="keys must be one"):
        ps.speculate(np.zeros((2, 2), int), target, random.split(3, 5))
    with pytest.raises(IndexError, match="token 4 is out of range"):
        ps.speculate(np.full((2, 2), 4), target, 3, draft_logits=target[:, :2])


def test_accepts_and_residuals_have_domains_of_their_own() -> None:
    """And these are frozen, as tokens are."""
    target = logits(6, 3, 8, seed=4)
    draft = target[:, :2] + logits(6, 2, 8, seed=5) / 2
    drafts = ps.sample(draft, random.split(2, 12).reshape(6, 2, 2))
    tokens, accepted = ps.speculate(drafts, target, 11, draft_logits=draft)
    assert [*accepted.tolist(), *itertools.chain(*tokens.tolist())] == PINNED


PINNED = [2, 2, 2, 2, 2, 2, 3, 7, 1, 0, 4, 1, 7, 6, 6, 1, 3, 6, 3, 0, 4, 7, 0, 5]
