"""Turn the results of ``tools/gpu_session.py`` into a folder with JSON, a table and plots. It needs no GPU.

python -m tools.gpu_report RESULTS --into benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import short_name
from tools.gpu import pictures, tables
from tools.gpu.asked import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Write DATE-gpu-NAME/ with results.json, table.md and the plots."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_report", description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a run, or the folder that holds it")
    parser.add_argument("--into", type=Path, default=ROOT / "benchmarks" / "results", help="where the folder is made")
    asked = parser.parse_args(arguments)
    path = asked.results / "results.json" if asked.results.is_dir() else asked.results
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"there are no results to report on: {error}", file=sys.stderr)
        return 2
    out = asked.into / folder_name(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(tables.text(results), encoding="utf-8")
    drawn = pictures.draw(results, out)
    print(f"results.json, table.md{''.join(f', {name}' for name in drawn)} are in {out}")
    return 0


def folder_name(results: dict[str, Any]) -> str:
    """Return DATE-gpu-NAME, such as ``2026-11-26-gpu-nvidia-h100-80gb-hbm3``."""
    facts = results.get("machine") or {}
    name = short_name(facts) if facts else "unknown"
    return f"{results['date']}-{'dry' if results.get('dry') else 'gpu'}-{name}"


if __name__ == "__main__":
    sys.exit(main())
