"""Emitted kernels compiled for GPUs that are not here: they compile, keep to registers, and use the right units."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bwla_compiler.codegen import triton_aot
from bwla_compiler.codegen.triton_aot import compile_kernel, parse_target
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_low_rank
from bwla_compiler.codegen.triton_prologue import emit_prologue
from bwla_compiler.codegen.triton_spec import Emitted, LinearKernel, PrologueKernel, Tile, mixed_rows
from bwla_compiler.errors import BuildError
from bwla_compiler.spec import TransformSpec

SMALL, ONE = Tile(64, 16, 2, 4), Tile(32, 1, 2, 2, split=8)

H100, MI300 = parse_target("cuda:90"), parse_target("hip:gfx942")

LINEAR = LinearKernel(
    columns=1000,
    out_features=(256, 130),
    planes=1,
    grouped=False,
    ranks=(16, 0),
    biases=(False, True),
    residuals=(True, False),
    activation_bits=6,
    tile=SMALL,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled anew, and nothing left in the user's cache


def test_matrix_kernel_on_nvidia() -> None:
    found = compile_kernel(emit_linear_dot(LINEAR), H100)
    r = found.resources
    assert r.matrix > 0
    assert r.spills == 0
    assert 32 <= r.registers <= 255
    assert 40 < r.instructions < 4000, "fewer is a stub that traps, more is unrolled without bound"
    assert r.shared_bytes <= H100.shared_limit
    assert b".target sm_90" in found.artefacts["ptx"]
    assert found.artefacts["cubin"][:4] == b"\x7fELF"


def test_a_wide_low_rank_pair_does_not_spill() -> None:
    tile = Tile(128, 128, 8, 3)
    spec = dataclasses.replace(LINEAR, ranks=(80, 80), tile=tile)
    assert compile_kernel(emit_linear_dot(spec), parse_target("cuda:80")).resources.spills == 0


def test_decode_kernel_on_nvidia_is_dp4a() -> None:
    spec = dataclasses.replace(LINEAR, tile=ONE, assembly=True)
    r = compile_kernel(emit_linear_gemv(spec), H100).resources
    # 32 x 8 lanes on 64 threads are 4 a thread, each 32 dp4a a step, whatever the compiler unrolls
    assert r.dot4 >= 128
    assert r.matrix == r.spills == 0
    assert r.instructions < 8 * r.dot4


def test_prologue_on_nvidia_stays_in_registers() -> None:
    basis = TransformSpec("kronecker", 32, 40, True, True, True)
    r = compile_kernel(emit_prologue(PrologueKernel(1280, "rms_norm", basis, gain=True)), H100).resources
    assert r.matrix > 0
    assert r.spills == r.stack_bytes == 0


@pytest.mark.parametrize("n1, n2", [(12, 256), (24, 512), (50, 512)])
def test_long_right_factors_stay_in_registers(n1: int, n2: int) -> None:
    kernel = PrologueKernel(
        n1 * n2, "silu_mul", TransformSpec("kronecker", n1, n2, True, True, True), activation_bits=6
    )
    for part in (kernel,) if kernel.fits else kernel.stages:
        r = compile_kernel(emit_prologue(part), H100).resources
        assert r.spills == r.stack_bytes == 0


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("n1, n2, left, right", [(64, 80, True, True), (96, 128, False, False)])
def test_low_rank_pairs_beside_the_rounding_stay_in_registers(
    tokens: int, n1: int, n2: int, left: bool, right: bool
) -> None:
    rows = mixed_rows(n1 * n2, tokens, turned=True)
    basis = TransformSpec("kronecker", n1, n2, left, right, scaled=left)
    spec = PrologueKernel(n1 * n2, transform=basis, activation_bits=6, ranks=(80, 26), mixed_rows=rows)
    r = compile_kernel(emit_prologue(spec), H100).resources
    assert rows
    assert r.spills == r.stack_bytes == 0
    assert r.registers * spec.warps * 32 <= 65536


@pytest.mark.parametrize("emit", [emit_linear_dot, emit_low_rank])
def test_matrix_kernels_on_amd(emit: Callable[[LinearKernel], Emitted]) -> None:
    found = compile_kernel(emit(dataclasses.replace(LINEAR, precision=MI300.precision)), MI300)
    assert found.resources.matrix > 0
    assert found.resources.spills == 0
    assert 16 <= found.resources.registers <= 512
    assert set(found.artefacts) == {"amdgcn", "hsaco"}


def test_what_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    emitted = emit_linear_dot(LINEAR)
    broken = dataclasses.replace(emitted, source=emitted.source.replace("total = total * 0.015625", "total = missing"))
    with pytest.raises(BuildError, match=r"linear_dot .* does not compile for cuda:90"):
        compile_kernel(broken, H100)


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda", "cuda:9", "cuda:sm_90", "cuda:47", "hip:90", "hip:gfx", "rocm:gfx942"]
)
def test_targets_that_are_not_known(text: str) -> None:
    with pytest.raises(
        BuildError, match=r"is not known: expected cpu, cpu:ISA, cuda:N with N one of 75, 80, .* or hip:gfx90a"
    ):
        parse_target(text)


def test_targets_print_as_they_are_read() -> None:
    assert str(H100) == "cuda:90"
    assert str(MI300) == "hip:gfx942"
    assert H100.shared_limit > parse_target("cuda:89").shared_limit > MI300.shared_limit


def test_the_interpreter_cannot_compile() -> None:
    code = (
        "from bwla_compiler.codegen.triton_aot import *\n"
        "from bwla_compiler.codegen.triton_prologue import emit_prologue\n"
        "from bwla_compiler.codegen.triton_spec import PrologueKernel\n"
        "try: compile_kernel(emit_prologue(PrologueKernel(64)), parse_target('cuda:90'))\n"
        "except BuildError as error: print(error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "unset TRITON_INTERPRET" in done.stdout, done.stderr


def test_amd_opcodes_are_counted_and_other_lines_are_not() -> None:
    text = "main:\n\ts_load_dwordx2 s[0:1], s[2:3]\n\tv_mfma_i32_16x16x32_i8 a, b\n; v_add\n\t.text\n"
    text += "\tds_read_b32 v0, v1\n"
    assert triton_aot._GCN.findall(text) == ["s_load_dwordx2", "v_mfma_i32_16x16x32_i8", "ds_read_b32"]
