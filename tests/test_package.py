"""What the package exports, imports and ships."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
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


PROBABILITIES = "x, /, *, axis=-1, temperature=1.0, where=None"
FILTERS = "axis=-1, temperature=1.0, top_k=None, top_p=None, min_p=None"
SIGNATURES = {
    "softmax": f"{PROBABILITIES}, dtype=None",
    "log_softmax": f"{PROBABILITIES}, dtype=None",
    "logsumexp": "x, /, *, axis=-1, keepdims=False, weights=None, where=None, dtype=None",
    "softmax_jacobian": "x, /, *, axis=-1, temperature=1.0",
    "log_softmax_jacobian": "x, /, *, axis=-1, temperature=1.0",
    "softmax_jvp": PROBABILITIES.replace("x", "x, tangent", 1),
    "softmax_vjp": PROBABILITIES.replace("x", "x, cotangent", 1),
    "log_softmax_jvp": PROBABILITIES.replace("x", "x, tangent", 1),
    "log_softmax_vjp": PROBABILITIES.replace("x", "x, cotangent", 1),
    "cross_entropy": "logits, targets, /, *, axis=-1, reduction='mean', ignore_index=None, label_smoothing=0.0, "
    "weight=None, z_loss=0.0",
    "entropy": PROBABILITIES,
    "kl_divergence": PROBABILITIES.replace("x", "logits_p, logits_q", 1),
    "truncate": f"logits, /, *, {FILTERS}",
    "sample": f"logits, key, /, *, {FILTERS}, where=None, return_logprobs=False",
    "random.key": "seed, *, xp=None, device=None",
    "random.split": "key, num=2",
    "random.fold_in": "key, data",
    "random.bits": "key, shape, *, xp=None, device=None",
    "random.uniform": "key, shape, *, xp=None, device=None",
    "random.gumbel": "key, shape, *, xp=None, device=None",
    "engine": "name",
    "explain": "x, op",
    "set_num_threads": "n",
}


def test_every_function_has_a_signature_on_record() -> None:
    ours = {name for name in polysoftmax.__all__ if callable(getattr(polysoftmax, name))}
    assert ours == {name for name in SIGNATURES if not name.startswith("random.")}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name: str) -> None:
    signature = inspect.signature(functools.reduce(getattr, name.split("."), polysoftmax))
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


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
