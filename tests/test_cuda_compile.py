"""The CUDA kernels' machine code where there is no GPU: what each NVRTC makes of them, and the cache that keeps it."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from polysoftmax import engines
from polysoftmax.engines.cuda import _cache, _compile
from polysoftmax.engines.cuda._accesses import narrow_accesses
from polysoftmax.engines.cuda._every import heaviest_kernels
from polysoftmax.engines.cuda._plan import SIZES, Machine, plan_rows

needs_compiler = pytest.mark.skipif(not engines.has_cuda_core(), reason="cuda.core is not installed")

ROOT = Path(__file__).parent.parent
H100 = Machine(132, clusters=True)
OLDEST_NVRTC = os.environ.get("POLYSOFTMAX_TEST_NVRTC")
"""The folder that ``make test`` puts it into."""


def wide_kernel(formula="softmax", x="float32", y=None, n=4096):
    return plan_rows(formula, x, y or x, 8, n, aligned=True, general=False, machine=H100).kernel


KERNEL = wide_kernel()


def heaviest_of_each_size():
    """Return the heaviest kernels, those of 16 bits of one dtype or the other, in turn.

    They hold equally many entries, compute in float32, and differ in how one entry is widened and rounded. Those of
    float32 are left to the oldest NVRTC, where there is one, which takes them through the same checks below. In float64
    every other kind is compiled.
    POLYSOFTMAX_TEST_WORK=all compiles them all, and ``make test-kernels ARGS='--every 1'`` every kernel.
    """
    kernels = heaviest_kernels()
    if os.environ.get("POLYSOFTMAX_TEST_WORK") == "all":
        return kernels
    kinds = sorted({kernel.kind for kernel, _ in kernels})
    narrow = dict(zip(kinds, itertools.cycle(("bfloat16", "float16")), strict=False))
    wide = {"float64": set(kinds[::2]), "float32": set() if OLDEST_NVRTC else set(kinds)}
    return [job for job in kernels if job[0].x == narrow[job[0].kind] or job[0].kind in wide.get(job[0].x, ())]


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "arch"), [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in heaviest_of_each_size()]
)
def test_kernels_compile_stay_in_registers_and_access_memory_16_bytes_at_a_time(kernel, arch):
    compiled = _compile.compile_kernel(kernel, arch)
    assert compiled.code.startswith(b"\x7fELF")
    assert kernel.name.encode() in compiled.code
    assert compiled.spilled == 0
    assert 0 < compiled.registers * kernel.block <= 65536
    assert narrow_accesses(kernel, compiled.ptx) == []


@needs_compiler
@pytest.mark.parametrize("x", ["bfloat16", "float32"])
@pytest.mark.parametrize("formula", ["softmax", "log_softmax", "logsumexp", "cross_entropy"])
def test_a_row_stays_in_64_registers(formula, x):
    """So that two blocks of 512 threads fit a multiprocessor: spills double the time of a call."""
    y, n = "float32" if formula == "cross_entropy" else x, 65_536 // SIZES[x]
    kernel = plan_rows(formula, x, y, 2048, n, aligned=True, general=False, machine=H100).kernel
    compiled = _compile.compile_kernel(kernel, 90)
    assert (kernel.packs, kernel.resident * kernel.block, compiled.spilled) == (8, 1024, 0)


def test_the_heaviest_kernels_are_of_every_kind_and_dtype():
    kernels = [kernel for kernel, _ in heaviest_kernels()]
    assert {kernel.x for kernel in kernels} == set(SIZES)
    assert len({kernel.kind for kernel in kernels}) == 11
    draws = ("sample_draw", "sample_draw_leading")
    in_whole_accesses = [one for one in kernels if one.x != "float64" and one.kind not in draws]
    assert {kernel.width * SIZES[kernel.x] for kernel in in_whole_accesses} == {16}


@needs_compiler
@pytest.mark.parametrize(
    ("formula", "x", "y"),
    [
        ("softmax", "float16", "float16"),
        ("softmax", "bfloat16", "float32"),
        ("softmax", "float32", "float32"),
        ("log_softmax_vjp", "bfloat16", "bfloat16"),
    ],
)
def test_wide_accesses_are_wide(formula, x, y):
    """Without a mask, which the kernels above have."""
    kernel = wide_kernel(formula, x, y)
    assert kernel.width * SIZES[x] == 16
    assert narrow_accesses(kernel, _compile.compile_kernel(kernel, 90).ptx) == []


STORES = {
    "whole": ("st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};", 4, []),
    "halves": ("st.global.v2.f32 [%rd1], {%f1, %f2};", 8, ["0 × st of 16 bytes, and not 4", "8 × st of 8 bytes"]),
    "one less": ("st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};", 3, ["3 × st of 16 bytes, and not 4"]),
}


@pytest.mark.parametrize("name", STORES)
def test_narrow_accesses_are_found(name):
    store, times, expected = STORES[name]
    kernel = wide_kernel(n=8192)
    assert kernel.packs == 4
    loads = ["ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];"] * 4
    ptx = "\n\t".join([*loads, "ld.global.f32 %f1, [%rd1];", *[store] * times, "st.global.f32 [%rd1], %f1;"])
    assert sorted(narrow_accesses(kernel, ptx)) == expected
    assert sorted(narrow_accesses(kernel, ptx.replace("ld.global.v4.u32", "ld.global.nc.v4.f32"))) == expected
    ptx += "\n\tld.global.nc.L1::no_allocate.v2.u32 {%r1, %r2}, [%rd1];"
    assert "1 × ld of 8 bytes" in narrow_accesses(kernel, ptx)


@needs_compiler
def test_the_oldest_nvrtc_that_the_extra_admits_compiles_every_family():
    """In a process of its own, which loads it."""
    if not OLDEST_NVRTC:
        pytest.skip("POLYSOFTMAX_TEST_NVRTC names no folder with the oldest NVRTC, as make test has it")
    options = ["--heaviest", "--match", "_float32_", "--nvrtc", OLDEST_NVRTC]
    command = [sys.executable, "-m", "polysoftmax.engines.cuda", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (oldest,) = re.findall(r"nvidia-cuda-nvrtc>=(\d+\.\d+)", " ".join(project["optional-dependencies"]["cuda"]))
    assert f"NVRTC {oldest}: 11 kernels compiled" in found.stdout
    assert "0 with spills or narrow accesses" in found.stdout


@needs_compiler
def test_cuda_core_and_cupy_give_the_compiler_the_same_options(monkeypatch):
    from cuda import core

    given = []

    class Program:
        def __init__(self, source, kind, options):
            given.extend(one.decode() for one in options.as_bytes("nvrtc"))
            raise KeyboardInterrupt

    monkeypatch.setattr(core, "Program", Program)
    with pytest.raises(KeyboardInterrupt):
        _compile.compile_kernel(KERNEL, 90)
    assert set(_compile.OPTIONS) == set(given) - {"-arch=sm_90", "--ptxas-options=-v"}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that remembers for what it was called, and an empty cache."""
    called = []

    def compile_kernel(kernel, arch):
        called.append(arch)
        return _compile.Compiled(f"{kernel.name} {arch}".encode(), "", 32, 0)

    monkeypatch.setattr(_compile, "compile_kernel", compile_kernel)
    monkeypatch.setattr(_compile, "compiler", lambda: "NVRTC 13.0")
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    return SimpleNamespace(called=called, folder=tmp_path / "cache")


def code_of(arch):
    code = _cache.machine_code(KERNEL, arch)
    assert code == f"{KERNEL.name} {arch}".encode()


def test_machine_code_is_made_once_for_each_architecture_and_compiler(compiler, monkeypatch):
    for arch in (90, 90, 80, 90):
        code_of(arch)
    assert compiler.called == [90, 80]
    assert len(list(compiler.folder.iterdir())) == 2
    monkeypatch.setattr(_compile, "compiler", lambda: "NVRTC 13.1")
    code_of(90)
    monkeypatch.setattr(_compile, "OPTIONS", (*_compile.OPTIONS, "--fmad=false"))
    code_of(90)
    assert compiler.called == [90, 80, 90, 90]


DAMAGE = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "cut to less than a checksum": lambda content: content[-5:],
    "a bit changed": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "no checksum": lambda content: content[:-32],
    "something else": lambda content: b"\x7fELF" * 1000,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_compiled_anew_and_replaced(compiler, name):
    code_of(90)
    (path,) = compiler.folder.iterdir()
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    code_of(90)
    code_of(90)
    assert compiler.called == [90, 90]


def test_a_cache_that_cannot_be_used_costs_a_compilation(compiler, monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(in_the_way))
    code_of(90)
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(compiler.folder))
    code_of(90)
    (path,) = compiler.folder.iterdir()
    path.unlink()
    path.mkdir()
    code_of(90)
    code_of(90)
    assert compiler.called == [90] * 4
    assert list(compiler.folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_read_costs_a_compilation(compiler, monkeypatch):
    code_of(90)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", refuse)
        code_of(90)
    assert compiler.called == [90, 90]


def test_a_user_without_a_home_has_no_cache(compiler, monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("POLYSOFTMAX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    code_of(90)
    code_of(90)
    assert compiler.called == [90, 90]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failed_write_leaves_nothing_behind(compiler, monkeypatch, failing):
    write_bytes = Path.write_bytes

    def fail(path, content):
        if failing == "write_bytes":
            write_bytes(path, content[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(Path, failing, fail)
        code_of(90)
    assert list(compiler.folder.iterdir()) == []
    code_of(90)
    assert len(list(compiler.folder.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(compiler, umask, mode):
    before = os.umask(umask)
    try:
        code_of(90)
    finally:
        os.umask(before)
    (path,) = compiler.folder.iterdir()
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("arch", "clusters"), [(75, None), (80, False), (89, False), (90, True), (120, True)])
def test_what_a_compute_capability_can_do(arch, clusters):
    if clusters is None:
        with pytest.raises(ImportError, match=r"compute capability 7\.5, and the kernels need 8\.0"):
            _compile.machine_of(arch, 40, 99 << 10, clusters=True)
    else:
        assert _compile.machine_of(arch, 40, 99 << 10, clusters=True) == Machine(40, clusters, 99 << 10)
        assert not _compile.machine_of(arch, 40, 99 << 10, clusters=False).clusters


@pytest.fixture
def installed(monkeypatch):
    """NVRTC 13.0 and a driver for CUDA 13.1; a test changes what they are."""
    bindings = pytest.importorskip("cuda.bindings")
    pytest.importorskip("cuda.core")  # which asks its own questions of the real ones, when it is imported
    nvrtc = SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 0), nvrtcGetSupportedArchs=lambda: (0, [75, 80, 86, 87, 89, 90, 100, 120])
    )
    driver = SimpleNamespace(cuDriverGetVersion=lambda: (0, 13010))
    monkeypatch.setattr(bindings, "nvrtc", nvrtc, raising=False)
    monkeypatch.setattr(bindings, "driver", driver, raising=False)
    return SimpleNamespace(nvrtc=nvrtc, driver=driver)


@needs_compiler
@pytest.mark.parametrize(("arch", "target"), [(80, 80), (88, 87), (90, 90), (103, 100), (121, 120)])
def test_a_device_runs_the_machine_code_of_its_family(installed, arch, target):
    assert _compile.target_of(arch) == target


@needs_compiler
def test_why_nothing_can_be_compiled_for_a_device(installed, monkeypatch):
    for arch, shown in ((110, r"11\.0"), (150, r"15\.0")):
        with pytest.raises(ImportError, match=rf"NVRTC 13\.0 does not know compute capability {shown}: pip install -U"):
            _compile.target_of(arch)
    monkeypatch.setattr(installed.driver, "cuDriverGetVersion", lambda: (0, 12080))
    with pytest.raises(ImportError, match=r"needs a driver for CUDA 13, and this one is for CUDA 12\.8: update"):
        _compile.target_of(90)

    def absent():
        raise RuntimeError('Failure finding "libnvrtc.so.13": \nNo such file: libnvrtc.so.13')

    monkeypatch.setattr(installed.nvrtc, "nvrtcVersion", absent)
    with pytest.raises(ImportError, match=r'^Failure finding "libnvrtc\.so\.13": pip install .*nvidia-cuda-nvrtc'):
        _compile.target_of(90)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(ImportError, match=r"cuda\.core cannot be imported .*: pip install .*cuda-core"):
        _compile.target_of(90)
