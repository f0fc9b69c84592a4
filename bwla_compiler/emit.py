"""Emit the kernels of a model for a target that need not be there: sources, compiled artefacts, and what they use."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.build import build
from bwla_compiler.codegen.cpp_linear import emit as emit_cpp
from bwla_compiler.codegen.isa import ISAS, Isa, best_isa, supported
from bwla_compiler.codegen.triton_aot import GpuTarget, Resources, compile_kernel, parse_target
from bwla_compiler.codegen.triton_gate import violations
from bwla_compiler.codegen.triton_gemv import emit_linear_gemv
from bwla_compiler.codegen.triton_linear import emit_linear_dot, emit_linear_sum, emit_low_rank
from bwla_compiler.codegen.triton_prologue import emit_prologue
from bwla_compiler.codegen.triton_spec import NO_TILE, Emitted, LinearKernel, PrologueKernel, mixed_rows
from bwla_compiler.codegen.triton_tiles import device_for, is_decode, ranked
from bwla_compiler.errors import BuildError, PlanError
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.group_specs import packed_specs, planned_specs
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.settings import settings
from bwla_compiler.spec import FLOAT_BITS, LinearSpec

Progress = Callable[[str, int, int], None]

TOKENS = (1, 8, 512)
"""Numbers of tokens that kernels are emitted for: one and a small batch that decode, and a prompt."""


@dataclass(frozen=True)
class EmittedGroup:
    """Linears of the model with one spec. linears: names, one tuple for each group that shares an input."""

    spec: LinearSpec
    linears: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class EmittedKernel:
    """One kernel on disk. files: names in the folder, the source first. groups: numbers of the specs that use it.

    resources: None where the target's compiler does not tell. holds: whether a program fits the target's shared
    memory; a prologue that does not is run in stages. broken: what it should keep to and does not, in words.
    """

    name: str
    title: str
    files: tuple[str, ...]
    groups: tuple[int, ...]
    warps: int | None = None
    resources: Resources | None = None
    holds: bool = True
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmitReport:
    """What was written. target: as it was asked for; folder: where; compiler: what compiled it."""

    target: str
    folder: str
    compiler: str
    groups: tuple[EmittedGroup, ...]
    kernels: tuple[EmittedKernel, ...]

    def to_json(self) -> str:
        """Return the report as JSON: the content of resources.json."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def emit(
    model: nn.Module,
    target: str,
    folder: Path,
    *,
    recipe: "str | Path | Recipe" = "bwla-w1a6",
    progress: Progress | None = None,
) -> EmitReport:
    """Write the kernels of a model's linears for a target into a folder, with resources.json, and return the report.

    model: packed, or float (on any device, meta too): then the specs are those that `recipe` would give. target:
    "cuda:90", "hip:gfx942", "cpu" for this machine's processor, or "cpu:neon" for any with that instruction set.
    folder: new or empty. Raises BuildError for an unknown target, a folder in use, or without a compiler for it;
    CaptureError and PlanError for the model.
    """
    goal = cpu_target(target) or parse_target(target)
    if isinstance(goal, GpuTarget):
        triton_module.require_triton()
    groups = model_groups(model, load_recipe(recipe))
    _make_empty(folder)
    if isinstance(goal, GpuTarget):
        report = _emit_gpu(groups, goal, folder, progress or (lambda label, done, total: None))
    else:
        report = _emit_cpu(groups, target, goal, folder)
    _write(folder / "resources.json", report.to_json().encode())
    return report


def _make_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BuildError(f"{folder}: exists and is not an empty folder; give another one or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder}: cannot be made: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BuildError(f"{path}: cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------- specs


def model_groups(model: nn.Module, recipe: Recipe) -> tuple[EmittedGroup, ...]:
    """Return the distinct specs of a model's quantized linears, members that share an input together.

    recipe: for a float model; a packed one has its own formats. Raises PlanError where there are none.
    """
    found = packed_specs(model) or planned_specs(model, make_plan(model), recipe)
    if not found:
        raise PlanError(f"{type(model).__name__}: no linear is quantized, so there are no kernels to emit")
    distinct: dict[LinearSpec, list[tuple[str, ...]]] = {}
    for names, spec in found:
        distinct.setdefault(spec, []).append(names)
    return tuple(EmittedGroup(spec, tuple(linears)) for spec, linears in distinct.items())


# ---------------------------------------------------------------- targets


def cpu_target(target: str) -> Isa | None:
    """Return the instruction set of "cpu" or "cpu:ISA", None for another target. Raises BuildError for another ISA."""
    if target == "cpu":
        return best_isa()
    backend, _, name = target.partition(":")
    if backend != "cpu":
        return None
    for isa in ISAS:
        if name == isa:
            return isa
    raise BuildError(f"target {target!r} is not known: expected cpu, or one of {', '.join(f'cpu:{i}' for i in ISAS)}")


def _emit_cpu(groups: tuple[EmittedGroup, ...], target: str, isa: Isa, folder: Path) -> EmitReport:
    """Write the C++ kernels of an instruction set: one source for all specs, which they take as arguments."""
    source = emit_cpp(isa)
    _write(folder / f"kernels-{isa}.cpp", source.encode())
    try:
        library = build(source, isa)
    except BuildError as error:
        if supported(isa):
            raise
        remedy = "set BWLA_CXX to a compiler that does (aarch64-linux-gnu-g++ for neon)"
        raise BuildError(f"{settings().compiler} does not compile for {isa}; {remedy}\n{error}") from error
    if library is None:
        raise BuildError("no C++ compiler was found: install g++, or name one in BWLA_CXX")
    shutil.copyfile(library, folder / f"kernels-{isa}.so")
    files = (f"kernels-{isa}.cpp", f"kernels-{isa}.so")
    kernel = EmittedKernel("kernels", f"All operators for {isa}", files, tuple(range(len(groups))))
    return EmitReport(target, str(folder), "C++", groups, (kernel,))


def _emit_gpu(groups: tuple[EmittedGroup, ...], gpu: GpuTarget, folder: Path, progress: Progress) -> EmitReport:
    users: dict[Emitted, list[int]] = {}
    for number, group in enumerate(groups):
        for emitted in group_kernels(group.spec, gpu):
            users.setdefault(emitted, []).append(number)
    kernels = []
    for done, (emitted, numbers) in enumerate(users.items()):
        progress(f"compiling for {gpu}", done, len(users))
        kernels.append(_compile(emitted, gpu, folder, tuple(numbers)))
    progress(f"compiling for {gpu}", len(users), len(users))
    compiler = f"triton {triton_module.require_triton().__version__}"
    return EmitReport(str(gpu), str(folder), compiler, groups, tuple(kernels))


def _compile(emitted: Emitted, gpu: GpuTarget, folder: Path, groups: tuple[int, ...]) -> EmittedKernel:
    compiled = compile_kernel(emitted, gpu)
    stem = triton_module.write(emitted, folder).stem
    for suffix, content in compiled.artefacts.items():
        _write(folder / f"{stem}.{suffix}", content)
    files = tuple(f"{stem}.{suffix}" for suffix in ("py", *compiled.artefacts))
    holds = compiled.resources.shared_bytes <= gpu.shared_limit
    broken = tuple(violations(compiled))
    return EmittedKernel(emitted.name, emitted.title, files, groups, emitted.warps, compiled.resources, holds, broken)


def group_kernels(spec: LinearSpec, gpu: GpuTarget) -> list[Emitted]:
    """Return the kernels that linears of one spec run on a GPU: before them, one token, a small batch, a prompt.

    Tiles are those of least modelled time; at run time they are timed.
    """
    prologue = PrologueKernel(
        columns=spec.in_features,
        transform=spec.transform,
        column_scaled=spec.scale_kind == "row+column",
        activation_bits=spec.activation_bits,
        precision=gpu.precision,
    )
    found: list[Emitted] = []
    for tokens in TOKENS:
        kernel = linear_kernel(spec, gpu, tokens)
        found += prologue_kernels(prologue, kernel, tokens)
        if is_decode(kernel, tokens):
            found.append(emit_linear_gemv(kernel))
        else:
            found.append(emit_linear_dot(kernel))
            found += [emit_linear_sum(kernel)] if kernel.tile.parts > 1 else []
        found += [emit_low_rank(kernel)] if kernel.ranked and not kernel.mixed_before else []
    return list(dict.fromkeys(found))


def prologue_kernels(prologue: PrologueKernel, linears: LinearKernel, tokens: int) -> list[Emitted]:
    """Return the kernels before linears, with the first half of their low-rank pairs where it is computed there."""
    if linears.mixed_before:
        ranks = tuple(rank for rank in linears.ranks if rank)
        rows = mixed_rows(linears.columns, tokens, turned=prologue.online)
        prologue = dataclasses.replace(prologue, ranks=ranks, mixed_rows=rows)
    return [emit_prologue(kernel) for kernel in ((prologue,) if prologue.fits else prologue.stages)]


def linear_kernel(spec: LinearSpec, gpu: GpuTarget, tokens: int) -> LinearKernel:
    """Return the kernel of linears of one spec for so many tokens, with the tile of least modelled time."""
    members, cuda = len(spec.out_features), gpu.backend == "cuda"
    turned = spec.transform.left or spec.transform.right
    beside = mixed_rows(spec.in_features, tokens, turned=turned) > 0
    kernel = LinearKernel(
        columns=spec.in_features,
        out_features=spec.out_features,
        planes=spec.planes,
        grouped=spec.scale_kind == "group",
        ranks=(spec.rank,) * members,
        biases=(spec.bias,) * members,
        residuals=(False,) * members,
        activation_bits=spec.activation_bits,
        tile=NO_TILE,
        precision=gpu.precision,
        assembly=cuda,
        decodes=cuda,
        mixed_before=spec.rank > 0 and spec.activation_bits < FLOAT_BITS and beside,
    )
    best = ranked(kernel, tokens, device_for([str(gpu)]), smallest=8 if cuda else 16)[0]
    return dataclasses.replace(kernel, tile=best)
