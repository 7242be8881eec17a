"""One run on a machine with a GPU: smoke cases, timings, compute-sanitizer, a piece of the matrix. See docs/gpu.md.

    python3 tools/gpu_session.py                     on the GPU: every stage; results.json after each, in .gpu/results
    python3 tools/gpu_session.py --stages smoke      one stage again, or some: --stages env,bench
    python3 tools/gpu_session.py --stages smoke --case NAME --seed N     one case again, on the same numbers
    python3 tools/gpu_session.py --prepare           anywhere: compile what the stages launch, into .gpu/cache
    python3 tools/gpu_session.py --dry               on a CPU: the smoke cases, formulas in place of kernels

It needs PyTorch for CUDA, NumPy, array-api-compat and cuda.core, and no installation, network or make. JAX, CuPy,
Liger, QuACK, pytest and compute-sanitizer are used where they are installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tools.gpu.session import main  # noqa: E402 - found by the line above, where nothing is installed

if __name__ == "__main__":
    sys.exit(main())
