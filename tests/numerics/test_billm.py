"""BiLLM-like weights: what they cost, where they are exact, and that they beat one plane on the Hessian."""

import torch

from bwla_compiler.numerics.billm import billm_bits, billm_weight
from bwla_compiler.numerics.psp import hessian_error
from bwla_compiler.numerics.signs import round_signs
from tests.numerics.test_group_signs import problem


def test_bits_count_every_byte() -> None:
    # two bits a weight, 4 (with means 8) scales of 16 bits a row and block, a bit a column
    assert billm_bits(4, 256) == 2 * 4 * 256 + 4 * 16 * 4 * 2 + 256
    assert billm_bits(4, 256, refined=True) == 2 * 4 * 256 + 8 * 16 * 4 * 2 + 256
    assert billm_bits(1000, 4096) / (1000 * 4096) == 2.501
    assert billm_bits(1, 130) == 2 * 130 + 4 * 16 * 2 + 130


def test_a_weight_of_its_own_kind_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (6, 40), generator=generator, dtype=torch.int64).double() * 2 - 1
    # every row: ten of the weights at 3, the others at 1, but for a salient column that is heard most
    ranks = torch.rand(6, 39, generator=generator).argsort(1).argsort(1)
    W = signs * torch.cat([torch.where(ranks < 10, 3.0, 1.0), torch.full((6, 1), 9.0)], 1).double()
    H = torch.eye(40, dtype=torch.float64)
    found = billm_weight(W, H)
    assert hessian_error(W - found, H) < 1e-20 * hessian_error(W, H)  # float64


def test_the_split_beats_one_scale_and_refinement_beats_the_split() -> None:
    W, H = problem(24, 200)
    signs, scale = round_signs(W)
    plain, refined = billm_weight(W, H), billm_weight(W, H, refined=True)
    assert hessian_error(W - plain, H) < 0.5 * hessian_error(W - scale * signs, H)
    assert float((W - refined).norm()) < float((W - plain).norm())


def test_it_is_deterministic_and_keeps_dtype() -> None:
    W, H = problem(8, 150, dtype=torch.float32)
    found = billm_weight(W, H)
    assert found.dtype == torch.float32
    assert torch.equal(found, billm_weight(W, H))
