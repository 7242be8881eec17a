"""Compile the C++ library for aarch64, run it under qemu, and compare its bits with those of this machine.

    python tools/native_aarch64.py [--cases N] [--seed N]

On Debian or Ubuntu it needs: apt-get install g++-aarch64-linux-gnu qemu-user cmake ninja-build g++
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tools.native.driver import build, run  # noqa: E402 - found by the line above
from tools.native.problems import problems  # noqa: E402

PACKAGES = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "cmake": "cmake"}
CROSS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_BUILD_TYPE=Release"]
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1700, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    asked = parser.parse_args()
    if absent := [package for program, package in PACKAGES.items() if shutil.which(program) is None]:
        print(f"this needs: apt-get install {' '.join(absent)}", file=sys.stderr)
        return 2

    here = build(ROOT / "build" / "native", options=["-DCMAKE_BUILD_TYPE=Release"])
    there = build(ROOT / "build" / "aarch64", compiler="aarch64-linux-gnu-g++", options=CROSS)
    made = problems(asked.seed, range(asked.cases), most=20_000)
    ours = run([here], made, dict(os.environ))
    theirs = run([*EMULATOR, there], made, dict(os.environ))
    differ = [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    for i in differ[:20]:
        print(f"{i}: {made[i]}\n    {ours[i]}\n    {theirs[i]}")
    print(f"{len(made)} problems of seed {asked.seed}, {sum(len(one.hashes) for one in ours)} outputs: ", end="")
    print(f"{len(differ)} differ" if differ else "the same bits")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
