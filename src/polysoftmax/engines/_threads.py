"""Helper threads for work that releases the interpreter lock: a pool of our own, or PyTorch's OpenMP threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_VARIABLE = "POLYSOFTMAX_NUM_THREADS"


def _checked(n: object, name: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        msg = f"{name} must be an int, got {type(n).__name__}"
        raise TypeError(msg)
    if n < 1:
        msg = f"{name} must be 1 or greater, got {n}"
        raise ValueError(msg)
    return n


def _from_environment() -> int | None:
    value = os.environ.get(_VARIABLE)
    if not value:
        return None
    try:
        return _checked(int(value), _VARIABLE)
    except ValueError as error:
        msg = f"{_VARIABLE} must be a whole number of threads, 1 or greater, got {value!r}"
        raise ValueError(msg) from error


_asked: int | None = _from_environment()


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use on the CPU, the caller's own included.

    Parameters
    ----------
    n : int
        Number of threads, 1 or greater, for every later call of this process. Before the first call of this
        function it is the environment variable ``POLYSOFTMAX_NUM_THREADS``, or else the number of CPUs that the
        process may run on.

    Raises
    ------
    TypeError
        If ``n`` is not an int.
    ValueError
        If ``n`` is less than 1.

    Notes
    -----
    Answers do not depend on the number of threads, to the last bit. JAX has threads of its own, which this does not
    reach. Where Numba is installed, helper threads keep their CPUs busy for a tenth of a millisecond after a call, in
    case another follows.

    Examples
    --------
    >>> import polysoftmax
    >>> polysoftmax.set_num_threads(2)
    """
    global _asked
    _asked = _checked(n, "n")


def num_threads() -> int:
    """Return how many threads a call may use."""
    if _asked is not None:
        return _asked
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _no_cpu() -> int:
    return -1


_cpu: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu if sys.platform == "linux" else _no_cpu
"""Return the CPU that the calling thread runs on; -1 where the system does not tell."""


class _Job:
    """Numbered pieces of work that the caller and whichever helpers are idle take one by one."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        self.work = work
        self.count = count
        self.taken = 0
        self.spin = _spin
        self.busy = [0] if _spin is None else _spin.number()
        self.sleeps = False
        self.error: BaseException | None = None
        self.changed = threading.Condition(threading.Lock())

    def take_all(self) -> None:
        """Work until nothing is left to take."""
        while True:
            with self.changed:
                if self.taken >= self.count:
                    return
                piece = self.taken
                self.taken += 1
            self.work(piece)

    def assist(self) -> None:
        """Work as a helper does, who leaves errors to the caller."""
        try:
            self.take_all()
        except BaseException as error:  # raised again in the caller's thread
            self.error = error
            self.cancel()

    def help(self) -> None:
        """Assist a caller who waits until nobody is busy."""
        with self.changed:
            if self.taken >= self.count:
                return
            self.busy[0] += 1
        self.assist()
        if self.spin is not None:
            self.spin.leave(self.busy, _posted, waits=not self.sleeps)
        with self.changed:
            if self.spin is None:
                self.busy[0] -= 1
            self.changed.notify()

    def cancel(self) -> None:
        with self.changed:
            self.taken = self.count

    def wait(self) -> None:
        if self.spin is not None and self.spin.wait(self.busy):
            return
        with self.changed:
            self.sleeps = True
            while self.busy[0]:
                self.changed.wait()


_FEW = 7
"""Helpers up to which they are kept off the caller's CPU: where there are many, the system finds idle ones."""


class _Pool:
    """Helper threads that start when first needed and live as long as the process."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.started = 0
        self.lock = threading.Lock()
        self.threads: list[int] = []
        self.callers_cpu = -1

    def run(self, job: _Job, helpers: int) -> None:
        if self.started < helpers:
            with self.lock:
                while self.started < helpers and self._start():
                    self.started += 1
        if (cpu := _cpu()) != self.callers_cpu and self.started <= _FEW:
            self._keep_off(cpu)
        try:
            if job.spin is not None:
                _posted[0] += 1
            for _ in range(helpers):
                # A context of its own for each: the engine chosen, and NumPy's errstate.
                self.queue.put(partial(copy_context().run, job.help))
            job.take_all()
        finally:
            job.cancel()
            job.wait()

    def _start(self) -> bool:
        # Daemons: a call made while the interpreter shuts down must find them alive, or else do without.
        thread = threading.Thread(target=self._serve, name="polysoftmax", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had, now or at all: the caller does the work itself
            return False
        return True

    def _keep_off(self, cpu: int) -> None:
        """Keep the helpers off the caller's CPU, where Linux wakes them when all CPUs have been busy of late."""
        others = os.sched_getaffinity(0) - {cpu}
        if others:
            for thread in self.threads:
                with suppress(OSError):  # where a sandbox forbids it they stay where they are
                    os.sched_setaffinity(thread, others)
            self.callers_cpu = cpu

    def _serve(self) -> None:
        self.threads.append(threading.get_native_id())
        self.callers_cpu = -1
        while True:
            self.queue.get()()


class _Team:
    """The OpenMP threads of another library as helpers.

    For some milliseconds after their work they wait in a loop for more, and a thread of our own would have to share
    its CPU with one of them. The caller enters and leaves the team as compiled code does; in between it is in Python as
    ever, and can be interrupted.
    """

    _entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def __init__(self, library: ctypes.CDLL, size: Callable[[], int]) -> None:
        self.start, self.end = library.GOMP_parallel_start, library.GOMP_parallel_end
        self.start.argtypes, self.start.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint), None
        self.end.argtypes, self.end.restype = (), None
        self.size = size
        self.leader = threading.main_thread().ident

    def fits(self, threads: int) -> bool:
        """Whether the calling thread leads a team of so many: another thread or number would start threads anew."""
        return self.size() == threads and threading.get_ident() == self.leader

    def run(self, job: _Job, helpers: int) -> None:
        contexts = [copy_context() for _ in range(helpers)]
        entry = self._entry(lambda _: contexts.pop().run(job.assist))
        try:
            if job.spin is None:
                self.start(entry, None, helpers + 1)
            else:
                late_entry = job.spin.late_entry(ctypes.c_void_p.from_buffer(entry).value)
                self.start(job.spin.ENTER_LATE, late_entry.ctypes.data, helpers + 1)
            job.take_all()
        finally:
            try:
                job.cancel()
            finally:
                self.end()


_pool = _Pool()
_team: _Team | None = None
_spin: ModuleType | None = None
_posted: Any = None


def wait_in_loops(spin: ModuleType) -> None:
    """Let threads wait for each other in the loops of ``_spin``, for a tenth of a millisecond, before they sleep."""
    global _spin, _posted
    _posted = spin.number()
    _spin = spin


def borrow(library: ctypes.CDLL, size: Callable[[], int]) -> None:
    """Take helpers from a GNU OpenMP library, whose teams another library keeps at ``size()`` threads."""
    global _team
    _team = _Team(library, size)


def _forget() -> None:
    """Start afresh in a forked child, where the helpers do not exist and locks may be held for ever."""
    global _pool, _team
    _pool, _team = _Pool(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def parallel(work: Callable[[int], None], count: int, threads: int) -> None:
    """Call ``work(0)`` … ``work(count - 1)`` on at most ``threads`` threads, the caller's among them.

    The caller never waits for a helper that has not begun, so calls from within ``work``, or from more threads than
    there are helpers, cannot lock up. After an error or an interrupt no new piece is begun, and the pieces that run
    are waited for: nobody writes into an array that the caller has been given back.
    """
    if min(threads, count) < 2:
        for piece in range(count):
            work(piece)
        return
    job = _Job(work, count)
    try:
        if _team is not None and _team.fits(threads):
            _team.run(job, threads - 1)
        else:
            _pool.run(job, min(threads, count) - 1)
    finally:
        del job.work  # it holds arrays, and a helper who waits for another job holds this one
    if job.error is not None:
        raise job.error
