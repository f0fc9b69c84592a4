"""bwla::prologue and the modules over it: float64 references, the fused group's very bits, other devices, refusals."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.runtime import native, ops, reference
from bwla_compiler.runtime.functions import ACTIVATIONS, NORMS, Activation, Norm
from bwla_compiler.runtime.portable import Prologue
from bwla_compiler.spec import PROLOGUES
from tests.runtime.test_fused import Case, make
from tests.runtime.test_ops import make_linear, without_native

BWLA = torch.ops.bwla
assert ops.LIBRARY is not None
ALONE = [kind for kind in PROLOGUES if kind != "none" and not kind.endswith("_mul")]


def alone(x: Tensor, p: Prologue) -> Tensor:
    result: Tensor = BWLA.prologue(x, p.kind, p.eps, p.gain, p.shift)
    return result


@given(st.sampled_from(ALONE), st.integers(1, 300), st.integers(0, 70), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_shape_equals_the_reference(kind: str, columns: int, tokens: int, vectors: bool, in_cpp: bool) -> None:
    x, p = make(kind, columns, tokens, transform=False, vectors=vectors, seed=columns)
    if in_cpp:
        native.install()
        found = alone(x, p)
    else:
        with without_native():
            found = alone(x, p)
    assert found.shape == x.shape
    # float32: a sum of up to 300 terms, then a few operations; erf by a formula within 1.5e-7
    torch.testing.assert_close(found.double(), reference.prologue(x, p), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [*ALONE, "silu_mul", "gelu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_a_fused_group_computes_the_same_bits(kind: str, tokens: int) -> None:
    native.install()
    x, p = make(kind, 203, tokens, transform=False)
    linear = make_linear(70, 203)
    inner = alone(x, Prologue(kind.removesuffix("_mul"), p.eps, p.gain, p.shift))
    inner = inner if p.gate is None else inner * p.gate
    fused = Case(x, p, [linear], bits=6).run()
    apart = Case(inner, Prologue(), [linear], bits=6).run()
    assert torch.equal(fused[0], apart[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits(threads: int) -> None:
    native.install()
    x, p = make("layer_norm", 301, 500, transform=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = alone(x, p)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat([alone(row, p) for row in x.split(1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    native.install()
    x, p = make("rms_norm", 64, 5, dtype=dtype, transform=False)
    strided = x.T.contiguous().T
    expected = reference.prologue(x, p)
    for one in (x, strided):
        found = alone(one, p)
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()


def test_what_does_not_fit_is_refused() -> None:
    native.install()
    x = torch.randn(3, 8)
    with pytest.raises(ShapeError, match=r"gain .*expected .8."):
        BWLA.prologue(x, "rms_norm", 1e-6, torch.ones(7), None)
    with pytest.raises(ShapeError, match="norms alone take them"):
        BWLA.prologue(x, "silu", 0.0, torch.ones(8), None)
    with pytest.raises(ShapeError, match="without a gate"):
        BWLA.prologue(x, "silu_mul", 0.0, None, None)
    with pytest.raises(ShapeError, match="computes nothing"):
        BWLA.prologue(x, "none", 0.0, None, None)
    with pytest.raises(ShapeError, match="'swish' is not known"):
        BWLA.prologue(x, "swish", 0.0, None, None)


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    native.install()
    norm = Norm("rms_norm", 1e-6, nn.Parameter(torch.ones(8)), None)
    y = norm(torch.randn(3, 8))
    with pytest.raises(GradientError):
        y.sum().backward()
    with torch.no_grad():
        assert not norm(torch.randn(3, 8)).requires_grad


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_off_the_cpu_are_plain_torch(kind: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Norm(kind, 1e-6, nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8)), offset=offset)
    on_meta = copy.deepcopy(norm).to("meta")
    monkeypatch.setattr("bwla_compiler.runtime.functions.PROLOGUE", None)  # whoever calls it fails
    assert on_meta(torch.empty(3, 8, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError):
        norm(torch.empty(3, 8))


def test_modules_survive_copies_pickles_and_state_dicts() -> None:
    norm = Norm("layer_norm", 1e-5, nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8)))
    assert set(norm.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 8)
    with torch.no_grad():
        for module in (norm, *map(Activation, ACTIVATIONS)):
            for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(again(x), module(x))
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    assert "layer_norm, eps=1e-05" in repr(norm)
