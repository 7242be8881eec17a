"""The softmax family, written once in the array API standard, for NumPy, JAX, PyTorch and CuPy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from polysoftmax import random, streaming
from polysoftmax.engines import engine, explain, set_num_threads
from polysoftmax.functions.jacobian import (
    log_softmax_jacobian,
    log_softmax_jvp,
    log_softmax_vjp,
    softmax_jacobian,
    softmax_jvp,
    softmax_vjp,
)
from polysoftmax.functions.linear import (
    LinearGradients,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_log_prob,
)
from polysoftmax.functions.losses import cross_entropy, entropy, kl_divergence
from polysoftmax.functions.partial import Partial, merge, merge_outputs, partial
from polysoftmax.functions.probability import log_prob, top_log_probs
from polysoftmax.functions.relaxation import gumbel_softmax
from polysoftmax.functions.sampling import sample
from polysoftmax.functions.softmax import log_softmax, logsumexp, softmax
from polysoftmax.functions.speculation import speculate
from polysoftmax.functions.truncation import truncate, unpack_mask

if TYPE_CHECKING:
    from polysoftmax import testing as testing
else:

    def __getattr__(name: str) -> object:
        # The conformance kit takes as long to import as all the rest.
        if name == "testing":
            return importlib.import_module("polysoftmax.testing")
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), "testing"})


__version__ = "0.1.0"

__all__ = [
    "LinearGradients",
    "Partial",
    "__version__",
    "cross_entropy",
    "engine",
    "entropy",
    "explain",
    "gumbel_softmax",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_log_prob",
    "log_prob",
    "log_softmax",
    "log_softmax_jacobian",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "logsumexp",
    "merge",
    "merge_outputs",
    "partial",
    "random",
    "sample",
    "set_num_threads",
    "softmax",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
    "speculate",
    "streaming",
    "top_log_probs",
    "truncate",
    "unpack_mask",
]
