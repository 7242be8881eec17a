"""``python -m polysoftmax.engines.cuda``: compile every kernel, without a GPU, and report what the assembler says."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from polysoftmax.engines._threads import num_threads
from polysoftmax.engines.cuda._compile import CLUSTERS_SINCE, compile_kernel
from polysoftmax.engines.cuda._every import every_kernel

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel


def _compile(job: tuple[Kernel, int]) -> tuple[str, int, int, int]:
    kernel, arch = job
    compiled = compile_kernel(kernel, arch)
    return kernel.name, arch, compiled.registers, compiled.spilled


def main() -> int:
    """Compile every kernel that matches, one line for each that spills registers, and count them."""
    parser = argparse.ArgumentParser(prog="python -m polysoftmax.engines.cuda", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--match", default="", help="only kernels with this in their names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only one kernel in N")
    parser.add_argument("--list", action="store_true", help="print the names and compile nothing")
    asked = parser.parse_args()
    kernels = {kernel: old for kernel, old in every_kernel().items() if asked.match in kernel.name}
    jobs = [(kernel, arch) for arch in asked.arch for kernel, old in kernels.items() if old or arch >= CLUSTERS_SINCE][
        :: asked.every
    ]
    if asked.list:
        print("\n".join(sorted(kernel.name for kernel in kernels)))
        return 0
    spills, most = 0, 0
    with ProcessPoolExecutor(num_threads()) as pool:
        for done, (name, arch, registers, spilled) in enumerate(pool.map(_compile, jobs, chunksize=8), 1):
            most = max(most, registers)
            if spilled:
                spills += 1
                print(f"\rsm_{arch} {name}: {spilled} bytes spilled")
            print(f"\r{done} of {len(jobs)} compiled", end="", file=sys.stderr, flush=True)
    print(f"\r{len(jobs)} kernels compiled, up to {most} registers, {spills} with spills")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
