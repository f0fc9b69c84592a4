"""Muon: the polar factor, and steps of known size down a known slope."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bwla_compiler.demo.muon import Muon, polar


@given(st.integers(1, 3), st.integers(2, 40), st.integers(2, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_singular_values_come_out_near_one(n: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(n, rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, columns, rank, generator=generator)).Q
    wanted = left @ right.mT
    values = torch.logspace(0, -2, rank)  # two decades: five polynomials lift what is above 1/300
    found = polar(left * values @ right.mT)
    spectrum = torch.linalg.svdvals(found)
    assert 0.6 < spectrum.min() <= spectrum.max() < 1.2  # the polynomials' own ripple is 0.12; small values lag
    inside = (left.mT @ found @ right).diagonal(dim1=-2, dim2=-1)
    assert (inside > 0.6).all()  # the same singular vectors, in their order and with their signs
    assert (found - wanted).norm() < 0.4 * wanted.norm()


def test_a_step_has_the_size_asked_for() -> None:
    tall = nn.Parameter(torch.zeros(16, 4))
    wide = nn.Parameter(torch.zeros(4, 16))
    optimizer = Muon([tall, wide])
    generator = torch.Generator().manual_seed(0)
    for parameter in (tall, wide):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(0.5)
    assert abs(torch.linalg.matrix_norm(tall.detach(), 2) - 0.5 * 2) < 0.2  # sqrt(16 / 4); ripple of 0.12
    assert abs(torch.linalg.matrix_norm(wide.detach(), 2) - 0.5) < 0.1


def test_finds_a_known_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(6, 8, generator=generator)
    weight = nn.Parameter(torch.zeros(6, 8))
    optimizer = Muon([weight])
    for step in range(200):
        weight.grad = weight.detach() - target
        optimizer.step(0.1 * (1 - step / 200))
    assert (weight.detach() - target).norm() < 0.02 * target.norm()  # the last steps are of size 0.0005
