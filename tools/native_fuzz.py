"""Run random problems through the C++ library, compiled with sanitizers (four minutes): make fuzz-native.

    python tools/native_fuzz.py                       2000 problems of seed 0, AddressSanitizer and UBSan
    python tools/native_fuzz.py --sanitizer thread    ThreadSanitizer, for the thread pool
    python tools/native_fuzz.py --only 17 --seed 3    one problem again, in full

Each problem is run three times: as it is, strided, broadcast, misaligned and on threads; with all operands contiguous
on one thread; and one row of it alone. The answers must have the same bits.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tools.native.driver import Answer, build, run  # noqa: E402 - found by the line above
from tools.native.problems import KERNELS, Problem, huge, malformed, problems  # noqa: E402

SANITIZERS = {"address": "address,undefined,float-cast-overflow", "thread": "thread", "none": ""}
CHUNK = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--sanitizer", choices=SANITIZERS, default="address")
    parser.add_argument("--only", type=int, metavar="N", help="the number of one problem")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=KERNELS, help="only these kernels")
    parser.add_argument("--huge", action="store_true", help="more than 2**31 entries, of one row broadcast: a minute")
    asked = parser.parse_args()

    name = SANITIZERS[asked.sanitizer]
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={name}"] if name else ["-O3", "-g"]
    program = build(ROOT / "build" / f"fuzz-{asked.sanitizer}", flags=flags, options=["-DCMAKE_BUILD_TYPE=None"])
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "exitcode=0"}

    numbers = range(asked.cases) if asked.only is None else [asked.only]
    numbers = [one for one in numbers if KERNELS[one % len(KERNELS)] in asked.kernel]
    count: collections.Counter[str] = collections.Counter()
    findings: dict[str, list[str]] = collections.defaultdict(list)
    for start in range(0, len(numbers), CHUNK):
        part = numbers[start : start + CHUNK]
        made = problems(asked.seed, part)
        for number, one, said in zip(part, made, judged(program, made, environment), strict=True):
            count[KERNELS[one.kernel]] += 1
            for complaint in said:
                findings[without_details(complaint)].append(f"{number}: {one}")
    others = huge() if asked.huge else malformed(asked.seed) if asked.only is None else []
    for one, answer in zip(others, run([program], others, environment), strict=True):
        count["huge" if asked.huge else "malformed"] += 1
        for complaint in complaints_of(one, answer):
            findings[complaint].append(str(one))
    return report(count, findings, asked)


def without_details(complaint: str) -> str:
    """Return what the reports of one mistake in the sources have in common."""
    place = re.search(r"\w+\.[hc]pp:\d+", complaint)
    what = re.search(r"runtime error: [a-z -]+|\w+Sanitizer: [\w -]+?(?= on | \()", complaint)
    return f"{place[0]}: {what[0]}" if place and what else complaint


def judged(program: Path, made: list[Problem], environment: dict[str, str]) -> list[list[str]]:
    """Run problems in three ways, and return the complaints about each."""
    said = []
    first = run([program], made, environment)
    second = run([program], [one.contiguous() for one in made], environment)
    lonely = [one.alone() for one in made if one.rows_are_alone]
    alone = iter(run([program], lonely, environment))
    for one, answer, plain in zip(made, first, second, strict=True):
        complaints = complaints_of(one, answer)
        complaints += [f"contiguous: {what}" for what in complaints_of(one, plain)]
        if answer.status == plain.status and answer.hashes != plain.hashes:
            complaints.append(f"{KERNELS[one.kernel]}: other bits where operands are contiguous")
        if one.rows_are_alone:
            single = next(alone)
            complaints += [f"one row alone: {what}" for what in complaints_of(one, single)]
            of_row = [row for _, row in plain.hashes]
            if single.status == plain.status and of_row != [all_rows for all_rows, _ in single.hashes]:
                complaints.append(f"{KERNELS[one.kernel]}: other bits for a row alone")
        said.append(complaints)
    return said


def complaints_of(one: Problem, answer: Answer) -> list[str]:
    wrong = [] if answer.status in (one.status, -1) else [f"status {answer.status}, expected {one.status}"]
    kernel = KERNELS[one.kernel] if one.status == 0 else "malformed"
    said = [what for what in answer.complaints if not (one.status and what.startswith("unwritten"))]
    return [f"{kernel}: {what}" for what in (*wrong, *said)]


def report(count: collections.Counter[str], findings: dict[str, list[str]], asked: argparse.Namespace) -> int:
    print(f"{sum(count.values())} problems of seed {asked.seed}, sanitizer {asked.sanitizer}: ", end="")
    print(", ".join(f"{name} {number}" for name, number in count.items()))
    for what, where in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(where)} times: {what}\n    first in {where[0]}")
    print(f"\n{len(findings)} kinds of findings" if findings else "nothing found")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
