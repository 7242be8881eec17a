"""`check`: what it says of a right library, of a bug in each function, of other people's functions and libraries."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import testing
from polysoftmax.__main__ import main
from polysoftmax.testing import CHECKS
from polysoftmax.testing._words import threefry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_every_public_function_has_a_check() -> None:
    public = {name for name in polysoftmax.__all__ if callable(getattr(polysoftmax, name))}
    public |= {f"random.{name}" for name in polysoftmax.random.__all__}
    # softmax from a file to a file is one for NumPy alone.
    public |= {f"streaming.{name}" for name in polysoftmax.streaming.__all__ if name != "softmax"}
    methods = {f"Partial.{name}" for name in ("logsumexp", "softmax", "log_prob")}
    assert set(CHECKS) == (public - {"Partial", "LinearGradients"}) | methods


def test_all_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    assert main(["check", "--backend", "numpy", "torch", "--quick", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "numpy, engine portable" in shown
    assert "torch, engine auto" in shown
    assert re.search(r"^softmax +0\.\d+ +[\d.]+ +0\.\d+ +same +\d+$", shown, re.MULTILINE)
    assert re.search(r"^All \d+ cases are right\.$", shown, re.MULTILINE)
    results = json.loads(path.read_text())["results"]
    assert {one["function"] for one in results} == set(CHECKS)
    assert {(one["library"], one["engine"]) for one in results} == {
        (library, engine) for library in ("numpy", "torch") for engine in ("auto", "portable")
    }
    assert all(0 <= one["of_bound"] <= 1 and one["cases"] for one in results)
    assert {one["dtype"] for one in results if one["function"] == "softmax"} == {"bfloat16", "float32"}


def test_the_words_that_draws_are_checked_by_are_those_of_random123() -> None:
    ones = 0xFFFFFFFF
    keys = [[0, 0], [ones, ones], [0x13198A2E, 0x03707344]]
    counters = [[0, 0], [ones, ones], [0x243F6A88, 0x85A308D3]]
    answers = [[0x6B200159, 0x99BA4EFE], [0x1CB996FC, 0xBB002BE7], [0xC4923A9C, 0x483DF7A0]]
    assert threefry(keys, counters).tolist() == answers


def test_an_edge_is_left_open_and_no_more() -> None:
    """Half of the mass is at the first token, to the last bit: top_p=0.5 may leave one or two, and never three."""
    truncate = next(one for one in CHECKS["truncate"].cases if one.name == "nothing")
    case = replace(truncate, given={"logits": np.asarray([[0.0, 0.0, -40.0, -41.0]]), "top_p": 0.5})
    (want,) = testing.reference(CHECKS["truncate"], case, "float32")
    rows = {left: np.asarray([[0.0 if i < left else -math.inf for i in range(4)]]) for left in (1, 2, 3)}
    assert [bool((want.excess(row) <= 1).all()) for row in rows.values()] == [True, True, False]


# Bugs, each a little wrong


def scaled(y: Any) -> Any:
    return np.asarray(y * (1 + 2.0**-18)).astype(y.dtype)


def first_scaled(y: Any) -> Any:
    return (scaled(y[0]), *y[1:])


def last_scaled(y: Any) -> Any:
    return polysoftmax.Partial(*y[:2], scaled(y[2]), y[3])


def weight_scaled(y: Any) -> Any:
    return y[0], y[1]._replace(weight=scaled(y[1].weight))


def next_token(y: Any) -> Any:
    return (y[0] + 1, *y[1:]) if isinstance(y, tuple) else y + 1


def last_two_swapped(y: Any) -> Any:
    values, tokens = y
    return values, np.concatenate([tokens[..., :-2], tokens[..., :-3:-1]], axis=-1)


def one_more(y: Any) -> Any:
    return y[0], y[1] + 1


def one_removed(y: Any) -> Any:
    y = y.copy()
    y[..., -1] = -math.inf
    return y


def one_bit(y: Any) -> Any:
    return y ^ (np.arange(y.size).reshape(y.shape) == y.size - 1)


def one_word(y: Any) -> Any:
    return one_bit(y) if y.ndim else y


def wrong_operation(y: Any) -> Any:
    return SimpleNamespace(op="log_softmax", shape=y.shape, engine=y.engine)


def not_done(function: Callable[..., Any]) -> Callable[..., Any]:
    del function
    return lambda _: None


def not_chosen(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _: function("auto")


BUGS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(CHECKS, scaled),
    "partial": last_scaled,
    "merge": last_scaled,
    "merge_outputs": first_scaled,
    "truncate": one_removed,
    "sample": next_token,
    "streaming.sample": next_token,
    "linear_cross_entropy_value_and_grad": weight_scaled,
    "top_log_probs": last_two_swapped,
    "speculate": one_more,
    **dict.fromkeys(("random.key", "random.split", "random.fold_in", "random.bits", "random.threefry2x32"), one_word),
    "unpack_mask": one_bit,
    "explain": wrong_operation,
}
INSTEAD = {"engine": not_chosen, "set_num_threads": not_done}


def break_function(monkeypatch: pytest.MonkeyPatch, name: str, instead: Callable[..., Any]) -> None:
    *path, last = name.split(".")
    monkeypatch.setattr(functools.reduce(getattr, path, polysoftmax), last, instead)


def check(path: Path, *arguments: str) -> tuple[int, str]:
    """Run a quick check, and return its exit code and the first program that shows a failure."""
    code = main(["check", *arguments, "--quick", "--json", str(path / "figures.json")])
    results = json.loads((path / "figures.json").read_text())["results"]
    return code, next((failure["code"] for one in results for failure in one["failures"]), "")


@pytest.mark.parametrize("name", CHECKS)
def test_a_bug_is_found_and_shown(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functools.reduce(getattr, name.split("."), polysoftmax)
    spoil = BUGS[name]

    def wrong(*args: Any, **options: Any) -> Any:
        return spoil(right(*args, **options))

    with monkeypatch.context() as patch:
        break_function(patch, name, INSTEAD[name](right) if name in INSTEAD else wrong)
        code, program = check(tmp_path, name, "--backend", "numpy")
        assert code == 1
        assert program in capsys.readouterr().out
        with pytest.raises(AssertionError):
            exec(program, {})
    exec(program, {})  # the right function has nothing to complain of
    assert len(program) < 1500


@pytest.mark.parametrize("name", ["softmax", "log_prob"])
def test_a_bit_that_depends_on_the_batch(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if polysoftmax.explain(np.zeros(1), "softmax").engine != "native":
        pytest.skip("only the native kernels promise it")
    right = getattr(polysoftmax, name)

    def wrong(x: Any, *args: Any, **options: Any) -> Any:
        y = right(x, *args, **options)
        is_batch = x.ndim > 1 and len(x) > 1 and y.dtype == np.float32
        return np.where(y != 0, np.nextafter(y, np.float32(0)), y) if is_batch else y

    with monkeypatch.context() as patch:
        patch.setattr(polysoftmax, name, wrong)
        code, program = check(tmp_path, name, "--backend", "numpy")
        assert code == 1
        assert "row 0 has other bits alone than in the batch" in capsys.readouterr().out
        with pytest.raises(AssertionError):
            exec(program, {})
    exec(program, {})


def test_bits_of_another_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if polysoftmax.explain(np.zeros(1), "softmax").engine != "native":
        pytest.skip("only the native kernels promise it")
    right = polysoftmax.entropy

    def wrong(x: Any, **options: Any) -> Any:
        y = right(x, **options)
        return torch.nextafter(y, y + 1) if torch.is_tensor(y) else y

    monkeypatch.setattr(polysoftmax, "entropy", wrong)
    assert main(["check", "entropy", "--backend", "numpy", "torch", "--quick"]) == 1
    assert "entropy of 'rows' in float32, torch: other bits than on numpy" in capsys.readouterr().out


def test_an_exception_and_a_wrong_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(x: Any, **_: Any) -> Any:
        msg = "no such luck"
        raise RuntimeError(msg)

    for wrong, said in ((raises, "RuntimeError: no such luck"), (lambda x, **_: np.zeros(x.shape), "dtype float64")):
        with monkeypatch.context() as patch:
            patch.setattr(polysoftmax, "softmax", wrong)
            code, program = check(tmp_path, "softmax", "--backend", "numpy")
            assert code == 1
            assert said in capsys.readouterr().out
            with pytest.raises((AssertionError, RuntimeError)):
                exec(program, {})


# What others have


def plain_softmax(x: Any, axis: int = -1) -> Any:
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def sharp_softmax(x: Any, axis: int = -1) -> Any:
    return plain_softmax(x * (1 + 2.0**-20), axis)


def test_a_function_of_yours() -> None:
    small = testing.check(plain_softmax, "softmax", xp=np, dtypes=["float64"], quick=True)
    assert small
    assert small.results[0].left_out > 0
    report = testing.check(sharp_softmax, "softmax", xp=np, dtypes=["float32"])
    assert not report
    assert "times the error allowed" in str(report)
    with pytest.raises(AssertionError, match="cases fail"):
        report.raise_failures()
    with pytest.raises(AssertionError):
        exec(report.failures[0].code, {"sharp_softmax": sharp_softmax})


def test_a_right_function_of_yours() -> None:
    def my_softmax(x: Any, **options: Any) -> Any:
        return polysoftmax.softmax(x, **options)

    report = testing.check(my_softmax, "softmax", backends=["numpy"], dtypes=["float32"], quick=True)
    assert report
    report.raise_failures()
    assert re.fullmatch(r"All \d+ cases are right\.", str(report))


def test_which_library_a_function_takes() -> None:
    with pytest.raises(TypeError, match="say which library the function takes"):
        testing.check(plain_softmax, "softmax")
    with pytest.raises(ValueError, match="there is no check of 'plain_softmax': choose from softmax, "):
        testing.check(plain_softmax, xp=np)


def test_a_library_of_yours() -> None:
    strict = pytest.importorskip("array_api_strict")
    report = testing.check(xp=strict, quick=True)
    report.raise_failures()
    assert {one.function for one in report.results} == set(CHECKS)
    assert {one.library for one in report.results} == {"array_api_strict"}


def test_a_library_of_yours_that_is_wrong() -> None:
    """A namespace as thin as can be, whose sums lose their last digits."""
    strict = pytest.importorskip("array_api_strict")
    mine = ModuleType("mine")
    mine.__dict__.update({name: getattr(strict, name) for name in strict.__all__})
    adapter = testing.adapt(mine, "mine")
    assert adapter.can.default_float == "float64"
    assert testing.check(polysoftmax.softmax, xp=adapter, quick=True)

    def short(x: Any, **options: Any) -> Any:
        y = polysoftmax.logsumexp(x, **options)
        return strict.astype(strict.astype(y, strict.float32), y.dtype)

    report = testing.check(short, "logsumexp", xp=adapter, dtypes=["float32", "float64"])
    assert [one.failed > 0 for one in report.results] == [False, True]  # float32 has these digits alone


def test_peers_and_what_they_get_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "jax", "scipy"):
        pytest.importorskip(name)
    assert main(["check", "random.bits", "--backend", "numpy", "--quick", "--peers"]) == 0
    shown = capsys.readouterr().out
    lines = re.findall(r"^(.+?)  +(scipy|jax|torch|scipy on torch)  +(.+?)  +(.+?)  +(\S.*)$", shown, re.MULTILINE)
    assert len(lines) == 11
    assert all(ours == right for _, _, _, ours, right in lines)
    assert all(answer != right for _, _, answer, _, right in lines)
    assert re.search(r"^softmax +float32( +[\d.]+){4}$", shown, re.MULTILINE)
    assert "| bfloat16 | KL | 0.1 |" in shown


def test_a_terminal_gets_a_table_and_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for variable in ("NO_COLOR", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["check", "entropy", "--backend", "numpy", "--quick"]) == 0
    assert "\x1b[32m" in capsys.readouterr().out
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["check", "entropy", "--backend", "numpy", "--quick"]) == 0
    assert "\x1b[32m" not in capsys.readouterr().out


def test_without_rich() -> None:
    program = (
        "import sys; sys.modules['rich'] = None; sys.stdout.isatty = lambda: True\n"
        "from polysoftmax.__main__ import main; sys.exit(main(['check', 'entropy', '--backend', 'numpy', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^entropy +[\d.]+", done.stdout, re.MULTILINE)
