"""``python -m polysoftmax.engines.cuda``: compile kernels, without a GPU, and report what is wrong with them."""

from __future__ import annotations

import argparse
import ctypes
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from polysoftmax.engines._library import num_threads
from polysoftmax.engines.cuda._accesses import narrow_accesses
from polysoftmax.engines.cuda._compile import CLUSTERS_SINCE, compile_kernel, compiler
from polysoftmax.engines.cuda._every import every_kernel, heaviest_kernels

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m polysoftmax.engines.cuda", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--match", default="", help="only kernels with this in their names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only one kernel in N")
    parser.add_argument(
        "--heaviest", action="store_true", help="only the kernel that holds most, of each formula and dtype"
    )
    parser.add_argument(
        "--nvrtc", type=Path, metavar="FOLDER", help="the compiler that pip install --target FOLDER put there"
    )
    parser.add_argument("--list", action="store_true", help="print the names and compile nothing")
    return parser


def _jobs(asked: argparse.Namespace) -> list[tuple[Kernel, int]]:
    if asked.heaviest:
        found = heaviest_kernels()
    else:
        every = every_kernel()
        found = [(one, arch) for arch in asked.arch for one, old in every.items() if old or arch >= CLUSTERS_SINCE]
    return [job for job in found if asked.match in job[0].name][:: asked.every]


def load_nvrtc(folder: Path) -> None:
    """Load the NVRTC in a folder, which cuda.bindings then takes in place of the one that is installed."""
    for one in _libraries(folder):
        ctypes.CDLL(str(one))


def _libraries(folder: Path) -> list[Path]:
    # In the order of their names, the builtins come before the library that looks for them.
    found = sorted(one for one in folder.glob("nvidia/*/lib/libnvrtc*.so.*") if ".alt." not in one.name)
    if not found:
        msg = f"there is no NVRTC in {folder}: pip install --target {folder} nvidia-cuda-nvrtc"
        raise FileNotFoundError(msg)
    return found


def _compile(job: tuple[Kernel, int]) -> tuple[str, int, str]:
    """Return the compiler, the registers of a kernel, and what is wrong with it."""
    from cuda.core._utils.cuda_utils import NVRTCError  # which has no public name

    kernel, arch = job
    try:
        found = compile_kernel(kernel, arch)
    except NVRTCError as error:
        error.add_note(f"sm_{arch} {kernel.name}, by {compiler()}")
        raise
    wrong = narrow_accesses(kernel, found.ptx)
    if found.spilled:
        wrong.append(f"{found.spilled} bytes spilled")
    return compiler(), found.registers, ", ".join(wrong)


def main() -> int:
    """Compile every kernel that was asked for, with a line for each that spills registers or has narrow accesses."""
    asked = _parser().parse_args()
    jobs = _jobs(asked)
    # The processes of the pool could not say that there is none.
    prepare = (load_nvrtc, (asked.nvrtc,)) if asked.nvrtc and _libraries(asked.nvrtc) else (None, ())
    if asked.list:
        print("\n".join(sorted({kernel.name for kernel, _ in jobs})))
        return 0
    most, bad, compilers = 0, 0, set()
    with ProcessPoolExecutor(num_threads(), None, *prepare) as pool:
        found = pool.map(_compile, jobs, chunksize=4)
        for done, ((kernel, arch), (by, registers, wrong)) in enumerate(zip(jobs, found, strict=True), 1):
            compilers.add(by)
            most = max(most, registers)
            if wrong:
                bad += 1
                print(f"\rsm_{arch} {kernel.name}: {wrong}")
            print(f"\r{done} of {len(jobs)} compiled", end="", file=sys.stderr, flush=True)
    counts = f"{len(jobs)} kernels compiled, up to {most} registers, {bad} with spills or narrow accesses"
    print(f"\r{', '.join(compilers)}: {counts}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
