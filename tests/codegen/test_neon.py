"""NEON: how it is chosen and compiled; its kernels, on Arm or in an emulator, beside the portable ones and float64.

`test_kernels.py` runs its own cases on these kernels too.
"""

import ctypes
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.codegen import build as building
from bwla_compiler.codegen import cpp_driver, cpp_neon, cpp_transform, isa, library
from bwla_compiler.codegen.build import COMMON_FLAGS, build
from bwla_compiler.codegen.cpp_linear import emit
from bwla_compiler.codegen.isa import FLAGS, Isa, best_isa, cpu_flags, supported
from bwla_compiler.codegen.library import LEFT, RIGHT, SCALE, Member
from bwla_compiler.numerics.activations import quantize_activation
from bwla_compiler.runtime import reference
from bwla_compiler.runtime.portable import Prologue
from bwla_compiler.spec import PROLOGUES
from tests.codegen.emulated import COMPILER, EmulatedLibrary, kernels
from tests.codegen.test_kernels import (
    Library,
    accumulate,
    packed_factor,
    packed_pair,
    packed_scale,
    packed_words,
    random_signs,
)
from tests.runtime.test_fused import Case, make
from tests.runtime.test_ops import make_linear

OBJDUMP = "aarch64-linux-gnu-objdump"

# ---------------------------------------------------------------- the choice


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Forget the processor's flags before and after; its name and its list are then faked."""
    cpu_flags.cache_clear()
    monkeypatch.setattr(isa, "CPU_INFO", tmp_path / "cpuinfo")
    yield monkeypatch
    cpu_flags.cache_clear()


ARM_LINUX = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes crc32 atomics asimddp\n\n" * 2
X86_LINUX = "processor\t: 0\nflags\t\t: fpu sse2 fma avx2 f16c asimd_is_no_flag_here\nbugs\t\t: spectre_v1\n\n" * 2


@pytest.mark.parametrize(
    "name, listed, best",
    [
        ("aarch64", ARM_LINUX, "neon"),
        ("aarch64", "", "neon"),
        ("arm64", None, "neon"),  # macOS
        ("ARM64", None, "neon"),  # Windows
        ("armv7l", "Features\t: half thumb neon vfpv4\n", "portable"),  # 32 bits: other registers and intrinsics
        ("x86_64", X86_LINUX, "avx2"),
        ("x86_64", None, "portable"),
    ],
)
def test_the_choice(machine: pytest.MonkeyPatch, name: str, listed: str | None, best: Isa) -> None:
    machine.setattr("platform.machine", lambda: name)
    if listed is not None:
        isa.CPU_INFO.write_text(listed)
    assert best_isa() == best
    assert supported("portable")
    assert isa.describe() == f"{name}: {best}"


def test_flags_of_arm_are_read(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("platform.machine", lambda: "aarch64")
    isa.CPU_INFO.write_text(ARM_LINUX)
    assert {"asimd", "asimddp", "crc32"} <= cpu_flags()


# ---------------------------------------------------------------- what is compiled


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def compile_nothing(command: list[str], source: str, work: Path, library: Path, *, links: tuple[str, ...]) -> None:
        commands.append(command)
        library.touch()

    monkeypatch.setattr(building, "_compile", compile_nothing)
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    library = build(emit("neon"), "neon")
    if library is None:
        pytest.skip("no C++ compiler here")
    assert commands == [[commands[0][0], *COMMON_FLAGS, "-march=armv8-a"]]
    assert "-ffp-contract=off" in COMMON_FLAGS, "arm64 compilers fuse a * b + c by default: codes would differ"
    assert library.name.startswith("neon-")


def test_the_source_needs_armv8_alone() -> None:
    source = emit("neon")
    assert "vqtbl1q_u8" in source
    for later in ("vdot", "vmmla", "svptrue", "float16x8_t", "bfloat16"):
        assert later not in source


# ---------------------------------------------------------------- the kernels


@pytest.fixture(scope="module")
def neon() -> Library:
    return kernels("neon")


@pytest.fixture
def direct(neon: Library) -> EmulatedLibrary:
    if not isinstance(neon, EmulatedLibrary):
        pytest.skip("this processor runs neon: test_fused.py calls these kernels through the operators")
    return neon


@pytest.mark.parametrize("columns", [513, 520])
@pytest.mark.parametrize("limit", [1, 7, 30, 31, 32, 63, 127])
def test_integer_sums_equal_the_portable_ones(neon: Library, limit: int, columns: int) -> None:
    """Limits on both sides of where one byte holds a sum of four; 513 columns end one word after a span."""
    generator = torch.Generator().manual_seed(limit)
    for tokens in (1, 2, 3, 70):
        codes = torch.randint(-limit, limit + 1, (tokens, columns), generator=generator, dtype=torch.int8)
        codes[0] = limit
        codes[-1, ::2] = -limit
        signs = random_signs(1, 67, columns, generator)
        signs[0, 0], signs[0, 1] = 1, -1
        found = accumulate(neon, codes, signs, limit)
        assert torch.equal(found, accumulate(kernels("portable"), codes, signs, limit))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 200), st.integers(1, 700), st.integers(1, 127), st.integers(0, 999))
def test_integer_sums_are_exact(neon: Library, tokens: int, out: int, columns: int, limit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-limit, limit + 1, (tokens, columns), generator=generator, dtype=torch.int8)
    signs = random_signs(1, out, columns, generator)
    exact = codes.long() @ signs[0].long().T
    assert torch.equal(accumulate(neon, codes, signs, limit).long(), exact)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_codes_of_scaled_columns_equal_torch(neon: Library, bits: int) -> None:
    """Ties go to even and no product is fused: each code and scale is torch's, bit for bit."""
    generator = torch.Generator().manual_seed(bits)
    limit = 2 ** (bits - 1) - 1
    x, scale = torch.randn(70, 333, generator=generator), torch.rand(333, generator=generator) + 0.5
    x[1] = (torch.arange(333) % (2 * limit + 1) - limit) / 2  # half of them ties, with a scale of 1/2
    scale[:40], x[1, 0] = 1.0, limit / 2
    codes, token_scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(70, 1)
    neon.quantize(x.data_ptr(), scale.data_ptr(), 70, 333, limit, codes.data_ptr(), token_scale.data_ptr())
    want, want_scale = quantize_activation(x * scale, bits=bits)
    assert torch.equal(codes, want)
    assert torch.equal(token_scale, want_scale)


@pytest.mark.parametrize("contract, fused", [((), False), (("-ffp-contract=fast",), True)], ids=["ours", "fast"])
def test_rounding_fuses_nothing(contract: tuple[str, ...], fused: bool) -> None:
    """Arm's compilers fuse a * b + c unless told not to; where they are let, this test sees it."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed")
    entry = "float round(float* x, float* s, long n, int8_t* codes) { return quantize(x, s, n, n, 127, codes); }\n"
    vectors = cpp_neon.KERNELS + cpp_driver.THREADS + cpp_transform.VECTORS
    source = cpp_driver.HEADER + vectors + cpp_driver.ROUNDING + entry
    flags = [*(flag for flag in COMMON_FLAGS if flag != "-shared"), *FLAGS["neon"], *contract]
    command = [COMPILER, *flags, "-x", "c++", "-S", "-o", "-", "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\tfdiv\t", text)
    assert bool(re.search(r"\tf(n?m(add|sub)|ml[as])\t", text)) == fused


Instruction = tuple[int, str, str]
"""Address, name, operands."""


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield name and instructions of each function that objdump lists."""
    for part in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        title, _, body = part.partition(">:\n")
        found = re.findall(r"^ *([0-9a-f]+):\t(\S+)\t?(.*)$", body, re.MULTILINE)
        yield title, [(int(address, 16), name, operands) for address, name, operands in found]


def inner_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yield the instructions of each loop that holds no other loop."""
    at = {address: number for number, (address, _, _) in enumerate(code)}
    ends = []
    for number, (_, name, operands) in enumerate(code):
        target = re.search(r"([0-9a-f]+) <", operands) if re.match(r"b\.|cbn?z", name) else None
        first = at.get(int(target[1], 16), number) if target else number
        if first < number:
            ends.append((first, number))
    for first, last in ends:
        if not any(first <= head and tail < last for head, tail in ends):
            yield code[first : last + 1]


def test_inner_loops_keep_their_sums_in_registers(direct: EmulatedLibrary) -> None:
    """A bound on instructions for a byte of weights and a token, some above what cpp_neon.py tells; and no spills."""
    if shutil.which(OBJDUMP) is None:
        pytest.skip(f"{OBJDUMP} is not installed")
    command = [OBJDUMP, "-d", "--no-show-raw-insn", str(direct.program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = {"TableKernelILb0E": 0, "TableKernelILb1E": 0}
    for title, code in functions(listing):
        kernel = next((name for name in counted if name in title), None)
        for loop in inner_loops(code) if kernel else ():
            lookups = sum(name == "tbl" for _, name, _ in loop)
            if kernel is None or not lookups:
                continue
            counted[kernel] += 1
            wide = kernel == "TableKernelILb1E"
            n_bytes = 16 * lookups / (4 if wide else 2)
            assert len(loop) / n_bytes < (1.0 if wide else 0.75), title
            assert sum("[sp" in operands for _, _, operands in loop) <= 2, title
    assert min(counted.values()) >= 4, "one and two tokens, row and group scales: each has its loop"


# ---------------------------------------------------------------- fused groups


@dataclasses.dataclass(frozen=True)
class DirectCase(Case):
    """A whole call, made to the kernels themselves."""

    library: EmulatedLibrary | None = None

    def run(self) -> list[Tensor]:
        """Return what bwla_fused_group gives."""
        assert self.library is not None
        tokens, columns = self.x.shape
        kept: list[Tensor] = []

        def at(values: Tensor | None) -> int:
            if values is None:
                return 0
            kept.append(values.contiguous())
            return kept[-1].data_ptr()

        p = self.prologue
        n1 = len(p.left) if p.left is not None else columns // len(p.right) if p.right is not None else 1
        transform = (
            None if factor is None else packed_factor(self.library, factor, side)
            for factor, side in ((p.scale, SCALE), (p.left, LEFT), (p.right, RIGHT))
        )
        vectors = (p.gate, p.gain, p.shift, *transform)
        before = library.Prologue(PROLOGUES.index(p.kind), p.eps, *map(at, vectors), n1, columns // n1)
        results, members = [], []
        for (signs, scale, low_rank, bias), residual in zip(
            self.members, self.residuals or [None] * len(self.members), strict=True
        ):
            planes, out, groups = scale.shape
            results.append(torch.full((tokens, out), float("nan")))
            stored = packed_words(self.library, signs, columns), packed_scale(self.library, scale)
            rank = low_rank[0].shape[0] if low_rank else 0
            pair = map(at, packed_pair(self.library, low_rank) or (None,) * 3)
            ends = at(bias), results[-1].data_ptr(), out, planes, groups, rank, at(residual)
            members.append(Member(*map(at, stored), *pair, *ends))
        limit = 2 ** (self.bits - 1) - 1 if self.bits < 16 else 0
        self.library.fused_group(
            at(self.x), ctypes.byref(before), at(self.column_scale), tokens, columns, limit,
            (Member * len(members))(*members), len(members), 2,
        )  # fmt: skip
        return results


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
@pytest.mark.parametrize("kind", PROLOGUES)
def test_fused_groups_equal_the_reference(direct: EmulatedLibrary, kind: str, bits: int) -> None:
    x, prologue = make(kind, 203, 3)
    generator = torch.Generator().manual_seed(3)
    residual, column_scale = torch.randn(3, 70, generator=generator), torch.rand(203, generator=generator) + 0.5
    members = [make_linear(70, 203, rank=3, planes=2), make_linear(5, 203, seed=1)]
    DirectCase(x, prologue, members, column_scale, [residual, None], bits, direct).check()


@pytest.mark.parametrize("kind", PROLOGUES[1:])
def test_a_prologue_alone_equals_the_reference(direct: EmulatedLibrary, kind: str) -> None:
    x, prologue = make(kind, 203, 5, transform=False)
    vectors = [0 if v is None else v.data_ptr() for v in (prologue.gate, prologue.gain, prologue.shift)]
    before = library.Prologue(PROLOGUES.index(kind), prologue.eps, *vectors, 0, 0, 0, 1, 203)
    y = torch.full_like(x, float("nan"))
    direct.prologue(x.data_ptr(), ctypes.byref(before), y.data_ptr(), 5, 203, 2)
    # float32 functions of values up to 10, and sums of 203 of them
    torch.testing.assert_close(y.double(), reference.prologue(x, prologue), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 70])
@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_numbers_of_tokens(direct: EmulatedLibrary, tokens: int, bits: int) -> None:
    x = torch.randn(tokens, 300, generator=torch.Generator().manual_seed(tokens))
    residual = torch.randn(tokens, 131, generator=torch.Generator().manual_seed(4))
    members = [make_linear(131, 300, rank=5, planes=2, groups=3), make_linear(9, 300)]
    DirectCase(x, Prologue(), members, None, [residual, None], bits, direct).check()
