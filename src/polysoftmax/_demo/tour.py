"""The demo as the user sees it: what is shown, in which order, in the terminal."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import polysoftmax
from polysoftmax._demo.backends import Backend, Missing, choose
from polysoftmax._demo.model import CONTEXT, Corpus, Fit, fit, gradient_rule, next_logits, open_context, read_corpus
from polysoftmax._demo.writing import STYLES, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from polysoftmax._arrays import Array

TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
WRITTEN = 160
SEED = 2026

# Largest differences that the demo calls agreement: about ten roundings of float32, and what they may grow to while
# a model is fitted.
SAME_VALUE = 1e-6
SAME_LOSS = 1e-3


def run(*, backends: Iterable[str] | None, text: Path | None, plot: Path | None, steps: int) -> int:
    """Run the demo; return 0 if every backend gave the same answers, 1 otherwise."""
    begun = time.perf_counter()
    console = Console(highlight=False)
    if plot is not None:
        from polysoftmax._demo.plot import check_plot

        check_plot(plot)
    corpus = read_corpus(text)
    with console.status("Looking for array libraries"):
        found, missing = choose(backends)
    _show_backends(console, found, missing)
    agreed = _worked_example(console, found)
    fits = _fit_all(console, found, corpus, steps)
    agreed &= _compare_fits(console, fits, corpus)
    context = open_context(fits[0], corpus)
    agreed &= _show_temperatures(console, fits, corpus, context)
    _show_texts(console, fits, corpus, context)
    if plot is not None:
        from polysoftmax._demo.plot import draw

        draw(plot, fits, corpus, context, TEMPERATURES)
        console.print(f"\nThe figure is in {plot}", soft_wrap=True)
    verdict = "Every answer agrees." if agreed else "Not every answer agrees: see the crosses above."
    console.print(f"\n{verdict} {time.perf_counter() - begun:.1f} s in all.", style="bold")
    return 0 if agreed else 1


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold cyan")


def _mark(good: bool) -> str:
    return "[green]✓[/]" if good else "[bold red]✗[/]"


def _grid(*columns: str, **header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header.get("header", True))
    for one in columns:
        table.add_column(one.lstrip(">"), justify="right" if one.startswith(">") else "left", header_style="dim")
    return table


def _show_backends(console: Console, found: list[Backend], missing: list[Missing]) -> None:
    console.print(f"polysoftmax {polysoftmax.__version__}: the softmax family on every array library", style="bold")
    _heading(console, "Backends")
    table = _grid("name", "version", "device", "engine for softmax")
    for one in found:
        chosen = polysoftmax.explain(one.floats([[0.0] * 1000] * 64), "softmax").engine
        table.add_row(one.name, one.version, one.device, chosen)
    for absent in missing:
        table.add_row(absent.name, Text(absent.reason), "", Text(absent.remedy), style="dim")
    console.print(table)


# What each line computes from the logits 1, 2, 3, and the answer by mpmath, computed to 30 digits.
_PLAIN = (0.0900305732, 0.2447284711, 0.6652409558)
_EXAMPLE: tuple[tuple[str, Callable[[Array], Array], tuple[float, float, float]], ...] = (
    ("softmax(1, 2, 3)", polysoftmax.softmax, _PLAIN),
    ("softmax(1000, 1001, 1002)", lambda x: polysoftmax.softmax(x + 999), _PLAIN),
    (
        "softmax(1, 2, 3, temperature=0.5)",
        lambda x: polysoftmax.softmax(x, temperature=0.5),
        (0.0158762400, 0.1173104278, 0.8668133322),
    ),
    (
        "softmax(1, 2, 3, temperature=2)",
        lambda x: polysoftmax.softmax(x, temperature=2),
        (0.1863237232, 0.3071958857, 0.5064803911),
    ),
    ("softmax(1, 2, 3, temperature=0)", lambda x: polysoftmax.softmax(x, temperature=0), (0.0, 0.0, 1.0)),
    ("log_softmax(1, 2, 3)", polysoftmax.log_softmax, (-2.4076059644, -1.4076059644, -0.4076059644)),
    (
        "softmax_jacobian(1, 2, 3), row 1",
        lambda x: polysoftmax.softmax_jacobian(x)[0, :],
        (0.0819250691, -0.0220330445, -0.0598920245),
    ),
)


def _worked_example(console: Console, found: list[Backend]) -> bool:
    _heading(console, "The classical example, in float32")
    table = _grid("", ">", ">", ">", *(one.name for one in found))
    errors = []
    for label, function, expected in _EXAMPLE:
        marks = []
        for backend in found:
            answer = function(backend.floats((1, 2, 3))).tolist()
            errors.append(largest_difference(answer, expected))
            marks.append(_mark(errors[-1] <= SAME_VALUE))
        table.add_row(label, *(f"{value:.4f}" for value in expected), *marks)
    console.print(table)
    console.print(f"✓ within {SAME_VALUE:g} of the exact value; the largest error is {max(errors):.1e}", style="dim")
    return max(errors) <= SAME_VALUE


def _fit_all(console: Console, found: list[Backend], corpus: Corpus, steps: int) -> list[Fit]:
    _heading(console, "A character model, fitted through cross_entropy")
    total = len(corpus.fitted) + len(corpus.held_out)
    console.print(
        Text(
            f"Text: {corpus.name}, {total:,} characters, {len(corpus.alphabet) - 1} symbols. "
            f"The model sees {CONTEXT} characters and predicts the next; every backend starts from the same weights "
            f"and sees the same minibatches."
        )
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    fits = []
    width = max(len(one.name) for one in found)
    with Progress(*columns, console=console) as progress:
        for backend in found:
            label = f"{backend.name:{width}}  {gradient_rule(backend)[0]:11}"
            task = progress.add_task(label, total=steps, loss=math.nan)

            def tell(step: int, loss: float, task: object = task) -> None:
                progress.update(task, completed=step, loss=loss)  # type: ignore[arg-type]

            fits.append(fit(backend, corpus, steps, tell))
    return fits


def _compare_fits(console: Console, fits: list[Fit], corpus: Corpus) -> bool:
    first = fits[0]
    several = f"curve differs from {first.backend.name}'s by" if len(fits) > 1 else ""
    table = _grid("held-out loss", ">nats", ">bits per character", several)
    counts = Counter(corpus.fitted)
    by_frequency = first.backend.floats([math.log(count) for count in counts.values()])
    baseline = float(polysoftmax.entropy(by_frequency))
    table.add_row("[dim]by frequency alone[/]", f"[dim]{baseline:.4f}[/]", f"[dim]{baseline / math.log(2):.4f}[/]", "")
    agreed = True
    for one in fits:
        difference = largest_difference(one.losses, first.losses)
        same = difference <= SAME_LOSS
        agreed &= same
        verdict = "" if one is first else f"{difference:.1e} nats at most {_mark(same)}"
        table.add_row(one.backend.name, f"{one.held_out:.4f}", f"{one.held_out / math.log(2):.4f}", verdict)
    console.print(table)
    return agreed


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest absolute difference, inf if there is a NaN."""
    differences = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return max(difference if difference == difference else math.inf for difference in differences)


def _show_temperatures(console: Console, fits: list[Fit], corpus: Corpus, context: str) -> bool:
    _heading(console, f"Temperature: what follows “{context}”")
    console.print("Logits are divided by T: below 1 the likely gains, above 1 the unlikely does.", style="dim")
    at = {t: _distribution(fits[0], corpus, context, t) for t in TEMPERATURES}
    likely = sorted(range(len(corpus.alphabet)), key=lambda i: -at[1.0][i])[:8]
    table = _grid("", *(f"T = {t:g}" for t in TEMPERATURES))
    width = max(2, min(20, (console.width - 9) // len(TEMPERATURES) - 7))
    for i in likely:
        table.add_row(Text(visible(corpus.alphabet[i])), *(_bar(at[t][i], width) for t in TEMPERATURES))
    x = next_logits(fits[0], corpus, context)
    entropies = [float(polysoftmax.entropy(x, temperature=t)) for t in TEMPERATURES]
    table.add_row(Text("entropy", style="dim"), *(Text(f"{h:.2f} nats", style="dim") for h in entropies))
    console.print(table)
    differences = [
        largest_difference(_distribution(one, corpus, context, t), at[t]) for one in fits[1:] for t in TEMPERATURES
    ]
    agreed = max(differences, default=0.0) <= SAME_LOSS
    if differences:
        console.print(f"Largest difference between backends: {max(differences):.1e} {_mark(agreed)}", style="dim")
    return agreed


def _distribution(one: Fit, corpus: Corpus, context: str, temperature: float) -> list[float]:
    x = next_logits(one, corpus, context)
    return polysoftmax.softmax(x, temperature=temperature).tolist()  # type: ignore[no-any-return]


def _show_texts(console: Console, fits: list[Fit], corpus: Corpus, prompt: str) -> None:
    _heading(console, f"Text drawn with sample, seed {SEED}")
    # All backends get the same weights: what is compared is the draw.
    written = [write_text(fits[0], one.backend, corpus, prompt, WRITTEN, SEED) for one in fits]
    table = _grid("", "", header=False)
    for i, style in enumerate(STYLES):
        table.add_row(style.name, Text.assemble((prompt, "dim"), written[0][i]))
    console.print(table)
    for one, texts in zip(fits[1:], written[1:], strict=True):
        console.print(f"{one.backend.name} {_compare_texts(fits[0].backend.name, written[0], texts)}", style="dim")


def _compare_texts(name: str, texts: list[str], others: list[str]) -> str:
    """Say whether texts are those of the first backend, and where they part.

    Parting is no failure: logits differ by rounding, and a draw changes where two scores lie that close.
    """
    parted = [i for i, (text, other) in enumerate(zip(texts, others, strict=True)) if text != other]
    if not parted:
        return f"draws the same {len(texts)} texts as {name} [green]✓[/]"
    places = []
    for i in parted:
        at = next(j for j, (a, b) in enumerate(zip(texts[i], others[i], strict=True)) if a != b)
        places.append(f"{STYLES[i].name} from character {at + 1}")
    return f"departs from {name}, as it may where two scores lie within rounding: {'; '.join(places)}"


def visible(character: str) -> str:
    """Return a character as it can be told from nothing."""
    return "space" if character == " " else character


def _bar(probability: float, width: int) -> Text:
    eighths = round(probability * width * 8)
    bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text.assemble((f"{bar:{width}}", "cyan"), f" {probability:4.0%}")
