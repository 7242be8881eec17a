"""What a CuPy user would call. Only the benchmark on a GPU does, and it has not yet run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cupyx.scipy import special

if TYPE_CHECKING:
    from collections.abc import Callable

PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "softmax": {"cupyx": special.softmax},
    "log_softmax": {"cupyx": special.log_softmax},
    "logsumexp": {"cupyx": special.logsumexp},
}
