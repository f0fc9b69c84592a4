"""The gate: kernels of the real Qwen3-32B compiled for GPUs that are not here keep to registers, units and budgets."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bwla_compiler.codegen.triton_aot import Compiled, Resources, compile_kernel, parse_target
from bwla_compiler.codegen.triton_gate import violations
from bwla_compiler.codegen.triton_sass import Executed, executed, innermost_loops, instructions
from bwla_compiler.codegen.triton_spec import Emitted, Work
from bwla_compiler.emit import model_groups
from bwla_compiler.recipe import load_recipe
from tests.codegen import qwen3_32b
from tests.wider import wider

H100 = parse_target("cuda:90")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def broken(kernels: list[Emitted], target: str) -> list[str]:
    """Return what kernels break on a target, each with the kernel's title."""
    found = []
    for emitted in kernels:
        compiled = compile_kernel(emitted, parse_target(target))
        found += [f"{emitted.name} ({emitted.title}): {words}" for words in violations(compiled)]
    return found


def test_one_token_of_the_widest_linear_keeps_to_its_budget() -> None:
    kernels = qwen3_32b.launched(qwen3_32b.linear_kernel(qwen3_32b.UP, H100, 1), 1)
    assert broken(kernels[-1:], "cuda:90") == []


@pytest.mark.parametrize("target", wider("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"))
@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 2048])
def test_linears(tokens: int, target: str) -> None:
    assert broken(qwen3_32b.linears(parse_target(target), tokens), target) == []


@pytest.mark.parametrize("target", wider("cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"))
def test_what_stands_around_the_linears(target: str) -> None:
    gpu = parse_target(target)
    before = [emitted for tokens in (1, 8, 32) for emitted in qwen3_32b.prologues(gpu, tokens)]
    assert broken([*dict.fromkeys(before), *qwen3_32b.heads(gpu)], target) == []


@pytest.mark.exhaustive
def test_these_are_the_specs_of_the_real_plan() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**qwen3_32b.SIZES, num_hidden_layers=1)).eval()
    found = {group.spec for group in model_groups(model, load_recipe("bwla-w1a6"))}
    assert found == set(qwen3_32b.SPECS)


# ---------------------------------------------------------------- the gate itself

GOOD = Resources(100, 0, 0, 1000, 500, 8, 0, ("IMMA.16832.S8.S8",), 1.0, 1.1)
SKINNY = Emitted("linear_dot", "t", "", (("codes", "*i8"),), 2, 4, Work(64 * 5120, 8))


@pytest.mark.parametrize(
    "change, word",
    [
        ({}, ""),
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"spills": 3}, "3 spills"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory, of 232448"),
        ({"instructions": 12}, "a stub of 12 instructions"),
        ({"packed_assembly": True}, "several elements"),
        ({"units": ("HMMA.1688",)}, "none of IMMA.16832"),
        ({"per_weight": 1.3}, "1.30 instructions a weight, of 1.25"),
        ({"per_weight": None}, "do not tell"),
    ],
)
def test_each_limit_is_held(change: dict[str, object], word: str) -> None:
    found = violations(Compiled(SKINNY, H100, {}, dataclasses.replace(GOOD, **change)))
    assert len(found) == bool(word)
    assert all(word in line for line in found)


def test_units_and_budgets_depend_on_the_kernel() -> None:
    decode = dataclasses.replace(SKINNY, name="linear_gemv")
    assert violations(Compiled(decode, H100, {}, dataclasses.replace(GOOD, units=("IDP.4A.U8.S8",)))) == [
        "1.00 instructions a weight, of 0.75: t"
    ]
    prompt = dataclasses.replace(SKINNY, warps=8, work=Work(128 * 5120, 128))
    assert violations(Compiled(prompt, H100, {}, GOOD)) == ["none of IGMMA in its code"]
    amd = Compiled(prompt, parse_target("hip:gfx942"), {}, dataclasses.replace(GOOD, units=(), per_weight=None))
    assert violations(amd) == []


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, RZ ;
        /*0020*/                   LOP3.LUT R2, R2, 0x80808080, RZ, 0x6a, !PT ;
        /*0030*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0060*/               @P1 BRA 0x50 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80 ;
"""


def test_trips_follow_from_the_products() -> None:
    code = instructions(SASS)
    assert [one.integer_products for one in code[:4]] == [0, 16 * 8 * 32, 0, 16 * 8 * 32]
    assert [(loop.first, loop.last) for loop in innermost_loops(code)] == [(2, 4), (5, 6)]
    # nine products, one before the loop and eight in it: eight trips of three; five of two; four lines stand alone
    assert executed(code, needed=9 * 4096, slabs=5) == Executed(8 * 3 + 5 * 2, 8 * 3 + 5 * 2 + 4)
    assert executed(code, needed=4096, slabs=5) is None, "fewer products than the code has at least"
    assert executed(instructions("/*0000*/ MOV R1, R2 ;"), needed=4096) is None


def test_products_of_several_units() -> None:
    lines = ("IDP.4A.U8.S8 R1, R2, R3, R4", "IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR8]", "HGMMA.64x16x8.F32.TF32 R2")
    code = instructions("".join(f"/*00{i}0*/ {line} ;\n" for i, line in enumerate(lines)))
    assert [one.integer_products for one in code] == [4 * 32, 64 * 128 * 32 // 4, 0]
    assert code[2].float_products == 64 * 16 * 8 // 4
