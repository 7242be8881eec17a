"""Text from the fitted model: `polysoftmax.sample`, one character after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import polysoftmax
from polysoftmax._demo.model import Weights, logits

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._demo.backends import Backend
    from polysoftmax._demo.model import Corpus, Fit


class Style(NamedTuple):
    """How characters are drawn; a top_k of 0 and a top_p of 1 are off."""

    name: str
    temperature: float
    top_k: int = 0
    top_p: float = 1.0


STYLES = (
    Style("T = 0", 0.0),
    Style("T = 0.5", 0.5),
    Style("T = 1", 1.0),
    Style("T = 1.5", 1.5),
    Style("T = 1, top_k = 5", 1.0, top_k=5),
    Style("T = 1, top_p = 0.9", 1.0, top_p=0.9),
)


def write_text(fit: Fit, backend: Backend, corpus: Corpus, prompt: str, length: int, seed: int) -> list[str]:
    """Continue a prompt on a backend, once in each style, with weights that may come from another backend.

    The styles are rows of one batch: each row has its own temperature, top_k and top_p, and each step its own key.
    """
    xp = backend.xp
    weights = Weights(*(backend.floats(one.tolist()) for one in fit.weights))
    temperature = backend.floats([one.temperature for one in STYLES])
    top_k = backend.integers([one.top_k for one in STYLES])
    top_p = backend.floats([one.top_p for one in STYLES])
    key = polysoftmax.random.key(seed, xp=xp, device=backend.place)
    context = backend.integers([corpus.encode(prompt)] * len(STYLES))
    columns = []
    for step in range(length):
        drawn: Array = polysoftmax.sample(
            logits(weights, context),
            polysoftmax.random.fold_in(key, step),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        columns.append(drawn.tolist())
        context = xp.concat([context[:, 1:], xp.astype(drawn[:, None], context.dtype)], axis=1)
    return [corpus.decode(list(row)) for row in zip(*columns, strict=True)]
