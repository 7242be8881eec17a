"""All CUDA kernels at once: how many there are, compiled into the cache, and what is counted in their machine code."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from polysoftmax.engines.cuda import __main__ as command
from polysoftmax.engines.cuda import _cache, _compile
from polysoftmax.engines.cuda._every import every_kernel
from polysoftmax.engines.cuda._plan import Machine, plan_rows
from tools import cuda_instructions


def test_the_kernels_are_few_enough_to_compile_them_all():
    """There were 3,494 when every length had the layout that is best for it, and no kernel served two of them."""
    kernels = every_kernel()
    assert len(kernels) <= 190
    assert len({kernel.name for kernel in kernels}) == len(kernels)


def test_a_folder_without_an_nvrtc_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip install --target .* nvidia-cuda-nvrtc"):
        command.load_nvrtc(tmp_path)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The kernels and architectures that were compiled, by nothing and in no other process, and an empty cache."""

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return SimpleNamespace(map=lambda work, jobs, chunksize: map(work, jobs))

        def __exit__(self, *_):
            pass

    def compile_kernel(kernel, arch):
        found.append((kernel.name, arch))
        return _compile.Compiled(b"code", "", 32, 0)

    found = []
    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(command, "compiler", lambda: "NVRTC 13.0")
    monkeypatch.setattr(_compile, "compiler", lambda: "NVRTC 13.0")
    monkeypatch.setattr(_compile, "compile_kernel", compile_kernel)
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    return found


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["cuda", *options])
    return command.main()


def test_all_kernels_are_compiled_into_the_cache(compiled, monkeypatch, capsys):
    for _ in range(2):
        assert run(monkeypatch, "--prepare", "--arch", "90") == 0
    assert sorted(compiled) == sorted((kernel.name, 90) for kernel in every_kernel())
    assert all(_cache.place_of(kernel, 90).exists() for kernel in every_kernel())
    assert f"NVRTC 13.0: {len(compiled)} of {len(compiled)} kernels in " in capsys.readouterr().out


def test_they_are_compiled_for_the_gpus_that_are_there(compiled, monkeypatch, capsys):
    monkeypatch.setattr(command, "targets_present", lambda: [80, 100])
    assert run(monkeypatch, "--prepare", "--match", "probabilities_float64") == 0
    assert {arch for _, arch in compiled} == {80, 100}
    monkeypatch.setattr(command, "targets_present", list)
    assert run(monkeypatch, "--prepare") == 2
    assert "no GPU here to prepare for: name its compute capability, such as --arch 90" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_to_is_seen(compiled, monkeypatch, capsys, tmp_path):
    (tmp_path / "cache").touch()
    assert run(monkeypatch, "--prepare", "--arch", "90", "--match", "sample_draw_leading") == 1
    assert "0 of 2 kernels in" in capsys.readouterr().out


def test_the_list_says_how_many_kernels_a_formula_has(compiled, monkeypatch, capsys):
    assert run(monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {name: int(count) for count, name in map(str.split, [one for one in lines if one[0] == " "])}
    assert counts.pop("kernels") == sum(counts.values()) == len(every_kernel())
    assert len(counts) == 11
    assert not compiled


SASS = """
\t.section\t.text.kernel
.text.kernel:
        /*0000*/                   S2R R3, SR_TID.X ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
.L_x_1:
        /*0020*/                   LDS.128 R8, [R2] ;
        /*0030*/                   MUFU.EX2 R9, R8 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.U16 desc[UR6][R2.64], R4 ;
        /*0060*/               @P3 EXIT ;
        /*0070*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   NOP ;
$__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath:
        /*00a0*/                   MOV R1, R2 ;
"""


def plan_of(staged=0, **changes):
    plan = plan_rows("softmax", "float32", "float32", 9, 512, aligned=True, general=False, machine=Machine(1, False))
    return plan._replace(kernel=replace(plan.kernel, **changes), staged=staged)


def test_instructions_are_counted_up_to_the_end_and_loops_as_often_as_they_run():
    code = cuda_instructions.parse(SASS)
    assert len(code) == 9
    plan = plan_of(packs=1, staged=3, width=4)
    # 9 instructions, of which 3 run three times, for 4 accesses of 4 entries.
    assert cuda_instructions.count(code, plan) == (9 + 2 * 3) / 16
    assert cuda_instructions.count(code, plan, r"MUFU\.EX2") == 3 / 16
    assert (cuda_instructions.accesses(code, "LDG"), cuda_instructions.accesses(code, "STG")) == ("16", "2, 4")


def test_a_row_that_is_read_in_chunks_counts_its_loops():
    code = cuda_instructions.parse(SASS.replace("LDS.128 R8, [R2]", "LDG.E.128.CONSTANT R8, desc[UR6][R2.64]"))
    assert cuda_instructions.count(code, plan_of(held=False, width=4)) == 3 / 4


@pytest.mark.parametrize(
    ("block", "registers", "shared", "expected"),
    [(512, 64, 2048, 2), (512, 65, 2048, 1), (128, 32, 0, 16), (64, 16, 0, 32), (256, 64, 49_152 + 1024, 4)],
)
def test_blocks_of_a_multiprocessor(block, registers, shared, expected):
    plan = plan_of()._replace(block=block, shared=shared)
    assert cuda_instructions.blocks(plan, registers) == expected


def test_the_lines_that_are_left_out_of_the_count_are_in_the_source():
    text = cuda_instructions._whole_rows(plan_of(), plan_of().kernel)
    assert all(line not in text for line in [*cuda_instructions.LEFT_OUT, "arguments.formula"])
