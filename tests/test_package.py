"""What the package exports, imports and ships."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import polysoftmax

SOURCE = Path(polysoftmax.__file__).parent
BACKENDS = ("numpy", "jax", "torch", "cupy", "dask", "scipy", "numba", "cuda")
MAY_NAME_A_BACKEND = {"__init__.py", "__main__.py", "_arrays.py"}
FORMULA_FILES = sorted(path for path in SOURCE.glob("*.py") if path.name not in MAY_NAME_A_BACKEND)


def test_all_is_complete_and_works() -> None:
    assert polysoftmax.__all__ == sorted(polysoftmax.__all__)
    public = {name for name, value in vars(polysoftmax).items() if not name.startswith("_") and callable(value)}
    assert public <= set(polysoftmax.__all__)
    for name in polysoftmax.__all__:
        assert getattr(polysoftmax, name) is not None


def test_version() -> None:
    assert polysoftmax.__version__ == importlib.metadata.version("polysoftmax")


def test_import_brings_no_backend_and_no_warning() -> None:
    code = f"import sys, polysoftmax; print([name for name in {BACKENDS} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_there_are_formula_files() -> None:
    assert {"_softmax.py", "_jacobian.py", "_losses.py", "_truncation.py", "_sampling.py", "random.py"} <= {
        path.name for path in FORMULA_FILES
    }


@pytest.mark.parametrize("path", FORMULA_FILES, ids=lambda path: path.name)
def test_no_formula_names_a_backend(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        words = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words = [*(one.name for one in node.names), getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            words = [] if " " in node.value else [node.value]  # messages may name the libraries of the reader
        found += [word for word in words if set(BACKENDS) & set(re.findall("[a-z0-9]+", word.lower()))]
    # The default library of a seed is the one exception.
    assert set(found) <= {"array_api_compat.numpy"}
