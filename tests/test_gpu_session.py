"""The run on a GPU where there is none: its dry run, what it does with stages that fail, and what it prepares."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

import polysoftmax as ps
from polysoftmax.engines import has_cuda_core
from polysoftmax.engines.cuda import _cache, _compile
from tools.gpu import environment, kernels, sanitizer, session, suite, supervisor, worker
from tools.gpu.asked import ROOT, Asked

torch = pytest.importorskip("torch")

SEED = 20_260_102


def command(*options, check=True):
    """Run the tool as a reader would, with no module on the path but those installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_session.py"), *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        check=check,
    )


def test_a_dry_run_from_the_command_to_the_report(tmp_path):
    from_command = command("--dry", "--stages", "env,smoke,bench", "--every", 30, "--seed", SEED, "--out", tmp_path)
    assert f"seed {SEED}" in from_command.stdout
    assert "everything passed" in from_command.stdout
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["stages"]) == ["env", "smoke", "bench"]
    for stage in results["stages"].values():
        assert (stage["ok"], stage["ended"], stage["items"]) == (True, "done", len(stage["records"]))
    assert len(results["stages"]["smoke"]["records"]) == 13
    assert results["versions"]["torch"] == torch.__version__
    assert str(ROOT) not in json.dumps(results)
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]

    for name in ("matplotlib", "rich"):
        pytest.importorskip(name)
    from tools import gpu_report

    assert gpu_report.main([str(tmp_path), "--into", str(tmp_path / "into")]) == 0
    (folder,) = (tmp_path / "into").iterdir()
    assert "-dry-" in folder.name
    assert "No figure here means anything" in (folder / "table.md").read_text(encoding="utf-8")


@pytest.fixture
def dry(tmp_path):
    return Asked(tmp_path, seed=SEED, dry=True)


WORKER = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tools.gpu.worker import write
    journal, items, skip = Path(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4])
    for item in items[skip:]:
        write(journal, {"name": item, "begun": True})
        if "crash" in item:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif "raise" in item:
            sys.exit("an error that nothing catches")
        elif "hang" in item:
            time.sleep(600)
        write(journal, {"name": item, "ok": True})
    """
)


def stand_in(journal, items):
    """A stage's process that does to its items what they say."""
    return lambda skip: [sys.executable, "-c", WORKER, str(ROOT), str(journal), items, str(skip)]


def test_an_item_that_crashes_or_hangs_does_not_take_the_others_along(tmp_path):
    journal = tmp_path / "stage.jsonl"
    run = stand_in(journal, "one,crash,two,hang,three,raise,four")
    found = supervisor.supervise(run, journal, seconds=60, patience=1.5)
    assert found.ended == "done"
    errors = {one["name"]: one.get("error") for one in found.records}
    assert list(errors) == ["one", "crash", "two", "hang", "three", "raise", "four"]
    assert [name for name, error in errors.items() if error is None] == ["one", "two", "three", "four"]
    assert errors["crash"] == "crashed: SIGSEGV"
    assert errors["hang"].startswith("hung: nothing happened for ")
    assert errors["raise"] == "crashed: exit status 1"


def test_a_stage_out_of_time_keeps_what_it_has(tmp_path):
    journal = tmp_path / "stage.jsonl"
    found = supervisor.supervise(stand_in(journal, "one,hang,two"), journal, seconds=2, patience=60)
    assert found == ("out of time", [{"name": "one", "ok": True}])


def test_a_process_that_never_begins_ends_its_stage(tmp_path):
    journal = tmp_path / "stage.jsonl"
    broken = [sys.executable, "-c", "raise SystemExit(7)"]
    found = supervisor.supervise(lambda skip: broken, journal, seconds=20, patience=20)
    assert found == ("crashed: exit status 7", [])


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    journal = tmp_path / "stage.jsonl"
    worker.write(journal, {"name": "one", "begun": True})
    with journal.open("a") as file:
        file.write('\n{"name": "one", "o')
    assert supervisor.read(journal) == ([], "one")
    worker.write(journal, {"name": "one", "ok": False})
    assert supervisor.read(journal) == ([{"name": "one", "ok": False}], "")


def test_a_stage_that_crashes_leaves_the_next_ones_to_run(dry, monkeypatch, capsys):
    seen = []

    def command_of(stage, asked, skip):
        journal = worker.journal_of(asked, session.STAGES[stage].module)
        seen.append(json.loads(path.read_text(encoding="utf-8"))["stages"].keys() if path.exists() else ())
        return stand_in(journal, f"softmax-float32-one,softmax-float32-{does[stage]},softmax-float32-two")(skip)

    does = {"smoke": "crash", "bench": "raise"}
    path = dry.out / "results.json"
    monkeypatch.setattr(session, "worker", command_of)
    assert session.run(("smoke", "bench"), dry) == 1
    # Each stage began once, and a second time after its crash; the second stage found the first one written down.
    assert [list(one) for one in seen] == [[], [], ["smoke"], ["smoke"]]
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    for stage in stages.values():
        assert [one["ok"] for one in stage["records"]] == [True, False, True]
    assert "FAILED softmax-float32-crash: crashed: SIGSEGV" in capsys.readouterr().out


def test_all_processes_of_a_stage_end_with_the_command(tmp_path):
    """As timeout(1) ends it."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tools.gpu import session, supervisor\n"
        "import signal\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended by a signal'))\n"
        "sleeper = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)']\n"
        f"supervisor.supervise(lambda _: sleeper, Path({str(tmp_path / 'stage.jsonl')!r}), seconds=600, patience=600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        sleeper = int(running.stdout.readline())
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(sleeper, 0)


def test_without_a_gpu_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = command("--out", tmp_path, check=False)
    assert found.returncode == 2
    assert found.stderr.endswith("has nothing to run: PyTorch finds no CUDA device\n")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(session, "find_spec", lambda name: name == "numpy")
    assert session.obstacle(needs_cuda=True) == "needs PyTorch built for CUDA: pip install torch"
    monkeypatch.setitem(sys.modules, "polysoftmax", None)
    assert "pip install array-api-compat" in session.obstacle(needs_cuda=True)


def test_the_formula_is_not_taken_for_a_kernel(monkeypatch):
    assert environment.without_kernels("cpu")
    monkeypatch.setattr(ps, "explain", lambda x, op: SimpleNamespace(engine="cuda"))
    assert environment.without_kernels("cpu") == ""


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        session.parse(["--stages", "smoke,smoek"])
    assert "there is no stage smoek: choose from env, kernels, smoke" in capsys.readouterr().err
    assert sum(one.seconds for one in session.STAGES.values()) == 475


@pytest.mark.skipif(not has_cuda_core(), reason="cuda.core is not installed")
def test_prepared_kernels_are_not_compiled_again(tmp_path, monkeypatch):
    text = "max-float32-37x3"
    found = command("--prepare", tmp_path, "--case", text).stdout
    wanted = kernels.needed(text=text)
    assert len(wanted) == len(list(tmp_path.glob("*.cubin"))) == 2
    last = found.splitlines()[-1]
    assert re.fullmatch(r"2 kernels: 0 from the cache, 2 compiled in .* MiB by NVRTC 13\.\d+ for sm_90", last)
    note = json.loads((tmp_path / kernels.NOTE).read_text(encoding="utf-8"))
    assert note == {"compiler": _compile.compiler(), "arch": 90, "kernels": 2}

    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(tmp_path))
    monkeypatch.delattr(_compile, "compile_kernel")
    for kernel in wanted:
        assert _cache.machine_code(kernel, 90).startswith(b"\x7fELF")


def test_kernels_of_another_compiler_are_named_as_such():
    summary = {"versions": {}, "smi": "", "compiler": "NVRTC 13.0", "cache": {"files": 9, "compiler": "NVRTC 13.5"}}
    assert "another compiler: none of them serves" in environment.lines(summary)[-1]
    summary["cache"]["compiler"] = "NVRTC 13.0"
    assert "9 kernels in the cache, prepared by NVRTC 13.0" in environment.lines(summary)[-1]


def test_what_a_sanitizer_says_is_read():
    assert sanitizer.verdict(0, f"{sanitizer.DONE}\n========= ERROR SUMMARY: 0 errors") == {}
    found = sanitizer.verdict(9, "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors")
    assert found == {"error": "exit status 9: 3 errors"}
    # A tool that refuses the device ends well, and has seen nothing.
    assert "Device not supported" in sanitizer.verdict(0, "========= Error: Device not supported")["error"]


def test_what_pytest_says_is_counted(tmp_path):
    report = tmp_path / "tests.xml"
    assert suite.counts(report) == {}
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
    )
    assert suite.counts(report) == {"tests": 4, "skipped": 1, "failed": ["b", "d"]}


def test_results_name_no_folder():
    error = FileNotFoundError(2, "No such file or directory", "/some/where/on/this/machine/libx.so")
    assert worker.in_brief(error) == "FileNotFoundError: [Errno 2] No such file or directory: 'libx.so'"
    assert worker.in_brief(ValueError("3/4 of a/b")) == "ValueError: 3/4 of a/b"
