"""``python -m polysoftmax.engines.cuda``: compile kernels, without a GPU, and report what is wrong with them.

``--prepare`` compiles them into the cache, so that no program waits for the compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from polysoftmax.engines._library import num_threads
from polysoftmax.engines.cuda import _cache
from polysoftmax.engines.cuda._accesses import narrow_accesses
from polysoftmax.engines.cuda._compile import CLUSTERS_SINCE, compile_kernel, compiler, targets_present
from polysoftmax.engines.cuda._every import every_kernel, heaviest_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from polysoftmax.engines.cuda._plan import Kernel


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m polysoftmax.engines.cuda", description=__doc__)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        help="compute capabilities; 80, 90 and 100 if not given, and for --prepare those of the GPUs of this machine",
    )
    parser.add_argument("--match", default="", help="only kernels with this in their names")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only one kernel in N")
    parser.add_argument(
        "--heaviest", action="store_true", help="only the kernel that holds most, of each formula and dtype"
    )
    parser.add_argument(
        "--nvrtc", type=Path, metavar="FOLDER", help="the compiler that pip install --target FOLDER put there"
    )
    parser.add_argument("--list", action="store_true", help="print the names, how many there are, and compile nothing")
    parser.add_argument("--prepare", action="store_true", help="compile into the cache, where calls look")
    return parser


def _jobs(asked: argparse.Namespace, architectures: list[int]) -> list[tuple[Kernel, int]]:
    if asked.heaviest:
        found = heaviest_kernels()
    else:
        every = every_kernel()
        found = [(one, arch) for arch in architectures for one, old in every.items() if old or arch >= CLUSTERS_SINCE]
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


def _prepare(job: tuple[Kernel, int]) -> tuple[str, int, bool]:
    """Return the compiler, the bytes of a kernel's machine code, and whether it is in the cache now."""
    kernel, arch = job
    size = len(_cache.machine_code(kernel, arch))
    place = _cache.place_of(kernel, arch)
    return compiler(), size, place is not None and place.exists()


def _in_processes(work: Callable[..., Any], jobs: list[tuple[Kernel, int]], nvrtc: Path | None) -> Iterator[Any]:
    """Do the work on all CPUs, and count what is done."""
    # The processes of the pool could not say that there is none.
    prepare = (load_nvrtc, (nvrtc,)) if nvrtc and _libraries(nvrtc) else (None, ())
    with ProcessPoolExecutor(num_threads(), None, *prepare) as pool:
        for done, found in enumerate(pool.map(work, jobs, chunksize=4), 1):
            yield found
            print(f"\r{done} of {len(jobs)} compiled", end="", file=sys.stderr, flush=True)


def _check(jobs: list[tuple[Kernel, int]], nvrtc: Path | None) -> int:
    """Compile kernels, with a line for each that spills registers or has narrow accesses."""
    most, bad, compilers = 0, 0, set()
    for (kernel, arch), (by, registers, wrong) in zip(jobs, _in_processes(_compile, jobs, nvrtc), strict=True):
        compilers.add(by)
        most = max(most, registers)
        if wrong:
            bad += 1
            print(f"\rsm_{arch} {kernel.name}: {wrong}")
    counts = f"{len(jobs)} kernels compiled, up to {most} registers, {bad} with spills or narrow accesses"
    print(f"\r{', '.join(compilers)}: {counts}")
    return 1 if bad else 0


def _fill_cache(jobs: list[tuple[Kernel, int]], nvrtc: Path | None) -> int:
    """Compile kernels into the cache."""
    compilers, total, kept = set(), 0, 0
    for by, size, is_kept in _in_processes(_prepare, jobs, nvrtc):
        compilers.add(by)
        total += size
        kept += is_kept
    folder = _cache.cache_folder()
    print(f"\r{', '.join(compilers)}: {kept} of {len(jobs)} kernels in {folder}, {total / 2**20:.1f} MiB")
    return 0 if kept == len(jobs) else 1


def main() -> int:
    """Compile every kernel that was asked for."""
    asked = _parser().parse_args()
    architectures = asked.arch or (targets_present() if asked.prepare else [80, 90, 100])
    if not architectures:
        print("there is no GPU here to prepare for: name its compute capability, such as --arch 90", file=sys.stderr)
        return 2
    jobs = _jobs(asked, architectures)
    if asked.list:
        kernels = {kernel.name: kernel for kernel, _ in jobs}
        print("\n".join(sorted(kernels)))
        for formula, count in sorted(Counter(kernel.kind for kernel in kernels.values()).items()):
            print(f"{count:5} {formula}")
        print(f"{len(kernels):5} kernels")
        return 0
    return (_fill_cache if asked.prepare else _check)(jobs, asked.nvrtc)


if __name__ == "__main__":
    sys.exit(main())
