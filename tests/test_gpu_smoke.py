"""The smoke cases of the run on a GPU: what is wrong is seen, and what they launch is found without one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

import polysoftmax as ps
from polysoftmax.engines.cuda import _compile, _devices
from tools.gpu import cases, fake, host, kernels, smoke
from tools.gpu.asked import Asked

torch = pytest.importorskip("torch")

SEED = 20_260_102


def test_cases_have_names_of_their_own():
    found = list(cases.smoke_cases())
    assert len({case.name for case in found}) == len(found) == 656
    names = [case.name for case in found]
    assert cases.choose(names, "softmax-bfloat16-37x3", 1) == ["softmax-bfloat16-37x3"]
    assert len(cases.choose(names, "-64x1000-top_k", 1)) == 16
    assert len(cases.choose(names, "", 10)) == 66


@pytest.fixture
def dry(tmp_path):
    return Asked(tmp_path, seed=SEED, dry=True)


@pytest.mark.parametrize(
    "name", ["softmax-float32-37x129", "softmax_gradient-bfloat16-9x129", "logsumexp-float16-37x1000"]
)
def test_a_wrong_answer_fails_its_case(dry, monkeypatch, capsys, name):
    run = smoke.start(dry)
    assert run(name)["ok"]
    right = smoke.answer

    def wrong(case, given, seed, engine):
        y = right(case, given, seed, engine)
        if given.x.dtype != torch.float64:
            y[0] *= 1.02
        return y

    monkeypatch.setattr(smoke, "answer", wrong)
    found = run(name)
    assert not found["ok"]
    assert found["share_of_bound"] > 1
    assert f"FAILED {name} --seed {SEED}: share_of_bound" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sample-float32-64x1000-return_logprobs", "truncate-float32-64x1000-top_k=20"])
def test_a_wrong_draw_fails_its_case(dry, name):
    (case,) = (one for one in cases.smoke_cases() if one.name == name)
    given = smoke.arguments(torch, case, SEED, "cpu")
    y = smoke.answer(case, given, SEED, "portable")
    assert smoke.compare(torch, case, given.x, y, y)["ok"]
    if case.base == "truncate":
        assert smoke.compare(torch, case, given.x, torch.zeros_like(y), y) == {"ok": False, "entries": 64_000}
        return
    tokens, logprobs = y
    others = torch.where(tokens < 0, tokens, (tokens + 1) % case.n)
    wrong = int((tokens >= 0).sum())
    assert smoke.compare(torch, case, given.x, (others, logprobs), y) == {"ok": False, "tokens": wrong, "logprobs": 0}
    later = logprobs + 1e-3
    found = smoke.compare(torch, case, given.x, (tokens, later), y)
    assert (found["ok"], found["tokens"]) == (False, 0)
    assert found["logprobs"] == int(torch.isfinite(logprobs).sum())


def test_an_entry_that_no_kernel_writes_is_seen(monkeypatch):
    class Device(fake.FakeDevice):
        pass

    launched = []
    smoke.watch(Device, launched)
    monkeypatch.setattr(fake, "FakeDevice", Device)
    (case,) = (one for one in cases.smoke_cases() if one.name == "softmax-float32-5x16384")
    given = smoke.arguments(torch, case, SEED, "cpu")
    with fake.fake_gpu(lambda plan: None):
        y = smoke.answer(case, given, SEED, "cuda")
        tokens = ps.sample(given.x, 3)
    assert y.isnan().all()
    assert (tokens == smoke.POISONED_TOKEN).all()
    found = smoke.compare(torch, case, given.x, y, smoke.reference(case, given, SEED))
    # Three rows are to be NaN.
    assert found == {"ok": False, "nan": 2 * 16384}
    assert [name.split("_float32")[0] for name in launched] == ["probabilities", "sample_masses", "sample_draw"]


def test_a_case_that_no_kernel_answers_fails():
    assert smoke.by_kernels({"ok": True}, []) == {"ok": False, "error": "no kernel ran"}
    assert smoke.by_kernels({"ok": True}, ["a_kernel"]) == {"ok": True}


def test_a_case_alone_has_the_numbers_that_it_had_among_the_others(dry):
    (case,) = (one for one in cases.smoke_cases() if one.name == "softmax-float32-37x129-where-temperature")
    one, two, other = (smoke.arguments(torch, case, seed, "cpu") for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(one.x.nan_to_num(), two.x.nan_to_num())
    assert torch.equal(one.options["where"], two.options["where"])
    assert not torch.equal(one.x.nan_to_num(), other.x.nan_to_num())
    again = Asked(dry.out, SEED, case.name, dry=True)
    assert smoke.names(again) == [case.name]


def test_the_device_is_used_as_the_engine_uses_it(dry, monkeypatch):
    """What the stages patch and read of the engine, which no other test reaches without a GPU."""
    for name, parameters in {"empty": ["self", "shape", "dtype"], "launch": ["self", "plan", "arguments"]}.items():
        assert list(inspect.signature(getattr(_devices._TorchDevice, name)).parameters) == parameters
    with host._without_launches():
        one = SimpleNamespace(stream=lambda _: 7, ordinal=0, target=90)
        _devices._TorchDevice.launch(one, None, ())

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(_compile, "target_of", lambda arch: arch)
    device = _devices._TorchDevice(0)
    monkeypatch.setattr(_devices, "device_of", lambda _: device)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(kernels, "compile_all", lambda found, arch: {"found": found, "arch": arch})
    text = "softmax-bfloat16-37x129"
    asked = Asked(dry.out, SEED, text)
    assert kernels.names(asked) == ["compile"]
    assert kernels.start(asked)("compile") == {"found": kernels.needed(text=text), "arch": 90}


def test_kernels_are_found_without_a_gpu():
    (found,) = kernels.needed(text="softmax-bfloat16-37x129")
    assert (found.kind, found.x, found.general) == ("probabilities", "bfloat16", False)
    assert len(kernels.needed(text="sample-float32-33x50257-top_k=20")) == 2
    names = {one.kind for one in kernels.needed(text="cross_entropy_grad-bfloat16")}
    assert names == {"reductions", "loss_slopes"}
