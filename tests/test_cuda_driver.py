"""Launches through the real bindings, with a library in C for the driver: what it is given, word for word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from polysoftmax.engines import has_cuda_core

COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(not has_cuda_core(), reason="cuda.core is not installed"),
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler"),
]

DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

typedef struct { unsigned id; char pad[4]; unsigned value[16]; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count; } Config;

long current;
static int status;

void become(long context, int result) { current = context; status = result; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 9; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(0x1000L + device); return 0; }
int cuDevicePrimaryCtxRelease(int device) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)current; return 0; }
int cuCtxSetCurrent(void *context) { current = (long)context; return 0; }
int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    *library = (void *)0x77;
    return 0;
}
int cuLibraryUnload(void *library) { return 0; }
int cuLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = (void *)0x99; return 0; }
int cuGetErrorName(int error, const char **name) { *name = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "?"; return 0; }
int cuLaunchKernelEx(const Config *c, void *kernel, void **words, void **extra) {
    unsigned cluster = c->count ? c->attributes[0].value[0] : 0, id = c->count ? c->attributes[0].id : 0;
    printf("[%ld, %ld, %ld, [%u, %u, %u], [%u, %u, %u], %u, [%u, %u, %u], [%lld, %.17g, %lld], %d]\n", current,
           (long)kernel, (long)c->stream, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
           c->shared, c->count, id, cluster, *(long long *)words[0], *(double *)words[1], *(long long *)words[2],
           extra != 0);
    fflush(stdout);
    return status;
}
static int unsupported(void) { return 801; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *how) {
    *found = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
    if (!*found) *found = (void *)unsupported;
    if (how) *how = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

CALLS = """
import ctypes
from polysoftmax.engines.cuda import _cache, _launch
from polysoftmax.engines.cuda._plan import Kernel, Plan

driver = ctypes.CDLL("libcuda.so.1")
_cache.machine_code = lambda kernel, arch: bytes(64)
one = Kernel("probabilities", "float32", 4, 512, 512, 4)
four = Kernel("probabilities", "float32", 4, 512, 512, 4, cluster=True)
plans = (
    (Plan("softmax", one, 7, 2304, 256), 0),
    (Plan("softmax", one, 9, 64, 128), 1 << 40),
    (Plan("softmax", four, 5, 1024, 512, 4), 0),
    (Plan("softmax", four, 5, 1024, 256, 2), 0),
)
for context in (0, 0x1001, 0x5555):
    for plan, stream in plans:
        driver.become(ctypes.c_long(context), 0)
        _launch.launch(plan, 90, 1, stream, [(1 << 46) + context, 0.1, -3])
        assert ctypes.c_long.in_dll(driver, "current").value == context
driver.become(ctypes.c_long(0x5555), 719)
try:
    _launch.launch(plan, 90, 1, 0, [1, 0.1, -3])
except RuntimeError as error:
    print(error)
assert ctypes.c_long.in_dll(driver, "current").value == 0x5555
"""


def test_the_driver_is_given_what_the_plan_says(tmp_path):
    source = tmp_path / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run([COMPILER, source, *library, "-ldl"], check=True)
    found = subprocess.run(
        [sys.executable, "-c", CALLS],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    *launches, error = found.stdout.splitlines()
    assert error.startswith("the driver could not launch probabilities_float32_")
    assert error.endswith(": CUDA_ERROR_LAUNCH_FAILED")
    of_cluster = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    expected = [
        [0x1001, 0x99, stream, [grid, 1, 1], [block, 1, 1], shared, cluster, [(1 << 46) + context, 0.1, -3], 0]
        for context in (0, 0x1001, 0x5555)
        for grid, block, shared, stream, cluster in (
            (7, 256, 2304, 0, [0, 0, 0]),
            (9, 128, 64, 1 << 40, [0, 0, 0]),
            (20, 512, 1024, 0, [1, of_cluster, 4]),
            (10, 256, 1024, 0, [1, of_cluster, 2]),
        )
    ]
    assert list(map(json.loads, launches[:-1])) == expected
