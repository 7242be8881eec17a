"""PyTorch's DTensor on two processes: equal answers, and how often they talk to each other.

This file is also a program, which torch.distributed.run starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

ROWS, N = 8, 1000
COLLECTIVES = {"softmax": 3, "log_softmax": 5, "entropy": 5, "cross_entropy": 7, "gradient": 12, "log_prob": 8}
"""All-reduces of rows that are spread, each of a word or two a row."""

OF_WHOLE_ROWS = ("smoothing", "weighted gradient", "sample", "sample, one key", "sample, top_p", "truncate", "partial")


def functions() -> dict[str, Any]:
    import torch

    import polysoftmax as ps

    def loss(x: Any, i: Any, **options: Any) -> Any:
        return ps.cross_entropy(x, i, reduction="none", **options)

    def gradient(function: Any) -> Any:
        def of(x: Any, i: Any, keys: Any) -> Any:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x, i).sum(), x)[0]

        return of

    return {
        "softmax": lambda x, i, k: ps.softmax(x),
        "log_softmax": lambda x, i, k: ps.log_softmax(x, temperature=0.7),
        "entropy": lambda x, i, k: ps.entropy(x),
        "cross_entropy": lambda x, i, k: loss(x, i),
        "gradient": gradient(loss),
        "log_prob": lambda x, i, k: ps.log_prob(x, i),
        "smoothing": lambda x, i, k: loss(x, i, label_smoothing=0.1),
        "weighted gradient": gradient(lambda x, i: loss(x, i, ignore_index=3, z_loss=0.1)),
        "sample": lambda x, i, k: ps.sample(x, k, top_k=5),
        "sample, one key": lambda x, i, k: ps.sample(x, 7, min_p=0.05),
        "sample, top_p": lambda x, i, k: ps.sample(x, k, top_p=0.9, draws=3),
        "truncate": lambda x, i, k: ps.truncate(x, top_p=0.9),
        "partial": lambda x, i, k: ps.partial(x).rest,
    }


def run() -> None:
    """Run every function on rows that are whole and on rows that are spread."""
    import torch
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    import polysoftmax as ps

    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    source = np.random.default_rng(0)
    given = (
        torch.from_numpy((3 * source.normal(size=(ROWS, N))).astype(np.float32)),
        torch.from_numpy(source.integers(0, N, ROWS)),
        torch.from_numpy(np.asarray(ps.random.key(np.arange(ROWS)))),
    )
    report: dict[str, Any] = {}
    for where, (x_place, place) in {"rows": (Shard(0), Shard(0)), "tokens": (Shard(1), Replicate())}.items():
        arrays = [distribute_tensor(x, mesh, [p]) for x, p in zip(given, (x_place, place, place), strict=True)]
        for name in (*COLLECTIVES, *(OF_WHOLE_ROWS if where == "rows" else ())):
            f = functions()[name]
            with CommDebugMode() as counted:
                f(*arrays)
            y = f(*arrays)  # once more, since such a mode keeps the kernels out
            assert isinstance(y, DTensor)
            whole, want = y.full_tensor(), f(*given)
            equal = torch.equal(whole, want) if where == "rows" else torch.allclose(whole, want, rtol=1e-5, atol=1e-5)
            sent = {str(kind).rpartition(".")[2]: count for kind, count in counted.get_comm_counts().items() if count}
            report[f"{where}, {name}"] = {"equal": bool(equal), "sent": sent}
        if where == "tokens":
            for parameters in ({}, {"top_k": 3}, {"top_p": 0.5}):
                try:
                    ps.sample(arrays[0], arrays[2], **parameters)
                except NotImplementedError as error:
                    report[f"error of {parameters}"] = str(error)
    if distributed.get_rank() == 0:
        print(json.dumps(report))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("torch.distributed.tensor")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_whole_rows_are_computed_where_they_are(report: dict[str, Any]) -> None:
    """With the bits of one device, and without a word sent."""
    for name in (*COLLECTIVES, *OF_WHOLE_ROWS):
        assert report[f"rows, {name}"] == {"equal": True, "sent": {}}, name


def test_rows_that_are_spread_send_a_few_words(report: dict[str, Any]) -> None:
    for name, most in COLLECTIVES.items():
        found = report[f"tokens, {name}"]
        assert found["equal"], name
        assert set(found["sent"]) == {"all_reduce"}, name
        assert found["sent"]["all_reduce"] <= most, name


def test_what_needs_whole_rows_says_so(report: dict[str, Any]) -> None:
    for parameters in ({}, {"top_k": 3}, {"top_p": 0.5}):
        assert "logits.redistribute(placements=[Shard(0)])" in report[f"error of {parameters}"]


if __name__ == "__main__":
    run()
