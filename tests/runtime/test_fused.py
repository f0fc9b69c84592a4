"""bwla::fused_group, in C++ and in plain torch, against float64 on odd shapes; refusals, gradients, compilation."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bwla_compiler.codegen.isa import ISAS, supported
from bwla_compiler.codegen.library import load
from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.numerics.half import to_half_bits
from bwla_compiler.numerics.kronecker import factor_pair
from bwla_compiler.runtime import compiled, native, ops, portable, reference
from bwla_compiler.runtime.halves import decoded, whole_factor
from bwla_compiler.spec import PROLOGUES
from tests.runtime.test_ops import make_linear, without_native

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None


@pytest.fixture(params=["native", "portable"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations: C++, plain torch."""
    if request.param == "native":
        native.install()
        yield "native"
        return
    with without_native():
        yield "portable"


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The C++ operators over the kernels of every instruction set."""
    if not supported(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    native.install()
    installed = native.operators()
    kernels = load(request.param)
    assert installed is not None
    assert kernels is not None
    own = installed._entries
    installed.unregister()
    monkeypatch.setattr(installed, "_entries", kernels.addresses())
    installed.register()
    yield request.param
    installed.unregister()
    monkeypatch.setattr(installed, "_entries", own)
    installed.register()


@dataclasses.dataclass(frozen=True)
class Case:
    """A whole call: what it reads, and its members."""

    x: Tensor
    prologue: portable.Prologue
    members: list[Any]
    column_scale: Tensor | None = None
    residuals: list[Tensor | None] | None = None
    bits: int = 6

    def operands(self) -> tuple[Any, ...]:
        """Return the operator's operands; the transform goes in as half bits."""
        p, nothing = self.prologue, [None] * len(self.members)
        factors = [(None, None) if t is None else halves(t) for t in (p.scale, p.left, p.right)]
        pairs = [m[2] or (None,) * 3 for m in self.members]
        return (
            self.x, p.gate, p.kind, p.eps, p.gain, p.shift, *(f[0] for f in factors), *(f[1] for f in factors),
            [m[0] for m in self.members], [m[1] for m in self.members], self.column_scale,
            *(list(c) for c in zip(*pairs, strict=True)), [m[3] for m in self.members], self.residuals or nothing,
            self.bits, nothing, None, nothing,
        )  # fmt: skip

    def whole(self) -> portable.Prologue:
        """Return the prologue with its factors as matrices."""
        right = self.prologue.right
        return dataclasses.replace(self.prologue, right=None if right is None else whole_factor(right))

    def run(self) -> list[Tensor]:
        """Return the operator's results."""
        results: list[Tensor] = BWLA.fused_group(*self.operands())
        return results

    def exact(self) -> list[Tensor]:
        """Return the results in float64, activations rounded in float32 as the operator does."""
        inner = reference.prologue(self.x, self.whole())
        results = []
        for (signs, scale, low_rank, bias), residual in zip(
            self.members, self.residuals or [None] * len(self.members), strict=True
        ):
            y = reference.linear(inner.float(), signs, scale, self.column_scale, low_rank, bias, self.bits)
            results.append(y if residual is None else y + residual.double())
        return results

    def check(self, *, slack: float = 2e-4) -> None:
        """Compare. A code at the edge of two may fall either way: one step of one code, at most two such a token."""
        inner = reference.prologue(self.x, self.whole())
        inner = inner if self.column_scale is None else inner * self.column_scale
        limit = 2 ** (self.bits - 1) - 1
        step = inner.abs().amax(-1, keepdim=True) / limit if self.bits < 16 else torch.zeros(())
        for y, want, member in zip(self.run(), self.exact(), self.members, strict=True):
            assert y.dtype == self.x.dtype
            weight = reference.dense(member[0], member[1], self.x.shape[-1], low_rank=member[2])
            flips = 2 * step * weight.abs().amax(1)
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[self.x.dtype]
            # float32 sums of up to 300 terms of order one; then one rounding to the dtype
            assert ((y.double() - want).abs() <= flips + rounding * want.abs() + slack).all()


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    bits, exponent = to_half_bits(values)
    return bits, torch.tensor(exponent, dtype=torch.int8)


def stored(values: Tensor) -> Tensor:
    """What is left of values that are stored as half bits."""
    return decoded(*halves(values))


def make(
    kind: str, columns: int, tokens: int, *, dtype: torch.dtype = torch.float32, transform: bool = True,
    vectors: bool = True, seed: int = 0, signed: bool = False,
) -> tuple[Tensor, portable.Prologue]:  # fmt: skip
    """Return x [tokens, columns] and a prologue of this kind with all that it may have.

    signed: its right factor is a Hadamard matrix, as large as can be, given by signs.
    """
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(tokens, columns, generator=g) + 0.3
    n1, n2 = (columns // (columns & -columns), columns & -columns) if signed else factor_pair(columns)
    right = torch.randn(n2, generator=g).sign() if signed else torch.randn(n2, n2, generator=g)
    norm = kind.endswith("_norm") and vectors
    prologue = portable.Prologue(
        kind,
        eps=1e-5 if kind.endswith("_norm") else 0.0,
        gain=torch.rand(columns, generator=g) + 0.5 if norm else None,
        shift=torch.randn(columns, generator=g) if norm else None,
        gate=torch.randn(tokens, columns, generator=g).to(dtype) if kind.endswith("_mul") else None,
        scale=stored(torch.rand(columns, generator=g) + 0.5) if transform else None,
        left=stored(torch.randn(n1, n1, generator=g) / n1**0.5) if transform else None,
        right=stored(right / n2**0.5) if transform else None,
    )
    return x.to(dtype), prologue


@pytest.mark.parametrize("columns", [3 * 2, 5 * 32, 3 * 512])
@pytest.mark.parametrize("tokens", [1, 9])
def test_signs_before_a_hadamard_matrix(path: str, columns: int, tokens: int) -> None:
    x, prologue = make("silu_mul", columns, tokens, signed=True)
    Case(x, prologue, [make_linear(70, columns), make_linear(9, columns, rank=3)]).check()


@pytest.mark.parametrize("transform", [False, True], ids=["plain", "transform"])
@pytest.mark.parametrize("bits", [4, 6, 8, 16])
@pytest.mark.parametrize("kind", PROLOGUES)
def test_prologues_equal_reference(path: str, kind: str, bits: int, transform: bool) -> None:
    x, prologue = make(kind, 203, 3, transform=transform)
    residual = torch.randn(3, 70, generator=torch.Generator().manual_seed(3))
    members = [make_linear(70, 203, rank=3), make_linear(5, 203, seed=1)]
    Case(x, prologue, members, residuals=[residual, None], bits=bits).check()


@pytest.mark.parametrize("bits", [6, 16])
def test_members_of_one_call_differ_in_planes(path: str, bits: int) -> None:
    x, prologue = make("rms_norm", 203, 3)
    members = [make_linear(70, 203, planes=2), make_linear(33, 203, seed=1), make_linear(33, 203, planes=3, seed=2)]
    Case(x, prologue, members, bits=bits).check()


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "gelu_mul", "silu"])
def test_every_instruction_set(isa: str, kind: str) -> None:
    x, prologue = make(kind, 203, 5, vectors=kind != "rms_norm")
    Case(x, prologue, [make_linear(70, 203)], bits=8).check()


@given(
    st.sampled_from(PROLOGUES), st.integers(1, 300), st.integers(1, 70), st.integers(1, 90),
    st.sampled_from(["row", "row+column", "group"]), st.sampled_from([4, 6, 8, 16]), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_any_shape(kind: str, columns: int, tokens: int, out: int, scales: str, bits: int, transform: bool) -> None:
    native.install()
    x, prologue = make(kind, columns, tokens, transform=transform, seed=columns)
    groups = -(-columns // 128) if scales == "group" else 1
    column_scale = torch.rand(columns, generator=torch.Generator().manual_seed(2)) + 0.5
    members = [make_linear(out, columns, groups=groups, planes=2, seed=out)]
    Case(x, prologue, members, column_scale if scales == "row+column" else None, bits=bits).check(slack=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "rms_norm", "silu_mul"])
def test_narrow_inputs_are_rounded_once(path: str, kind: str, dtype: torch.dtype) -> None:
    x, prologue = make(kind, 40, 4, dtype=dtype)
    residual = torch.randn(4, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    Case(x, prologue, [make_linear(9, 40)], residuals=[residual], bits=16).check()


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (2, 1, 3, 40)], ids=str)
def test_leading_dimensions(path: str, shape: tuple[int, ...]) -> None:
    x, prologue = make("silu_mul", 40, max(1, torch.Size(shape[:-1]).numel()))
    assert prologue.gate is not None
    count = torch.Size(shape).numel()
    x, gate = x.flatten()[:count].view(shape), prologue.gate.flatten()[:count].view(shape)
    residual = torch.ones(*shape[:-1], 9)
    case = Case(x, dataclasses.replace(prologue, gate=gate), [make_linear(9, 40)], residuals=[residual], bits=16)
    assert case.run()[0].shape == (*shape[:-1], 9)
    case.check()


def test_strided_operands(path: str) -> None:
    both = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    x, gate = both.chunk(2, -1)
    residual = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).T
    split = Case(x, portable.Prologue("silu_mul", gate=gate), [make_linear(9, 40)], residuals=[residual])
    whole = dataclasses.replace(
        split,
        x=x.contiguous(),
        prologue=portable.Prologue("silu_mul", gate=gate.contiguous()),
        residuals=[residual.contiguous()],
    )
    assert torch.equal(split.run()[0], whole.run()[0])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_are_accurate_far_out(kind: str) -> None:
    """One column and sign +1: the result is the activation itself, also where e^x leaves float32."""
    native.install()
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-200.0, -89.0, 0.0, 89.0, 200.0])])[:, None]
    one = (torch.full((1, 1, 1), 1, dtype=torch.uint8), torch.ones(1, 1, 1), None, None)
    (y,) = Case(x, portable.Prologue(kind), [one], bits=16).run()
    exact = portable.ACTIVATIONS[kind](x.double())
    # the exponential is good to 3e-7 of its value, erf to 1.5e-7
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=2e-6 if kind == "gelu" else 1e-7)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "gelu_mul"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sick_token_gives_nan_and_no_other_does(path: str, kind: str, bad: float) -> None:
    x, prologue = make(kind, 40, 3)
    x[1, 7] = bad
    (y,) = Case(x, prologue, [make_linear(9, 40)]).run()
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_threads_do_not_change_a_bit() -> None:
    native.install()
    x, prologue = make("rms_norm", 1024, 9)
    case = Case(x, prologue, [make_linear(1030, 1024)])
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(case.run()[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results)


def test_opcheck_and_meta() -> None:
    x, prologue = make("rms_norm", 40, 2)
    signs, scale, _, bias = make_linear(9, 40)
    nothing: list[None] = [None]
    arguments = (
        x, None, "rms_norm", 1e-5, prologue.gain, None, None, None, None, None, None, None, [signs], [scale], None,
        nothing, nothing, nothing, [bias], [torch.randn(2, 9)], 6, nothing, None, nothing,
    )  # fmt: skip
    torch.library.opcheck(BWLA.fused_group.default, arguments)
    (y,) = BWLA.fused_group(x.to("meta"), *arguments[1:12], [signs.to("meta")], *arguments[13:])
    assert y.is_meta
    assert y.shape == (2, 9)


@pytest.mark.parametrize("where", ["x", "gate", "residual"])
def test_gradient_is_refused_only_when_asked(path: str, where: str) -> None:
    x, prologue = make("silu_mul", 40, 2)
    residual = torch.randn(2, 9)
    case = Case(x, prologue, [make_linear(9, 40)], residuals=[residual])
    target = {"x": x, "gate": prologue.gate, "residual": residual}[where]
    assert target is not None
    target.requires_grad_()
    (y,) = case.run()
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(case.run()[0], y)
    with pytest.raises(GradientError, match="no_grad"):
        y.sum().backward()


def test_lengths_share_a_graph() -> None:
    """Two lengths, and a third that the symbolic graph of the second serves."""
    native.install()
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    members, prologue = [make_linear(9, 40)], make("rms_norm", 40, 1)[1]
    torch._dynamo.reset()
    function = torch.compile(lambda x: Case(x, portable.Prologue("rms_norm", 1e-5, prologue.gain), members).run()[0],
                             backend=backend)  # fmt: skip
    for tokens in (3, 5, 6):
        x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens))
        want = Case(x, portable.Prologue("rms_norm", 1e-5, prologue.gain), members).run()[0]
        assert torch.equal(function(x), want)
    assert len(graphs) <= 2


def test_what_does_not_fit_is_named(path: str) -> None:
    x, prologue = make("silu_mul", 40, 2)
    members = [make_linear(9, 40)]
    wrong: dict[str, Case] = {
        "is not known": Case(x, portable.Prologue("softmax"), members),
        "without a gate": Case(x, portable.Prologue("silu_mul"), members),
        "with a gate": Case(x, portable.Prologue("silu", gate=x), members),
        r"gate \[2, 3\]": Case(x, dataclasses.replace(prologue, gate=torch.ones(2, 3)), members),
        "norms alone": Case(x, portable.Prologue("silu", gain=torch.ones(40)), members),
        r"gain \[3\]": Case(x, portable.Prologue("rms_norm", gain=torch.ones(3)), members),
        "square": Case(x, portable.Prologue(left=torch.ones(2, 3)), members),
        "factors of 7 and 1": Case(x, portable.Prologue(left=torch.eye(7)), members),
        r"residual \[2, 3\]": Case(x, portable.Prologue(), members, residuals=[torch.ones(2, 3)]),
        "2 residuals": Case(x, portable.Prologue(), members, residuals=[None, None]),
        "signs": Case(x, portable.Prologue(), [make_linear(9, 60)]),
    }
    for words, case in wrong.items():
        with pytest.raises(ShapeError, match=words):
            case.run()


def test_a_fork_computes_and_does_not_hang() -> None:
    """A child has none of its parent's threads; it computes with threads of its own."""
    import os

    native.install()
    assert compiled.kernels() is not None
    x, prologue = make("none", 1024, 8, transform=False)
    case = Case(x, prologue, [make_linear(2048, 1024)])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = case.run()[0]  # the parent's threads exist now
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(case.run()[0], want) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(case.run()[0], want)
    finally:
        torch.set_num_threads(threads)


def test_reference_is_torchs(path: str) -> None:
    """The reference itself against torch's own functions in float64."""
    x, p = make("layer_norm", 40, 3, transform=False)
    assert p.gain is not None
    assert p.shift is not None
    own = F.layer_norm(x.double(), (40,), p.gain.double(), p.shift.double(), p.eps)
    torch.testing.assert_close(reference.prologue(x, p), own, rtol=1e-12, atol=1e-12)  # float64
    rms = F.rms_norm(x.double(), (40,), p.gain.double(), p.eps)
    found = reference.prologue(x, portable.Prologue("rms_norm", p.eps, p.gain))
    torch.testing.assert_close(found, rms, rtol=1e-12, atol=1e-12)
