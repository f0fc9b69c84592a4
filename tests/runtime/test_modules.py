"""Packed modules: what they store, what they compute, and that no cast, copy or load changes it unnoticed."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from bwla_compiler.errors import GradientError, ShapeError, WeightError
from bwla_compiler.numerics.kronecker import signed_hadamard
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.runtime import reference
from bwla_compiler.runtime.modules import (
    EndEmbedding,
    EndLinear,
    OnlineTransform,
    PackedLinear,
    TiedHead,
    set_activation_bits,
    stored_bytes,
)
from bwla_compiler.spec import Coding, LinearSpec, TransformSpec

OUT, IN = 30, 200


def binary(seed: int = 0, *, planes: int = 1, groups: int = 1, columns: bool = False, rank: int = 0) -> BinaryWeight:
    g = torch.Generator().manual_seed(seed)
    return BinaryWeight(
        torch.randint(0, 2, (planes, OUT, IN), generator=g, dtype=torch.int8) * 2 - 1,
        torch.rand(planes, OUT, groups, generator=g) * 1e-3 + 1e-4,
        torch.rand(IN, generator=g) + 0.5 if columns else None,
        torch.randn(OUT, rank, generator=g) * 1e-3 if rank else None,
        torch.randn(rank, IN, generator=g) if rank else None,
        group_size=128 if groups > 1 else 0,
    )


def kronecker(seed: int = 0) -> OnlineTransform:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g))[0] for n in (10, 20))
    return OnlineTransform.from_factors(torch.rand(IN, generator=g) + 0.5, left, right, kind="kronecker")


def packed(seed: int = 0, *, bits: int = 6, transform: bool = True, biased: bool = True) -> PackedLinear:
    return PackedLinear.from_binary(
        binary(seed, columns=True, rank=3),
        activation_bits=bits,
        transform=kronecker(seed) if transform else None,
        bias=torch.randn(OUT, generator=torch.Generator().manual_seed(seed)) if biased else None,
    )


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(9))


class Tied(nn.Module):
    """An embedding and a head of the same codes, each with its transform."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.embedding = EndEmbedding.from_weight(torch.randn(50, IN, generator=g), transform=kronecker(seed))
        self.head = TiedHead(self.embedding, transform=kronecker(seed + 1), column_scale=torch.rand(IN, generator=g))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(ids))
        return y


FORMATS = {"row": {}, "planes": {"planes": 2}, "groups": {"groups": 2}, "columns": {"columns": True}}


@pytest.mark.parametrize("name", FORMATS)
def test_dense_weight_is_the_binary_weight(name: str) -> None:
    weight = binary(**FORMATS[name])  # type: ignore[arg-type]
    linear = PackedLinear.from_binary(weight, activation_bits=6)
    # scales are rounded to float16 (2^-11), column scales once more
    # of each term; the terms of two planes may cancel
    torch.testing.assert_close(linear.dense_weight(), weight.dense(), rtol=2.0**-9, atol=2.0**-9 * 2e-3)


@pytest.mark.parametrize("columns", [False, True])
def test_low_rank_pair_acts_beside_column_scales(columns: bool) -> None:
    weight = binary(columns=columns, rank=4)
    linear = PackedLinear.from_binary(weight, activation_bits=6)
    error = linear.dense_weight() - weight.dense()
    # int8 by component: half a step of 1/127 of the peak on either side, four components
    assert error.norm() < 0.02 * weight.dense().norm()


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_forward_is_transform_then_dense(bits: int) -> None:
    linear = packed(bits=bits)
    assert linear.transform is not None
    x = inputs(2, 3)
    y = linear(x)
    exact = reference.transform(x, *linear.transform.factors()) @ linear.dense_weight().double().T + linear.bias
    # rounding to b bits per token: relative error near 2^-b; float32 at 16
    tolerance = 1e-5 if bits == 16 else 4 * 2.0**-bits
    assert (y - exact).norm() <= tolerance * exact.norm()


def test_spec_round_trips_and_empty_module_loads() -> None:
    linear = packed()
    assert linear.spec == LinearSpec(IN, (OUT,), 1, "row+column", 128, 3, linear.transform.spec, 6, True)  # type: ignore[union-attr]
    empty = PackedLinear(linear.spec, device="meta")
    assert empty.spec == linear.spec
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(empty(inputs(3)), linear(inputs(3)))


def test_specs_that_cannot_be_packed() -> None:
    with pytest.raises(ShapeError, match="members"):
        PackedLinear(LinearSpec(8, (4, 4)))
    with pytest.raises(ShapeError, match="groups of 64"):
        PackedLinear(LinearSpec(IN, (OUT,), scale_kind="group", group_size=64))
    weight = binary(groups=2)
    object.__setattr__(weight, "group_size", 100)
    with pytest.raises(ShapeError, match="128"):
        PackedLinear.from_binary(weight, activation_bits=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_saved_integers_and_weights(dtype: torch.dtype) -> None:
    linear = packed(biased=False)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    dense = linear.dense_weight()
    x = inputs(3)
    want = linear(x)
    linear.to(dtype)
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())
    assert torch.equal(linear.dense_weight(), dense)
    assert torch.equal(linear(x), want)
    assert linear(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("make", [packed, Tied], ids=["packed", "tied"])
def test_copies_are_equal_to_the_bit(make: type[nn.Module]) -> None:
    module = make()
    x = torch.tensor([[1, 2, 49]]) if isinstance(module, Tied) else inputs(3)
    want = module(x)
    state = module.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), want)
    other = make(7)  # type: ignore[call-arg]
    assert not torch.equal(other(x), want)  # used before the load: caches are warm
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), want)


@pytest.mark.parametrize("name", ["signs", "row_scale", "row_scale_exponent", "low_rank_scale", "column_scale"])
@pytest.mark.parametrize("compiling", [False, True])
def test_buffers_edited_in_place_are_seen(name: str, compiling: bool) -> None:
    linear, x = packed(bits=8), inputs(2)
    function = torch.compile(linear, fullgraph=True, backend="aot_eager") if compiling else linear
    with torch.no_grad():
        before = function(x).clone()
        buffer = linear.get_buffer(name)
        buffer.copy_(buffer.flip(*range(buffer.dim())) if buffer.dim() else buffer + 1)
        if name == "signs":
            buffer.bitwise_not_()
        after = function(x)
    fresh = copy.deepcopy(linear)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, fresh(x), rtol=1e-6, atol=1e-6)  # inductor may reorder one product


def test_replaced_buffers_are_seen() -> None:
    linear, other, x = packed(), packed(3), inputs(2)
    linear(x)
    for name, buffer in other.named_buffers(recurse=False):
        setattr(linear, name, buffer)
    linear.transform = other.transform
    assert torch.equal(linear(x), other(x))


def test_compiles_in_one_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.linear = Tied(), packed()
            self.norm = nn.LayerNorm(IN)
            self.int8 = EndLinear.from_weight(torch.randn(7, OUT, generator=torch.Generator().manual_seed(0)))

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.norm(self.tied.embedding(ids))
            return self.int8(self.linear(hidden)), self.tied.head(hidden)

    model = Model()
    # the norms are worked in another order: a code may round the other way
    for length in (3, 5):  # the second is traced with a symbolic length, and gradients are on
        ids = torch.arange(length)[None]
        results = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
        for got, want in zip(results, model(ids), strict=True):
            assert got.requires_grad
            assert (got - want).norm() <= 1e-2 * want.norm()
    with pytest.raises(GradientError):
        results[0].sum().backward()


def test_compiles_with_inductor() -> None:
    linear, x = packed(), inputs(2)
    with torch.no_grad():
        got, want = torch.compile(linear, fullgraph=True, backend="inductor")(x), linear(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the arithmetic is in the operators


def test_transform_from_factors() -> None:
    transform = kronecker()
    assert transform.spec == TransformSpec("kronecker", 10, 20, True, True, True)
    x = inputs(2)
    # factors are used as they are stored; two float32 sums of 20 terms
    torch.testing.assert_close(
        transform(x).double(), reference.transform(x, *transform.factors()), rtol=1e-5, atol=1e-5
    )
    only = OnlineTransform.from_factors(None, None, torch.eye(20), kind="hadamard")
    assert only.factors()[:2] == (None, None)
    assert torch.equal(only(x), x)
    scaled = OnlineTransform.from_factors(torch.full((IN,), 0.5), None, torch.eye(20), kind="hadamard")
    assert scaled.spec.n1 * scaled.spec.n2 == IN
    assert torch.equal(scaled(x), x * 0.5)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]) / 2
    signed = OnlineTransform.from_factors(None, torch.eye(5), signs, kind="kronecker")
    assert signed.spec == TransformSpec("kronecker", 5, 4, True, True, False, True)
    assert signed.spec.numbers == 29
    assert signed._buffers["right"].shape == (4,)  # type: ignore[union-attr]
    torch.testing.assert_close(signed.factors()[2], signed_hadamard(signs))
    torch.testing.assert_close(signed(signed(x[:, :20])).norm(dim=-1), x[:, :20].norm(dim=-1))
    empty = OnlineTransform(signed.spec)
    empty.load_state_dict(signed.state_dict())
    assert torch.equal(empty(x[:, :20]), signed(x[:, :20]))
    with pytest.raises(ShapeError):
        OnlineTransform.from_factors(None, None, torch.ones(6), kind="kronecker")  # no power of two
    with pytest.raises(ShapeError):
        OnlineTransform.from_factors(torch.ones(7), torch.eye(2), torch.eye(3), kind="kronecker")
    with pytest.raises(WeightError):
        OnlineTransform.from_factors(None, torch.full((2, 2), float("nan")), None, kind="kronecker")


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1.0, 1e30])
def test_scales_of_any_magnitude(magnitude: float) -> None:
    transform = OnlineTransform.from_factors(torch.full((4,), magnitude), None, None, kind="none")
    scale = transform.factors()[0]
    assert scale is not None
    # float16 keeps 11 bits; what float32 itself holds as a subnormal becomes zero
    torch.testing.assert_close(scale, torch.full((4,), magnitude), rtol=2.0**-11, atol=1e-38)


def test_int8_linear_and_embedding_round_by_row() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, IN, generator=g) * torch.logspace(-2, 3, 50)[:, None]
    weight[3] = 0
    bias, x = torch.randn(50, generator=g), inputs(2)
    head = EndLinear.from_weight(weight, bias=bias)
    exact = x @ weight.T + bias
    # a weight is off by at most half a step, 1/254 of its row's peak, and a little where float16 rounds the scale
    bound = x.abs().sum(1, keepdim=True) * weight.abs().amax(1) / 250
    assert ((head(x) - exact).abs() <= bound + 1e-6).all()
    assert (head(x) - exact).norm() <= 0.02 * exact.norm()
    embedding = EndEmbedding.from_weight(weight.bfloat16(), padding_idx=3)
    rows = embedding(torch.arange(50))
    assert rows.dtype == torch.bfloat16
    assert embedding.padding_idx == 3
    assert (rows[3] == 0).all()
    assert ((rows.float() - weight).abs() <= weight.abs().amax(1, keepdim=True) * (1 / 254 + 2**-7)).all()
    assert embedding.to(torch.float32)(torch.tensor([0])).dtype == torch.float32


def test_ends_of_4_bits_round_by_group() -> None:
    g, coding = torch.Generator().manual_seed(0), Coding(4, 64)
    weight, bias, x = torch.randn(50, IN, generator=g) * 1e-3, torch.randn(50, generator=g), inputs(2)
    head = EndLinear.from_weight(weight, bias=bias, coding=coding)
    assert (head.codes.dtype, head.codes.shape, head.row_scale.shape) == (
        torch.uint8,
        (50, IN // 2),
        (50, -(-IN // 64)),
    )
    # 0.0081 of the energy (see test_nibbles) is 0.09 of the norm
    assert (head.dense_weight() - weight).norm() < 0.095 * weight.norm()
    # the input is rounded to 16 bits a token
    torch.testing.assert_close(head(x), x @ head.dense_weight().T + bias, rtol=1e-4, atol=1e-5)
    embedding = EndEmbedding.from_weight(weight, coding=coding)
    assert torch.equal(embedding(torch.arange(50)), embedding.dense_weight())
    assert torch.equal(embedding.codes, head.codes)
    tied = TiedHead(embedding, bias=bias)
    assert torch.equal(tied(x), head(x))
    assert torch.equal(tied.dense_weight(), head.dense_weight())
    assert "int4" in repr(tied)
    assert head.half().codes.dtype == torch.uint8
    with pytest.raises(WeightError):
        EndLinear.from_weight(torch.full((3, 70), float("nan")), coding=coding)


def test_tied_head_owns_no_codes_and_stays_tied() -> None:
    model = Tied()
    assert not any("codes" in key for key in model.head.state_dict())
    assert list(model.head.children()) == [model.head.transform]
    copied = copy.deepcopy(model)
    assert copied.head.embedding is copied.embedding
    assert copied.embedding is not model.embedding
    x = inputs(2)
    scale = model.head.column_scale is not None
    assert scale
    before = model.head(x)
    model.embedding.codes.neg_()
    # the same codes negated give the same sums negated
    assert torch.equal(model.head(x), -before)


def test_set_activation_bits() -> None:
    model = nn.Sequential(packed(bits=4, transform=False), nn.ReLU())
    coarse = model(inputs(2))
    set_activation_bits(model, 16)
    assert model[0].activation_bits == 16
    assert not torch.equal(model(inputs(2)), coarse)
    with pytest.raises(ShapeError):
        set_activation_bits(model, 12)


def test_stored_bytes_and_repr() -> None:
    linear = PackedLinear.from_binary(binary(), activation_bits=6)
    # signs, one float16 a row, one exponent
    assert stored_bytes(linear) == OUT * IN // 8 + 2 * OUT + 1
    assert f"{8 * stored_bytes(linear) / (OUT * IN):.3f} bits" in repr(linear)
    assert "A6" in repr(linear)
    assert "kronecker, 10 x 20" in repr(packed())


def test_nothing_expands_the_weight_to_bytes() -> None:
    """The largest tensor that the forward allocates stays far below one byte a weight."""
    g = torch.Generator().manual_seed(0)
    out, columns = 2048, 4096
    signs = torch.randint(0, 256, (1, out, columns // 8), generator=g, dtype=torch.uint8)
    empty = PackedLinear(LinearSpec(columns, (out,)))
    empty.signs = signs
    empty.row_scale.fill_(0x3C00)  # one, in float16
    x = torch.randn(1, columns, generator=g)
    empty(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        empty(x)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < out * columns // 8
