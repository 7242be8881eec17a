"""What the package exports, imports and ships."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import polysoftmax

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(polysoftmax.__file__).parent
BACKENDS = ("numpy", "jax", "torch", "cupy", "dask", "scipy", "cuda")


def test_all_is_complete_and_works() -> None:
    assert polysoftmax.__all__ == sorted(polysoftmax.__all__)
    public = {name for name, value in vars(polysoftmax).items() if not name.startswith("_") and callable(value)}
    assert public <= set(polysoftmax.__all__)
    for name in polysoftmax.__all__:
        assert getattr(polysoftmax, name) is not None


PROBABILITIES = "x, /, *, axis=-1, temperature=1.0, where=None"
FILTERS = "axis=-1, temperature=1.0, top_k=None, top_p=None, min_p=None"
LOSS = "ignore_index=None, label_smoothing=0.0, class_weight=None, z_loss=0.0, chunk_size=None"
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
    "weight=None, z_loss=0.0, dtype=None",
    "entropy": f"{PROBABILITIES}, dtype=None",
    "kl_divergence": f"{PROBABILITIES.replace('x', 'logits_p, logits_q', 1)}, dtype=None",
    "linear_cross_entropy": f"hidden, weight, targets, /, *, bias=None, softcap=None, reduction='mean', {LOSS}",
    "linear_cross_entropy_value_and_grad": "hidden, weight, targets, /, *, bias=None, softcap=None, reduction='mean', "
    f"{LOSS}",
    "linear_log_prob": "hidden, weight, tokens, /, *, bias=None, softcap=None, "
    f"{FILTERS.removeprefix('axis=-1, ')}, where=None, chunk_size=None",
    "LinearGradients": "hidden, weight, bias",
    "truncate": f"logits, /, *, {FILTERS}",
    "sample": f"logits, key, /, *, {FILTERS}, where=None, draws=None, replace=True, return_logprobs=False",
    "log_prob": f"logits, tokens, /, *, {FILTERS}, where=None, return_rank=False",
    "top_log_probs": "logits, k, /, *, axis=-1, temperature=1.0, where=None",
    "speculate": "draft_tokens, target_logits, key, /, *, draft_logits=None, temperature=1.0, top_k=None, top_p=None, "
    "min_p=None, where=None",
    "partial": "x, /, *, axis=-1, temperature=1.0, where=None",
    "merge": "a, b, /",
    "merge_outputs": "a, b, /",
    "Partial": "maximum, count, rest, temperature=None",
    "gumbel_softmax": "logits, key, /, temperature=1.0, *, hard=False, axis=-1, where=None, dtype=None",
    "unpack_mask": "words, n, /",
    "random.key": "seed, *, xp=None, device=None",
    "random.split": "key, num=2",
    "random.fold_in": "key, data",
    "random.bits": "key, shape, *, xp=None, device=None",
    "random.uniform": "key, shape, *, xp=None, device=None",
    "random.gumbel": "key, shape, *, xp=None, device=None",
    "streaming.logsumexp": "chunks, /, *, axis=-1, temperature=1.0, progress=False",
    "streaming.log_prob": "chunks, tokens, /, *, axis=-1, temperature=1.0, progress=False",
    "streaming.cross_entropy": "chunks, targets, /, *, axis=-1, reduction='mean', ignore_index=None, z_loss=0.0, "
    "progress=False",
    "streaming.sample": "chunks, key, n, /, *, axis=-1, temperature=1.0, return_logprobs=False, progress=False",
    "streaming.softmax": "x, out, /, *, temperature=1.0, memory=67108864, progress=False",
    "engine": "name",
    "explain": "x, op",
    "set_num_threads": "n",
}


def test_every_function_has_a_signature_on_record() -> None:
    ours = {name for name in polysoftmax.__all__ if callable(getattr(polysoftmax, name))}
    assert ours == {name for name in SIGNATURES if "." not in name}


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


def test_the_conformance_kit_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, polysoftmax\n"
        "print('polysoftmax.testing' in sys.modules, 'testing' in dir(polysoftmax), 'softmax' in dir(polysoftmax))\n"
        "print(polysoftmax.testing.Backend.__name__, polysoftmax.testing is sys.modules['polysoftmax.testing'])\n"
        "from polysoftmax import testing\n"
    )
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "True", "True", "Backend", "True"]
    with pytest.raises(AttributeError, match="module 'polysoftmax' has no attribute 'softmin'"):
        polysoftmax.softmin  # noqa: B018


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()


FORMULA_FILES = ("_softmax", "_losses", "_truncation", "_sampling", "_threefry", "_ops", "_formula", "_rows")


@pytest.mark.parametrize("name", FORMULA_FILES)
def test_formulas_import_no_engine(name: str) -> None:
    """Nowhere, be it in a function or for the type checker alone."""
    source = (SOURCE / f"{name}.py").read_text(encoding="utf-8")
    nodes = [one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.Import | ast.ImportFrom)]
    assert nodes
    assert not [ast.unparse(one) for one in nodes if "engines" in ast.unparse(one)]


MODULES = {
    ".".join(("polysoftmax", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports when it is imported itself.

    A package that is named only for a module in it is none of these: it need not be complete.
    """
    found = set()
    for node in executed(ast.parse(path.read_text(encoding="utf-8")).body):
        names = [one.name for one in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports by relative names, which this does not follow"
            names = [name if (name := f"{node.module}.{one}") in MODULES else str(node.module) for one in names]
        found |= {one for one in names if one in MODULES}
    return found


def executed(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Return the imports that run with a module, and not in functions or for the type checker alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from executed(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from executed(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from executed(handler.body)


def test_imports_have_no_circle() -> None:
    left = {name: imports_of(path) for name, path in MODULES.items()}
    assert left["polysoftmax._softmax"] == {
        "polysoftmax._arrays",
        "polysoftmax._formula",
        "polysoftmax._ops",
    }  # they are found
    while ready := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in ready:
            del left[name]
    assert not left
