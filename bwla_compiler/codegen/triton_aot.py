"""Ahead-of-time compilation of emitted Triton kernels for GPUs that need not be there, and what they use of them."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bwla_compiler.codegen import triton_module
from bwla_compiler.codegen.triton_sass import LANES, Instruction, executed, instructions
from bwla_compiler.codegen.triton_spec import Emitted, Precision
from bwla_compiler.errors import BuildError

SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that a program may have, by CUDA capability; the compiler does not check them."""

HIP_SHARED_LIMITS = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840}
"""The same by AMD architecture, of those with matrix units and 64 lanes to a warp."""

_CUDA, _HIP = ", ".join(map(str, SHARED_LIMITS)), " or hip:".join(HIP_SHARED_LIMITS)
FORMS = f"cpu, cpu:ISA, cuda:N with N one of {_CUDA}, or hip:{_HIP}"

Activations = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class GpuTarget:
    """A GPU to compile for. architecture: "90" for CUDA's 9.0, "gfx942"."""

    backend: Literal["cuda", "hip"]
    architecture: str

    @property
    def precision(self) -> Precision:
        """How float products run on it."""
        return "tf32x2" if self.backend == "cuda" else "ieee"

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a program may have."""
        if self.backend == "hip":
            return HIP_SHARED_LIMITS[self.architecture]
        return SHARED_LIMITS[int(self.architecture)]

    def __str__(self) -> str:
        return f"{self.backend}:{self.architecture}"


def parse_target(text: str) -> GpuTarget:
    """Return the GPU of "cuda:90" or "hip:gfx942". Raises BuildError, naming the forms, for anything else."""
    backend, _, architecture = text.partition(":")
    if backend == "cuda" and architecture in map(str, SHARED_LIMITS):
        return GpuTarget("cuda", architecture)
    if backend == "hip" and architecture in HIP_SHARED_LIMITS:
        return GpuTarget("hip", architecture)
    raise BuildError(f"target {text!r} is not known: expected {FORMS}")


@dataclass(frozen=True)
class Resources:
    """What one kernel uses. registers: a thread's (HIP: vector registers). stack_bytes: a thread's, with spills.

    spills: registers spilled (HIP), loads and stores of local memory (CUDA). shared_bytes: a program's, static and
    dynamic. instructions: all of the kernel's. matrix: of them those on matrix units; dot4: dp4a and alike. units:
    names of these. per_weight: instructions that a thread executes in its loops for each of its 1-bit weights, None
    where that is not known; whole_per_weight: with those before and after. packed_assembly: whether inline assembly
    takes several elements at once, which assumes neighbours.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: int
    matrix: int
    dot4: int
    units: tuple[str, ...] = ()
    per_weight: float | None = None
    whole_per_weight: float | None = None
    packed_assembly: bool = False


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target. artefacts: contents by file suffix (ptx, cubin; amdgcn, hsaco)."""

    emitted: Emitted
    target: GpuTarget
    artefacts: dict[str, bytes]
    resources: Resources


def compile_kernel(emitted: Emitted, target: GpuTarget, *, activations: Activations = "bf16") -> Compiled:
    """Return the kernel compiled for a GPU that need not be there. activations: dtype of inputs and results.

    Raises BuildError where Triton is missing, runs as an interpreter, or rejects the kernel.
    """
    triton = triton_module.require_triton()
    if triton_module.interpreted():
        raise BuildError("Triton cannot compile as an interpreter: unset TRITON_INTERPRET and start Python anew")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = triton_module.load(emitted)
    types = {name: kind.replace("*x", f"*{activations}") for name, kind in emitted.parameters}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    architecture: int | str = int(target.architecture) if target.backend == "cuda" else target.architecture
    gpu = GPUTarget(target.backend, architecture, 32 if target.backend == "cuda" else 64)
    try:
        built = triton.compile(ASTSource(function, types, attrs=aligned), target=gpu, options=emitted.options)
    except Exception as error:  # Triton's own errors have no common base, and MLIR's are RuntimeErrors
        raise BuildError(f"{emitted.name} ({emitted.title}) does not compile for {target}: {error}") from error
    found = _nvidia(built, emitted) if target.backend == "cuda" else _amd(built)
    suffixes = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
    return Compiled(emitted, target, {suffix: _bytes(built.asm[suffix]) for suffix in suffixes}, found)


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


# ---------------------------------------------------------------- NVIDIA


def _tool(name: str) -> str:
    """Return a tool of CUDA: the one that Triton carries, else the one on the path."""
    own = Path(triton_module.require_triton().__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.exists() else name


def _inspect(cubin: bytes, *flags: str) -> str:
    """Return what cuobjdump says of a cubin. Raises BuildError where it cannot be run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            run = subprocess.run([_tool("cuobjdump"), *flags, str(path)], capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"cuobjdump, which counts a kernel's instructions, cannot be run: {error}") from error
    if run.returncode != 0:
        raise BuildError(f"cuobjdump failed with status {run.returncode}: {run.stderr.strip()}")
    return run.stdout


_MATRIX_SASS = ("IMMA", "IGMMA", "HMMA", "HGMMA", "UTCIMMA", "UTCHMMA", "DMMA")
_PACKED = re.compile(r"packed_element = (?!1\b)\d+")


def _nvidia(built: Any, emitted: Emitted) -> Resources:
    cubin = built.asm["cubin"]
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _inspect(cubin, "--dump-resource-usage"))
    if found is None:
        raise BuildError("cuobjdump does not tell a kernel's registers: its format is not known")
    registers, stack, static, _ = map(int, found.groups())
    code = instructions(_inspect(cubin, "-sass"))
    opcodes = [one.opcode for one in code]
    in_loops, whole = _per_weight(code, emitted)
    return Resources(
        registers=registers,
        stack_bytes=stack,
        spills=_count(opcodes, ("LDL", "STL")),
        shared_bytes=static + int(built.metadata.shared),
        instructions=len(opcodes),
        matrix=_count(opcodes, _MATRIX_SASS),
        dot4=_count(opcodes, ("IDP",)),
        units=tuple(sorted({opcode for opcode in opcodes if opcode.startswith((*_MATRIX_SASS, "IDP"))})),
        per_weight=in_loops,
        whole_per_weight=whole,
        packed_assembly=_PACKED.search(built.asm["ttgir"]) is not None,
    )


def _per_weight(code: Sequence[Instruction], emitted: Emitted) -> tuple[float | None, float | None]:
    """Return the instructions a weight, in loops and in all; None for other kernels and where the code is silent."""
    work = emitted.work
    count = None if work is None else executed(code, needed=work.products // emitted.warps, slabs=work.slabs)
    if work is None or count is None:
        return None, None
    threads = LANES * emitted.warps
    return round(count.in_loops * threads / work.weights, 3), round(count.whole * threads / work.weights, 3)


def _count(opcodes: Sequence[str], families: tuple[str, ...]) -> int:
    return sum(opcode.startswith(families) for opcode in opcodes)


# ---------------------------------------------------------------- AMD

_GCN = re.compile(r"^\t((?:[vs]|ds|global|buffer|flat|scratch)_[a-z0-9_]+)", re.MULTILINE)


def _amd(built: Any) -> Resources:
    text = built.asm["amdgcn"]
    opcodes = _GCN.findall(text)
    return Resources(
        registers=_metadata(text, "vgpr_count"),
        stack_bytes=_metadata(text, "private_segment_fixed_size"),
        spills=_metadata(text, "vgpr_spill_count") + _metadata(text, "sgpr_spill_count"),
        shared_bytes=int(built.metadata.shared),
        instructions=len(opcodes),
        matrix=_count(opcodes, ("v_mfma", "v_smfma")),
        dot4=_count(opcodes, ("v_dot4",)),
    )


def _metadata(text: str, key: str) -> int:
    """Return a number of the kernel's metadata. Raises BuildError where it is not there."""
    found = re.findall(rf"\.{key}:\s*(\d+)", text)
    if not found:
        raise BuildError(f"the assembly does not tell {key}: its format is not known")
    return int(found[-1])
