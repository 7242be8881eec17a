"""Arrays that are refused, because formulas would ignore part of what they are, and what to pass in their place."""

from __future__ import annotations

import sys
from typing import Any


def require_plain(x: Any) -> None:
    """Raise ``TypeError`` for an array that is more than a full grid of numbers."""
    require_dense(x)
    kind = type(x)
    numpy, masked = (sys.modules.get(name) for name in ("numpy", "numpy.ma"))
    if masked is not None and isinstance(x, masked.MaskedArray):
        msg = (
            "got a numpy.ma.MaskedArray, whose mask the formulas would ignore: "
            "pass x.data together with where=~numpy.ma.getmaskarray(x)"
        )
        raise TypeError(msg)
    if numpy is not None and isinstance(x, numpy.matrix):
        msg = "got a numpy.matrix, which cannot lose a dimension: pass numpy.asarray(x)"
        raise TypeError(msg)
    if numpy is not None and isinstance(x, numpy.ndarray) and kind.__array_ufunc__ is not numpy.ndarray.__array_ufunc__:
        msg = (
            f"got a {kind.__module__}.{kind.__qualname__}, a NumPy array with arithmetic of its own (units, for "
            "example), which the formulas would ignore: pass its plain numbers, numpy.asarray(x)"
        )
        raise TypeError(msg)


def require_dense(x: Any) -> None:
    """Raise ``TypeError`` for a tensor of PyTorch that is no full grid of numbers."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return
    if x.is_nested:
        msg = (
            "got a nested tensor, whose rows differ in length: pad them with what a softmax ignores, "
            "torch.nested.to_padded_tensor(x, -torch.inf)"
        )
        raise TypeError(msg)
    if isinstance(x, torch.masked.MaskedTensor):
        msg = (
            "got a torch.masked.MaskedTensor, whose mask the formulas would ignore: "
            "pass x.get_data() together with where=x.get_mask()"
        )
        raise TypeError(msg)
    if x.layout is not torch.strided:
        msg = f"got a tensor of the layout {x.layout}: pass x.to_dense()"
        raise TypeError(msg)
