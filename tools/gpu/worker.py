"""The process of a stage: it runs the items one by one, and writes down each before and after."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from tools.gpu.asked import Asked

RESTART = 3
"""Exit status of a worker whose process is of no more use: the next item needs a new one."""


def work(stage: str, asked: Asked, skip: int) -> int:
    """Run the items of a stage after the first ``skip`` of them."""
    module: ModuleType = import_module(f"tools.gpu.{stage}")
    chosen = module.names(asked)[skip:]
    run = module.start(asked)
    for name in chosen:
        write(journal_of(asked, stage), {"name": name, "begun": True})
        found = run(name)
        restart = found.pop("restart", False)
        write(journal_of(asked, stage), {"name": name, **found})
        if restart:
            return RESTART
    return 0


def journal_of(asked: Asked, stage: str) -> Path:
    return asked.out / f"{stage}.jsonl"


def write(journal: Path, entry: dict[str, Any]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        # A line of its own also after one that a killed process has left unfinished.
        file.write("\n" + json.dumps(entry, default=str))


def in_brief(error: BaseException) -> str:
    """Return an error as one line for the results."""
    return without_folders(f"{type(error).__name__}: {error}")


def without_folders(text: str) -> str:
    """Return a text as one line without the folders of its paths: results leave the machine."""
    return " ".join(re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", "", text).split())[:300]


class NewKernels:
    """Counts the kernels that this process has compiled, because no file in the cache was theirs."""

    def __init__(self) -> None:
        from polysoftmax.engines.cuda import _compile

        self.count = 0
        compile_kernel = _compile.compile_kernel

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return compile_kernel(*arguments, **options)

        _compile.compile_kernel = counted

    def since_last(self) -> dict[str, int]:
        """Return the count since this was last asked, and nothing where it is 0."""
        count, self.count = self.count, 0
        return {"new": count} if count else {}


@cache
def new_kernels() -> NewKernels:
    """Return the one count of this process."""
    return NewKernels()
