"""PyTorch's DTensor on two and four processes: equal answers, and how much they send to each other.

This file is also a program, which forks them after it has imported PyTorch once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROWS, N, FEW = 8, 65_500, 5
"""Two and four devices cut blocks of 256 tokens; of a few tokens the last of four devices has none."""

COLLECTIVES = {"all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "shard_dim_alltoall"}

SENT = {
    "softmax": (2, 2),
    "log_softmax": (4, 4),
    "entropy": (5, 5),
    "cross_entropy": (5, 5),
    "gradient": (9, 9),
    "log_prob": (5, 5),
    "sample": (5, 256 + 5),
    "sample, top_p": (17, 516),
    "sample, top_k": (14, 410),
    "log_prob, filters": (20, 420),
    "top_log_probs": (20, 280),
}
"""Collectives of rows that are spread, and the words of 4 bytes that they answer for each row, at most."""

OF_SPREAD_ROWS = (
    "sample, one key",
    "sample, mask",
    "sample, all filters",
    "sample, limits",
    "sample, draws",
    "sample, distinct",
    "sample, inference",
    "truncate",
    "truncate, ties",
    "sample, NaN",
    "sample, NaN, top_k",
    "several tokens",
    "gradient, filters",
)
OF_WHOLE_ROWS = ("smoothing", "weighted gradient", "sample, one key", "sample, draws", "truncate", "partial")

MODES = {
    2: {"rows": (*SENT, *OF_WHOLE_ROWS), "tokens": (*SENT, *OF_SPREAD_ROWS)},
    4: {
        "tokens": ("softmax", "gradient", "sample", "sample, top_p", "sample, top_k"),
        "rows and tokens": ("sample, one key", "sample, limits", "truncate, ties", "gradient, filters"),
        "few tokens": (
            "softmax",
            "sample, mask",
            "sample, limits",
            "sample, NaN",
            "sample, NaN, top_k",
            "several tokens",
        ),
    },
}
"""By the number of processes: how arrays lie, and functions."""


def functions() -> dict[str, Any]:
    import polysoftmax as ps

    def loss(x: Any, i: Any, **options: Any) -> Any:
        return ps.cross_entropy(x, i, reduction="none", **options)

    def gradient(function: Any) -> Any:
        def of(x: Any, i: Any, keys: Any) -> Any:
            import torch

            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x, i).sum(), x)[0]

        return of

    def limits(x: Any, i: Any, k: Any) -> Any:
        """Draw at T = 0 from some rows, with k of their own, and a bad one."""
        return ps.sample(x, k, temperature=(i % 3) / 2, top_k=i % 4 - 1, top_p=0.9)

    def in_inference_mode(x: Any, i: Any, k: Any) -> Any:
        import torch

        with torch.inference_mode():
            return ps.sample(x, k, top_k=9, where=x < 2.0)

    return {
        "softmax": lambda x, i, k: ps.softmax(x),
        "log_softmax": lambda x, i, k: ps.log_softmax(x, temperature=0.7),
        "entropy": lambda x, i, k: ps.entropy(x),
        "cross_entropy": lambda x, i, k: loss(x, i),
        "gradient": gradient(loss),
        "log_prob": lambda x, i, k: ps.log_prob(x, i),
        "smoothing": lambda x, i, k: loss(x, i, label_smoothing=0.1),
        "weighted gradient": gradient(lambda x, i: loss(x, i, ignore_index=3, z_loss=0.1)),
        "sample": lambda x, i, k: ps.sample(x, k),
        "sample, one key": lambda x, i, k: ps.sample(x, 7, min_p=0.05),
        "sample, mask": lambda x, i, k: ps.sample(x, k, where=x < 2.0, temperature=1.5),
        "sample, top_p": lambda x, i, k: ps.sample(x, k, top_p=0.9),
        "sample, top_k": lambda x, i, k: ps.sample(x, k, top_k=min(50, x.shape[-1] - 1)),
        "sample, all filters": lambda x, i, k: ps.sample(x, k, top_k=3, top_p=0.9, min_p=0.01, temperature=0.7),
        "sample, limits": limits,
        "sample, draws": lambda x, i, k: ps.sample(x, k, top_p=0.9, draws=3),
        "sample, distinct": lambda x, i, k: ps.sample(x, k, draws=3, replace=False),
        "sample, inference": in_inference_mode,
        "truncate": lambda x, i, k: ps.truncate(x, top_p=0.9),
        "truncate, ties": lambda x, i, k: ps.truncate(x.round(), top_k=1 + i % 99, top_p=i % 3 / 2.5),
        "sample, NaN": lambda x, i, k: ps.sample(x + 0.0 / (x < 4.0), k),
        "sample, NaN, top_k": lambda x, i, k: ps.sample(x + 0.0 / (x < 4.0), k, top_k=2),
        "log_prob, filters": lambda x, i, k: ps.log_prob(x, i, top_k=50, top_p=0.9),
        "several tokens": lambda x, i, k: ps.log_prob(x, ps.top_log_probs(x, 2)[1]),
        "gradient, filters": gradient(lambda x, i: ps.log_prob(x, i, top_p=0.99)),
        "top_log_probs": lambda x, i, k: ps.top_log_probs(x, 3)[1],
        "partial": lambda x, i, k: ps.partial(x).rest,
    }


def counting() -> Any:
    """Return a mode that counts collectives, and the bytes that they answer."""
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.bytes = 0, 0

        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented  # what it becomes on each device will come
            y = function(*given, **(options or {}))
            if str(function).split(".")[1] in COLLECTIVES:
                self.calls, self.bytes = self.calls + 1, self.bytes + y.numel() * y.element_size()
            return y

    return Counting()


def run(rank: int, processes: int, folder: str) -> None:
    """Run every function in every mode as one of several processes, and write what was right and what was sent."""
    import torch
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    import polysoftmax as ps

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    lines, square = init_device_mesh("cpu", (processes,)), init_device_mesh("cpu", (2, processes // 2))
    layouts = {
        "rows": (lines, [Shard(0)], [Shard(0)], N),
        "tokens": (lines, [Shard(1)], [Replicate()], N),
        "few tokens": (lines, [Shard(1)], [Replicate()], FEW),
        "rows and tokens": (square, [Shard(0), Shard(1)], [Shard(0), Replicate()], 1000),
    }
    report: dict[str, Any] = {}
    for where, names in MODES[processes].items():
        mesh, x_places, places, n = layouts[where]
        source = np.random.default_rng(0)
        rows = ROWS - (where == "rows and tokens")  # which then differ in number
        logits, i = (3 * source.normal(size=(rows, n))).astype(np.float32), source.integers(0, n, rows)
        given = [logits, i, np.asarray(ps.random.key(np.arange(rows)))]
        tensors = [torch.from_numpy(one) for one in given]
        arrays = [distribute_tensor(x, mesh, p) for x, p in zip(tensors, (x_places, places, places), strict=True)]
        for name in names:
            f = functions()[name]
            with counting() as counted:
                y = f(*arrays)
            y = f(*arrays) if where == "rows" else y  # such a mode keeps the kernels out
            assert isinstance(y, DTensor)
            whole, want = y.full_tensor(), f(*tensors if "gradient" in name else given)
            want = torch.as_tensor(want)
            is_close = torch.allclose(whole, want, rtol=1e-5, atol=1e-5, equal_nan=True)
            report[f"{where}, {name}"] = {
                "equal": is_close if where != "rows" and whole.is_floating_point() else torch.equal(whole, want),
                "calls": counted.calls,
                "bytes": counted.bytes,
            }
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(report), encoding="utf-8")
    distributed.destroy_process_group()


def main() -> None:
    import torch.distributed.tensor  # noqa: F401  # once, before the fork
    from torch.multiprocessing import start_processes

    for processes in MODES:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(run, (processes, folder), nprocs=processes, start_method="fork")
            print(Path(folder, "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reports() -> dict[int, dict[str, Any]]:
    pytest.importorskip("torch.distributed.tensor")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return dict(zip(MODES, map(json.loads, found.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("processes", MODES)
def test_answers_are_those_of_one_device(reports: dict[int, dict[str, Any]], processes: int) -> None:
    """With the tokens that NumPy draws, and of whole rows with its bits."""
    assert {name for name, found in reports[processes].items() if not found["equal"]} == set()


def test_whole_rows_send_nothing(reports: dict[int, dict[str, Any]]) -> None:
    for name in MODES[2]["rows"]:
        assert reports[2][f"rows, {name}"]["calls"] == 0, name


@pytest.mark.parametrize("processes", MODES)
def test_rows_that_are_spread_send_a_few_words(reports: dict[int, dict[str, Any]], processes: int) -> None:
    for name in SENT.keys() & MODES[processes]["tokens"]:
        calls, words = SENT[name]
        found = reports[processes][f"tokens, {name}"]
        assert found["calls"] <= calls, (name, found)
        assert found["bytes"] <= ROWS * 4 * words, (name, found)


if __name__ == "__main__":
    main()
