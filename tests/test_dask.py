"""Dask: chunks of whole rows run in the engine of NumPy, lazily, with the filters too."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._formula import RowFormula, named
from polysoftmax.engines import FORMULAS

if TYPE_CHECKING:
    from pathlib import Path

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

ROWS = (3 * np.random.default_rng(0).normal(size=(6, 4, 50))).astype(np.float32)
WHERE = np.random.default_rng(1).random((4, 50)) < 0.8
TOKENS = np.random.default_rng(2).integers(0, 50, (6, 4, 2))
T = np.linspace(0.0, 2.0, 24, dtype=np.float32).reshape(6, 4)

FUNCTIONS: dict[str, Any] = {
    "softmax": lambda x, m, i, t: ps.softmax(x, where=m, temperature=t),
    "log_softmax": lambda x, m, i, t: ps.log_softmax(x, temperature=0.7),
    "first axis": lambda x, m, i, t: ps.softmax(x, axis=0),
    "logsumexp": lambda x, m, i, t: ps.logsumexp(x, axis=1, keepdims=True),
    "entropy": lambda x, m, i, t: ps.entropy(x, where=m),
    "cross_entropy": lambda x, m, i, t: ps.cross_entropy(x, i[..., 0], label_smoothing=0.1),
    "softmax_vjp": lambda x, m, i, t: ps.softmax_vjp(x, x * 2),
    "truncate": lambda x, m, i, t: ps.truncate(x, top_k=7, top_p=0.8),
    "log_prob": lambda x, m, i, t: ps.log_prob(x, i, temperature=t + 1, top_p=0.9, where=m),
    "rank": lambda x, m, i, t: ps.log_prob(x, i[..., 0], return_rank=True)[1],
    "top_log_probs": lambda x, m, i, t: ps.top_log_probs(x, 3)[1],
    "sample": lambda x, m, i, t: ps.sample(x, 7, temperature=t, where=m),
    "draws": lambda x, m, i, t: ps.sample(x, 7, top_p=0.9, draws=3, replace=False),
    "keys": lambda x, m, i, t: ps.sample(x, ps.random.key(i[..., 0]), min_p=0.1, return_logprobs=True)[1],
}


def planned(name: str) -> Any:
    """Return a function's answer as a plan, in chunks of whole rows."""
    chunks = [2, 3, 20]
    chunks[{"first axis": 0, "logsumexp": 1}.get(name, 2)] = -1
    return FUNCTIONS[name](
        da.from_array(ROWS, tuple(chunks)),
        da.from_array(WHERE, (2, 25)),
        da.from_array(TOKENS, (3, 2, 1)),
        da.from_array(T, (2, 4)),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_of_whole_rows_have_the_answers_of_numpy(name: str) -> None:
    """To the bit, in chunks of whole rows along each axis that is reduced."""

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("computed before the values were asked for")

    with dask.config.set(scheduler=refuse):
        y = planned(name)
    want = FUNCTIONS[name](ROWS, WHERE, TOKENS, T)
    assert (y.shape, y.dtype) == (np.shape(want), want.dtype)
    found = y.compute(scheduler="sync")
    if name == "cross_entropy":  # Dask adds the rows up
        np.testing.assert_allclose(found, want, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, want)


def test_a_draw_of_whole_rows_makes_no_array_of_variates() -> None:
    """Its graph holds a task or two for each chunk, where the formula alone would be hundreds."""
    x = da.from_array(np.zeros((8, 1000), np.float32), (2, 1000))
    assert len(ps.sample(x, ps.random.key(da.arange(8, chunks=2))).dask) < 200
    assert ps.explain(x, "sample").reason.endswith("for each chunk") or ps.explain(x, "softmax").engine == "portable"


def test_rows_that_are_spread_over_chunks() -> None:
    x = da.from_array(ROWS, (2, 2, 20))
    assert ps.explain(x, "softmax").engine == "portable"
    np.testing.assert_allclose(ps.softmax(x).compute(), ps.softmax(ROWS), rtol=1e-5, atol=1e-7)
    found = ps.log_prob(x, da.from_array(TOKENS, (2, 2, 2)), return_rank=True)
    for one, want in zip(found, ps.log_prob(ROWS, TOKENS, return_rank=True), strict=True):
        np.testing.assert_allclose(one.compute(), want, rtol=1e-5)
    with pytest.raises(NotImplementedError, match=r"Dask cannot order rows.*logits.rechunk\({axis: -1}\)"):
        ps.sample(x, 7, top_k=3)
    with ps.engine("portable"), pytest.raises(NotImplementedError, match="Dask cannot order rows"):
        ps.sample(x.rechunk({2: -1}), 7, top_k=3)


def test_a_formula_is_pickled_by_its_name() -> None:
    """Kernels are found by the object, so another would run as it stands."""
    logits = (True, False, False)
    derived = [one.pullback(logits) for one in FORMULAS.values()]
    derived += [one.pushforward(moving) for one in FORMULAS.values() for moving in (logits, (True, True, False))]
    for formula in (*FORMULAS.values(), *derived, derived[0].pullback(logits)):
        assert pickle.loads(pickle.dumps(formula)) is formula
        assert len(pickle.dumps(formula)) < 250
    lost = pickle.dumps(RowFormula("a formula of this test", len)).replace(b"a formula of", b"the sum over")
    with pytest.raises(LookupError, match="no row formula named 'the sum over this test': import the module"):
        pickle.loads(lost)
    assert named("softmax") is FORMULAS["softmax"]


def test_a_plan_is_computed_in_another_process() -> None:
    code = """
import pickle, sys
found = [y.compute(scheduler="sync") for y in pickle.load(sys.stdin.buffer)]
print(pickle.dumps(found).hex())
"""
    given = pickle.dumps([planned(name) for name in FUNCTIONS])
    found = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    for name, y in zip(FUNCTIONS, pickle.loads(bytes.fromhex(found.stdout.decode())), strict=True):
        np.testing.assert_array_equal(y, planned(name).compute(scheduler="sync"), err_msg=name)


@pytest.mark.filterwarnings("default")  # distributed has its own of files and sockets of a worker that is gone
@pytest.mark.parametrize("name", ["sample", "draws"])
def test_a_cluster_that_loses_a_worker(name: str, tmp_path: Path) -> None:
    """Its chunks are computed anew by the other, with the same tokens."""
    distributed = pytest.importorskip("distributed")

    def slowly(chunk: Any) -> Any:  # workers cannot import this file
        (tmp_path / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(0.1)
        return chunk

    dashboard = {"dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **dashboard) as cluster,
        cluster.get_client() as client,
    ):
        y = planned(name)
        begun = client.compute(y.map_blocks(slowly, meta=y._meta))  # without it, the function is called here as well
        while len(list(tmp_path.iterdir())) < 4 and not begun.done():
            time.sleep(0.01)
        lost = int(next(tmp_path.iterdir()).name.partition("-")[0])
        os.kill(lost, signal.SIGKILL)
        found = begun.result(timeout=60)
        assert {lost} < {int(one.name.partition("-")[0]) for one in tmp_path.iterdir()}
    np.testing.assert_array_equal(found, planned(name).compute(scheduler="sync"))
