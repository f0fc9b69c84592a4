"""PackedExperts, and families' experts run through their children: what they computed before, and packed."""

import copy
import pickle

import pytest
import torch
from bwla_compiler.evaluate.zoo.models import tiny_model
from torch import Tensor, nn

from bwla_compiler.errors import ShapeError
from bwla_compiler.graph.experts import experts_form, projections
from bwla_compiler.numerics.planes import BinaryWeight
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.runtime.experts import PackedExperts, TransformedExperts, adopt
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.online import OnlineTransform

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text")
"""Gated; with biases, transposed and interleaved; without a gate; batched."""


HIDDEN = 64
"""Channels of the zoo's models."""


def weights(n_experts: int, out: int, columns: int, *, rank: int = 2, scaled: bool = False) -> list[BinaryWeight]:
    generator = torch.Generator().manual_seed(out)
    found = []
    for _ in range(n_experts):
        signs = (torch.randint(0, 2, (1, out, columns), generator=generator) * 2 - 1).to(torch.int8)
        pair = [torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, columns))]
        columns_scale = torch.rand(columns, generator=generator) + 0.5 if scaled else None
        scale = torch.rand(1, out, 1, generator=generator)
        found.append(BinaryWeight(signs, scale, columns_scale, low_rank_out=pair[0], low_rank_in=pair[1]))
    return found


def rotation(n: int) -> OnlineTransform:
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))
    return OnlineTransform.from_factors(None, None, q, kind="kronecker")


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in model.named_modules() if experts_form(module))


def call(module: nn.Module, *, tokens: int = 8) -> Tensor:
    """Run a family's experts as its router would, some experts left out."""
    n_experts = int(module.num_experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    with torch.no_grad():
        if experts_form(module) == "batched":
            return module(x)
        chosen = torch.stack([torch.randperm(n_experts - 1, generator=generator)[:2] for _ in range(tokens)])
        return module(x, chosen, torch.rand(tokens, 2, generator=generator))


@pytest.mark.parametrize("scaled", [False, True])
def test_each_expert_is_the_packed_linear_of_its_weight(scaled: bool) -> None:
    given = weights(3, 10, 24, scaled=scaled)
    transform = rotation(24)
    packed = PackedExperts.from_binary(given, activation_bits=6, transform=transform)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [0, 1], [1, 2]])
    y = packed(x, chosen)
    for expert, weight in enumerate(given):
        linear = PackedLinear.from_binary(weight, activation_bits=6, transform=transform)
        rows = (chosen == expert).nonzero()
        # one float16 exponent serves all experts' scales here, one each there
        torch.testing.assert_close(y[rows[:, 0], rows[:, 1]], linear(x[rows[:, 0]]), rtol=1e-3, atol=1e-3)


def test_weights_of_several_formats_are_refused() -> None:
    with pytest.raises(ShapeError, match="2 formats"):
        PackedExperts.from_binary([*weights(2, 6, 16), *weights(1, 6, 16, rank=1)], activation_bits=6)


def test_casting_leaves_the_state_as_it_was() -> None:
    packed = PackedExperts.from_binary(weights(2, 6, 16), activation_bits=6)
    before = copy.deepcopy(packed.state_dict())
    after = packed.to(torch.bfloat16).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adopted_module_computes_what_the_family_computes(name: str) -> None:
    _, experts = experts_of(tiny_model(name, dtype=torch.float32))
    expected = call(experts)
    adopt(experts)
    # another order of sums
    torch.testing.assert_close(call(experts), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transform_with_its_inverse_in_the_weights_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    where, experts = experts_of(model)
    expected = call(experts)
    transposed = getattr(experts, "is_transposed", name == "llama4_text")
    for leaf in projections(experts):
        weight = experts.get_parameter(leaf)
        in_axis = 1 if transposed else 2
        module = TransformedExperts(rotation(weight.shape[in_axis]), weight, in_axis=in_axis)
        replace_module(model, f"{where}.{leaf}", module)
    assert not any(p.ndim == 3 for p in experts._parameters.values() if p is not None)
    # the transform is stored in float16, the inverse is that of what is stored
    torch.testing.assert_close(call(experts), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_copy_and_a_pickle_run_through_their_own_children() -> None:
    model = tiny_model("mixtral")
    where, experts = experts_of(model)
    call(experts)
    for leaf in projections(experts):
        shape = experts.get_parameter(leaf).shape
        packed = PackedExperts.from_binary(weights(shape[0], *shape[1:]), activation_bits=6)
        replace_module(model, f"{where}.{leaf}", packed)
    expected = call(experts)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(call(other), expected)
        other.down_proj.signs.zero_()
        assert not torch.equal(call(other), expected)
    assert torch.equal(call(experts), expected)


def test_a_module_of_unknown_ways_is_refused() -> None:
    with pytest.raises(ShapeError, match="not known"):
        adopt(nn.Linear(2, 2))
