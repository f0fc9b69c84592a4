"""docs/format.md against a reader that knows nothing of the package: numpy, json, zlib and the text's own words."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bwla_compiler import api
from bwla_compiler.runtime.modules import EndEmbedding, PackedLinear
from bwla_compiler.zoo.models import tiny_model
from tests import tiny

DOCS = Path(__file__).parents[2] / "docs" / "format.md"
DTYPES = {"U8": "<u1", "I8": "<i1", "I16": "<i2", "F32": "<f4", "F16": "<f2"}
SETTINGS = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1, "tuning.steps": 0}


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, each held to its checksum."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    sums = json.loads(header.pop("__metadata__")["bwla.crc32"])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        own = data[start + begin : start + end]
        assert zlib.crc32(own) == sums[name]
        tensors[name] = np.frombuffer(own, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def halves(tensors: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    if name not in tensors:
        return None
    return tensors[name].view("<f2").astype(np.float64) * 2.0 ** float(tensors[f"{name}_exponent"])


def signs(packed: np.ndarray, columns: int) -> np.ndarray:
    bits = np.stack([(packed >> j) & 1 for j in range(8)], -1).reshape(*packed.shape[:-1], -1)
    return bits[..., :columns].astype(np.float64) * 2 - 1


def transformed(x: np.ndarray, spec: dict[str, Any], tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    scale, left, right = (halves(tensors, f"{name}.transform.{part}") for part in ("scale", "left", "right"))
    x = x if scale is None else x * scale
    if left is None and right is None:
        return x
    n = x.shape[-1]
    if right is not None and spec.get("signed"):
        ones = np.array([[(i & j).bit_count() for j in range(len(right))] for i in range(len(right))])
        right = right[:, None] * (-1.0) ** ones
    n1 = len(left) if left is not None else n // len(right)  # type: ignore[arg-type]
    grid = x.reshape(*x.shape[:-1], n1, n // n1)
    grid = grid if left is None else left.T @ grid
    return (grid if right is None else grid @ right).reshape(x.shape)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    if bits >= 16:
        return x
    most = np.float32(2 ** (bits - 1) - 1)
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / most
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.round(x / scale), -most, most).astype(np.float64) * scale


def weight(spec: dict[str, Any], t: dict[str, np.ndarray], name: str, expert: int | None = None) -> np.ndarray:
    """Return W [m, n]."""

    def own(part: str, values: np.ndarray | None) -> np.ndarray | None:
        return values if values is None or expert is None else values[expert]

    n = spec["in_features"]
    planes = signs(own("signs", t[f"{name}.signs"]), n)  # type: ignore[arg-type]
    scale = own("row_scale", halves(t, f"{name}.row_scale"))
    assert scale is not None
    wide = np.repeat(scale, 128, 2)[..., :n] if spec["scale_kind"] == "group" else scale
    found: np.ndarray = (wide * planes).sum(0)
    if spec["rank"]:
        into, onto = own("", t[f"{name}.low_rank_in"]), own("", t[f"{name}.low_rank_out"])
        pair = own("", halves(t, f"{name}.low_rank_scale"))
        assert into is not None
        assert onto is not None
        assert pair is not None
        found = found + (onto.astype(np.float64) * pair) @ into.astype(np.float64)
    return found


def linear(x: np.ndarray, entry: dict[str, Any], t: dict[str, np.ndarray], name: str) -> np.ndarray:
    spec = entry["spec"]
    x = transformed(x, spec["transform"], t, name)
    columns = halves(t, f"{name}.column_scale")
    x = rounded(x if columns is None else x * columns, spec["activation_bits"])
    y = x @ weight(spec, t, name).T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def nibbles(packed: np.ndarray, columns: int) -> np.ndarray:
    both = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return both[..., :columns].astype(np.float64) - 8


def coded(entry: dict[str, Any], t: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return the rows of an embedding or a head [m, n]."""
    scale = halves(t, f"{name}.row_scale")
    assert scale is not None
    if entry["kind"].startswith("Int8"):
        return t[f"{name}.codes"].astype(np.float64) * scale[:, None]
    n = entry["width"] if "width" in entry else entry["in"]
    return nibbles(t[f"{name}.codes"], n) * np.repeat(scale, entry["group_size"], 1)[:, :n]


CASES = [
    ("gpt2", "bwla-w1a6", {}),  # biases, low rank, online transforms with a diagonal, rounding
    ("llama", "bwla-paper", {"tuning.steps": 0, "head.bits": 4}),  # column scales, codes of 4 bits
    # planes, groups; a head that reads an embedding's codes of 4 bits
    ("llama-tied", "rtn", {"weights.planes": 2, "weights.scales": "group", "head.bits": 4, "head.group_size": 32}),
]


@pytest.mark.parametrize("name, recipe, settings", CASES)
def test_a_reader_from_the_text_alone_computes_the_same(
    name: str, recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = tiny.make(name)
    tokens = tiny.ids(batch=8, length=16, seed=3)
    api.quantize(model, recipe=recipe, settings={**SETTINGS, **settings}, calibration=tokens)
    model.save_pretrained(tmp_path)
    tensors = read(tmp_path / "model.safetensors")
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    generator = torch.Generator().manual_seed(0)
    for key, entry in entries.items():
        module = model.get_submodule(key)
        if entry["kind"] == "PackedLinear":
            assert isinstance(module, PackedLinear)
            x = torch.randn(3, entry["spec"]["in_features"], generator=generator)
            # float32 of another order; a rounding at a half may fall to the other side, hence the share
            expected, found = module(x).double().numpy(), linear(x.double().numpy(), entry, tensors, key)
            close = np.isclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            assert close.mean() > 0.9, key
        elif entry["kind"] in ("Int8Linear", "Int4Linear"):
            x = torch.randn(3, entry["in"], generator=generator)
            y = x.double().numpy() @ coded(entry, tensors, key).T
            np.testing.assert_allclose(module(x).double().numpy(), y, rtol=1e-3, atol=1e-3)
        elif entry["kind"] in ("Int8Embedding", "Int4Embedding"):
            assert isinstance(module, EndEmbedding)
            rows = coded(entry, tensors, key)
            rows = transformed(rows, entry["transform"] or {}, tensors, key)
            np.testing.assert_allclose(module(torch.arange(128)).double().numpy(), rows, rtol=1e-4, atol=1e-4)
        elif entry["kind"] == "TiedHead":
            table = entry["embedding"]
            x = torch.randn(3, model.config.hidden_size, generator=generator)
            inner = transformed(x.double().numpy(), entry["transform"] or {}, tensors, key)
            columns = halves(tensors, f"{key}.column_scale")
            inner = inner if columns is None else inner * columns
            y = inner @ coded(entries[table], tensors, table).T + tensors.get(f"{key}.bias", 0.0)
            np.testing.assert_allclose(module(x).double().numpy(), y, rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
def test_experts_are_linears_with_one_more_axis(tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral")
    api.quantize(model, settings=SETTINGS, calibration=tiny.ids(batch=8, length=16, seed=3))
    model.save_pretrained(tmp_path)
    tensors = read(tmp_path / "model.safetensors")
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    key = "model.layers.0.mlp.experts.down_proj"
    spec, module = entries[key]["spec"], model.get_submodule(key)
    x = torch.randn(4, spec["in_features"], generator=torch.Generator().manual_seed(0))
    experts = torch.arange(4) % entries[key]["experts"]
    expected = module(x, experts).double().numpy()
    inner = rounded(transformed(x.double().numpy(), spec["transform"], tensors, key), spec["activation_bits"])
    found = np.stack([weight(spec, tensors, key, int(e)) @ row for e, row in zip(experts, inner, strict=True)])
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()).mean() > 0.9


def vectors() -> dict[str, Any]:
    found = re.search(r"<!-- vectors.*?```json\n(.*?)```", DOCS.read_text("utf-8"), re.S)
    assert found is not None
    table: dict[str, Any] = json.loads(found.group(1))
    return table


def test_vectors_by_the_reader() -> None:
    v = vectors()
    assert signs(np.array(v["signs"]["bytes"], "u1"), 10).tolist() == v["signs"]["columns"]
    stored = {"a": np.array(v["halves"]["bits"], "<i2"), "a_exponent": np.array(v["halves"]["exponent"], "i1")}
    found = halves(stored, "a")
    assert found is not None
    assert found.tolist() == v["halves"]["values"]
    assert zlib.crc32(bytes(v["crc32"]["bytes"])) == v["crc32"]["value"]
    assert nibbles(np.array(v["nibbles"]["bytes"], "u1"), 5).tolist() == v["nibbles"]["columns"]
    x = np.array(v["rounding"]["x"])
    codes = rounded(x, v["rounding"]["bits"]) / v["rounding"]["scale"]
    np.testing.assert_allclose(codes, v["rounding"]["codes"], atol=1e-6)
    t = v["transform"]
    grid = (np.array(t["x"]) * t["scale"]).reshape(t["n1"], t["n2"])
    assert (np.array(t["left"]).T @ grid @ np.array(t["right"])).flatten().tolist() == t["result"]
    t = v["signed"]
    stored = {"x.transform.right": np.array(t["right"], "<f2").view("<i2"), "x.transform.right_exponent": np.int8(0)}
    assert transformed(np.array(t["x"]), {"signed": True}, stored, "x").tolist() == t["result"]
    case = v["linear"]
    planes = signs(np.array(case["signs"], "u1"), 4) * np.array(case["row_scale"])
    pair = np.array(case["low_rank_out"]) * case["low_rank_scale"] @ np.array(case["low_rank_in"])
    assert ((planes.sum(0) + pair) @ np.array(case["x"])).tolist() == case["y"]


def test_vectors_by_the_package() -> None:
    from bwla_compiler.numerics.activations import quantize_activation
    from bwla_compiler.numerics.half import from_half_bits
    from bwla_compiler.numerics.nibbles import pack_nibbles
    from bwla_compiler.numerics.planes import pack_signs
    from bwla_compiler.runtime.online import OnlineTransform

    v = vectors()
    assert pack_signs(torch.tensor(v["signs"]["columns"], dtype=torch.int8)).tolist() == v["signs"]["bytes"]
    assert pack_nibbles(torch.tensor(v["nibbles"]["columns"], dtype=torch.int8)).tolist() == v["nibbles"]["bytes"]
    bits = torch.tensor(v["halves"]["bits"], dtype=torch.int16)
    assert from_half_bits(bits, v["halves"]["exponent"]).tolist() == v["halves"]["values"]
    codes, scale = quantize_activation(torch.tensor([v["rounding"]["x"]]), bits=v["rounding"]["bits"])
    assert codes.flatten().tolist() == v["rounding"]["codes"]
    assert float(scale) == v["rounding"]["scale"]
    t = v["transform"]
    factors = (torch.tensor(t[part], dtype=torch.float32) for part in ("scale", "left", "right"))
    turned = OnlineTransform.from_factors(*factors, kind="kronecker")(torch.tensor([t["x"]], dtype=torch.float32))
    assert turned.flatten().tolist() == t["result"]
    t = v["signed"]
    by_signs = OnlineTransform.from_factors(None, None, torch.tensor(t["right"]), kind="kronecker")
    assert by_signs.spec.signed
    assert by_signs(torch.tensor([t["x"]], dtype=torch.float32)).flatten().tolist() == t["result"]
