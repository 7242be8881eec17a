"""The results of a run as plots."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks import svg
from tools.gpu.bench import limit
from tools.gpu.contenders import COPY, OURS, READ
from tools.gpu.host import NO_LAUNCH
from tools.gpu.tables import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matplotlib.axes import Axes

WIDTH, PANEL = 6.5, 1.65
LINE = 0.3
FAINT = "#808080"
LIMIT = "the limit"


def draw(results: dict[str, Any], out: Path) -> list[str]:
    """Write a plot for each kind of result that there is, and return their names."""
    facts = results.get("machine") or {}
    where = f"{facts.get('gpu') or facts.get('cpu')}, {results['date']}"
    raced = [one for one in records(results, "bench") if OURS in one.get("seconds", {})]
    rows = [one for one in raced if not one["op"].startswith("sample")]
    draws = [one for one in raced if one["op"].startswith("sample")]
    host = [one for one in records(results, "bench") if one.get("returned")]
    wanted: dict[str, tuple[Callable[..., Figure], list[dict[str, Any]]]] = {
        "bandwidth.svg": (_bandwidth, rows),
        "draws.svg": (_draws, draws),
        "host.svg": (_host, host),
    }
    drawn = {name: (make, found) for name, (make, found) in wanted.items() if found}
    for name, (make, found) in drawn.items():
        (out / name).write_text(svg.draw(functools.partial(make, found, where)), encoding="utf-8")
    return list(drawn)


def _colours(names: Iterable[str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(names) if name not in (OURS, NO_LAUNCH, COPY, READ)]
    return {OURS: svg.INK, NO_LAUNCH: FAINT} | {
        name: svg.COLOURS[i % len(svg.COLOURS)] for i, name in enumerate(others)
    }


def _bandwidth(found: list[dict[str, Any]], where: str) -> Figure:
    """Draw the share of the device's own limit by row length: a panel for each operation and dtype."""
    ops, dtypes = (list(dict.fromkeys(one[key] for one in found)) for key in ("op", "dtype"))
    colours = _colours(name for one in found for name in one["seconds"])
    figure = Figure(figsize=(WIDTH, PANEL * len(ops) + 1.4))
    grid = figure.subplots(len(ops), len(dtypes), squeeze=False, sharex=True, sharey=True)
    for line, op in zip(grid, ops, strict=True):
        for ax, dtype in zip(line, dtypes, strict=True):
            _shares(ax, [one for one in found if (one["op"], one["dtype"]) == (op, dtype)], colours)
            ax.set_title(f"{op}, {dtype}")
            ax.grid(color=svg.INK, alpha=0.15)
    for ax in grid[-1]:
        ax.set_xlabel("entries in a row")
    ax = grid[0, 0]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title = "Bandwidth as a share of the device's own:\nthat of a copy, or of a read where the answer is short"
    figure.suptitle(f"{title}\n{where}{_limits(found)}", fontsize=11)
    _legend(figure, grid.flat, colours)
    return figure


def _limits(found: list[dict[str, Any]]) -> str:
    """Return the limits in digits: the fastest copy and read of the run."""
    best: dict[str, float] = {}
    for one in found:
        name = limit(one)
        if name in one["seconds"]:
            best[name] = max(best.get(name, 0.0), one["traffic"] / one["seconds"][name]["median"] / 1e9)
    return "".join(f", {name} {rate:,.0f} GB/s" for name, rate in best.items())


def _legend(figure: Figure, panels: Iterable[Axes], colours: dict[str, str]) -> None:
    handles = {str(line.get_label()): line for ax in panels for line in ax.lines}
    names = [name for name in (*colours, LIMIT) if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)


def _shares(ax: Axes, found: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for name, colour in reversed(colours.items()):  # ours last, on top
        points = {
            one["shape"][-1]: one["seconds"][limit(one)]["median"] / one["seconds"][name]["median"]
            for one in found
            if name in one["seconds"] and limit(one) in one["seconds"]
        }
        if points:
            width = 2.2 if name == OURS else 1.3
            ax.plot(*zip(*sorted(points.items()), strict=True), marker="o", ms=4, color=colour, lw=width, label=name)
    ax.axhline(1, color=FAINT, ls="--", lw=1.2, zorder=0, label=LIMIT)


def _draws(found: list[dict[str, Any]], where: str) -> Figure:
    """Draw the time of each draw beside its peers', and beside a read of its logits."""
    lines: dict[str, dict[str, float]] = {}
    for one in sorted(found, key=lambda one: (one["op"], one["shape"])):
        label = f"{one['op']}, {'×'.join(map(str, one['shape']))} {one['dtype']}"
        times = {name: 1e6 * seconds["median"] for name, seconds in one["seconds"].items() if name != COPY}
        lines[label] = times | lines.get(label, {})
    return _dots(lines, "µs on the device", f"Time of a draw on the device, and of a read of its logits\n{where}")


def _host(found: list[dict[str, Any]], where: str) -> Figure:
    shape = "×".join(map(str, found[0]["shape"]))
    lines = {one["op"]: one["returned"] for one in found}
    return _dots(lines, "µs until a call returns", f"Time of a call on the host, {shape} entries of bfloat16\n{where}")


def _dots(lines: dict[str, dict[str, float]], x_label: str, title: str) -> Figure:
    """Draw a line for each label, with a dot for each time: on a logarithmic scale bars would have no beginning."""
    colours = _colours(name for line in lines.values() for name in line) | {READ: FAINT}
    figure = Figure(figsize=(WIDTH, LINE * len(lines) + 1.7))
    ax = figure.subplots()
    for name, colour in reversed(colours.items()):  # ours last, on top
        points = [(line[name], y) for y, line in enumerate(lines.values()) if name in line]
        if points:
            style = {"marker": "|", "ms": 12, "mew": 2} if name == READ else {"marker": "o", "ms": 6, "mew": 0}
            ax.plot(*zip(*points, strict=True), ls="", color=colour, label=name, **style)
    ax.set_yticks(range(len(lines)), lines)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    times = [time for line in lines.values() for time in line.values()]
    ax.set_xscale("log")
    ax.set_xlim(min(times) / 1.6, max(times) * 1.6)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(x_label)
    ax.grid(axis="x", color=svg.INK, alpha=0.15)
    figure.suptitle(title, fontsize=11)
    _legend(figure, [ax], colours)
    return figure
