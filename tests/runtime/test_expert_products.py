"""bwla::experts against its float64 reference on odd shapes; experts without rows; refusals; shapes of a trace."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwla_compiler.errors import GradientError, ShapeError
from bwla_compiler.numerics.planes import pack_signs
from bwla_compiler.runtime import compiled, native, ops, reference

EXPERTS = torch.ops.bwla.experts
assert ops.LIBRARY is not None


def make(
    n_experts: int, out: int, columns: int, *, planes: int = 1, groups: int = 1, rank: int = 0, scaled: bool = False
) -> tuple[Any, ...]:
    """Return (signs, scale, column scale, low rank) of random experts."""
    generator = torch.Generator().manual_seed(out + columns)
    signs = torch.randint(0, 2, (n_experts, planes, out, columns), generator=generator, dtype=torch.int8) * 2 - 1
    scale = torch.rand(n_experts, planes, out, groups, generator=generator) + 0.5
    column_scale = torch.rand(n_experts, columns, generator=generator) + 0.5 if scaled else None
    low_rank = None
    if rank:
        into = torch.randint(-127, 128, (n_experts, rank, columns), generator=generator, dtype=torch.int8)
        onto = torch.randint(-127, 128, (n_experts, out, rank), generator=generator, dtype=torch.int8)
        low_rank = (into, onto, torch.rand(n_experts, rank, generator=generator) / 127**2)
    return pack_signs(signs), scale, column_scale, low_rank


def run(x: Tensor, chosen: Tensor, packed: tuple[Any, ...], bits: int) -> Tensor:
    signs, scale, column_scale, low_rank = packed
    result: Tensor = EXPERTS(x, chosen, signs, scale, column_scale, *(low_rank or (None,) * 3), bits)
    return result


def chosen_of(tokens: int, choices: int, n_experts: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n_experts, generator=generator)[:choices] for _ in range(tokens)])


@pytest.fixture(params=["compiled", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "portable":
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    return str(request.param)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "planes": {"planes": 2},
    "low rank": {"rank": 3},
    "columns": {"scaled": True},
    "columns and low rank": {"scaled": True, "rank": 2},
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("bits", [4, 6, 16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 13, 5), (9, 67, 21)])
def test_products_are_those_of_the_reference(case: str, bits: int, tokens: int, columns: int, out: int) -> None:
    packed = make(5, out, columns, **CASES[case])
    chosen = chosen_of(tokens, 3, 5)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    expected = reference.experts(x, chosen, *packed, bits)
    # integer sums are exact; scales and low-rank sums round in float32
    torch.testing.assert_close(run(x, chosen, packed, bits).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("path")
def test_groups_of_columns_have_scales_of_their_own() -> None:
    packed = make(3, 7, 200, groups=2)
    x, chosen = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)), chosen_of(4, 2, 3)
    expected = reference.experts(x, chosen, *packed, 6)
    torch.testing.assert_close(run(x, chosen, packed, 6).double(), expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(0, 6), choices=st.integers(1, 3), n_experts=st.integers(3, 7), columns=st.integers(1, 40))
def test_both_paths_agree_on_any_shape(tokens: int, choices: int, n_experts: int, columns: int) -> None:
    packed = make(n_experts, 6, columns, rank=1)
    chosen = chosen_of(tokens, choices, n_experts) if tokens else torch.zeros(0, choices, dtype=torch.int64)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3))
    fast = run(x, chosen, packed, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernels", lambda: None)
        slow = run(x, chosen, packed, 6)
    assert fast.shape == (tokens, choices, 6)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)  # float32 sums in another order


@pytest.mark.usefixtures("path")
def test_experts_without_rows_and_rows_without_expert() -> None:
    packed = make(4, 6, 24)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    chosen = torch.tensor([2, 4, 2, -1, 2])  # experts 0, 1, 3 get nothing; 4 and -1 are none
    y = run(x, chosen, packed, 6)
    assert not y[[1, 3]].any()
    assert y[[0, 2, 4]].abs().sum(1).gt(0).all()
    assert torch.equal(y, run(x, chosen[:, None], packed, 6)[:, 0])


def test_an_edit_of_the_signs_is_seen() -> None:
    packed = make(2, 6, 24)
    x, chosen = torch.randn(3, 24), torch.tensor([0, 1, 1])
    before = run(x, chosen, packed, 16)
    packed[0].bitwise_not_()
    torch.testing.assert_close(run(x, chosen, packed, 16), -before)
    packed[0].data.bitwise_not_()  # which no count of edits tells
    native.forget(packed[0])
    torch.testing.assert_close(run(x, chosen, packed, 16), before)


def test_bad_operands_are_named() -> None:
    packed = make(3, 6, 24)
    x, chosen = torch.randn(3, 24), torch.tensor([0, 1, 2])
    with pytest.raises(ShapeError, match=r"x \[3, 24\] and experts \[2\]"):
        run(x, chosen[:2], packed, 6)
    with pytest.raises(ShapeError, match="integer numbers"):
        run(x, chosen.float(), packed, 6)
    with pytest.raises(ShapeError, match="input columns"):
        run(torch.randn(3, 40), chosen, packed, 6)
    with pytest.raises(ShapeError, match=r"\[E, planes, out, bytes\]"):
        run(x, chosen, (packed[0], packed[1][:2], None, None), 6)


def test_gradients_are_refused_and_a_trace_has_the_shapes() -> None:
    packed = make(3, 6, 24)
    x, chosen = torch.randn(3, 24, requires_grad=True), chosen_of(3, 2, 3)
    with pytest.raises(GradientError):
        run(x, chosen, packed, 6).sum().backward()
    with torch.no_grad():
        arguments = (x.detach(), chosen, packed[0], packed[1], None, None, None, None, 6)
        torch.library.opcheck(EXPERTS.default, arguments, test_utils=("test_schema", "test_faketensor"))
