"""The figures of the guide, drawn with the functions that they show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

import polysoftmax

if TYPE_CHECKING:
    from pathlib import Path

BLUE = "#0072B2"


def temperature() -> Figure:
    """Draw the softmax of five logits at five temperatures."""
    logits = np.asarray([0.0, 2.0, 1.0, 3.0, -1.0])
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    panels = figure.subplots(1, 5, sharey=True)
    for panel, t in zip(panels, (0.0, 0.5, 1.0, 2.0, np.inf), strict=True):
        panel.bar(range(5), polysoftmax.softmax(logits, temperature=t), color=BLUE)
        panel.set_title("T = ∞" if t == np.inf else f"T = {t:g}")
        panel.set_xticks(range(5), [f"{one:g}" for one in logits])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("probability")
    figure.supxlabel("logit", fontsize="medium")
    return figure


def jacobian() -> Figure:
    """Draw the Jacobians of softmax and log_softmax at the logits 1, 2, 3."""
    logits = np.asarray([1.0, 2.0, 3.0])
    figure = Figure(figsize=(7, 2.9), layout="constrained")
    functions = {"softmax": polysoftmax.softmax_jacobian, "log_softmax": polysoftmax.log_softmax_jacobian}
    for panel, (name, function) in zip(figure.subplots(1, 2), functions.items(), strict=True):
        matrix = function(logits)
        panel.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            panel.text(j, i, f"{value:.4f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
        panel.set_title(f"Jacobian of {name}")
        panel.set_xlabel("j, of the logit")
        panel.set_ylabel("i, of the answer")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MultipleLocator(1))
    return figure


def attention() -> Figure:
    """Draw scores and what a causal mask makes of them."""
    n = 12
    scores = np.random.default_rng(0).normal(size=(n, n), scale=1.5)
    causal = np.tril(np.ones((n, n), dtype=bool))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    weights = polysoftmax.softmax(scores, where=causal)
    shown = {"scores": (scores, "Greys"), "softmax(scores, where=causal)": (weights, "Blues")}
    for panel, (title, (values, colours)) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        figure.colorbar(panel.imshow(values, cmap=colours), ax=panel)
        panel.set_title(title)
        panel.set_xlabel("key, the position looked at")
        panel.set_ylabel("query, the position that looks")
    return figure


def draw_all(folder: Path) -> None:
    """Draw every figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in (temperature, jacobian, attention):
        figure().savefig(folder / f"{figure.__name__}.svg", metadata={"Date": None})
