"""Emitted Triton sources: valid Python, named by their hash, with only what their spec asks for."""

import ast
import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_int4 import emit_int4_linear, int4_tile
from bwla_compiler.codegen.triton_int8 import emit_int8_linear, int8_tile
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_linear_sum, emit_low_rank
from bwla_compiler.codegen.triton_prologue import emit_prologue
from bwla_compiler.codegen.triton_spec import (
    Emitted,
    Int4Kernel,
    Int8Kernel,
    Kind,
    LinearKernel,
    PrologueKernel,
    Tile,
    padded,
)
from bwla_compiler.codegen.triton_tiles import candidates, is_decode
from bwla_compiler.cost.factors import LARGEST_TILE, power_of_two
from bwla_compiler.errors import BuildError
from bwla_compiler.spec import TransformSpec

SMALL, ONE = Tile(64, 16, 2, 4), Tile(32, 1, 2, 2, split=8)


def linear(**changes: Any) -> LinearKernel:
    kernel = LinearKernel(
        columns=200,
        out_features=(64, 17),
        planes=1,
        grouped=False,
        ranks=(0, 0),
        biases=(False, False),
        residuals=(False, False),
        activation_bits=6,
        tile=SMALL,
    )
    return dataclasses.replace(kernel, **changes)


def check(emitted: Emitted) -> ast.FunctionDef:
    """Return the kernel's definition: the module parses, and its parameters are the declared ones, all of them used."""
    tree = ast.parse(emitted.source)
    assert ast.get_docstring(tree)
    (kernel,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == emitted.name]
    names = [a.arg for a in kernel.args.args]
    assert names == [name for name, _ in emitted.parameters]
    read = {n.id for n in ast.walk(kernel) if isinstance(n, ast.Name)}
    assert set(names) <= read
    defined = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    everything = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert defined <= everything, f"constants that nothing reads: {defined - everything}"
    return kernel


flags = st.tuples(st.booleans(), st.booleans())


@settings(deadline=None, max_examples=60)
@given(
    columns=st.integers(1, 700),
    out=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    planes=st.integers(1, 3),
    grouped=st.booleans(),
    ranks=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    biases=flags,
    residuals=flags,
    bits=st.sampled_from([4, 8, 16]),
    tokens=st.sampled_from([1, 16, 50, 500]),
)
def test_linear_kernels_declare_what_they_read(
    columns: int, out: Any, planes: int, grouped: bool, ranks: Any, biases: Any, residuals: Any, bits: int, tokens: int
) -> None:
    spec = LinearKernel(columns, out, planes, grouped, ranks, biases, residuals, bits, SMALL)
    for tile in candidates(spec, tokens)[::3]:
        chosen = dataclasses.replace(spec, tile=tile)
        if is_decode(spec, tokens):
            check(emit_linear_gemv(chosen))
            continue
        check(emit_linear_dot(chosen))
        if tile.parts > 1:
            check(emit_linear_sum(chosen))
        if spec.ranked:
            check(emit_low_rank(chosen))
            check(emit_linear_dot(dataclasses.replace(chosen, mixed_before=True)))


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_declare_what_they_read(tokens: int, bias: bool) -> None:
    check(emit_int8_linear(Int8Kernel(200, 33, bias, int8_tile(tokens))))
    check(emit_int4_linear(Int4Kernel(200, 33, 64, bias, int4_tile(tokens))))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("left, right", [(False, False), (True, False), (False, True), (True, True)])
def test_prologues_declare_what_they_read(kind: Kind, left: bool, right: bool) -> None:
    for n1, n2, scaled, bits in ((6, 10, True, 8), (16, 8, False, 16), (3, 40, True, 4)):
        transform = TransformSpec("kronecker", n1, n2, left, right, scaled)
        norm = kind.endswith("_norm")
        spec = PrologueKernel(n1 * n2, kind, transform, scaled, norm, kind == "layer_norm", bits)
        check(emit_prologue(spec))
        for stage in spec.stages:
            check(emit_prologue(stage))
        if spec.rounds:
            beside = dataclasses.replace(spec, ranks=(5, 1), mixed_rows=2)
            check(emit_prologue(beside))
            assert (beside.programs, beside.stages[-1].programs) == (1 + 3 + 1, 1 + 3 + 1)


def test_stages_do_each_thing_once() -> None:
    basis = TransformSpec("kronecker", 20, 30, True, True, True)
    spec = PrologueKernel(600, "rms_norm", basis, column_scaled=True, gain=True, activation_bits=6)
    right, left, last = spec.stages
    assert (right.kind, right.gain, right.transform.scaled, right.transform.right, right.transform.left) == (
        "rms_norm", True, True, True, False,
    )  # fmt: skip
    assert (left.kind, left.gain, left.transform.scaled, left.transform.right, left.transform.left) == (
        "none", False, False, False, True,
    )  # fmt: skip
    assert not right.rounds
    assert not left.rounds
    assert right.stride == left.stride == 600
    assert (last.online, last.column_scaled, last.activation_bits, last.row_stride) == (False, True, 6, 640)
    assert (right.blocks, left.blocks, last.blocks) == (2, 2, 1)


def test_what_is_not_asked_for_is_not_there() -> None:
    plain = emit_linear_dot(linear()).source
    for word in ("residual", "bias", "low_rank", "product(", "group_scale"):
        assert word not in plain
        assert (
            word
            in emit_linear_dot(
                linear(residuals=(True, False), biases=(True, True), ranks=(3, 0), grouped=word == "group_scale")
            ).source
        )
    assert "inline_asm" not in emit_linear_gemv(linear(tile=ONE)).source
    assert "dp4a.u32.s32" in emit_linear_gemv(linear(tile=ONE, assembly=True)).source


def test_sizes() -> None:
    assert [power_of_two(n) for n in (1, 16, 17, 200)] == [16, 16, 32, 256]
    assert [padded(n) for n in (1, 128, 129)] == [128, 128, 256]
    assert LinearKernel.first_tiles((64, 17, 130), 64) == [0, 1, 2, 5]
    fits = {n: PrologueKernel(n[0] * n[1], transform=TransformSpec("kronecker", *n, True, True)).fits for n in SIZES}
    assert fits == SIZES
    assert PrologueKernel(LARGEST_TILE).fits
    assert not PrologueKernel(LARGEST_TILE + 1).fits


SIZES = {(64, 80): True, (64, 128): True, (96, 128): False, (200, 128): False, (256, 16): True, (300, 80): False}
"""Factors, and whether one program holds them: at most 8192 channels when padded."""


def test_a_source_is_written_once_and_mended(tmp_path: Path) -> None:
    emitted = emit_linear_dot(linear())
    path = triton_module.write(emitted, tmp_path / "deep" / "cache")
    assert path.read_text() == emitted.source
    assert path.name == f"linear_dot_{triton_module.digest(emitted.source)}.py"
    before = path.stat().st_mtime_ns
    assert triton_module.write(emitted, tmp_path / "deep" / "cache") == path
    assert path.stat().st_mtime_ns == before, "a whole file is left as it is"
    path.write_text(emitted.source[:50])
    triton_module.write(emitted, tmp_path / "deep" / "cache")
    assert path.read_text() == emitted.source
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no drafts stay behind"


def test_different_specs_have_different_files(tmp_path: Path) -> None:
    kernels = [linear(), linear(columns=201), linear(ranks=(3, 0)), linear(grouped=True)]
    assert len({triton_module.write(emit_linear_dot(k), tmp_path) for k in kernels}) == len(kernels)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="set BWLA_CACHE to a writable folder"):
        triton_module.write(emit_linear_dot(linear()), tmp_path / "file" / "cache")
