"""Every row of the guide's tables for optax and transformers: both sides are run, and return the same numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
T, K, P, M = 0.7, 50, 0.9, 0.05


def rows(heading: str) -> set[str]:
    """Return what stands on the left in the table below a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| (?!you wrote|--)(.+?) \|", section, re.MULTILINE))


def losses() -> dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]]:
    """Return both sides of each row for optax, whose module is given."""
    import jax
    import jax.numpy as jnp

    x, other = (jax.random.normal(jax.random.key(seed), (3, 4)) for seed in (0, 1))
    t, q = jnp.asarray([0, 3, 1]), jax.nn.softmax(other)
    impossible, zero = x.at[0, 1].set(-jnp.inf), jnp.asarray([[0.5, 0.0, 0.25, 0.25]] * 3)
    return {
        "`softmax_cross_entropy_with_integer_labels(x, t)`": (
            lambda optax: optax.softmax_cross_entropy_with_integer_labels(x, t),
            lambda: ps.cross_entropy(x, t, reduction="none"),
        ),
        "`softmax_cross_entropy(x, q)`": (
            lambda optax: optax.softmax_cross_entropy(x, q),
            lambda: ps.cross_entropy(x, q, reduction="none"),
        ),
        "`safe_softmax_cross_entropy(x, q)`": (
            lambda optax: optax.safe_softmax_cross_entropy(impossible, zero),
            lambda: ps.cross_entropy(impossible, zero, reduction="none"),
        ),
        "`softmax_cross_entropy(x, smooth_labels(onehot, a))`": (
            lambda optax: optax.softmax_cross_entropy(x, optax.smooth_labels(jax.nn.one_hot(t, 4), 0.1)),
            lambda: ps.cross_entropy(x, t, label_smoothing=0.1, reduction="none"),
        ),
        "`kl_divergence(log_softmax(q), p)`": (
            lambda optax: optax.kl_divergence(jax.nn.log_softmax(other), jax.nn.softmax(x)),
            lambda: ps.kl_divergence(x, other),
        ),
    }


def test_losses_of_optax() -> None:
    pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    both = losses()
    assert rows("From optax") == set(both)
    for name, (theirs, ours) in both.items():
        np.testing.assert_allclose(ours(), theirs(optax), rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_differs_from_optax() -> None:
    """As the last column has it: labels out of range, and probability 0 on a logit of -inf."""
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")
    x, labels = jnp.asarray([[0.5, 2.0, -1.0]] * 3), jnp.asarray([3, -1, 2])
    theirs = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    assert np.isnan(ps.cross_entropy(x, labels, reduction="none")).tolist() == [True, True, False]
    assert np.isnan(theirs).tolist() == [True, False, False]
    assert theirs[1] == theirs[2]  # -1 is the last class
    logits, p = jnp.asarray([1.0, -jnp.inf]), jnp.asarray([1.0, 0.0])
    assert np.isnan(optax.softmax_cross_entropy(logits, p))
    assert ps.cross_entropy(logits, p) == 0


def warpers(transformers: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return a list of processors for each row for transformers, and the options that say the same."""
    torch = pytest.importorskip("torch")
    heat, k, p, m = (
        transformers.TemperatureLogitsWarper(T),
        transformers.TopKLogitsWarper(K),
        transformers.TopPLogitsWarper(P),
        transformers.MinPLogitsWarper(M),
    )
    every = {"temperature": T, "top_k": K, "top_p": P}
    suppressed = [3, 5, 8]
    mask = torch.ones(1000, dtype=torch.bool)
    mask[suppressed] = False
    return {
        "`TemperatureLogitsWarper(T)`": ([heat], {"temperature": T}),
        "`TopKLogitsWarper(k)`": ([k], {"top_k": K}),
        "`TopPLogitsWarper(p)`": ([p], {"top_p": P}),
        "`MinPLogitsWarper(p)`": ([m], {"min_p": M}),
        "processors, then softmax and `torch.multinomial`": ([heat, k, p, m], {**every, "min_p": M}),
        "processors alone": ([heat, k, p], every),
        "`SuppressTokensLogitsProcessor`, constraints": (
            [transformers.SuppressTokensLogitsProcessor(suppressed), heat],
            {"temperature": T, "where": mask},
        ),
    }


def test_processors_of_transformers() -> None:
    """The distribution that is left is the same, token by token; so is the set of tokens that stay."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    x = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    history = torch.tensor([[1, 2, 2], [4, 4, 4], [0, 1, 2], [7, 8, 9]])
    both = warpers(transformers)
    assert rows("From the logits processors of transformers") - {"`RepetitionPenaltyLogitsProcessor`"} == set(both)
    tokens = torch.arange(1000).expand(4, 1000)
    for name, (processors, options) in both.items():
        scores = transformers.LogitsProcessorList(processors)(history, x.clone())
        ours = ps.log_prob(x, tokens, **options)
        assert torch.equal(ours.isfinite(), scores.isfinite()), name
        torch.testing.assert_close(ours, scores.log_softmax(-1), rtol=1e-5, atol=2e-6, msg=name)
        assert scores.isfinite().gather(1, ps.sample(x, 7, **options)[:, None]).all(), name
    filters = both["processors alone"][1]
    kept = ps.truncate(x, **filters)
    assert torch.equal(kept[kept.isfinite()], x[kept.isfinite()])  # not divided by T

    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.2)
    seen = torch.zeros(4, 1000, dtype=torch.bool).scatter(1, history, value=True)
    penalised = torch.where(seen, torch.where(x > 0, x / 1.2, x * 1.2), x)
    torch.testing.assert_close(penalised, penalty(history, x.clone()))


def test_generate_takes_the_processors_in_our_order() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(do_sample=True, temperature=T, top_k=K, top_p=P, min_p=M)
    made = transformers.GenerationMixin()._get_logits_processor(config, input_ids_seq_length=1)
    names = [type(one).__name__.removesuffix("LogitsWarper") for one in made]
    assert names == ["Temperature", "TopK", "TopP", "MinP"]


def test_ties_at_the_end_of_top_k() -> None:
    """Exactly k stay here, and there all that tie with the k-th."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert transformers.TopKLogitsWarper(2)(None, x).isfinite().tolist() == [[True, True, True, True, False]]
    assert ps.truncate(x, top_k=2).isfinite().tolist() == [[True, True, False, False, False]]
