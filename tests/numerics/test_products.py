"""Products in bfloat16: only where they are native and wanted, and never once the work is done."""

import pytest
import torch

from bwla_compiler.numerics import products
from bwla_compiler.numerics.products import bfloat16_products, native_bfloat16


def precision() -> str:
    found: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("found", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)],
)
def test_what_is_native_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert native_bfloat16() is expected


@pytest.mark.parametrize(("native", "wanted"), [(True, True), (True, False), (False, True)])
def test_the_switch_is_put_back_also_after_an_error(
    monkeypatch: pytest.MonkeyPatch, native: bool, wanted: bool
) -> None:
    monkeypatch.setattr(products, "native_bfloat16", lambda: native)
    before = precision()

    def fail() -> None:
        with bfloat16_products(wanted=wanted):
            assert precision() == ("bf16" if native and wanted else before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert precision() == before


def test_a_product_is_off_by_the_rounding_of_its_factors_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 256), (256, 64)))
    exact = left.double() @ right.double()
    with bfloat16_products():
        found = left @ right
    bound = 2.0**-8 * (left.abs().double() @ right.abs().double())  # both factors, 2^-9 each
    assert ((found - exact).abs() <= 1.01 * bound).all()
