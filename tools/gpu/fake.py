"""A GPU that launches nothing: CPU tensors take the way of CUDA tensors up to the launch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax.engines.cuda._plan import Machine, Plan

H100_PROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM), on which the layout of few long rows depends."""


class FakeDevice:
    """Plans as a device with these multiprocessors does; ``launched`` is called in place of a launch."""

    def __init__(self, machine: Machine, launched: Callable[[Plan], object]) -> None:
        self.machine, self.arch, self.by_cuda_core = machine, 90, True
        self.launched = launched

    def view(self, x: Any) -> Any:
        from polysoftmax.engines.cuda import _devices

        return _devices._TorchDevice.view(self, x)  # type: ignore[arg-type]

    def pointer(self, x: Any) -> Any:
        return x.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        import torch

        # What nothing writes to takes no memory, whatever its size.
        return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def copied(self, x: Any) -> Any:
        import torch

        return x.clone(memory_format=torch.contiguous_format)

    def launch(self, plan: Plan, arguments: list[int | float]) -> None:
        del arguments
        self.launched(plan)


@contextmanager
def fake_gpu(launched: Callable[[Plan], object], machine: Machine | None = None) -> Iterator[FakeDevice]:
    """Let CPU tensors pass for CUDA tensors of a fake device, with the engine of kernels on."""
    import polysoftmax as ps
    import polysoftmax.engines.torch as engine
    from polysoftmax.engines.cuda import _devices
    from polysoftmax.engines.cuda._plan import Machine
    from polysoftmax.functions import losses

    device = FakeDevice(machine or Machine(H100_PROCESSORS, clusters=True, shared=227 << 10), launched)
    with (
        patch.object(engine, "is_cuda", lambda _: True),
        patch.object(engine, "is_on_gpu", lambda _: True),
        patch.object(_devices, "device_of", lambda _: device),
        patch.object(losses, "values_are_free", lambda _: False),
        ps.engine("cuda"),
    ):
        yield device
