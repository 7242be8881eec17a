"""The demo's figure: every backend's loss curve, how far they lie apart, and what temperature does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import polysoftmax
from polysoftmax._demo.backends import UsageError
from polysoftmax._demo.model import next_logits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polysoftmax._demo.model import Corpus, Fit

# Okabe and Ito's palette, told apart by colour-blind readers, too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_GREY = "#666666"


def check_plot(path: Path) -> None:
    """Raise ``UsageError`` if no figure could be written to a path, before anything is computed."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        msg = "--plot needs matplotlib, which is not installed: pip install matplotlib"
        raise UsageError(msg) from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        msg = f"cannot draw into {str(path)!r}: end its name in one of {', '.join('.' + one for one in sorted(known))}"
        raise UsageError(msg)
    if not path.absolute().parent.is_dir():
        msg = f"cannot draw into {str(path)!r}: there is no directory {str(path.parent)!r}"
        raise UsageError(msg)


def draw(path: Path, fits: list[Fit], corpus: Corpus, context: str, temperatures: Sequence[float]) -> None:
    """Draw the figure into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained", dpi=150)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.05), wspace=0.04)
    left, right = halves
    if len(fits) > 1:
        curves, apart = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_differences(apart, fits)
    else:
        curves = apart = left.subplots()
    _draw_curves(curves, fits, corpus)
    apart.set_xlabel("step")
    panels = right.subplots(1, len(temperatures), sharey=True, sharex=True)
    _draw_temperatures(panels, fits[0], corpus, context, temperatures)
    right.suptitle(f"What follows “{context}”, by temperature", fontsize="large", parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a text in a script that the font lacks
            figure.savefig(path)
    except OSError as error:
        msg = f"cannot draw into {str(path)!r}: {error.strerror}"
        raise UsageError(msg) from error


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY)


def _draw_curves(axes: Any, fits: list[Fit], corpus: Corpus) -> None:
    # Curves that agree hide each other: the first is the widest, and each one on top of it is thinner.
    window = _window(fits[0])
    for i, one in enumerate(fits):
        smooth = _moving_average(one.losses, window)
        label = f"{one.backend.name} (held-out text: {one.held_out:.3f})"
        axes.plot(
            range(window, len(smooth) + window),
            smooth,
            color=_COLOURS[i],
            lw=1.2 + 2.2 * (len(fits) - 1 - i),
            label=label,
        )
    axes.set_title(f"Fitting {corpus.name} through cross_entropy", fontsize="large", parse_math=False)
    axes.set_ylabel(f"loss in nats, mean of {window} steps")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    _bare(axes)


def _window(one: Fit) -> int:
    """Return over how many steps the noise of minibatches is smoothed."""
    return min(25, len(one.losses) // 20 + 1)


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def _draw_differences(axes: Any, fits: list[Fit]) -> None:
    first = fits[0]
    window = _window(first)
    for i, one in enumerate(fits[1:], start=1):
        apart = [abs(a - b) for a, b in zip(one.losses, first.losses, strict=True)]
        starts = range(0, len(apart), window)
        greatest = [max(apart[start : start + window]) for start in starts]
        axes.plot([*starts, len(apart)], [*greatest, greatest[-1]], drawstyle="steps-post", color=_COLOURS[i], lw=1.2)
    axes.set_ylabel(f"greatest distance\nfrom {first.backend.name}")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    _bare(axes)


def _draw_temperatures(
    panels: Any, one: Fit, corpus: Corpus, context: str, temperatures: Sequence[float], shown: int = 12
) -> None:
    x = next_logits(one, corpus, context)
    order = sorted(range(len(corpus.alphabet)), key=x.tolist().__getitem__, reverse=True)[:shown]
    names = ["␣" if corpus.alphabet[i] == " " else corpus.alphabet[i] for i in order]
    for axes, temperature in zip(panels, temperatures, strict=True):
        p = polysoftmax.softmax(x, temperature=temperature).tolist()
        heights = [100 * p[i] for i in order]
        axes.barh(range(len(order)), heights, color=_COLOURS[0], height=0.75)
        for y, height in enumerate(heights):
            label = f"{height:.0f}" if height >= 0.5 else "<1"
            axes.text(height + 2, y, label, va="center", fontsize="small", color=_GREY)
        entropy = float(polysoftmax.entropy(x, temperature=temperature))
        axes.set_title(f"T = {temperature:g}\nentropy {entropy:.2f}", fontsize="medium")
        axes.set_xlabel("%")
        _bare(axes)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(order)), names, fontfamily="monospace", color="black")
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    panels[0].set_xlim(0, 112)
    panels[0].set_xticks((0, 50, 100))
