"""Kernels of an instruction set that this processor lacks, cross-compiled with driver.cpp and run by an emulator."""

import ctypes
import functools
import shutil
import struct
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler.codegen.build import COMMON_FLAGS, build_library
from bwla_compiler.codegen.cpp_linear import emit
from bwla_compiler.codegen.isa import FLAGS, Isa, supported
from bwla_compiler.codegen.library import RIGHT, SCALE, SIGNS, KernelLibrary, Member, Prologue, load

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).parent / "driver.cpp"
SHARED_ONLY = ("-shared", "-fPIC")


class Cached(ctypes.Structure):
    """Mirrors `struct Cached` of the emitted source."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("batch", "head", "token")),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("scale_batch", "scale_head", "scale_token")),
    )


class Attention(ctypes.Structure):
    """Mirrors `struct Attention` of the emitted source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "mask", "y")),
        ("keys", Cached),
        ("values", Cached),
        *((f"query_{name}", ctypes.c_long) for name in ("batch", "head", "token")),
        *((f"mask_{name}", ctypes.c_long) for name in ("batch", "head", "token", "bytes")),
        *((name, ctypes.c_long) for name in ("batch", "heads", "group", "tokens", "length", "size", "bytes")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((f"turn_{name}", ctypes.c_long) for name in ("batch", "token")),
    )


class Rows(ctypes.Structure):
    """Mirrors `struct Rows` of the emitted source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "y", "scale")),
        *((f"x_{name}", ctypes.c_long) for name in ("batch", "token", "head")),
        *((f"{to}_{name}", ctypes.c_long) for to in ("y", "scale") for name in ("batch", "head", "token")),
        *((f"turn_{name}", ctypes.c_long) for name in ("batch", "token")),
        *((name, ctypes.c_long) for name in ("batch", "tokens", "heads", "size")),
    )


@dataclass(frozen=True)
class Region:
    """Memory of this process that an entry is given. address: 0 for none. links: what pointers at offsets point to."""

    address: int | None
    size: int
    returned: bool = False
    links: tuple[tuple[int, "Region"], ...] = ()


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


class EmulatedLibrary:
    """The entries that tests call of a `KernelLibrary`, with the same arguments, served by a process in an emulator."""

    def __init__(self, program: Sequence[str | Path], isa: Isa) -> None:
        self.isa = isa
        self.program = program[-1]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()

    def packed_bytes(self, planes: int, out: int, columns: int) -> int:
        return self._call("packed_bytes", planes, out, columns)

    def packed_scales(self, planes: int, out: int, groups: int) -> int:
        return self._call("packed_scales", planes, out, groups)

    def pack(self, signs: int, packed: int, planes: int, out: int, columns: int, threads: int) -> None:
        canonical = Region(signs, planes * out * -(-columns // 8))
        own = Region(packed, self.packed_bytes(planes, out, columns), returned=True)
        self._call("pack", canonical, own, planes, out, columns, threads)

    def pack_scale(self, scale: int, packed: int, planes: int, out: int, groups: int) -> None:
        own = Region(packed, 4 * self.packed_scales(planes, out, groups), returned=True)
        self._call("pack_scale", Region(scale, 4 * planes * out * groups), own, planes, out, groups)

    def packed_pair(self, out: int, rank: int) -> int:
        return self._call("packed_pair", out, rank)

    def pack_pair(self, codes: int, packed: int, out: int, rank: int) -> None:
        own = Region(packed, self.packed_pair(out, rank), returned=True)
        self._call("pack_pair", Region(codes, out * rank), own, out, rank)

    def packed_factor(self, n: int, side: int) -> int:
        return self._call("packed_factor", n, side)

    def pack_factor(self, factor: int, packed: int, n: int, side: int) -> None:
        own = Region(packed, 4 * self.packed_factor(n, side), returned=True)
        self._call("pack_factor", Region(factor, 4 * n * (1 if side in (SIGNS, SCALE) else n)), own, n, side)

    def _factor(self, packed: int | None, n: int) -> int:
        """Return the floats of a factor that is packed, 0 for none; the first one tells its kind."""
        signs = bool(packed) and ctypes.c_float.from_address(packed or 0).value != 0
        return self.packed_factor(n, SIGNS if signs else RIGHT) if packed else 0

    def quantize(
        self, x: int, column_scale: int, tokens: int, columns: int, limit: int, codes: int, scale: int
    ) -> None:
        results = Region(codes, tokens * columns, returned=True), Region(scale, 4 * tokens, returned=True)
        inputs = Region(x, 4 * tokens * columns), Region(column_scale, 4 * columns)
        self._call("quantize", *inputs, tokens, columns, limit, *results)

    def accumulate(self, codes: int, signs: int, tokens: int, out: int, columns: int, limit: int, acc: int) -> None:
        inputs = Region(codes, tokens * columns), Region(signs, self.packed_bytes(1, out, columns))
        result = Region(acc, 4 * tokens * out, returned=True)
        self._call("accumulate", *inputs, tokens, out, columns, limit, result)

    def linear(
        self, x: int, column_scale: int, tokens: int, columns: int, limit: int, members: Any, count: int, threads: int
    ) -> None:
        inputs = Region(x, 4 * tokens * columns), Region(column_scale, 4 * columns)
        group = self._members(members, tokens, columns)
        self._call("linear", *inputs, tokens, columns, limit, group, count, threads)

    def fused_group(
        self, x: int, prologue: Any, column_scale: int, tokens: int, columns: int, limit: int, members: Any,
        count: int, threads: int,
    ) -> None:  # fmt: skip
        before = self._before(prologue, tokens, columns)
        inputs = Region(x, 4 * tokens * columns), before, Region(column_scale, 4 * columns)
        group = self._members(members, tokens, columns)
        self._call("fused_group", *inputs, tokens, columns, limit, group, count, threads)

    def prologue(self, x: int, prologue: Any, y: int, tokens: int, columns: int, threads: int) -> None:
        inputs = Region(x, 4 * tokens * columns), self._before(prologue, tokens, columns)
        self._call("prologue", *inputs, Region(y, 4 * tokens * columns, returned=True), tokens, columns, threads)

    def int8_linear(
        self, x: int, codes: int, scale: int, bias: int, y: int, tokens: int, out: int, columns: int, threads: int
    ) -> None:
        inputs = Region(x, 4 * tokens * columns), Region(codes, out * columns), Region(scale, 4 * out)
        ends = Region(bias, 4 * out), Region(y, 4 * tokens * out, returned=True)
        self._call("int8_linear", *inputs, *ends, tokens, out, columns, threads)

    def transform(
        self, x: int, scale: int, left: int, right: int, y: int, tokens: int, n1: int, n2: int, threads: int
    ) -> None:
        scaled = 4 * self.packed_factor(n1 * n2, SCALE) if scale else 0
        inputs = Region(x, 4 * tokens * n1 * n2), Region(scale, scaled)
        factors = (Region(factor, 4 * self._factor(factor, n)) for factor, n in ((left, n1), (right, n2)))
        result = Region(y, 4 * tokens * n1 * n2, returned=True)
        self._call("transform", *inputs, *factors, result, tokens, n1, n2, threads)

    def int8_embedding(self, ids: int, codes: int, scale: int, y: int, tokens: int, width: int) -> None:
        rows = 1 + max(ctypes.cast(ids, ctypes.POINTER(ctypes.c_int64))[:tokens])
        inputs = Region(ids, 8 * tokens), Region(codes, rows * width), Region(scale, 4 * rows)
        self._call("int8_embedding", *inputs, Region(y, 4 * tokens * width, returned=True), tokens, width)

    def int4_linear(
        self, x: int, codes: int, scale: int, bias: int, y: int, tokens: int, out: int, columns: int, group: int,
        power: int, threads: int,
    ) -> None:  # fmt: skip
        inputs = Region(x, 4 * tokens * columns), *self._nibbles(codes, scale, out, columns, group)
        ends = Region(bias, 4 * out), Region(y, 4 * tokens * out, returned=True)
        self._call("int4_linear", *inputs, *ends, tokens, out, columns, group, power, threads)

    def int4_embedding(
        self, ids: int, codes: int, scale: int, y: int, tokens: int, width: int, group: int, power: int
    ) -> None:
        rows = 1 + max(ctypes.cast(ids, ctypes.POINTER(ctypes.c_int64))[:tokens])
        inputs = Region(ids, 8 * tokens), *self._nibbles(codes, scale, rows, width, group)
        result = Region(y, 4 * tokens * width, returned=True)
        self._call("int4_embedding", *inputs, result, tokens, width, group, power)

    def attend(self, given: Any, threads: int) -> None:
        """All that it reads must lie in rows one behind another."""
        a = given._obj
        queries, cached = 4 * a.batch * a.heads * a.group * a.tokens * a.size, a.batch * a.heads * a.length
        links = [
            (Attention.queries.offset, Region(a.queries, queries)),
            (Attention.y.offset, Region(a.y, queries, returned=True)),
            (Attention.mask.offset, Region(a.mask, a.mask_bytes * a.batch * a.tokens * a.length)),
        ]
        for name in ("cos", "sin"):
            turns = 4 * (a.batch if a.turn_batch else 1) * a.tokens * a.size
            links.append((getattr(Attention, name).offset, Region(getattr(a, name), turns)))
        for name in ("keys", "values"):
            at, its = getattr(Attention, name).offset, getattr(a, name)
            links.append((at + Cached.data.offset, Region(its.data, a.bytes * cached * a.size)))
            links.append((at + Cached.scale.offset, Region(its.scale, 4 * cached)))
        self._call("attend", Region(ctypes.addressof(a), ctypes.sizeof(a), links=tuple(links)), threads)

    def place(self, given: Any, threads: int) -> None:
        """All that it reads and writes must lie in rows one behind another, of as many tokens as there are."""
        r = given._obj
        heads = r.batch * r.tokens * r.heads
        links = [
            (Rows.x.offset, Region(r.x, 4 * heads * r.size)),
            (Rows.cos.offset, Region(r.cos, 4 * r.batch * r.tokens * r.size)),
            (Rows.sin.offset, Region(r.sin, 4 * r.batch * r.tokens * r.size)),
            (Rows.y.offset, Region(r.y, (1 if r.scale else 4) * heads * r.size, returned=True)),
            (Rows.scale.offset, Region(r.scale, 4 * heads, returned=True)),
        ]
        self._call("place", Region(ctypes.addressof(r), ctypes.sizeof(r), links=tuple(links)), threads)

    @staticmethod
    def _nibbles(codes: int, scale: int, rows: int, columns: int, group: int) -> tuple[Region, Region]:
        return Region(codes, rows * -(-columns // 2)), Region(scale, 2 * rows * -(-columns // group))

    def _before(self, given: Any, tokens: int, columns: int) -> Region:
        """Return the memory of a Prologue, with all that it points to."""
        p = given._obj
        lengths = {
            "gate": tokens * columns, "gain": columns, "shift": columns,
            "scale": self.packed_factor(columns, SCALE) if p.scale else 0,
            "left": self._factor(p.left, p.n1), "right": self._factor(p.right, p.n2),
        }  # fmt: skip
        links = tuple((getattr(Prologue, name).offset, Region(getattr(p, name), 4 * n)) for name, n in lengths.items())
        return Region(ctypes.addressof(p), ctypes.sizeof(p), links=links)

    def _members(self, given: Any, tokens: int, columns: int) -> Region:
        """Return the memory of one Member, or of an array of them, with all that they point to."""
        found = given._obj if hasattr(given, "_obj") else given
        members = [found] if isinstance(found, Member) else list(found)
        links = []
        for number, m in enumerate(members):
            grouped = 4 * self.packed_scales(m.planes, m.out_features, m.groups)
            sizes = {
                "signs": self.packed_bytes(m.planes, m.out_features, columns),
                "scale": grouped if m.groups > 1 else 4 * m.planes * m.out_features,
                "rank_in": m.rank * columns,
                "rank_out": self.packed_pair(m.out_features, m.rank),
                "rank_scale": 4 * m.rank,
                "bias": 4 * m.out_features,
                "y": 4 * tokens * m.out_features,
                "residual": 4 * tokens * m.out_features,
            }
            for name, size in sizes.items():
                at = number * ctypes.sizeof(Member) + getattr(Member, name).offset
                links.append((at, Region(getattr(m, name), size, returned=name == "y")))
        return Region(ctypes.addressof(found), ctypes.sizeof(found), links=tuple(links))

    def _call(self, name: str, *arguments: int | Region) -> int:
        regions: list[Region] = []
        pointers: list[tuple[int, int, int]] = []

        def number_of(region: Region) -> int:
            own = len(regions)
            regions.append(region)
            for offset, target in region.links:
                if target.address:
                    pointers.append((own, offset, number_of(target)))
            return own

        sent = [
            (0, a) if isinstance(a, int) else (1, number_of(a)) if a.address else (0, 0) for a in arguments
        ]  # fmt: skip
        request = [numbers(len(name)), name.encode(), numbers(len(regions))]
        for region in regions:
            assert region.address is not None
            request += [numbers(region.size, region.returned), ctypes.string_at(region.address, region.size)]
        request.append(numbers(len(pointers), *(value for pointer in pointers for value in pointer)))
        request.append(numbers(len(sent), *(value for argument in sent for value in argument)))
        return self._exchange(b"".join(request), [region for region in regions if region.returned])

    def _exchange(self, request: bytes, results: list[Region]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            size = 8 + sum(region.size for region in results)
            answer = self._process.stdout.read(size)
            assert len(answer) == size, f"the emulated kernels ended with status {self._process.wait()}"
        at = 8
        for region in results:
            assert region.address is not None
            ctypes.memmove(region.address, answer[at : at + region.size], region.size)
            at += region.size
        result: int = struct.unpack_from("<q", answer)[0]
        return result


@functools.cache
def _emulated(isa: Isa) -> EmulatedLibrary:
    flags = [flag for flag in COMMON_FLAGS if flag not in SHARED_ONLY]
    source = emit(isa) + DRIVER.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BWLA_CXX", COMPILER)
        program = build_library(source, f"driver-{isa}", flags=[*flags, "-static", *FLAGS[isa]])
    assert program is not None
    return EmulatedLibrary([EMULATOR, program], isa)


def kernels(isa: Isa) -> KernelLibrary | EmulatedLibrary:
    """Return the kernels of an instruction set, in an emulator where need be; skip the test where neither runs."""
    if supported(isa):
        native = load(isa)
        assert native is not None, "the tests need a C++ compiler"
        return native
    if isa != "neon":
        pytest.skip(f"this processor does not run {isa}")
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"this processor does not run {isa}, and {program} is not installed")
    return _emulated(isa)
