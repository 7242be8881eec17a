"""The backends that the command line finds, and how it speaks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import array_api_compat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from polysoftmax._arrays import Array


class UsageError(Exception):
    """The command line asks for something that cannot be done; the message says what to do instead."""


@dataclass(frozen=True)
class Backend:
    """An array library on a device, ready to be used."""

    name: str
    version: str
    device: str
    xp: Any
    place: Any = None

    def floats(self, values: Sequence[Any]) -> Array:
        """Return an array of float32, the type that every library computes in alike."""
        return self.xp.asarray(values, dtype=self.xp.float32, device=self.place)

    def integers(self, values: Sequence[Any]) -> Array:
        """Return an array of the library's default integers."""
        return self.xp.asarray(values, device=self.place)


@dataclass(frozen=True)
class Missing:
    """A backend that cannot be used here, and what would change that."""

    name: str
    reason: str
    remedy: str


class _NoDeviceError(Exception):
    """The library is installed, but the device is not there."""


def _numpy() -> Backend:
    import numpy as np

    return Backend("numpy", np.__version__, "cpu", _compatible(np.zeros(1)))


def _jax() -> Backend:
    import jax

    device = jax.devices()[0]
    what = device.platform if device.platform == "cpu" else f"{device.platform} ({device.device_kind})"
    return Backend("jax", jax.__version__, what, _compatible(jax.numpy.zeros(1)))


def _torch() -> Backend:
    import torch

    return Backend("torch", torch.__version__, "cpu", _compatible(torch.zeros(1)), torch.device("cpu"))


def _torch_cuda() -> Backend:
    import torch

    if not torch.cuda.is_available():
        msg = "no CUDA device found"
        raise _NoDeviceError(msg)
    what = f"cuda ({torch.cuda.get_device_name(0)})"
    return Backend("torch:cuda", torch.__version__, what, _compatible(torch.zeros(1)), torch.device("cuda"))


def _cupy() -> Backend:
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        msg = "no CUDA device found"
        raise _NoDeviceError(msg) from error
    what = f"cuda ({cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()})"
    return Backend("cupy", cupy.__version__, what, _compatible(cupy.zeros(1)))


def _compatible(x: Array) -> Any:
    return array_api_compat.array_namespace(x)


_OPENERS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "jax": _jax,
    "torch": _torch,
    "torch:cuda": _torch_cuda,
    "cupy": _cupy,
}
NAMES = tuple(_OPENERS)

_PACKAGES = {"cupy": "cupy-cuda13x"}
"""What a library is called on the package index, where that is not its name."""


def look_for(name: str) -> Backend | Missing:
    """Import a backend, and say what it is or why it cannot be used."""
    try:
        return _OPENERS[name]()
    except ImportError as error:
        library = name.partition(":")[0]
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        return Missing(name, reason, f"pip install {_PACKAGES.get(library, library)}")
    except _NoDeviceError as error:
        return Missing(name, str(error), "it needs an NVIDIA GPU and its driver")


def choose(names: Iterable[str] | None) -> tuple[list[Backend], list[Missing]]:
    """Return the backends asked for, or all that can be found, and those that are missing.

    Raises
    ------
    UsageError
        If a name is unknown, if a backend asked for by name is missing, or if there is none at all.
    """
    asked = list(dict.fromkeys(names or ()))
    for name in asked:
        if name not in _OPENERS:
            msg = f"unknown backend {name!r}: choose from {', '.join(NAMES)}"
            raise UsageError(msg)
    found: list[Backend] = []
    missing: list[Missing] = []
    for one in map(look_for, asked or NAMES):
        if isinstance(one, Backend):
            found.append(one)
        elif asked:
            msg = f"backend {one.name} was asked for, but: {one.reason} ({one.remedy})"
            raise UsageError(msg)
        else:
            missing.append(one)
    if not found:
        msg = "found no array library to run on; the quickest to add is NumPy: pip install numpy"
        raise UsageError(msg)
    return found, missing
