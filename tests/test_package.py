"""What the package exports, imports and ships."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import polysoftmax

SOURCE = Path(polysoftmax.__file__).parent
BACKENDS = ("numpy", "jax", "torch", "cupy", "dask", "scipy", "numba", "cuda")


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


FORMULA_FILES = ("_softmax", "_losses", "_truncation", "_sampling", "_threefry", "_ops", "_formula", "_rows")


@pytest.mark.parametrize("name", FORMULA_FILES)
def test_formulas_import_no_engine(name: str) -> None:
    assert not [one for one in imports_of(SOURCE / f"{name}.py") if one.startswith("polysoftmax.engines")]


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polysoftmax"):
            found |= {f"{node.module}.{one.name}" for one in node.names} | {str(node.module)}
    return found


def test_imports_have_no_circle() -> None:
    modules = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(("polysoftmax", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        modules[name] = imports_of(path)
    left = {name: {one for one in imports if one in modules} - {name} for name, imports in modules.items()}
    left.pop("polysoftmax")  # its files say where they stand by its name
    while ready := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in ready:
            del left[name]
    # Engines ask their package what was chosen: it imports none of them before it is asked for one.
    assert not {name for name in left if not name.startswith("polysoftmax.engines")}
