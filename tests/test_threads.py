"""The thread pool of the CPU engines: same answers on any number of threads, in any surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import polysoftmax
from polysoftmax.engines import _blocks, _threads
from polysoftmax.engines._threads import num_threads, parallel, set_num_threads

SHAPES = [(400, 513), (30000, 7), (3, 120_000), (17, 40, 90), (2, 400_000), (2048, 256)]
FORMULAS = [polysoftmax.softmax, polysoftmax.log_softmax, polysoftmax.logsumexp, polysoftmax.entropy]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_asked", None)


def logits(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("engine", ["blocks", "auto"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_answers_do_not_depend_on_the_number_of_threads(engine: str, shape: tuple[int, ...], axis: int) -> None:
    x = logits(shape)
    for formula in FORMULAS:
        answers = []
        for n in (1, 2, 3, 8):
            set_num_threads(n)
            with polysoftmax.engine(engine):
                answers.append(formula(x, axis=axis).tobytes())
        assert len(set(answers)) == 1, formula.__name__


def test_work_is_shared_with_other_threads() -> None:
    names = set()

    def work(i: int) -> None:
        names.add(threading.current_thread())
        time.sleep(0.01)

    parallel(work, 40, 3)
    assert threading.current_thread() in names
    assert len(names) == 3


def test_every_piece_is_done_once() -> None:
    done: list[int] = []
    parallel(done.append, 1000, 4)
    assert sorted(done) == list(range(1000))


@pytest.mark.parametrize("broken", [0, 37, 99])
def test_an_error_reaches_the_caller_and_stops_the_rest(broken: int) -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        if i == broken:
            msg = "piece"
            raise ArithmeticError(msg)
        time.sleep(0.001)

    with pytest.raises(ArithmeticError, match="piece"):
        parallel(work, 100, 3)
    assert len(begun) <= broken + 4
    settled = len(begun)
    time.sleep(0.01)
    assert len(begun) == settled
    test_every_piece_is_done_once()


def test_interrupt_waits_for_pieces_that_run() -> None:
    finished: list[int] = []
    caller = threading.current_thread()

    def work(i: int) -> None:
        if threading.current_thread() is caller:
            time.sleep(0.01)  # until the helper is busy
            raise KeyboardInterrupt
        time.sleep(0.05)
        finished.append(i)

    with pytest.raises(KeyboardInterrupt):
        parallel(work, 100, 2)
    settled = list(finished)
    time.sleep(0.1)
    assert finished == settled
    assert len(settled) <= 1


def test_helpers_who_wait_for_more_keep_nothing() -> None:
    x = logits((1000, 700))
    set_num_threads(3)
    for _ in range(20):
        y = polysoftmax.softmax(x)
        gone = weakref.ref(y)
        del y
        assert gone() is None


@pytest.mark.parametrize("spins", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.0005])
def test_many_helpers_leave_in_any_order(spins: bool, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some count themselves out while the caller looks, some when it sleeps."""
    spin = pytest.importorskip("polysoftmax.engines._spin", reason="needs Numba") if spins else None
    monkeypatch.setattr(_threads, "_spin", spin)
    monkeypatch.setattr(_threads, "_posted", [0] if spin is None else spin.number())
    monkeypatch.setattr(_threads, "_team", None)
    for round_ in range(200):
        done = []

        def work(i: int, done: list[int] = done) -> None:
            if i % 3:
                time.sleep(seconds)
            done.append(i)

        parallel(work, 3 + round_ % 5, 6)
        assert sorted(done) == list(range(3 + round_ % 5))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the CPU")
def test_helpers_stay_off_the_callers_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one CPU only")
    pool = _threads._Pool()
    monkeypatch.setattr(_threads, "_pool", pool)
    monkeypatch.setattr(_threads, "_team", None)
    masks: list[set[int]] = []

    def work(i: int) -> None:
        if threading.get_native_id() in pool.threads:
            masks.append(os.sched_getaffinity(0))
        time.sleep(0.001)

    parallel(work, 10, 2)  # the helper may still be new
    masks.clear()
    parallel(work, 20, 2)
    assert masks
    assert {len(mask) for mask in masks} == {len(allowed) - 1}
    assert pool.callers_cpu not in masks[-1]
    assert os.sched_getaffinity(0) == allowed


def test_nested_calls_do_not_lock_up() -> None:
    done: list[tuple[int, int]] = []
    parallel(lambda i: parallel(lambda j: done.append((i, j)), 5, 3), 8, 3)
    assert sorted(done) == [(i, j) for i in range(8) for j in range(5)]


def test_sixteen_user_threads_at_once() -> None:
    inputs = [logits((300, 257), seed) for seed in range(16)]
    with polysoftmax.engine("portable"):
        expected = [polysoftmax.softmax(x) for x in inputs]

    def repeat(i: int) -> list[np.ndarray]:
        return [polysoftmax.softmax(inputs[i]) for _ in range(20)]

    with ThreadPoolExecutor(16) as users:
        for want, got in zip(expected, users.map(repeat, range(16)), strict=True):
            for one in got:
                np.testing.assert_allclose(one, want, rtol=1e-5)
                assert one.tobytes() == got[0].tobytes()


def test_helpers_see_the_callers_context() -> None:
    seen: set[tuple[str, str]] = set()

    def work(i: int) -> None:
        from polysoftmax.engines import chosen

        seen.add((chosen(), np.geterr()["invalid"]))
        time.sleep(0.002)

    with polysoftmax.engine("blocks"), np.errstate(invalid="print"):
        parallel(work, 20, 3)
    assert seen == {("blocks", "print")}


def test_rows_of_nan_and_inf_raise_no_warning_in_any_thread() -> None:
    x = np.full((3000, 64), np.inf, dtype=np.float32)
    x[::2] = -np.inf
    set_num_threads(4)
    with np.errstate(all="raise"), polysoftmax.engine("blocks"):
        assert np.isnan(polysoftmax.softmax(x)).all()


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_thread(n: int) -> None:
    with pytest.raises(ValueError, match=f"1 or greater, got {n}"):
        set_num_threads(n)


@pytest.mark.parametrize("n", [2.0, "2", None, True])
def test_what_is_not_a_number_of_threads(n: object) -> None:
    with pytest.raises(TypeError, match=f"int, got {type(n).__name__}"):
        set_num_threads(n)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform has no CPU affinity")
def test_default_respects_affinity() -> None:
    mine = os.sched_getaffinity(0)
    assert num_threads() == len(mine)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert num_threads() == 1
    finally:
        os.sched_setaffinity(0, mine)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_variable() -> None:
    code = "from polysoftmax.engines._threads import num_threads; print(num_threads())"
    assert _python(code, POLYSOFTMAX_NUM_THREADS="3").stdout == "3\n"


@pytest.mark.parametrize("value", ["0", "many", "1.5"])
def test_bad_environment_variable(value: str) -> None:
    failed = _python("import polysoftmax", POLYSOFTMAX_NUM_THREADS=value)
    assert failed.returncode
    assert "POLYSOFTMAX_NUM_THREADS must be a whole number of threads" in failed.stderr
    assert repr(value) in failed.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_calls_after_fork() -> None:
    # In a process of its own: this one may hold threads of other libraries, with which forking is not safe.
    code = """
import os, threading, warnings
import numpy as np
import polysoftmax
from polysoftmax.engines import _threads
warnings.simplefilter("ignore", DeprecationWarning)  # Python's general warning about forking beside threads
_threads.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((3000, 200))
with polysoftmax.engine("blocks"):
    before = polysoftmax.softmax(x).tobytes()
    children = []
    for _ in range(3):
        _threads._pool.lock.acquire()  # as if another thread of the parent were starting a helper
        child = os.fork()
        if not child:
            _threads.set_num_threads(6)
            same = polysoftmax.softmax(x).tobytes() == before
            os._exit(0 if same and threading.active_count() > 1 else 1)
        _threads._pool.lock.release()
        children.append(child)
    assert polysoftmax.softmax(x).tobytes() == before
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    done = _python(code)
    assert done.stdout == "[0, 0, 0]\n", done.stderr


WITH_A_TEAM = """
import contextlib, os, threading, time, warnings
import numpy as np
import torch
import polysoftmax
from polysoftmax.engines import _threads, chosen
warnings.simplefilter("ignore", DeprecationWarning)  # Python's general warning about forking beside threads
torch.set_num_threads(3)
x = torch.randn(2000, 600, dtype=torch.float64)
_threads.set_num_threads(1)
with polysoftmax.engine("blocks"):
    alone = polysoftmax.softmax(x)
_threads.set_num_threads(3)

def works():
    with polysoftmax.engine("blocks"):
        return torch.equal(polysoftmax.softmax(x), alone) and bool(torch.mm(x.T, x).isfinite().all())
"""


def _with_a_team(code: str) -> str:
    pytest.importorskip("torch")
    return _python(WITH_A_TEAM + code).stdout


@pytest.fixture(scope="module")
def _openmp() -> None:
    if _with_a_team("print(works(), _threads._team is not None)") != "True True\n":
        pytest.skip("PyTorch brings no GNU OpenMP here")


@pytest.mark.usefixtures("_openmp")
def test_openmp_threads_do_the_work_beside_pytorch() -> None:
    code = """
seen = set()
def work(i):
    seen.add((threading.get_ident(), chosen()))
    time.sleep(0.002)
with polysoftmax.engine("blocks"):
    _threads.parallel(work, 40, 3)
print(len(seen), {engine for _, engine in seen}, _threads._pool.started, works())
_threads.parallel(work, 40, 2)
print(_threads._pool.started)
"""
    assert _with_a_team(code) == "3 {'blocks'} 0 True\n1\n"


@pytest.mark.usefixtures("_openmp")
@pytest.mark.parametrize("error", ["ArithmeticError", "KeyboardInterrupt"])
@pytest.mark.parametrize("thrower", ["caller", "helper"])
def test_an_error_leaves_the_team_whole(error: str, thrower: str) -> None:
    code = f"""
caller, done = threading.get_ident(), []
def work(i):
    time.sleep(0.01)
    if (threading.get_ident() == caller) == {thrower == "caller"}:
        raise {error}
    done.append(i)
try:
    _threads.parallel(work, 100, 3)
except {error}:
    print(len(done) < 10, works())
"""
    assert _with_a_team(code) == "True True\n"


@pytest.mark.usefixtures("_openmp")
def test_nested_calls_other_threads_and_children_beside_a_team() -> None:
    code = """
done = []
_threads.parallel(lambda i: _threads.parallel(lambda j: done.append((i, j)), 5, 3), 8, 3)
print(sorted(done) == [(i, j) for i in range(8) for j in range(5)])
others = [threading.Thread(target=lambda: print(works())) for _ in range(2)]
for other in others:
    other.start()
    other.join()
child = os.fork()
if not child:
    with polysoftmax.engine("blocks"):
        same = polysoftmax.softmax(x.numpy()).tobytes() == alone.numpy().tobytes()
    os._exit(0 if same and _threads._team is None else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), works())
"""
    assert _with_a_team(code) == "True\nTrue\nTrue\n0 True\n"


def test_calls_while_the_interpreter_shuts_down() -> None:
    code = """
import atexit
import numpy as np
import polysoftmax
from polysoftmax.engines._threads import set_num_threads
set_num_threads(3)
x = np.zeros((3000, 200))
with polysoftmax.engine("blocks"):
    atexit.register(lambda: print(polysoftmax.softmax(x)[0, 0]))
"""
    done = _python(code, POLYSOFTMAX_ENGINE="blocks")
    assert done.stdout == "0.005\n", done.stderr


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("shape", "axis", "rows"), [((7, 5, 3), 1, 4), ((40, 3), 0, 1), ((2, 3, 4, 5), 3, 7), ((9,), 0, 2)]
)
def test_pieces_cover_every_row_once(shape: tuple[int, ...], axis: int, rows: int, order: str) -> None:
    x = np.zeros(shape, order=order)  # type: ignore[call-overload]
    blocks = _blocks.pieces(x, axis, rows)
    for block in blocks:
        x[block] += 1
        part = x[block]
        assert part.shape[axis] == shape[axis]
        assert part.size <= rows * shape[axis]
    assert (x == 1).all()


def _several(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x + 1, np.argmax(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_formulas_with_several_answers_and_whole_numbers(threads: int) -> None:
    x = logits((30, 5, 8)).astype(np.float64)
    blocks = _blocks.pieces(x, 2, 7)
    assert len(blocks) > 5
    moved, where = _blocks.run_in_blocks(lambda operands: _several(*operands), (x,), 2, blocks, threads)
    np.testing.assert_array_equal(moved, x + 1)
    np.testing.assert_array_equal(where, np.argmax(x, axis=-1, keepdims=True))
    assert where.dtype == np.argmax(x).dtype
