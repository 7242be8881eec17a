"""Every case on every backend, held to mpmath within the bounds of the numerics page."""

from __future__ import annotations

import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import CHECKS, Adapter, Backend, check_case

FAMILY = ("softmax", "log_softmax", "logsumexp")


# Other numbers for the programs of other core cases: PyTorch compiles each of them, for its operations to run.
SAME_PROGRAMS = {"finite rows", "special rows", "masked rows", "normal, axis 0"}


def failures(lib: Adapter, op: str, dtype: str, *, large: bool) -> str:
    every = not (lib.can.compiles or lib.can.lazy)
    cases = [one for one in CHECKS[op].cases if one.large == large and (every or one.core)]
    if "compile" in lib.can.how and op != "logsumexp":
        cases = [one for one in cases if one.name not in SAME_PROGRAMS]
    assert cases
    outcomes = [check_case(lib, CHECKS[op], one, dtype) for one in cases]
    return "\n".join(str(one) for one in outcomes if not one.is_right)


@pytest.mark.parametrize("op", FAMILY)
def test_small_cases(lib: Adapter, dtype: str, op: str) -> None:
    assert not failures(lib, op, dtype, large=False)


# torch.compile records the steps that it records for short rows, and gives them to the operations of eager PyTorch;
# autograd records what eager PyTorch answers.
@pytest.mark.enough(lambda can: "compile" not in can.how and "autograd" not in can.how)
@pytest.mark.parametrize("op", FAMILY)
def test_large_cases(lib: Adapter, dtype: str, op: str, *, everything: bool) -> None:
    if lib.backend is Backend.JAX_FUSED and dtype != "float32" and not everything:
        pytest.skip("16 bits are summed in float32, as the contract's tests have it; the product is contracted there")
    assert not failures(lib, op, dtype, large=True)


@pytest.mark.backends(lambda can: can.mutable and not can.compiles)
def test_views_answer_as_their_copies(lib: Adapter) -> None:
    """Blocks, threads and foreign kernels read strides of their own."""
    wide = lib.asarray(np.random.default_rng(0).normal(size=(400, 300)), "float32")
    xp = lib.xp
    views = {
        "every second": wide[::2, ::3],
        "transposed": xp.permute_dims(wide, (1, 0)),
        "offset": wide[1:, 1:],
        "one column": wide[:, :1],
        "repeated rows": xp.broadcast_to(wide[:1, :], (50, 300)),
        "repeated entries": xp.broadcast_to(wide[:, :1], (400, 64)),
        "rolled axes": xp.permute_dims(xp.reshape(wide, (20, 20, 300)), (2, 0, 1)),
    }
    for name, view in views.items():
        copy = lib.asarray(lib.values(view), "float32")
        for axis in (0, -1, None):
            for op in FAMILY:
                y, plain = (lib.values(lib.call(getattr(polysoftmax, op), x, axis=axis)) for x in (view, copy))
                np.testing.assert_allclose(y, plain, rtol=1e-5, atol=0, err_msg=f"{op} of {name}, axis {axis}")
