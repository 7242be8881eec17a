"""The softmax family, written once in the array API standard, for NumPy, JAX, PyTorch and CuPy."""

from polysoftmax._softmax import log_softmax, logsumexp, softmax
from polysoftmax.engines import engine, explain

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "engine",
    "explain",
    "log_softmax",
    "logsumexp",
    "softmax",
]
