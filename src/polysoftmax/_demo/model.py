"""A small character model, written once in the array API, fitted through `polysoftmax.cross_entropy`.

It sees the last few characters and answers with logits for the next one. Everything random is drawn with
Python's own generator, so that every backend starts from the same weights and sees the same minibatches.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import polysoftmax
from polysoftmax._arrays import Array, device_for, namespace
from polysoftmax._demo.backends import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from polysoftmax._demo.backends import Backend

CONTEXT = 10
EMBEDDING = 24
HIDDEN = 256
BATCH = 256
RATE = 3.0
MOMENTUM = 0.9

VOCABULARY = 96
STAND_IN = "\N{REPLACEMENT CHARACTER}"
SHORTEST = 2000


@dataclass(frozen=True)
class Corpus:
    """A text as numbers: those the model is fitted to, and those that are held out."""

    name: str
    alphabet: str
    fitted: list[int]
    held_out: list[int]

    def encode(self, text: str) -> list[int]:
        """Return the numbers of characters; rare ones share the number 0."""
        number = {character: i for i, character in enumerate(self.alphabet)}
        return [number.get(character, 0) for character in text]

    def decode(self, numbers: list[int]) -> str:
        """Return the characters of numbers."""
        return "".join(self.alphabet[i] for i in numbers)


def read_corpus(path: Path | None) -> Corpus:
    """Read the user's text, or the English that comes with Python: the help on its language.

    Raises
    ------
    UsageError
        If the file cannot be read, is no UTF-8, or is too short to fit anything to.
    """
    if path is None:
        from pydoc_data import topics

        return make_corpus("pydoc_data.topics", " ".join(topics.topics[key] for key in sorted(topics.topics)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        msg = f"cannot read the text {str(path)!r}: {error.strerror}"
        raise UsageError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"the text {str(path)!r} is not UTF-8 (byte {error.start}): convert it first, for example with iconv"
        raise UsageError(msg) from error
    return make_corpus(path.name, text)


def make_corpus(name: str, text: str) -> Corpus:
    """Turn a text into numbers. White space becomes single spaces; the last tenth is held out."""
    text = re.sub(r"\s+", " ", text).strip()
    if len(text) < SHORTEST:
        msg = f"the text {name!r} has {len(text)} characters: at least {SHORTEST} are needed to fit a model to"
        raise UsageError(msg)
    common = [character for character, _ in Counter(text).most_common(VOCABULARY - 1)]
    corpus = Corpus(name, STAND_IN + "".join(common), [], [])
    numbers = corpus.encode(text)
    cut = len(numbers) * 9 // 10
    return Corpus(name, corpus.alphabet, numbers[:cut], numbers[cut:])


class Weights(NamedTuple):
    """The parameters of the model."""

    embedding: Array
    hidden: Array
    hidden_bias: Array
    output: Array
    output_bias: Array


def initial_weights(symbols: int, seed: int = 0) -> Weights:
    """Draw the initial weights, as nested lists that any backend can take."""
    draw = random.Random(seed)

    def normal(rows: int, columns: int, deviation: float) -> list[list[float]]:
        return [[draw.gauss(0.0, deviation) for _ in range(columns)] for _ in range(rows)]

    wide = CONTEXT * EMBEDDING
    return Weights(
        normal(symbols, EMBEDDING, 0.5),
        normal(wide, HIDDEN, wide**-0.5),
        [0.0] * HIDDEN,
        normal(HIDDEN, symbols, 0.5 * HIDDEN**-0.5),
        [0.0] * symbols,
    )


def _activations(weights: Weights, context: Array) -> tuple[Array, Array]:
    xp = namespace(context)
    symbols = xp.take(weights.embedding, xp.reshape(context, (-1,)), axis=0)
    inputs = xp.reshape(symbols, (context.shape[0], -1))
    return inputs, xp.tanh(inputs @ weights.hidden + weights.hidden_bias)


def logits(weights: Weights, context: Array) -> Array:
    """Return the logits of the next character, (rows, symbols), for contexts of shape (rows, CONTEXT)."""
    _, hidden = _activations(weights, context)
    return hidden @ weights.output + weights.output_bias


def loss(weights: Weights, context: Array, target: Array) -> Array:
    """Return the mean cross-entropy of the next characters, in nats."""
    return polysoftmax.cross_entropy(logits(weights, context), target)


def closed_form(weights: Weights, context: Array, target: Array) -> tuple[Array, Weights]:
    """Return the loss and its gradient, for libraries without automatic differentiation."""
    inputs, hidden = _activations(weights, context)
    z = hidden @ weights.output + weights.output_bias
    # The gradient of cross_entropy is what softmax says less what happened.
    gz = (polysoftmax.softmax(z) - _one_hot(target, z.shape[1], z.dtype)) / z.shape[0]
    ghidden = (gz @ weights.output.T) * (1.0 - hidden * hidden)
    xp = namespace(z)
    gsymbols = xp.reshape(ghidden @ weights.hidden.T, (-1, EMBEDDING))
    chosen = _one_hot(xp.reshape(context, (-1,)), z.shape[1], z.dtype)
    gradient = Weights(
        chosen.T @ gsymbols, inputs.T @ ghidden, xp.sum(ghidden, axis=0), hidden.T @ gz, xp.sum(gz, axis=0)
    )
    return polysoftmax.cross_entropy(z, target), gradient


def _one_hot(numbers: Array, symbols: int, dtype: object) -> Array:
    xp = namespace(numbers)
    columns = xp.arange(symbols, dtype=numbers.dtype, device=device_for(numbers))
    return xp.astype(numbers[:, None] == columns, dtype)


def gradient_rule(backend: Backend) -> tuple[str, Callable[[Weights, Array, Array], tuple[Array, Weights]]]:
    """Return how a backend gets the gradient of the loss, in words and as a function."""
    if backend.name == "jax":
        import jax

        return "jax.grad", jax.jit(jax.value_and_grad(loss))
    if backend.xp.__name__.endswith("torch"):
        import torch

        def recorded(weights: Weights, context: Array, target: Array) -> tuple[Array, Weights]:
            leaves = Weights(*(one.detach().requires_grad_() for one in weights))
            value = loss(leaves, context, target)
            return value.detach(), Weights(*torch.autograd.grad(value, leaves))

        return "autograd", recorded
    return "closed form", closed_form


@dataclass(frozen=True)
class Fit:
    """A fitted model, and how the fitting went."""

    backend: Backend
    weights: Weights
    losses: list[float]
    held_out: float


def fit(backend: Backend, corpus: Corpus, steps: int, tell: Callable[[int, float], None]) -> Fit:
    """Fit the model by gradient descent with momentum, telling the step and the loss now and then."""
    _, rule = gradient_rule(backend)
    weights = Weights(*(backend.floats(one) for one in initial_weights(len(corpus.alphabet))))
    velocity = Weights(*(0.0 * one for one in weights))
    text = backend.integers(corpus.fitted)
    starts = random.Random(1).choices(range(len(corpus.fitted) - CONTEXT), k=steps * BATCH)
    losses = []
    for step in range(steps):
        context, target = _windows(backend, text, starts[step * BATCH : (step + 1) * BATCH])
        value, gradient = rule(weights, context, target)
        velocity = Weights(*(MOMENTUM * v + (1.0 - MOMENTUM) * g for v, g in zip(velocity, gradient, strict=True)))
        rate = RATE * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        weights = Weights(*(w - rate * v for w, v in zip(weights, velocity, strict=True)))
        losses.append(value)
        if step % 25 == 24 or step == steps - 1:
            tell(step + 1, float(value))
    return Fit(backend, weights, [float(one) for one in losses], _held_out_loss(backend, weights, corpus))


def _windows(backend: Backend, text: Array, starts: list[int]) -> tuple[Array, Array]:
    xp = backend.xp
    first = backend.integers(starts)
    places = first[:, None] + backend.integers(range(CONTEXT))
    context = xp.reshape(xp.take(text, xp.reshape(places, (-1,)), axis=0), (len(starts), CONTEXT))
    return context, xp.take(text, first + CONTEXT, axis=0)


def _held_out_loss(backend: Backend, weights: Weights, corpus: Corpus) -> float:
    text = backend.integers(corpus.held_out)
    return float(loss(weights, *_windows(backend, text, _spread(corpus, 8192))))


def _spread(corpus: Corpus, most: int) -> list[int]:
    last = len(corpus.held_out) - CONTEXT
    return list(range(0, last, math.ceil(last / most)))


def open_context(fit: Fit, corpus: Corpus) -> str:
    """Find a place in the held-out text where the model hesitates: an entropy of about 1.5 nats after a word."""
    starts = _spread(corpus, 4096)
    contexts = [corpus.decode(corpus.held_out[start : start + CONTEXT]) for start in starts]
    plain = [i for i, one in enumerate(contexts) if one.replace(" ", "").isalpha() and not one.endswith(" ")]
    chosen = [starts[i] for i in plain or range(len(starts))]
    context, _ = _windows(fit.backend, fit.backend.integers(corpus.held_out), chosen)
    entropies = polysoftmax.entropy(logits(fit.weights, context)).tolist()
    best = min(range(len(chosen)), key=lambda i: abs(entropies[i] - 1.5))
    return corpus.decode(corpus.held_out[chosen[best] : chosen[best] + CONTEXT])


def next_logits(fit: Fit, corpus: Corpus, context: str) -> Array:
    """Return the logits of the character that follows a text of CONTEXT characters."""
    return logits(fit.weights, fit.backend.integers([corpus.encode(context)]))[0, :]
