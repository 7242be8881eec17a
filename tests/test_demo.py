"""The command line: what the demo shows, what it answers when backends disagree, and what it says to bad input."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pytest

import polysoftmax
import polysoftmax.testing
from polysoftmax.__main__ import main
from polysoftmax._demo import backends, model, tour, writing
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Iterator

WORDS = ("a", "small", "model", "reads", "words", "and", "learns", "which", "letter", "follows", "the", "others")


@pytest.fixture(scope="module")
def corpus() -> model.Corpus:
    return model.make_corpus("words", " ".join(random.Random(3).choices(WORDS, k=2000)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(random.Random(3).choices(WORDS, k=2000)), encoding="utf-8")
    return path


def backend(name: str) -> backends.Backend:
    pytest.importorskip(name.partition(":")[0])
    found = backends.look_for(name)
    if isinstance(found, backends.Missing):
        pytest.skip(found.reason)
    return found


@pytest.fixture(autouse=True)
def _keep_environment() -> Iterator[None]:
    with patch.dict(os.environ):  # the demo sets numbers of threads for libraries that it imports
        yield


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line; argparse leaves with an exception where others return."""
    try:
        code = main([str(one) for one in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_closed_form_gradient_matches_differences() -> None:
    draw = np.random.default_rng(0)
    weights = model.Weights(*(np.asarray(one, dtype=np.float64) for one in model.initial_weights(7)))
    context, target = draw.integers(0, 7, (5, model.CONTEXT)), draw.integers(0, 7, 5)
    _, gradient = model.closed_form(weights, context, target)
    for i, one in enumerate(weights):
        direction = draw.standard_normal(one.shape)
        step = 1e-6

        def moved(by: float, i: int = i, direction: np.ndarray = direction) -> float:
            replaced = [w + by * direction if j == i else w for j, w in enumerate(weights)]
            return float(model.loss(model.Weights(*replaced), context, target))

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert float((gradient[i] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["jax", "torch", "torch:cuda", "cupy"])
def test_every_gradient_rule_draws_the_same_curve(name: str, corpus: model.Corpus) -> None:
    fits = [model.fit(one, corpus, 40, lambda *_: None) for one in (backend("numpy"), backend(name))]
    assert tour.largest_difference(fits[0].losses, fits[1].losses) < 1e-5
    assert fits[1].held_out == pytest.approx(fits[0].held_out, abs=1e-5)


def test_fitting_beats_the_frequencies(corpus: model.Corpus) -> None:
    fit = model.fit(backend("numpy"), corpus, 150, lambda *_: None)
    counts = np.bincount(corpus.fitted)
    p = counts[counts > 0] / len(corpus.fitted)
    assert fit.losses[0] == pytest.approx(math.log(len(corpus.alphabet)), abs=0.3)
    assert fit.held_out < -float((p * np.log(p)).sum()) - 0.5


def test_corpus_keeps_common_characters_and_holds_the_end_out() -> None:
    rare = "".join(chr(0x4E00 + i) for i in range(300))
    corpus = model.make_corpus("mixed", "ab  \n\tc" * 3000 + rare)
    assert len(corpus.alphabet) == model.VOCABULARY
    assert corpus.decode(corpus.fitted[:8]) == "ab cab c"
    assert len(corpus.held_out) == pytest.approx(len(corpus.fitted) / 9, rel=0.01)
    assert corpus.decode(corpus.held_out[-1:]) == model.STAND_IN


def test_bundled_text_is_english() -> None:
    corpus = model.read_corpus(None)
    assert len(corpus.fitted) > 100_000
    assert "the " in corpus.decode(corpus.held_out)


def test_demo_shows_every_part(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    code, out, err = run(capsys, "demo", "--text", text, "--steps", 30, "--backend", "numpy")
    assert (code, err) == (0, "")
    for part in (
        "Backends",
        np.__version__,
        "words.txt",
        "held-out loss",
        "T = 0.25",
        "top_p = 0.9",
        "Every answer agrees",
    ):
        assert part in out
    rows = {tuple(re.findall(r"-?\d\.\d{4}", line)) for line in out.splitlines()}
    assert ("0.0900", "0.2447", "0.6652") in rows
    assert ("0.0819", "-0.0220", "-0.0599") in rows
    assert "\x1b" not in out


def test_demo_says_when_backends_disagree(
    capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend("torch")
    fit = model.fit

    def astray(one: backends.Backend, *rest: object) -> model.Fit:
        result = fit(one, *rest)  # type: ignore[arg-type]
        shift = 0.01 if one.name == "torch" else 0.0
        return model.Fit(one, result.weights, [loss + shift for loss in result.losses], result.held_out)

    monkeypatch.setattr(tour, "fit", astray)
    code, out, _ = run(capsys, "demo", "--text", text, "--steps", 5, "--backend", "numpy", "torch")
    assert code == 1
    assert "1.0e-02 nats at most ✗" in out
    assert "Not every answer agrees" in out


def test_demo_says_when_the_example_is_wrong(
    capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [(label, lambda x: x * math.nan, expected) for label, _, expected in tour._EXAMPLE[:1]]
    monkeypatch.setattr(tour, "_EXAMPLE", wrong)
    code, out, _ = run(capsys, "demo", "--text", text, "--steps", 1, "--backend", "numpy")
    assert code == 1
    assert "0.6652  ✗" in out


def test_demo_bears_a_text_of_one_character(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * 3000, encoding="utf-8")
    code, out, _ = run(capsys, "demo", "--text", path, "--steps", 3, "--backend", "numpy")
    assert code == 0
    assert "1 symbols" in out


@pytest.fixture(scope="module")
def fitted(corpus: model.Corpus) -> model.Fit:
    return model.fit(backend("numpy"), corpus, 30, lambda *_: None)


PROMPT = "the others"


def test_texts_follow_their_style(corpus: model.Corpus, fitted: model.Fit) -> None:
    length = 60
    texts = writing.write_text(fitted, fitted.backend, corpus, PROMPT, length, seed=1)
    rows = dict(zip((style.name for style in writing.STYLES), texts, strict=True))
    # The ranks of the characters drawn, among what the model holds likely after what stands before them.
    ranks = {}
    for name, text in rows.items():
        numbers = corpus.encode(PROMPT + text)
        before = np.asarray([numbers[i : i + model.CONTEXT] for i in range(length)])
        z = model.logits(fitted.weights, before)
        drawn = np.asarray(numbers[model.CONTEXT :])
        ranks[name] = (z > np.take_along_axis(z, drawn[:, None], axis=1)).sum(axis=1)
    assert ranks["T = 0"].max() == 0
    assert ranks["T = 1, top_k = 5"].max() < 5
    assert ranks["T = 1, top_k = 5"].max() > 0
    assert ranks["T = 1"].max() >= 5
    again = writing.write_text(fitted, fitted.backend, corpus, PROMPT, length, seed=2)
    assert [text == other for text, other in zip(texts, again, strict=True)] == [True] + [False] * (len(texts) - 1)


@pytest.mark.parametrize("name", ["jax", "torch", "torch:cuda", "cupy"])
def test_texts_are_those_of_numpy(name: str, corpus: model.Corpus, fitted: model.Fit) -> None:
    texts = writing.write_text(fitted, fitted.backend, corpus, PROMPT, 40, seed=1)
    assert writing.write_text(fitted, backend(name), corpus, PROMPT, 40, seed=1) == texts


def test_demo_says_where_texts_part() -> None:
    same = ["abcdef"] * len(writing.STYLES)
    other = [*same[:2], "abcXef", *same[3:]]
    assert "draws the same 6 texts as numpy" in tour._compare_texts("numpy", same, list(same))
    assert tour._compare_texts("numpy", same, other).endswith("rounding: T = 1 from character 4")


@pytest.mark.parametrize("names", [["numpy"], ["numpy", "torch"]])
def test_plot_is_a_figure(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path, names: list[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.image")
    for name in names:
        backend(name)
    path = tmp_path / "demo.png"
    code, out, _ = run(capsys, "demo", "--text", text, "--steps", 30, "--plot", path, "--backend", *names)
    assert code == 0
    assert str(path) in out
    pixels = pyplot.imread(path)
    assert pixels.shape[:2] == (900, 1800)
    # Ink in both halves: the curves and the bars.
    blue = np.abs(pixels[:, :, :3] - np.asarray([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    assert blue[:, :900].sum() > 500
    assert blue[:, 900:].sum() > 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "nunpy"], "unknown backend 'nunpy': choose from numpy, jax"),
        (["--text", "no/such/file"], "cannot read the text 'no/such/file': No such file"),
        (["--text", "."], "cannot read the text '.'"),
        (["--plot", "demo.xyz"], "cannot draw into 'demo.xyz': end its name in one of"),
        (["--plot", "no/such/demo.png"], "there is no directory 'no/such'"),
        (["--steps", "0"], "invalid positive number value: '0'"),
        (["--steps", "many"], "invalid positive number value: 'many'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_options_are_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, _, err = run(capsys, "demo", *arguments)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe" * 2000, "is not UTF-8 (byte 0)"), (b"short", "has 5 characters: at least 2000")],
)
def test_bad_texts_are_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    code, _, err = run(capsys, "demo", "--text", path)
    assert code == 2
    assert said in err


def test_missing_backends_name_their_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    code, _, err = run(capsys, "demo", "--backend", "jax")
    assert code == 2
    assert "pip install jax" in err
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "not installed (pip install jax)" in out


def test_no_backend_at_all_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "NAMES", ())
    code, _, err = run(capsys, "demo")
    assert code == 2
    assert "pip install numpy" in err


def test_demo_without_rich_names_its_package() -> None:
    program = "import sys; sys.modules['rich'] = None\nfrom polysoftmax.__main__ import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the demo needs rich, which is not installed: pip install rich matplotlib\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "nunpy"], "unknown backend 'nunpy': choose from numpy, numpy:readonly"),
        (["--json", "no/such/file.json"], "there is no directory 'no/such'"),
    ],
)
def test_check_explains_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, _, err = run(capsys, "check", *arguments)
    assert code == 2
    assert said in err


def test_check_hands_its_options_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(polysoftmax.testing, "report", lambda names, **how: asked.update(how, names=names) or 1)
    given = ("check", "softmax", "sample", "--backend", "numpy", "--quick", "--peers", "--json", "errors.json")
    code, _, _ = run(capsys, *given)
    assert code == 1
    how = {"backends": ["numpy"], "quick": True, "peers": True, "json": Path("errors.json")}
    assert asked == {"names": ["softmax", "sample"], **how}


def test_info_names_versions_and_engines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", "/kernels")
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    assert re.search(rf"^polysoftmax +{re.escape(polysoftmax.__version__)}, ", out, re.MULTILINE)
    for package in ("numpy", "mpmath", "array-api-compat"):
        assert re.search(rf"^{package} +{re.escape(metadata.version(package))}$", out, re.MULTILINE)
    assert re.search(rf"^numpy +{re.escape(np.__version__)}, cpu$", out, re.MULTILINE)
    assert re.search(r"^CUDA cache +/kernels$", out, re.MULTILINE)
    if library := _library.load():
        assert f"kernels for {library.level}, compiled by {library.compiler}" in out
        assert re.search(r"^ +native: most \(", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("portable", 0, r"(?m)^engine +portable, from POLYSOFTMAX_ENGINE$"),
        ("auto", 0, r"(?m)^engine +auto, from POLYSOFTMAX_ENGINE$"),
        ("", 0, r"(?m)^engine +auto$"),
        ("bogus", 1, r"POLYSOFTMAX_ENGINE is set to 'bogus': unknown engine 'bogus': choose one of auto, portable"),
    ],
)
def test_info_shows_the_engine_of_the_environment(value: str, code: int, said: str) -> None:
    environment = {**os.environ, "POLYSOFTMAX_ENGINE": value}
    command = [sys.executable, "-m", "polysoftmax", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert re.search(said, done.stdout or done.stderr)


def test_no_message_names_an_extra_of_a_package_that_is_on_no_index() -> None:
    for root in (Path(polysoftmax.__file__).parent, Path(__file__).parent.parent / "docs"):
        for path in (one for one in root.rglob("*") if one.suffix in (".py", ".md") and "_build" not in one.parts):
            assert not re.search(r"pip install[^\n]*polysoftmax\[", path.read_text(encoding="utf-8")), path


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "polysoftmax", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    running.stdout.close()
    _, err = running.communicate()
    assert running.returncode == 1
    assert err == b""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"polysoftmax {polysoftmax.__version__}\n", "")
    code, out, _ = run(capsys)
    assert code == 0
    for command in ("demo", "check", "info"):
        assert f"    {command} " in out
