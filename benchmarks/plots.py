"""Results as pictures: ratio by size, and GB/s against the machine's own copy."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.cases import LADDER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OURS_COLOURS = ("#111111", "#777777")
COPY = "copy of the same bytes"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Marker, greatest row length, and what the legend calls it.
ROWS = (("^", 32, "rows of up to 32"), ("o", 8192, "rows of 33 to 8192"), ("s", math.inf, "longer rows"))
X_LABEL = "elements of the input"
PANEL = (4.6, 3.2)
CALL_BOUND = 10_000
"""Elements below which a call's overhead, not the bytes moved, is its time."""


@dataclass(frozen=True)
class Point:
    """One measurement in a panel."""

    op: str
    series: str
    x: int
    y: float
    length: int
    joined: bool


@dataclass(frozen=True)
class Picture:
    """A figure's points and words; ``parity`` draws the line at 1."""

    points: list[Point]
    title: str
    y_label: str
    x_label: str
    parity: bool


def draw(result: dict[str, Any], out: Path) -> None:
    """Write ``ratio-LIBRARY.png`` and ``throughput-LIBRARY.png`` for every library of the run."""
    options = result["options"]
    about = f"float32, last axis; {result['machine']['cpu']}, {options['threads']} threads"
    for backend in dict.fromkeys(case["backend"] for case in result["cases"]):
        cases = [c for c in result["cases"] if (c["backend"], c["axis"], c["dtype"]) == (backend, -1, "float32")]
        title = f"polysoftmax on {backend}: time of a peer / ours, above 1× ours is faster\n{about}"
        _save(Picture(list(_ratios(cases)), title, "peer / ours", X_LABEL, True), out / f"ratio-{backend}.png")
        title = f"polysoftmax on {backend}: GB/s, every input and result counted once\n{about}"
        large = [case for case in cases if case["elements"] >= CALL_BOUND]
        if large:
            speeds = Picture(list(_speeds(large)), title, "GB/s", X_LABEL, False)
            _save(speeds, out / f"throughput-{backend}.png")


def _ratios(cases: list[dict[str, Any]]) -> Iterator[Point]:
    for case in cases:
        for peer in case["peers"]:
            if peer["name"] != "copy":
                yield _point(case, peer["name"], peer["ratio"])


def _speeds(cases: list[dict[str, Any]]) -> Iterator[Point]:
    copies: dict[int, list[float]] = {}
    for case in cases:
        copies.setdefault(case["elements"], []).append(case["copy_gb_per_s"])
    for case in cases:
        yield _point(case, "ours", case["gb_per_s"])
        yield Point(case["op"], COPY, case["elements"], statistics.median(copies[case["elements"]]), 0, True)
        for peer in case["peers"]:
            if peer["name"] != "copy":
                yield _point(case, peer["name"], peer["gb_per_s"])


def _point(case: dict[str, Any], name: str, y: float) -> Point:
    series = name if case["mode"] == "eager" else f"{name}, {case['mode']}"
    return Point(case["op"], series, case["elements"], y, case["length"], tuple(case["shape"]) in LADDER)


def _colours(points: list[Point]) -> dict[str, str]:
    names = list(dict.fromkeys(point.series for point in points))
    ours = [name for name in names if name.startswith("ours")]
    peers = [name for name in names if name not in ours and name != COPY]
    found = dict(zip(ours, OURS_COLOURS, strict=False))
    found |= {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(peers)}
    return found | ({COPY: "#999999"} if COPY in names else {})


def _save(picture: Picture, path: Path) -> None:
    ops = list(dict.fromkeys(point.op for point in picture.points))
    colours = _colours(picture.points)
    columns = min(3, len(ops))
    lines = -(-len(ops) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(PANEL[0] * columns, 9), PANEL[1] * lines + 1.8), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for ax, op in zip(grid.flat, ops, strict=False):
            _panel(ax, [point for point in picture.points if point.op == op], colours, parity=picture.parity)
            ax.set_title(op)
        _scale(grid[0, 0], picture)
        for ax in grid.flat[len(ops) :]:
            ax.set_visible(False)
        for column in range(columns):
            bottom = grid[(len(ops) - 1 - column) // columns, column]
            bottom.set_xlabel(picture.x_label)
            bottom.tick_params(labelbottom=True)
        for ax in grid[:, 0]:
            ax.set_ylabel(picture.y_label)
        figure.suptitle(picture.title, fontsize=13)
        figure.legend(handles=_legend(picture, colours), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=110)


def _panel(ax: Axes, points: list[Point], colours: dict[str, str], *, parity: bool) -> None:
    for series, colour in reversed(colours.items()):  # ours last, on top
        mine = sorted((p for p in points if p.series == series), key=lambda p: p.x)
        line = [(p.x, p.y) for p in mine if p.joined]
        width, dash = (2.4 if series.startswith("ours") else 1.5), ("--" if series == COPY else "-")
        if line:
            ax.plot(*zip(*line, strict=True), color=colour, ls=dash, lw=width)
        for p in mine:
            if p.length:
                marker = next(m for m, most, _ in ROWS if p.length <= most)
                ax.plot(p.x, p.y, marker=marker, color=colour, ms=6.5, mec="white", mew=0.6, ls="")
    if parity:
        ax.axhline(1, color="black", lw=1.3, zorder=1)
        ax.axhspan(1e-9, 1, color="#d55e00", alpha=0.06, lw=0, zorder=0)


def _scale(ax: Axes, picture: Picture) -> None:
    """Set log axes for all panels; a decade has one, two or three labels, by how many decades there are."""
    values = [point.y for point in picture.points] + ([1.0] if picture.parity else [])
    low, high = min(values) / 1.3, max(values) * 1.3
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    sizes = [point.x for point in picture.points]
    ax.set_xlim(min(sizes) / 2.5, max(sizes) * 2.5)
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    ax.xaxis.set_minor_locator(NullLocator())
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 4 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ax.yaxis.set_major_locator(FixedLocator([step * 10.0**e for e in exponents for step in steps]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{'×' if picture.parity else ''}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(picture: Picture, colours: dict[str, str]) -> list[Line2D]:
    lines = [
        Line2D([], [], color=colour, lw=2, ls="--" if series == COPY else "-", label=series)
        for series, colour in colours.items()
    ]
    return lines + [Line2D([], [], color="#555555", marker=marker, ls="", label=text) for marker, _, text in ROWS]
