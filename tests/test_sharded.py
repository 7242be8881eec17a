"""JAX over several devices: equal answers, and little that is sent between them.

The number of devices is fixed when JAX starts, so this file is also a program, which a process of its own runs.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quick_programs import FLAGS

DEVICES, ROWS, N = 4, 8, 4096

WORDS_A_ROW = {
    "softmax": 2,
    "logsumexp": 4,
    "cross_entropy": 6,
    "gradient": 8,
    "log_prob": 6,
    "head": 8,
    "sample": 256 + N // 256 + 24,
    "sample, top_p": 2 * 256 + 2 * N // 256 + 48,
}
"""What each function may send, at most; a draw needs the tokens of one block, and each token's filter a search."""

WIDE, ENOUGH = 65_536, 64 << 10
"""A vocabulary, and the bytes that `top_k=50` and `top_p` of 8 rows of it may send in all."""

CUT = 4000
"""A vocabulary of 63 blocks of 64 tokens, of which four devices cut the most."""

FUNCTIONS = (*WORDS_A_ROW, "sample, top_k", "sample, top_ks", "truncate, top_p", "top_log_probs")

MODES = {
    "explicit, vocabulary": ("Explicit", "vocabulary", FUNCTIONS),
    "explicit, rows": ("Explicit", "rows", ("gradient", "sample, top_ks", "hidden states", "gradient of a weight")),
    "automatic, vocabulary": ("Auto", "vocabulary", ("gradient", "sample, top_p", "head")),
    "automatic, rows": ("Auto", "rows", ("gradient", "truncate, top_p", "hidden states")),
    "shard_map, rows": (None, "rows", ("sample, top_p", "sample, top_ks")),
}
"""Axes of the mesh, what is spread over them, and functions: those whose words are special there."""


def functions() -> dict[str, Any]:
    import jax

    import polysoftmax as ps

    def loss(x: Any, i: Any) -> Any:
        return ps.cross_entropy(x, i, reduction="none")

    def small(x: Any, *shape: int) -> Any:
        """Hidden states or a head that are whole on each device."""
        values = np.random.default_rng(1).normal(size=shape, scale=0.1).astype(np.float32)
        return values if isinstance(x, np.ndarray) else jax.numpy.asarray(values)

    def head(hidden: Any, weight: Any, i: Any) -> Any:
        return ps.linear_cross_entropy(hidden, weight, i, reduction="none", chunk_size=ROWS // 2)

    return {
        "head": lambda x, i, k: head(small(x, ROWS, ROWS), x.T, i),
        "hidden states": lambda x, i, k: head(x, small(x, 16, N), i % 16),
        "gradient of a weight": lambda x, i, k: jax.grad(lambda w: head(x / 16, w, i % 16).sum())(small(x, 16, N)),
        "softmax": lambda x, i, k: ps.softmax(x),
        "logsumexp": lambda x, i, k: ps.logsumexp(x),
        "cross_entropy": lambda x, i, k: loss(x, i),
        "gradient": lambda x, i, k: jax.grad(lambda x: loss(x, i).sum())(x),
        "log_prob": lambda x, i, k: ps.log_prob(x, i),
        "sample": lambda x, i, k: ps.sample(x, k),
        "sample, top_p": lambda x, i, k: ps.sample(x, k, top_p=0.9),
        "sample, top_k": lambda x, i, k: ps.sample(x, k, top_k=40),
        "sample, top_ks": lambda x, i, k: ps.sample(x, k, top_k=i % 50),
        "truncate, top_p": lambda x, i, k: ps.truncate(x, top_p=0.9),
        "top_log_probs": lambda x, i, k: ps.top_log_probs(x, 3)[1],
    }


def filters_of_cut_blocks() -> dict[str, Any]:
    import polysoftmax as ps

    return {
        "sample": lambda x: ps.sample(x, 7),
        "top_k": lambda x: ps.sample(x, 7, top_k=5),
        "top_p": lambda x: ps.truncate(x, top_p=0.9),
    }


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def sent(program: str) -> dict[str, int]:
    """Return the bytes that the collectives of a compiled program answer, by kind."""
    found: dict[str, int] = {}
    for shapes, kind in COLLECTIVE.findall(program):
        for width, lengths in re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in lengths.split(",") if n)
            found[kind] = found.get(kind, 0) + size * max(1, int(width or 8) // 8)
    return found


def run() -> None:
    """Run every function in every mode, and write what was right and what was sent."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import polysoftmax as ps

    assert jax.device_count() == DEVICES
    source = np.random.default_rng(0)
    given = (
        (3 * source.normal(size=(ROWS, N))).astype(np.float32),
        source.integers(0, N, ROWS).astype(np.int32),
        np.asarray(ps.random.key(np.arange(ROWS))),
    )
    x, i, _ = given
    want = {"gradient": ps.softmax(x) - (np.arange(N) == i[:, None])}
    of_weight = "gradient of a weight"
    want[of_weight] = np.asarray(functions()[of_weight](*map(jax.numpy.asarray, given)))
    want |= {name: f(*given) for name, f in functions().items() if name not in want}
    report: dict[str, Any] = {}
    for mode, (axis_type, where, names) in MODES.items():
        mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType[axis_type or "Auto"],))
        whole, rows = PartitionSpec(), PartitionSpec("d")
        specs = (rows, rows, rows) if where == "rows" else (PartitionSpec(None, "d"), whole, whole)
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)]
        report[mode] = {}
        for name in names:
            f = functions()[name]
            program = jax.jit(f if axis_type else jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=rows))
            compiled = program.lower(*arrays).compile()
            y = np.asarray(compiled(*arrays))
            is_equal = np.array_equal if y.dtype.kind == "i" else lambda y, x: np.allclose(y, x, rtol=1e-5, atol=1e-5)
            loops, _, once = compiled.as_text().partition("\nENTRY ")
            report[mode][name] = {
                "equal": bool(is_equal(y, want[name])),
                "sent": sent(loops + once),
                "again": sent(loops),
            }
        if where == "vocabulary":
            wide = jax.ShapeDtypeStruct((ROWS, WIDE), np.float32, sharding=arrays[0].sharding)
            for name, filters in {"top_k": {"top_k": 50}, "top_p": {"top_p": 0.9}}.items():
                draw = jax.jit(functools.partial(ps.sample, **filters))
                report[mode][f"wide, {name}"] = {"sent": sent(draw.lower(wide, arrays[2]).compile().as_text())}
        if mode == "explicit, vocabulary":
            cut = given[0][:, :CUT]
            spread = jax.device_put(cut, arrays[0].sharding)
            for name, f in filters_of_cut_blocks().items():
                program = jax.jit(f).lower(spread).compile()
                equal = np.array_equal(program(spread), f(cut))
                report[f"cut, {name}"] = {"equal": equal, "sent": sent(program.as_text())}
            report["eager"] = bool((np.asarray(functions()["sample"](*arrays)) == want["sample"]).all())
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("jax")
    environment = {**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={DEVICES}"}
    command, root = [sys.executable, "-m", "tests.test_sharded"], Path(__file__).parents[1]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_one_device(report: dict[str, Any], mode: str) -> None:
    assert {name for name in MODES[mode][2] if not report[mode][name]["equal"]} == set()


def test_an_eager_draw_takes_arrays_with_explicit_axes(report: dict[str, Any]) -> None:
    assert report["eager"]


@pytest.mark.parametrize("mode", ["automatic, vocabulary", "explicit, vocabulary"])
def test_a_vocabulary_is_not_gathered(report: dict[str, Any], mode: str) -> None:
    for name in MODES[mode][2]:
        found = report[mode][name]["sent"]
        assert set(found) <= {"all-reduce", "all-gather"}, name
        assert found.get("all-gather", 0) <= ROWS * N * 4 / 8, name
        assert sum(found.values()) <= ROWS * 4 * WORDS_A_ROW.get(name, N // 2), (name, found)


@pytest.mark.parametrize("mode", ["automatic, vocabulary", "explicit, vocabulary"])
def test_filters_of_a_wide_vocabulary_send_little(report: dict[str, Any], mode: str) -> None:
    for name in ("wide, top_k", "wide, top_p"):
        assert sum(report[mode][name]["sent"].values()) <= ENOUGH, name


def test_blocks_that_devices_cut_are_not_gathered(report: dict[str, Any]) -> None:
    """JAX has no windows over an axis that is spread by explicit axes where their number is no multiple of these."""
    for name in filters_of_cut_blocks():
        found = report[f"cut, {name}"]
        assert found["equal"], name
        assert sum(found["sent"].values()) <= ROWS * CUT * 4 / 8, name


@pytest.mark.parametrize("mode", ["automatic, rows", "explicit, rows", "shard_map, rows"])
def test_rows_stay_where_they_are(report: dict[str, Any], mode: str) -> None:
    """Beside a word on whether any row is confident, and XLA's search for a few tokens, which it does not split."""
    for name in set(report[mode]) - {"gradient of a weight"}:
        found = report[mode][name]
        searches = name == "sample, top_ks" and mode != "shard_map, rows"
        assert sum(found["sent"].values()) <= (ROWS * N if searches else 8), name


def test_the_gradient_of_a_weight_is_sent_once_for_all_chunks(report: dict[str, Any]) -> None:
    """Where the axes of the mesh are explicit, so that it is known that rows are spread."""
    found = report["explicit, rows"]["gradient of a weight"]
    assert found["again"] == {}
    assert set(found["sent"]) == {"all-reduce"}
    assert found["sent"]["all-reduce"] == 16 * N * 4


if __name__ == "__main__":
    run()
