"""Run the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine, peers, plots, run, table
from benchmarks.cases import OPS, available

BACKENDS = ("numpy", "torch", "jax")
WIDTH = 116
"""Columns that the tables need; a narrower terminal folds their lines."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; default all")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, under a minute")
    parser.add_argument(
        "--threads", type=int, default=machine.cpus(), help="of polysoftmax and torch (default: all CPUs)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain formula as one more peer")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/DATE-MACHINE)")
    return parser.parse_args(arguments)


def main() -> None:
    """Parse the options, run, show, and write JSON, Markdown and plots."""
    chosen = parse()
    backends = tuple(filter(peers.installed, chosen.backend or BACKENDS))
    if not backends:
        sys.exit(f"none of {', '.join(chosen.backend or BACKENDS)} is installed: install one, or choose another")
    options = run.Options(
        backends=backends,
        ops=available(tuple(chosen.op or OPS)),
        quick=chosen.quick,
        compiled=chosen.compile,
        memory=not chosen.no_memory,
        threads=chosen.threads,
    )
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    total = len(run.cases(options)) + len(run.memory_cases(options))
    columns = (
        TextColumn("{task.description:<60}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        result = run.run(options, lambda text: progress.update(task, description=text, advance=1))
    table.show(result, console)
    name = f"{result['date']}-{machine.short_name(result['machine'])}"
    out = chosen.out or Path(__file__).parent / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table.write(result, out / "table.md")
    plots.draw(result, out)
    console.print(f"\nresults.json, table.md and plots are in {out}", highlight=False)


if __name__ == "__main__":
    main()
