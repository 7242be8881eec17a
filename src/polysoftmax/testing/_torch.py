"""PyTorch as the kit uses it: eagerly, recorded by autograd, under torch.func or torch.compile."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._adapters import Adapter
from polysoftmax.testing._backends import Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from polysoftmax.testing._adapters import Call

    Array = Any


class TorchAdapter(Adapter):
    """One device of PyTorch."""

    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.torch as xp

        return xp

    @contextmanager
    def setting(self) -> Iterator[None]:
        if self.backend is not Backend.TORCH_COMPILE:
            yield
            return
        import torch._dynamo

        # Every shape and option of the matrix is a program of its own.
        with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
            yield

    def dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        import torch

        return torch.as_tensor(exact.copy(), device="cuda" if self.can.gpu else "cpu").to(self.dtype(dtype))

    def values(self, y: Array) -> NDArray[Any]:
        import torch

        y = y.detach().cpu()
        return np.asarray((y.to(torch.float64) if y.is_floating_point() else y).numpy())

    def _run(self, spec: Call, arrays: list[Array]) -> Any:
        import torch

        if self.backend is Backend.TORCH_COMPILE:
            return self._compiled(spec)(*arrays)
        floating = [one.is_floating_point() for one in arrays]
        if not any(floating) or self.backend not in (Backend.TORCH_FUNC, Backend.TORCH_AUTOGRAD):
            return spec(*arrays)
        if self.backend is Backend.TORCH_AUTOGRAD:
            leaves = [one.clone().requires_grad_() if real else one for one, real in zip(arrays, floating, strict=True)]
            return _detached(spec(*leaves))

        def of_floating(*moved: Array) -> Any:
            left = iter(moved)
            return spec(*[next(left) if real else one for one, real in zip(arrays, floating, strict=True)])

        return torch.func.vjp(of_floating, *[one for one, real in zip(arrays, floating, strict=True) if real])[0]

    @functools.cache  # noqa: B019 (adapters live as long as the process)
    def _compiled(self, spec: Call) -> Callable[..., Any]:
        import torch

        program: Callable[..., Any] = torch.compile(
            lambda *arrays: spec(*arrays),  # noqa: PLW0108 (as above)
            fullgraph=True,
            dynamic=False,
            backend="aot_eager",
        )
        return program


def _detached(y: Any) -> Any:
    """Take answers out of the graph; some of several may be constants, such as a maximum."""
    from torch.utils import _pytree as pytree

    floating = [one.requires_grad for one in pytree.tree_leaves(y) if one.is_floating_point()]
    assert any(floating) or not floating, "autograd lost the answer"
    return pytree.tree_map(lambda one: one.detach(), y)
