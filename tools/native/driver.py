"""Build the library with a program that runs problems from a file, and read what the program says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.native.problems import Problem

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("driver.cpp")
NAME = "driver"


def build(folder: Path, *, compiler: str = "c++", flags: Sequence[str] = (), options: Sequence[str] = ()) -> Path:
    """Compile the library by CMake and link the program to it; return the program."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", *options]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *settings], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    program = folder / NAME
    linked = ["-o", program, SOURCE, f"-L{folder}", "-lpolysoftmax", "-Wl,-rpath,$ORIGIN", "-pthread"]
    subprocess.run([compiler, "-std=c++17", "-g", "-O1", *flags, *linked], check=True)
    return program


@dataclass
class Answer:
    """What came of a problem: ``status``, hashes of all rows and of the chosen one, by output, and complaints."""

    status: int
    hashes: list[tuple[str, str]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def run(command: Sequence[str | Path], problems: Sequence[Problem], environment: dict[str, str]) -> list[Answer]:
    """Run problems in one process, and those after a crash in another."""
    answers: list[Answer] = []
    while len(answers) < len(problems):
        with tempfile.NamedTemporaryFile(suffix=".problems") as file:
            for one in problems[len(answers) :]:
                file.write(one.file())
            file.flush()
            ran = subprocess.run([*command, file.name], env=environment, capture_output=True, text=True, check=False)
        found = _read(ran.stdout, ran.stderr)
        if len(answers) + len(found) < len(problems) and ran.returncode in (0, 3):
            msg = f"{command} stopped with {ran.returncode} after {len(found)} problems:\n{ran.stderr[-2000:]}"
            raise RuntimeError(msg)
        if ran.returncode and len(answers) + len(found) < len(problems):
            last = ran.stderr.rpartition(f"problem {len(found)}\n")[2]
            found.append(Answer(-1, complaints=[f"crashed ({ran.returncode}): {_summary(last)}"]))
        elif ran.returncode:  # at the end: a leak
            found[-1].complaints.append(_summary(ran.stderr))
        answers += found
    return answers


def _read(out: str, err: str) -> list[Answer]:
    answers = []
    for line in out.splitlines():
        if match := re.fullmatch(r"\d+ status (-?\d+)((?: \S+)*)", line):
            answer = Answer(int(match[1]))
            for word in match[2].split():
                if "/" in word:
                    answer.hashes.append((word.partition("/")[0], word.partition("/")[2]))
                else:
                    answer.complaints.append(word)
            answers.append(answer)
    number = -1
    for line in err.splitlines():
        if match := re.fullmatch(r"problem (\d+)", line):
            number = int(match[1])
        elif ("runtime error:" in line and number < len(answers)) or (
            line.startswith("SUMMARY: ThreadSanitizer") and number < len(answers)
        ):
            answers[number].complaints.append(line.replace(f"{ROOT}/", ""))
    return answers


def _summary(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "ERROR:" in line or "SUMMARY:" in line or " in " in line]
    return " | ".join(lines[:4]).replace(f"{ROOT}/", "") or text[-300:]
