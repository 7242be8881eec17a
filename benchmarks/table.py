"""Results as tables to read: in the terminal, and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

MARKS = {"met": "✓", "near": "≈", "missed": "✗"}
STYLES = {"met": "green", "near": "yellow", "missed": "bold red"}
TEXT_COLUMNS = {"library", "input", "peer", "target", "call"}
LEGEND = (
    "Medians of interleaved rounds; ratio is peer / ours, and in brackets the quartiles of the rounds' ratios. GB/s "
    "counts every input and result once; “of copy” is that against a copy of the same bytes. ✓ target met, "
    "≈ missed within the quartiles, ✗ missed."
)


def show(result: dict[str, Any], console: Console, *, markdown: bool = False) -> None:
    """Print facts, a table for each operation, memory, and what missed its target."""
    console.print("\n\n".join(_facts(result)), highlight=False, markup=False)
    for op in dict.fromkeys(case["op"] for case in result["cases"]):
        _heading(console, op, markdown=markdown)
        console.print(_times(result, op, markdown=markdown))
    if result["memory"]:
        _heading(console, "peak memory beyond input and result", markdown=markdown)
        console.print(_memory(result, markdown=markdown))
    _heading(console, "not measured", markdown=markdown)
    console.print("\n".join(f"- {reason}" for reason in result["dropped"]), highlight=False, markup=False)
    _heading(console, "against the targets", markdown=markdown)
    console.print(_verdicts(result), highlight=False, markup=False)


def write(result: dict[str, Any], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        show(result, Console(file=file, width=400), markdown=True)
    # rich pads every line to the width of its table
    path.write_text("\n".join(line.strip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", "utf-8")


def _heading(console: Console, title: str, *, markdown: bool) -> None:
    console.print(f"\n## {title}\n" if markdown else f"\n[bold]{title}[/bold]", highlight=False)


def _facts(result: dict[str, Any]) -> list[str]:
    facts, options = result["machine"], result["options"]
    caches = ", ".join(f"{name} {size // 1024} KiB" for name, size in facts["caches"].items())
    quick = ", quick run" if options["quick"] else ""
    return [
        f"{facts['cpu']}, {facts['cpus']} CPUs, {caches}; {facts['system']}; {result['date']}",
        f"{options['threads']} threads{quick}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        LEGEND,
    ]


def _grid(columns: tuple[str, ...], *, markdown: bool) -> Table:
    grid = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in columns:
        grid.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=True)
    return grid


def _times(result: dict[str, Any], op: str, *, markdown: bool) -> Table:
    columns = ("library", "input", "ms", "± %", "GB/s", "of copy", "peer", "peer ms", "ratio", "target", "")
    grid = _grid(columns, markdown=markdown)
    for case in result["cases"]:
        if case["op"] != op:
            continue
        share = case["gb_per_s"] / case["copy_gb_per_s"]
        first = (case["runner"], case["label"], *_ms(case["ours"]), f"{case['gb_per_s']:.3g}", f"{share:.0%}")
        for peer in case["peers"]:
            if peer["name"] == "copy" and peer["target"] is None:
                continue
            grid.add_row(*first, *_peer(peer, quartiles=markdown))
            first = ("", "", "", "", "", "")
    return grid


def _peer(peer: dict[str, Any], *, quartiles: bool) -> tuple[str | Text, ...]:
    low, high = peer["ratio_quartiles"]
    style = STYLES.get(peer["verdict"], "")
    ratio = f"{peer['ratio']:.2f}" + (f" ({low:.2f} … {high:.2f})" if quartiles else "")
    target = peer["target"]["text"] if peer["target"] else ""
    return peer["name"], f"{peer['ms']:.4g}", Text(ratio, style), target, Text(MARKS.get(peer["verdict"], ""), style)


def _ms(times: dict[str, Any]) -> tuple[str, str]:
    low, high = times["quartiles_ms"]
    return f"{times['ms']:.4g}", f"{50 * (high - low) / times['ms']:.0f}"


def _memory(result: dict[str, Any], *, markdown: bool) -> Table:
    grid = _grid(("call", "library", "input MiB", "ours MiB", "peer", "peer MiB", "target", ""), markdown=markdown)
    for entry in result["memory"]:
        style = STYLES[entry["verdict"]]
        mark = Text(MARKS[entry["verdict"]], style)
        ours = Text(f"{entry['extra_mib']:.1f}", style)
        size, theirs = f"{entry['input_mib']:.0f}", f"{entry['peer_extra_mib']:.1f}"
        grid.add_row(entry["op"], entry["runner"], size, ours, entry["peer"], theirs, "≤ 16", mark)
    return grid


def _verdicts(result: dict[str, Any]) -> str:
    found = []
    for case in result["cases"]:
        for peer in case["peers"]:
            if peer["verdict"]:
                excess = 1e3 * (case["ours"]["ms"] - peer["ms"])
                ratio = f"{peer['ratio']:.2f}× {peer['name']}, {excess:+.4g} µs"
                text = f"- {case['op']}, {case['runner']}, {case['label']}: {ratio}, target {peer['target']['text']}"
                found.append((text, peer["verdict"]))
    for one in result["memory"]:
        text = f"- memory of {one['op']}, {one['runner']}: {one['extra_mib']:.1f} MiB, target ≤ 16"
        found.append((text, one["verdict"]))
    counts = {name: sum(verdict == name for _, verdict in found) for name in MARKS}
    head = f"{counts['met']} met, {counts['near']} missed within the spread, {counts['missed']} missed."
    return "\n".join([head, "", *(text for text, verdict in found if verdict == "missed")])
