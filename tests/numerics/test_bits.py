"""The true-bits meter."""

import pytest
import torch

from bwla_compiler.numerics.bits import Bits, claimed_bits, n_bytes
from bwla_compiler.spec import LinearSpec, TransformSpec


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (LinearSpec(1024, (4096,)), 1 + 16 / 1024),
        (LinearSpec(1024, (512, 512), planes=2), 2 + 2 * 16 / 1024),
        (LinearSpec(1024, (4096,), scale_kind="group"), 1 + 16 / 128),
        (LinearSpec(100, (10,), scale_kind="group", group_size=64), 1 + 2 * 16 / 100),
        (LinearSpec(1024, (4096,), scale_kind="row+column"), 1 + 16 / 1024 + 16 / 4096),
        (LinearSpec(1024, (4096,), rank=8), 1 + 16 / 1024 + (8 * 8 * 5120 + 8 * 16) / (1024 * 4096)),
        (LinearSpec(1024, (4096,), bias=True), 1 + 2 * 16 / 1024),
    ],
)
def test_known_specs(spec: LinearSpec, bits: float) -> None:
    assert claimed_bits(spec) == pytest.approx(bits, rel=1e-12)


def test_transforms() -> None:
    plain = claimed_bits(LinearSpec(1024, (4096,)))

    def extra(**fields: object) -> float:
        transform = TransformSpec(n1=32, n2=32, **fields)  # type: ignore[arg-type]
        return (claimed_bits(LinearSpec(1024, (4096,), transform=transform)) - plain) * 1024 * 4096

    assert extra(kind="kronecker", left=True, right=True) == pytest.approx(2 * 32 * 32 * 16)
    assert extra(kind="kronecker", right=True) == pytest.approx(32 * 32 * 16)
    assert extra(kind="hadamard", left=True, right=True) == pytest.approx(0)
    assert extra(kind="folded") == pytest.approx(0)
    assert extra(kind="none", scaled=True) == pytest.approx(1024 * 16)


def test_bytes_count_a_tied_tensor_once() -> None:
    a, b = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(5, dtype=torch.float32)
    assert n_bytes([a, b, a]) == 12 + 20
    assert n_bytes([]) == 0
    assert Bits(linears=1.1, model=2.0, n_bytes=32).n_bytes == 32
