"""A stage in a process of its own, which may crash or hang: what it had found is kept, and the next item tried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.gpu.worker import RESTART, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[[int], list[str]]

START_UP = 30.0
"""Seconds more before the first item: libraries may have to come from a cold disk."""

INTERVAL = 0.05
DONE, OUT_OF_TIME = "done", "out of time"


class Outcome(NamedTuple):
    """How a stage ended, and what it found for each item."""

    ended: str
    records: list[dict[str, Any]]


def supervise(command: Command, journal: Path, *, seconds: float, patience: float) -> Outcome:
    """Run ``command(number of items done)`` until all items are, or time is up.

    ``patience`` is how many seconds the process may write nothing to its journal before it counts as hung.
    """
    end = time.monotonic() + seconds
    journal.unlink(missing_ok=True)
    while True:
        before = len(read(journal)[0])
        ended = _attend(command(before), journal, end, patience)
        done, unfinished = read(journal)
        if unfinished and ended != OUT_OF_TIME:
            record = {"name": unfinished, "ok": False, "error": ended}
            write(journal, record)
            done.append(record)
            print(f"FAILED {unfinished}: {ended}", flush=True)
        # A process that came to no item would not do so the next time.
        if ended in (DONE, OUT_OF_TIME) or len(done) == before:
            return Outcome(ended, done)


def _attend(command: list[str], journal: Path, end: float, patience: float) -> str:
    """Run a process, and say how it ended; it is killed, with all that it started, when it is late."""
    # A group of its own, so that the processes it starts end with it.
    process = subprocess.Popen(command, start_new_session=True)
    heard, size = time.monotonic() + START_UP, _size(journal)
    try:
        while process.poll() is None:
            now, found = time.monotonic(), _size(journal)
            if found != size:
                heard, size = now, found
            if now > end:
                return OUT_OF_TIME
            if now > heard + patience:
                return f"hung: nothing happened for {patience:.0f} s"
            time.sleep(INTERVAL)
    finally:
        _end(process)
    return _in_words(process.returncode)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it has ended, and so has all that it started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _in_words(code: int) -> str:
    if code == 0:
        return DONE
    if code == RESTART:
        return "a new process is needed"
    return f"crashed: {signal.Signals(-code).name}" if code < 0 else f"crashed: exit status {code}"


def read(journal: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what was found so far, and the item that was begun and not finished, if there is one."""
    done, unfinished = [], ""
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    for one in text.splitlines():
        try:
            entry = json.loads(one)
        except ValueError:  # the process was ended in the middle of a line
            continue
        if entry.pop("begun", False):
            unfinished = entry["name"]
        else:
            done.append(entry)
            unfinished = ""
    return done, unfinished
