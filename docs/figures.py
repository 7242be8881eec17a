"""The figures of the guide, drawn with the functions that they show: make figures writes them anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

import polysoftmax as ps
from benchmarks import newest_results
from benchmarks.svg import BLUE, GREEN, INK, ORANGE, PURPLE, draw

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "figures"
SMALL = 10_000  # entries of a call whose time is overhead


def bars(panel: Axes, heights: Iterable[float], names: Iterable[str], labels: Iterable[str] = ()) -> None:
    """Draw bars, orange below 0, with their names under the axis and their values at their ends."""
    heights, names = list(heights), list(names)
    drawn = panel.bar(names, heights, color=[ORANGE if height < 0 else BLUE for height in heights])
    if labels := list(labels):
        panel.bar_label(drawn, labels, padding=2, fontsize=10)
        panel.margins(y=0.2)
    if min(heights) < 0:
        panel.axhline(0, color=INK, linewidth=0.8)


def steps() -> Figure:
    """Draw the way from logits to probabilities."""
    x = np.asarray([-2.0, 0.0, 3.0])
    terms = np.exp(x)
    figure = Figure(figsize=(5, 2.3))
    names = ["$x_1$", "$x_2$", "$x_3$"]
    titles = ("$x$", "$e^x$", r"$e^x\,/\,\Sigma$")
    for panel, title, values, form in zip(
        figure.subplots(1, 3), titles, (x, terms, ps.softmax(x)), ("{:g}", "{:.2f}", "{:.3f}"), strict=True
    ):
        bars(panel, values, names, map(form.format, values))
        panel.set_title(title)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
    return figure


def emphasis() -> Figure:
    """Draw what one great logit does."""
    figure = Figure(figsize=(5, 2.3))
    for panel, x in zip(figure.subplots(1, 2, sharey=True), ([1, 2, 3], [1, 2, 10]), strict=True):
        y = ps.softmax(np.asarray(x, dtype=float))
        bars(panel, y, map(str, x), (f"{one:.4f}" for one in y))
        panel.set_title(f"softmax({x})")
        panel.set_yticks([0, 0.5, 1])
    return figure


def temperature() -> Figure:
    """Draw the softmax of five logits at six temperatures."""
    logits = np.asarray([0.0, 2.0, 1.0, 3.0, -1.0])
    figure = Figure(figsize=(5, 3.4))
    for panel, t in zip(figure.subplots(2, 3, sharey=True).flat, (0.0, 0.3, 0.7, 1.0, 2.0, np.inf), strict=True):
        bars(panel, ps.softmax(logits, temperature=t), (f"{one:g}" for one in logits))
        panel.set_title("T = ∞" if t == np.inf else f"T = {t:g}")
        panel.set_yticks([0, 0.5, 1])
    return figure


def heat(panel: Axes, values: np.ndarray, **options: Any) -> Any:
    """Draw a matrix as cells, the first row on top."""
    panel.invert_yaxis()
    panel.set_aspect("equal")
    return panel.pcolormesh(values, **options)


def jacobian() -> Figure:
    """Draw the Jacobians of softmax and log_softmax at the logits 1, 2, 3."""
    logits = np.asarray([1.0, 2.0, 3.0])
    figure = Figure(figsize=(5, 2.7))
    functions = {"softmax": ps.softmax_jacobian, "log_softmax": ps.log_softmax_jacobian}
    for panel, (name, function) in zip(figure.subplots(1, 2), functions.items(), strict=True):
        matrix = function(logits)
        heat(panel, matrix, cmap="RdBu", vmin=-1, vmax=1, edgecolors="#808080", linewidth=0.5)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "#ffffff" if abs(value) > 0.6 else "#000000"
            panel.text(j + 0.5, i + 0.5, f"{value:.3f}", ha="center", va="center", color=colour)
        panel.set_title(name)
        panel.set_xlabel("$j$")
        panel.set_ylabel("$i$")
        panel.set_xticks(np.arange(3) + 0.5, ["1", "2", "3"])
        panel.set_yticks(np.arange(3) + 0.5, ["1", "2", "3"])
    return figure


def rounded_maximum() -> Figure:
    """Draw logsumexp beside the maximum that it rounds off."""
    x = np.linspace(-4, 4, 33)
    pairs = np.stack([x, np.zeros_like(x)], axis=-1)
    figure = Figure(figsize=(5, 2.5))
    panel = figure.subplots()
    panel.plot(x, pairs.max(axis=-1), color=INK, linestyle="--", label="max(x, 0)")
    panel.plot(x, ps.logsumexp(pairs), color=BLUE, linewidth=2, label="logsumexp([x, 0])")
    panel.set_xlabel("x")
    panel.legend(frameon=False)
    return figure


def loss_gradient() -> Figure:
    """Draw the gradient of the cross-entropy: probabilities, less 1 at the target."""
    x, target = np.asarray([2.0, 1.0, 0.0, -1.0]), 1
    p = ps.softmax(x)
    onehot = np.eye(4)[target]
    figure = Figure(figsize=(5, 2.3))
    shown = {"$p$": p, "onehot": onehot, "$p$ − onehot": p - onehot}
    for panel, (title, values) in zip(figure.subplots(1, 3, sharey=True), shown.items(), strict=True):
        bars(panel, values, ["0", "1", "2", "3"], (f"{one:.2f}" for one in values))
        panel.set_title(title)
        panel.set_yticks([-1, 0, 1])
        panel.set_ylim(-1.05, 1.3)
    return figure


def attention() -> Figure:
    """Draw scores and what a causal mask makes of them."""
    n = 8
    scores = np.random.default_rng(0).normal(size=(n, n), scale=1.5)
    causal = np.tril(np.ones((n, n), dtype=bool))
    figure = Figure(figsize=(5, 2.7))
    shown = {"scores": scores, "weights": ps.softmax(scores, where=causal)}
    for panel, (title, values) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        cells = heat(panel, values, cmap="cividis")
        figure.colorbar(cells, ax=panel, shrink=0.8)
        panel.set_title(title)
        panel.set_xlabel("key")
        panel.set_ylabel("query")
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def speed(backend: str, mode: str) -> Figure:
    """Draw how many times as long the library's own functions took, a dot for each size that was measured."""
    cases = [
        case
        for case in newest_results("cpus")["cases"]
        if (case["backend"], case["mode"], case["dtype"], case["axis"]) == (backend, mode, "float32", -1)
    ]
    ops = list(dict.fromkeys(case["op"] for case in cases))
    figure = Figure(figsize=(5, 3.2))
    panel = figure.subplots()
    panel.axvline(1, color=INK, linewidth=0.8)
    for is_small, colour, label in ((True, ORANGE, "up to 10,000 entries"), (False, BLUE, "more")):
        chosen = [case for case in cases if (case["elements"] <= SMALL) == is_small]
        ratios = [case["peers"][0]["ratio"] for case in chosen]
        places = [ops.index(case["op"]) for case in chosen]
        panel.plot(ratios, places, "o", color=colour, alpha=0.8, markeredgewidth=0, label=label)
    panel.invert_yaxis()
    panel.set_yticks(range(len(ops)), ops)
    panel.set_xscale("log")
    panel.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.2", "0.5", "1", "2", "5", "10", "20", "50"])
    panel.minorticks_off()
    panel.set_xlim(0.15, 60)
    panel.set_xlabel("time of the other / ours: right of 1 ours is faster")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def speed_numpy() -> Figure:
    """Draw the ratios on NumPy, to SciPy and to Gumbel noise in NumPy."""
    return speed("numpy", "eager")


def speed_torch() -> Figure:
    """Draw the ratios on PyTorch."""
    return speed("torch", "eager")


def speed_jax() -> Figure:
    """Draw the ratios on JAX, inside `jit`."""
    return speed("jax", "jit")


MARKS = {"ours": (BLUE, "o"), "scipy": (ORANGE, "s"), "jax.nn": (GREEN, "^"), "torch": (PURPLE, "D")}
BEYOND = 1e9  # where what is no number at all is drawn


def errors(dtype: str, *, together: bool = False) -> Figure:
    """Draw the largest errors on rows of each kind, ours where it is largest; a panel a function, or one."""
    found: dict[tuple[str, str, str], float] = {}
    for one in newest_results("accuracy")["rows"]:
        if one["dtype"] == dtype:
            key = "" if together else one["function"], one["rows"], one["by"].partition(",")[0]
            found[key] = max(found.get(key, 0.0), min(float(one["ulps"]), BEYOND))
    titles, rows = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    everyone = [name for name in MARKS if any(key[2] == name for key in found)]
    figure = Figure(figsize=(5, 1 + 2 * len(titles)))
    panels = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for panel, title in zip(panels, titles, strict=True):
        for place, name in enumerate(everyone):
            colour, mark = MARKS[name]
            heights = [k + 0.24 * (place - (len(everyone) - 1) / 2) for k in range(len(rows))]
            label = "polysoftmax" if name == "ours" else name
            values = [found[title, kind, name] for kind in rows]
            panel.plot(values, heights, mark, color=colour, markersize=4.5, markeredgewidth=0, label=label)
        panel.set_title(title)
        panel.set_yticks(range(len(rows)), rows)
        panel.invert_yaxis()
        panel.grid(axis="x", color=INK, alpha=0.15)
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xlabel(f"largest error in ulp, {dtype}")
    names = panel.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=4, frameon=False, columnspacing=1)
    return figure


def accuracy() -> Figure:
    """Draw the largest error in float32 of softmax, log_softmax and logsumexp."""
    return errors("float32", together=True)


def accuracy_float32() -> Figure:
    """Draw the errors of each in float32."""
    return errors("float32")


def accuracy_bfloat16() -> Figure:
    """Draw the errors of each in bfloat16, which SciPy does not have."""
    return errors("bfloat16")


FIGURES = (
    *(steps, emphasis, temperature, jacobian, rounded_maximum, loss_gradient, attention),
    *(speed_numpy, speed_torch, speed_jax),
    *(accuracy, accuracy_float32, accuracy_bfloat16),
)


if __name__ == "__main__":
    for one in FIGURES:
        (FOLDER / f"{one.__name__}.svg").write_text(draw(one), encoding="utf-8")
