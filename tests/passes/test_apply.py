import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bwla_compiler.errors import WeightError
from bwla_compiler.graph.plan import Expression
from bwla_compiler.numerics.kronecker import haar
from bwla_compiler.passes.apply import apply_module, check_weights, replace_module, rotate_axis
from bwla_compiler.passes.base import DropGain, InsertTransform, ScaleParameter, ShiftBias


def leaf(name: str, size: int) -> Expression:
    return Expression("leaf", size, name)


def random_matrix(n: int, seed: int) -> torch.Tensor:
    return haar(n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_a_product_rotates_as_its_kronecker_matrix(n1: int, n2: int, n3: int, axis: int) -> None:
    expression = Expression("product", n1 * n2 * n3, "", (leaf("a", n1), leaf("b", n2), leaf("", n3)))
    rotations = {"a": random_matrix(n1, 1), "b": random_matrix(n2, 2)}
    shape = [2, 3, 2]
    shape[axis] = n1 * n2 * n3
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    dense = torch.kron(torch.kron(rotations["a"], rotations["b"]), torch.eye(n3, dtype=torch.float64))
    expected = (tensor.movedim(axis, -1) @ dense.T).movedim(-1, axis)
    # float64 sums of at most 60 products
    torch.testing.assert_close(rotate_axis(tensor, axis, expression, rotations), expected, rtol=0, atol=1e-12)


def test_a_sum_rotates_block_by_block() -> None:
    expression = Expression("sum", 7, "", (leaf("a", 3), leaf("", 4)))
    tensor = torch.randn(5, 7, dtype=torch.float64)
    rotation = random_matrix(3, 0)
    found = rotate_axis(tensor, 1, expression, {"a": rotation})
    torch.testing.assert_close(found[:, :3], tensor[:, :3] @ rotation.T)
    assert torch.equal(found[:, 3:], tensor[:, 3:])


def test_scaling_shifting_and_dropping() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(3))
    weight = model[0].weight.detach().clone()
    shift, factor = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 3.0, 4.0])
    apply_module(model, [ShiftBias("0", 1, shift), ScaleParameter("0.weight", 1, factor), DropGain("1.weight", 0.25)])
    torch.testing.assert_close(model[0].bias, weight @ shift)
    torch.testing.assert_close(model[0].weight, weight * factor)
    assert bool((model[1].weight == 0.25).all())


def test_inserting_a_transform_leaves_the_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 5))
    x = torch.randn(7, 24)
    before = model(x)
    left, right = random_matrix(4, 0).float(), random_matrix(6, 1).float()
    apply_module(model, [InsertTransform((("0", 1),), 0.5 + torch.rand(24), left, right, "kronecker")])
    # the stored factors are rounded to float16, and the weight undoes them as stored: float32 rounding remains
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_replacing_a_nested_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    new = nn.Identity()
    replace_module(model, "0.0", new)
    assert model[0][0] is new


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(WeightError, match=r"0\.weight holds 1 NaN or infinite values of 9.*reload"):
        check_weights(model)


def test_weights_of_the_wrong_kind_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match=r"torch.int8"):
        check_weights(model)
    with pytest.raises(WeightError, match="meta"):
        check_weights(nn.Linear(2, 2, device="meta"))
