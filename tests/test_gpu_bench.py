"""The benchmark of the run on a GPU: its contenders answer the same question, and are timed as it says."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import polysoftmax as ps
from benchmarks.cases import Case, gpu_cases
from tools.gpu import bench, clocks, contenders

torch = pytest.importorskip("torch")

SEED = 20_260_102


@pytest.mark.parametrize("op", dict.fromkeys(case.op for case in gpu_cases()))
def test_contenders_answer_the_same_question(op):
    """On the CPU with two rows; other libraries than PyTorch where they are installed."""
    case = Case(op, "torch", "eager", (2, 1000), "float32")
    torch.manual_seed(SEED)
    xs = contenders.inputs(torch, case, "cpu", 2)
    arena = contenders.arena(torch, case, xs)
    others = {name: make for name, make in contenders.peers(torch, case, xs).items() if name == "jax"}
    with ps.engine("portable"):
        answers = {name: one.call() for name, one in arena.items()}
        answers |= {name: make().call() for name, make in others.items()}
    assert contenders.COPY in answers
    ours = np.asarray(answers.pop(contenders.OURS))
    del answers[contenders.COPY], answers[contenders.READ]
    assert "torch" in answers
    for name, theirs in answers.items():
        found = np.asarray(theirs).reshape(ours.shape)
        if op.startswith("sample"):
            assert ((found >= 0) & (found < 1000)).all(), name
        else:
            np.testing.assert_allclose(found, ours, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_peer_that_fails_leaves_the_others_to_be_measured(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("cannot open /usr/lib/x86_64/libpeer.so.1")

    monkeypatch.setattr(contenders, "peers", lambda *_: {"a peer": broken})
    case = Case("softmax", "torch", "eager", (2, 100), "float32")
    found = bench.measure(torch, case, others=True, dry=True)
    assert found["ok"]
    assert found["errors"] == {"a peer": "RuntimeError: cannot open libpeer.so.1"}
    assert {"polysoftmax", "copy", "read", "torch"} == found["seconds"].keys() == found["how"].keys()
    line = bench.line(found)
    assert "of copy" in line
    assert "a peer: RuntimeError" in line


class FakeCuda:
    """What of torch.cuda the stopwatches use; it notes the order of events."""

    def __init__(self, waits=False):
        self.said, self.waits, self.mode = [], waits, 0

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def call(self):
        if self.waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.said.append("call")

    def Event(self, *, enable_timing):
        assert enable_timing
        note = self.said.append
        return SimpleNamespace(
            record=lambda: note("event"), synchronize=lambda: note("wait"), elapsed_time=lambda end: 3.0
        )

    def _sleep(self, cycles):
        self.said.append(cycles)

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, one):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.said.append("replay"))

    @contextmanager
    def graph(self, graph, *, stream):
        self.said.append("capture")
        yield
        self.said.append("captured")


def test_calls_are_queued_before_the_first_runs():
    cuda = FakeCuda()
    contender = clocks.Contender(cuda.call, clocks.EVENTS)
    how, one = clocks.round_of(SimpleNamespace(cuda=cuda), contender, 1000)
    del cuda.said[:]
    assert one() == pytest.approx(3e-3 / clocks.QUEUED)
    assert cuda.said == [clocks.HEAD_START, "event", *["call"] * clocks.QUEUED, "event", "wait"]
    assert how == "events"


def test_a_call_that_waits_for_the_device_is_timed_by_the_clock():
    cuda = FakeCuda(waits=True)
    cuda.synchronize, cuda.is_available = lambda: cuda.said.append("wait"), lambda: True
    how, one = clocks.round_of(SimpleNamespace(cuda=cuda), clocks.Contender(cuda.call), 5)
    del cuda.said[:]
    assert one() > 0
    assert cuda.said == ["wait", *["call"] * 5, "wait"]
    assert (how, cuda.mode) == ("clock", 0)


def test_a_graph_of_several_calls_is_replayed():
    cuda = FakeCuda()
    how, one = clocks.round_of(SimpleNamespace(cuda=cuda), clocks.Contender(cuda.call), 6)
    begun = cuda.said.index("capture")
    assert set(cuda.said[:begun]) == {"call"}
    assert cuda.said[begun:] == ["capture", *["call"] * 6, "captured"]
    del cuda.said[:]
    assert one() == pytest.approx(3e-3 / 6)
    assert cuda.said == ["event", "replay", "event", "wait"]
    assert how == "graph"


def test_rounds_are_interleaved():
    order = []

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    found = clocks.race({name: contender(name) for name in "abc"}, 5)
    assert [len(times) for times in found.values()] == [5, 5, 5]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 5 + clocks.UNCOUNTED
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert min(min(times) for times in found.values()) > 3 * clocks.UNCOUNTED
