"""The C++ library: found, chosen, the same on every CPU; and how it is built, installed and packed."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]

needs_library = pytest.mark.skipif(_library.load() is None, reason=_library.reason())


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


SHOW = "from polysoftmax.engines import _library; library = _library.load(); print(library and library.level)"


def test_there_is_a_library_where_there_is_a_compiler() -> None:
    if os.environ.get("POLYSOFTMAX_NATIVE") != "required":
        pytest.skip("set by make where there is a compiler")
    assert _library.load() is not None, _library.reason()


@needs_library
def test_load_returns_the_same_library() -> None:
    library = _library.load()
    assert library is _library.load()
    assert library is not None
    assert library.level in _library.LEVELS
    assert _library.reason() == ""


@needs_library
def test_threads() -> None:
    before = _library._asked
    try:
        _library.set_num_threads(3)
        library = _library.load()
        assert library is not None
        assert library.num_threads == _library.num_threads() == 3
    finally:
        _library._asked = before
        _library.load().set_num_threads(_library.num_threads())  # type: ignore[union-attr]


@needs_library
def test_a_malformed_problem_is_an_internal_error() -> None:
    no_such_kernel = struct.pack("13q", 1000, *[0] * 12)
    with pytest.raises(RuntimeError, match="internal error"):
        _library.load().run(no_such_kernel, b"")  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which the loader looks, and finds a file that is no library."""
    file = tmp_path / "libpolysoftmax.so"
    file.touch()
    os.utime(file, (1, 1))
    monkeypatch.setattr(_library, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(_library, "_FILE", str(file))
    monkeypatch.setattr(_library, "_found", None)
    monkeypatch.setattr(_library, "_reason", None)
    return tmp_path


def test_a_broken_library_is_an_error(folder: Path) -> None:
    with pytest.raises(OSError, match=str(folder)):
        _library.load()


def test_without_a_file_the_reason_says_what_to_do(folder: Path) -> None:
    (folder / "libpolysoftmax.so").unlink()
    assert "no C++ compiler" in _library._why_absent()
    (folder / "kernels.cpp").touch()
    assert "pip install -e ." in _library.reason()
    assert _library.load() is None


def test_a_library_older_than_its_sources_is_rebuilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "arithmetic.hpp").touch()
    assert not _library._is_stale()  # as in a wheel, which has no sources
    (folder / "kernels.cpp").touch()
    assert _library._is_stale()

    loader = SimpleNamespace(rebuild=lambda: None)
    monkeypatch.setattr(sys.modules["polysoftmax"], "__loader__", loader)
    _library._rebuild()
    assert not _library._is_stale()

    loader.rebuild = lambda: subprocess.run([sys.executable, "-c", "exit(1)"], check=True)
    with pytest.warns(RuntimeWarning, match=r"older than its sources.*pip install -e \."):
        _library._rebuild()


def test_importing_the_package_loads_no_library() -> None:
    shown = python(
        "import polysoftmax, polysoftmax.engines._library as library;"
        "print(library._reason, any('libpolysoftmax' in line for line in open('/proc/self/maps')))"
        if sys.platform == "linux"
        else "import polysoftmax.engines._library as library; print(library._reason, False)"
    )
    assert shown.stdout.split() == ["None", "False"]


def test_cpu_none_means_formulas() -> None:
    shown = python(f"{SHOW}; print(_library.reason())", POLYSOFTMAX_CPU="none")
    assert shown.stdout.splitlines() == ["None", "POLYSOFTMAX_CPU is 'none'"]


def test_an_unknown_cpu_is_an_error() -> None:
    shown = python(SHOW, POLYSOFTMAX_CPU="x86-64-v5")
    assert (
        "ValueError: POLYSOFTMAX_CPU must be one of x86-64-v3, x86-64-v4, aarch64, none, got 'x86-64-v5'"
        in shown.stderr
    )


def levels() -> Iterator[str]:
    """Yield the levels that this CPU can run."""
    for level in _library.LEVELS:
        if python(SHOW, POLYSOFTMAX_CPU=level).stdout.strip() == level:
            yield level


@needs_library
def test_a_level_that_the_cpu_cannot_run_is_an_error() -> None:
    others = set(_library.LEVELS) - set(levels())
    assert others
    for level in others:
        assert (
            f"ValueError: POLYSOFTMAX_CPU is '{level}', which this CPU cannot run"
            in python(SHOW, POLYSOFTMAX_CPU=level).stderr
        )


@needs_library
def test_levels_give_the_same_bits() -> None:
    able = list(levels())
    if len(able) < 2:
        pytest.skip(f"this CPU can run {able[0]} alone")
    code = (
        "from polysoftmax.engines import _library; from tools.native.problems import problems;"
        "library = _library.load();"
        "print(library.level, *(one.run(library) for one in problems(1, range(340), most=5000)))"
    )
    level, *first = python(code, POLYSOFTMAX_CPU=able[0], PYTHONPATH=str(ROOT)).stdout.split()
    for other in able[1:]:
        name, *bits = python(code, POLYSOFTMAX_CPU=other, PYTHONPATH=str(ROOT)).stdout.split()
        assert (level, name) == (able[0], other)
        assert bits == first


def pip(*arguments: object, **environment: str) -> str:
    """Call pip on this tree, and return all that it says."""
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "-v", "--disable-pip-version-check", *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "POLYSOFTMAX_NATIVE"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.build
def test_without_a_compiler_the_formulas_are_installed(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in filter(shutil.which, ("cmake", "ninja", "make")):
        (programs / name).symlink_to(shutil.which(name))  # type: ignore[arg-type]
    site = tmp_path / "site"
    nowhere = str(tmp_path / "no-compiler")
    said = pip("install", "--no-deps", "--target", site, ".", PATH=str(programs), CC=nowhere, CXX=nowhere)
    told = [line.strip() for line in said.splitlines() if "without its C++ library" in line]
    assert told == [
        "polysoftmax is installed without its C++ library, for want of a compiler: it works, but more slowly."
    ]

    # Without the site module, whose editable installation of this tree would be found first.
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}, {sysconfig.get_path('purelib')!r}];"
        "import numpy, polysoftmax; from polysoftmax.engines import _library;"
        "print(polysoftmax.__file__); print(polysoftmax.softmax(numpy.zeros(4)).tolist());"
        "print(_library.load()); print(_library.reason())"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout.splitlines() == [
        str(site / "polysoftmax" / "__init__.py"),
        "[0.25, 0.25, 0.25, 0.25]",
        "None",
        "there was no C++ compiler that could build the library when polysoftmax was installed",
    ]


@pytest.mark.build
@needs_library
def test_the_source_distribution_builds_a_wheel_for_every_python(tmp_path: Path) -> None:
    build = "from scikit_build_core.build import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    ran = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    archive = tmp_path / ran.stdout.splitlines()[-1]
    # Without a build type nothing is optimized, in a fifth of the time: the kernels that run are those of this tree.
    built = {"POLYSOFTMAX_NATIVE": "required", "SKBUILD_CMAKE_BUILD_TYPE": "None"}
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path, archive, **built)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"polysoftmax-[\d.]+-py3-none-\w+\.whl", wheel.name)
    assert not wheel.name.endswith("-any.whl")
    assert wheel.stat().st_size < 2_000_000
    shipped = zipfile.ZipFile(wheel).namelist()
    native = ("libpolysoftmax.so", "arithmetic.hpp", "cuda/rows.cuh")
    assert {"polysoftmax/py.typed", *(f"polysoftmax/native/{name}" for name in native)} <= {*shipped}
    assert not [name for name in shipped if name.endswith(".cpp")]
