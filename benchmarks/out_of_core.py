"""Softmax, tokens and their log-probabilities for more logits than memory holds: by Dask, chunk by chunk, into Zarr.

Each size runs twice in fresh processes: on threads, and on a cluster of two worker processes of which one is killed
half-way. Peak memory is that of all processes together, looked up 50 times a second. Both runs have to leave the same
bytes behind, and the first chunk has to hold what NumPy answers.

It needs dask[distributed], zarr and psutil, and room on the disk for the softmax of the greatest size.

python -m benchmarks.out_of_core --gigabytes 0.1 1 5 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import psutil
import zarr

import polysoftmax as ps
from benchmarks import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PARALLEL = 2
"""Threads, or worker processes."""

SEED = 17
OPTIONS = {"temperature": 0.8, "top_p": 0.9}
PACKAGES = ("dask", "distributed", "zarr")


def logits_of(block_info: Any) -> np.ndarray:
    """Return a chunk of logits between -8 and 8, which follow from its place alone."""
    here = block_info[None]
    x = np.random.default_rng((SEED, here["chunk-location"][0])).random(here["chunk-shape"], np.float32)
    x -= 0.5
    x *= 16
    return x


def planned(rows: int, vocabulary: int, chunk: int, folder: Path) -> dict[str, Any]:
    """Return what is to be written, by name: nothing has been computed yet."""
    chunks = ((chunk,) * (rows // chunk) + ((rows % chunk,) if rows % chunk else ()), (vocabulary,))
    logits = da.map_blocks(logits_of, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    tokens = ps.sample(logits, SEED, **OPTIONS)
    answers = {"softmax": ps.softmax(logits), "tokens": tokens, "logprobs": ps.log_prob(logits, tokens, **OPTIONS)}
    return {  # random numbers do not compress
        name: da.to_zarr(y, folder, component=name, compute=False, compressors=None) for name, y in answers.items()
    }


def resident() -> int:
    """Return the resident bytes of this process and all that it started."""
    found = 0
    me = psutil.Process()
    for one in (me, *me.children(recursive=True)):
        try:
            found += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Measure time and peak memory of a ``with`` block."""
    found = {"idle_mb": resident() / 1e6, "peak_mb": 0.0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            found["peak_mb"] = max(found["peak_mb"], resident() / 1e6)

    watcher = threading.Thread(target=look)
    watcher.start()
    begun = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - begun
        done.set()
        watcher.join()


def on_threads(plans: list[Any], written: Callable[[], float]) -> dict[str, float]:
    del written
    with dask.config.set(scheduler="threads", num_workers=PARALLEL), watched() as found:
        dask.compute(*plans)
    return found


def on_a_cluster(plans: list[Any], written: Callable[[], float]) -> dict[str, float]:
    """Compute by worker processes, and kill one of them when half is written."""
    from distributed import Client, LocalCluster, wait

    size = {"n_workers": PARALLEL, "threads_per_worker": 1, "memory_limit": "1GB"}
    with LocalCluster(**size, dashboard_address=None) as cluster, Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
        with watched() as found:
            begun = client.compute(plans)
            while written() < 0.5:
                time.sleep(0.05)
            os.kill(pids[0], signal.SIGKILL)
            found["killed_at"] = written()
            wait(begun)
        client.gather(begun)  # raises what a task has raised
    return found


def measure(gigabytes: float, vocabulary: int, chunk: int, scratch: Path | None, *, cluster: bool) -> dict[str, Any]:
    """Write everything once, check it, and remove it again."""
    ps.set_num_threads(1)
    rows = max(1, round(gigabytes * 1e9 / 4 / vocabulary))
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        plans = planned(rows, vocabulary, chunk, folder)
        arrays = {one: zarr.open_array(folder / one, mode="r") for one in plans}
        chunks = arrays["tokens"].nchunks

        def written() -> float:
            return sum(1 for one in (folder / "tokens").rglob("*") if one.name.isdigit()) / chunks

        found: dict[str, Any] = (on_a_cluster if cluster else on_threads)(list(plans.values()), written)
        assert all(one.nchunks_initialized == one.nchunks for one in arrays.values()), "a chunk was lost"
        _compare_with_numpy(arrays, (min(rows, chunk), vocabulary))
        digests = {one: _digest(array) for one, array in arrays.items()}
    return {
        "way": "two processes, one killed" if cluster else "two threads",
        "gigabytes": rows * vocabulary * 4 / 1e9,
        "rows": rows,
        "chunks": chunks,
        **found,
        "seconds_per_gb": found["seconds"] / (rows * vocabulary * 4 / 1e9),
        "digests": digests,
    }


def _compare_with_numpy(arrays: dict[str, Any], shape: tuple[int, int]) -> None:
    first = slice(0, shape[0])
    x = logits_of({None: {"chunk-location": (0, 0), "chunk-shape": shape}})
    tokens, logprobs = ps.sample(x, SEED, return_logprobs=True, **OPTIONS)
    np.testing.assert_array_equal(arrays["tokens"][first], tokens)
    np.testing.assert_array_equal(arrays["logprobs"][first], logprobs)
    np.testing.assert_array_equal(arrays["softmax"][first], ps.softmax(x))


def _digest(array: Any) -> str:
    found, step = 0, array.chunks[0]
    for begin in range(0, array.shape[0], step):
        found = zlib.crc32(np.ascontiguousarray(array[begin : begin + step]), found)
    return f"{found:08x}"


def table(result: dict[str, Any]) -> str:
    """Return the results as a page of Markdown."""
    facts, options = result["machine"], result["options"]
    about = f"""{facts["cpu"]}, {facts["cpus"]} CPUs, {facts["memory_gib"]} GiB; {facts["system"]}; {result["date"]}

{", ".join(f"{name} {version}" for name, version in result["versions"].items())}

Logits are float32, uniform from -8 to 8, in rows of {options["vocabulary"]:,} and chunks of {options["chunk"]} rows.
Their softmax, tokens drawn with temperature {OPTIONS["temperature"]} and top_p {OPTIONS["top_p"]}, and the tokens'
log-probabilities are written to Zarr. GB are those of the logits; as many are written. Peak memory is that of all
processes together, scheduler and nannies included; idle is what they hold before the first chunk. Both ways wrote the
same bytes, and in the first chunk those that NumPy computes. Other programs ran on the machine, so that times are good
for comparisons within this table alone.

| GB | rows | way | peak MB | idle MB | s/GB |
|---|---|---|---|---|---|
"""
    rows = [
        f"| {one['gigabytes']:.3g} | {one['rows']:,} | {one['way']} | {one['peak_mb']:.0f} | {one['idle_mb']:.0f} "
        f"| {one['seconds_per_gb']:.1f} |"
        for one in result["cases"]
    ]
    return about + "\n".join([*rows, ""])


def main() -> None:
    """Run every size in both ways, show, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.out_of_core", description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0], help="of logits")
    parser.add_argument("--vocabulary", type=int, default=50257, help="entries of a row")
    parser.add_argument("--chunk", type=int, default=256, help="rows of a chunk")
    parser.add_argument("--scratch", type=Path, help="folder with room for the greatest size (default: the system's)")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/DATE-out-of-core)")
    asked = parser.parse_args()
    cases = []
    for gigabytes in asked.gigabytes:
        runs = []
        for cluster in (False, True):
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as fresh:
                task = fresh.submit(measure, gigabytes, asked.vocabulary, asked.chunk, asked.scratch, cluster=cluster)
                runs.append(task.result())
            print(json.dumps(runs[-1]), flush=True)
        assert runs[0]["digests"] == runs[1]["digests"], "the two ways wrote different bytes"
        cases += runs
    date = datetime.now(UTC).date().isoformat()
    result = {
        "date": date,
        "options": {"vocabulary": asked.vocabulary, "chunk": asked.chunk, **OPTIONS},
        "machine": machine.machine("cpu"),
        "versions": machine.versions(PACKAGES),
        "cases": cases,
    }
    out = asked.out or Path(__file__).parent / "results" / f"{date}-out-of-core"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
