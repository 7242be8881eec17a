"""A piece of the test matrix on the device, in parallel where pytest-xdist is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

from tools.gpu.asked import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tools.gpu.asked import Asked

SECONDS = 120
FILES = ("gpu", "accuracy", "contract", "losses", "sampling", "truncation", "derivatives")
OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-m", "gpu", "--maxfail", "60", "-k", "not compute_sanitizer"),
    # Warnings of newer libraries than the project's own are no failures here; neither are doctests wanted.
    *("-o", "filterwarnings=ignore", "-o", "addopts=--import-mode=importlib"),
)


def names(asked: Asked) -> list[str]:
    return [] if asked.dry else ["pytest"]


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    def run(_: str) -> dict[str, Any]:
        if not importlib.util.find_spec("pytest"):
            print("pytest is not installed, so the test matrix does not run: pip install pytest hypothesis", flush=True)
            return {"ok": False, "error": "pytest is not installed"}
        report = asked.out / "tests.xml"
        many = ["-n", "12"] if importlib.util.find_spec("xdist") else []
        files = [f"tests/test_{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", *OPTIONS, *many, "--junitxml", str(report), *files]
        environment = {
            **os.environ,
            "POLYSOFTMAX_TEST_BACKENDS": "torch:cuda,cupy,jax:cuda",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        }
        with (asked.out / "tests.txt").open("w", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=SECONDS, check=False
                )
                code: int | str = done.returncode
            except subprocess.TimeoutExpired:
                code = f"not done in {SECONDS} s"
        print(*(asked.out / "tests.txt").read_text("utf-8", "replace").splitlines()[-25:], sep="\n", flush=True)
        return {"ok": code == 0, "code": code, **counts(report)}

    return run


def counts(report: Path) -> dict[str, Any]:
    """Return how many tests there were, and the names of those that failed, from pytest's own report."""
    if not report.exists():
        return {}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [one.get("name", "") for one in cases if one.find("failure") is not None or one.find("error") is not None]
    skipped = sum(one.find("skipped") is not None for one in cases)
    return {"tests": len(cases), "skipped": skipped, "failed": failed}


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for one in records for key, value in one.items() if key not in ("name", "ok")}


def lines(summary: dict[str, Any]) -> list[str]:
    if "tests" not in summary:
        return [str(summary.get("error") or summary.get("code") or "no tests ran")]
    return [f"{summary['tests']} tests, {summary['skipped']} skipped, {len(summary['failed'])} failed"]
