"""Emit: the specs of a model, float or packed, and what lands in the folder."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bwla_compiler import emit as emit_module
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.checkpoint import hf
from bwla_compiler.codegen import build
from bwla_compiler.codegen.isa import ISAS, Isa, supported
from bwla_compiler.codegen.triton_aot import Compiled, GpuTarget, Resources, parse_target
from bwla_compiler.codegen.triton_spec import Emitted
from bwla_compiler.emit import emit, group_kernels, model_groups
from bwla_compiler.errors import BuildError, PlanError
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.spec import LinearSpec, TransformSpec
from tests import tiny
from tests.codegen.emulated import COMPILER
from tests.wider import wider

QUICK = {
    "calibration.sequences": 2,
    "calibration.length": 16,
    "signs.sweeps": 1,
    "psp.iterations": 1,
    "transform.iterations": 1,
    "tuning.steps": 0,
}


def quick(name: str, **changes: object) -> Recipe:
    return load_recipe(name, {**QUICK, **changes})


@pytest.mark.parametrize(
    "architecture, recipe",
    [
        ("opt", quick("hadamard-rtn")),
        ("phi3", quick("rtn", **{"weights.planes": 1.5})),
        (
            "llama",
            quick(
                "bwla-w1a6",
                overrides=[{"pattern": "*k_proj", "keep": True}, {"pattern": "*up*", "set": {"psp.hidden_over": 16}}],
            ),
        ),
    ],
    ids=["opt-hadamard", "phi3-planes", "llama-overrides"],
)
def test_a_float_model_has_the_specs_that_quantizing_gives(architecture: str, recipe: Recipe) -> None:
    model = tiny.make(architecture)
    want = model_groups(model, recipe)
    tokens = tiny.ids(batch=2, length=16) if recipe.needs_calibration else None
    report = quantize_model(model, recipe, tokens)
    hf.attach(model, recipe=recipe, plan=report.plan, bits=report.bits)
    assert set(model_groups(model, recipe)) == set(want)


@pytest.mark.exhaustive
def test_members_that_share_an_input_are_one_spec() -> None:
    groups = model_groups(tiny.make("llama"), load_recipe("bwla-w1a6"))
    shapes = {(g.spec.in_features, g.spec.out_features): len(g.linears) for g in groups}
    assert shapes == {(64, (64, 32, 32)): 2, (64, (64,)): 2, (64, (96, 96)): 2, (96, (64,)): 2}
    (down,) = [g for g in groups if g.spec.in_features == 96]
    assert down.linears == (("model.layers.0.mlp.down_proj",), ("model.layers.1.mlp.down_proj",))
    assert down.spec.transform.online


@pytest.mark.parametrize("architecture", ["opt", *wider("gemma2")])
def test_a_model_without_values_has_the_same_specs(architecture: str) -> None:
    recipe = load_recipe("bwla-w1a6")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.CONFIGS[architecture]()).eval()
    assert model_groups(empty, recipe) == model_groups(tiny.make(architecture), recipe)


def test_a_model_without_linears_to_quantize() -> None:
    recipe = load_recipe("bwla-w1a6", {"overrides": [{"pattern": "*", "keep": True}]})
    with pytest.raises(PlanError, match="no linear is quantized"):
        model_groups(tiny.make("llama"), recipe)


# ---------------------------------------------------------------- kernels of a spec


def names(spec: LinearSpec, target: str) -> list[str]:
    return [kernel.name for kernel in group_kernels(spec, parse_target(target))]


def test_a_spec_has_the_kernels_that_it_runs() -> None:
    plain = LinearSpec(256, (64, 32))
    ranked = dataclasses.replace(plain, rank=4)
    assert names(plain, "cuda:90") == ["prologue", "linear_gemv", "linear_dot", "linear_dot"]
    # of few tokens what rounds them takes the low-rank pair's first half along
    assert names(ranked, "cuda:90") == [
        "prologue", "linear_gemv", "prologue", "linear_dot", "prologue", "linear_dot", "low_rank",
    ]  # fmt: skip
    # without a dot product of bytes, one token and a small batch take the same kernel
    assert names(plain, "hip:gfx942") == ["prologue", *["linear_dot"] * 2]
    assert names(dataclasses.replace(plain, activation_bits=16), "cuda:90") == ["prologue", *["linear_dot"] * 2]


def test_few_rows_of_many_channels_are_summed_in_parts() -> None:
    assert "linear_sum" in names(LinearSpec(25600, (5120,)), "cuda:90")


def test_factors_too_large_for_a_program_run_in_stages() -> None:
    spec = LinearSpec(25600, (64,), transform=TransformSpec("kronecker", 160, 160, True, True, True))
    stages = [dict(k.parameters) for k in group_kernels(spec, parse_target("cuda:90")) if k.name == "prologue"]
    assert [("right" in p, "left" in p, p["out"]) for p in stages] == [
        (True, False, "*fp32"), (False, True, "*fp32"), (False, False, "*i8"),
    ]  # fmt: skip


# ---------------------------------------------------------------- the folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the compiler, which its own tests hold; the list tells what it was given."""
    seen: list[str] = []

    def compiled(emitted: Emitted, target: GpuTarget) -> Compiled:
        seen.append(emitted.name)
        shared = 300_000 if emitted.name == "prologue" else 1000
        return Compiled(emitted, target, {"ptx": b"text", "cubin": b"code"}, Resources(40, 0, 0, shared, 500, 8, 0))

    monkeypatch.setattr(emit_module, "compile_kernel", compiled)
    return seen


def test_the_folder_holds_each_kernel_once(no_compiler: list[str], tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    report = emit(tiny.make("llama"), "cuda:90", tmp_path / "out", progress=lambda *step: steps.append(step))
    assert len(no_compiler) == len(report.kernels)
    assert steps[-1] == ("compiling for cuda:90", len(report.kernels), len(report.kernels))
    files = {name for kernel in report.kernels for name in kernel.files}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files | {"resources.json"}
    assert len(files) == 3 * len(report.kernels)
    saved = json.loads((tmp_path / "out" / "resources.json").read_text())
    assert saved["target"] == "cuda:90"
    assert saved["kernels"][0]["resources"]["registers"] == 40
    assert saved["groups"][0]["spec"]["in_features"] == 64
    used = {number for kernel in report.kernels for number in kernel.groups}
    assert used == set(range(len(report.groups)))
    assert {kernel.name: kernel.holds for kernel in report.kernels}["prologue"] is False, "300000 bytes are too many"


def test_the_processor_gets_its_library(tmp_path: Path) -> None:
    if build.compiler_version() is None:
        pytest.skip("no C++ compiler here")
    report = emit(tiny.make("llama"), "cpu", tmp_path)
    (kernel,) = report.kernels
    source, library = (tmp_path / name for name in kernel.files)
    assert "generated" in source.read_text()
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert kernel.groups == (0, 1, 2, 3)


@pytest.fixture
def no_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels are the same for every model: spare the capture of one."""
    monkeypatch.setattr(emit_module, "model_groups", lambda model, recipe: ())


@pytest.mark.usefixtures("no_specs")
@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_that_this_machine_need_not_have(
    isa: Isa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, Isa]] = []

    def library(source: str, isa: Isa) -> Path:
        built.append((source, isa))
        (tmp_path / "library").write_bytes(b"code")
        return tmp_path / "library"

    monkeypatch.setattr(emit_module, "build", library)
    report = emit(nn.Module(), f"cpu:{isa}", tmp_path / "out")
    assert report.target == f"cpu:{isa}"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"kernels-{isa}.cpp",
        f"kernels-{isa}.so",
        "resources.json",
    }
    assert built == [((tmp_path / "out" / f"kernels-{isa}.cpp").read_text(), isa)]


def test_an_unknown_instruction_set(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"'cpu:sse' is not known: expected cpu, or one of cpu:amx, cpu:avx512vbmi, .*cpu:neon"
    ):
        emit(nn.Module(), "cpu:sse", tmp_path / "out")


@pytest.mark.usefixtures("no_specs")
def test_a_compiler_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.compiler_version() is None:
        pytest.skip("no C++ compiler here")
    foreign: Isa = "avx512" if supported("neon") else "neon"
    monkeypatch.setattr(emit_module, "emit_cpp", lambda _: "int f() { return 0; }\n")
    with pytest.raises(BuildError, match=f"does not compile for {foreign}; set BWLA_CXX"):
        emit(nn.Module(), f"cpu:{foreign}", tmp_path / "out")


@pytest.mark.usefixtures("no_specs")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
def test_a_cross_compiler_makes_a_library_of_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_CXX", COMPILER)
    monkeypatch.setattr(emit_module, "emit_cpp", lambda _: "int f() { return 0; }\n")
    (kernel,) = emit(nn.Module(), "cpu:neon", tmp_path / "out").kernels
    header = (tmp_path / "out" / kernel.files[1]).read_bytes()
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183, "the machine of the ELF header is not AArch64"


def test_without_a_cpp_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_CXX", "")
    with pytest.raises(BuildError, match="install g\\+\\+, or name one in BWLA_CXX"):
        emit(tiny.make("llama"), "cpu", tmp_path)


@pytest.mark.parametrize("target", ["gpu", "cuda:9", "hip"])
def test_a_bad_target_is_refused_before_anything_is_written(target: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"target '{target}' is not known: expected cpu, cpu:ISA, cuda:N"):
        emit(nn.Module(), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(BuildError, match="is not an empty folder"):
        emit(tiny.make("llama"), "cuda:90", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
