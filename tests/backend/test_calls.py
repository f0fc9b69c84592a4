"""Every way to call a compiled model: gradient modes, dtypes, padding, generation, copies."""

import copy
import functools
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, CompileConfig

import bwla_compiler
from bwla_compiler.backend import compile_backend
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.errors import GradientError
from bwla_compiler.recipe import load_recipe
from tests import tiny
from tests.backend import small
from tests.wider import wider


def made(kind: str, **kwargs: Any) -> nn.Module:
    return copy.deepcopy(packed(**kwargs)) if kind == "packed" else small.llama(**kwargs)


@functools.cache
def packed(**kwargs: Any) -> nn.Module:
    model = small.llama(**kwargs)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    return model


def reference(model: nn.Module) -> nn.Module:
    """Return what computes the same eagerly: the backend's copy of a raw model, a packed one itself."""
    return small.only_variant(model).quantized if variants_of(model) else model


KINDS = pytest.mark.parametrize("kind", ["raw", "packed"])


@pytest.mark.parametrize("kind", ["raw", *wider("packed")])
def test_gradient_modes(kind: str, graphs: list[GraphModule]) -> None:
    model, ids = made(kind), tiny.ids()
    fast = small.compiled(model)
    found = fast(ids).logits  # the default grad mode, parameters that ask for gradients
    expected = reference(model)(ids).logits.detach()
    assert torch.equal(found, expected)
    assert found.requires_grad == any(p.requires_grad for p in model.parameters())
    if found.requires_grad:
        with pytest.raises(GradientError, match="no gradient"):
            found.sum().backward()
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, expected)
    with torch.inference_mode():
        found = fast(ids).logits
        assert torch.equal(found, expected)
        assert found.is_inference()
    model.train()
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, expected)  # no dropout in these models


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("raw", torch.float16),
        ("packed", torch.bfloat16),
        *wider(("raw", torch.bfloat16), ("packed", torch.float16)),
    ],
)
def test_half_precision(kind: str, dtype: torch.dtype, graphs: list[GraphModule]) -> None:
    model = made(kind, dtype=dtype)
    with torch.no_grad():
        found = small.compiled(model)(tiny.ids()).logits
        assert torch.equal(found, reference(model)(tiny.ids()).logits)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", ["raw", *wider("packed")])
def test_autocast_and_padding(kind: str, graphs: list[GraphModule]) -> None:
    model, ids = made(kind), tiny.ids()
    fast = small.compiled(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    with torch.no_grad():
        found = fast(ids, attention_mask=mask).logits
        # masks are built by other operations when traced, the sums are the same
        assert small.error(found, reference(model)(ids, attention_mask=mask).logits) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            found = fast(ids, attention_mask=mask).logits
            assert small.error(found, reference(model)(ids, attention_mask=mask).logits) < 1e-5


GREEDY: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
CHOSEN: list[dict[str, Any]] = [{"num_beams": 2}, {"do_sample": True}]


@pytest.mark.parametrize("kind, ways", [("raw", GREEDY), *wider(("raw", CHOSEN), ("packed", [*GREEDY, *CHOSEN]))])
def test_generation(kind: str, ways: list[dict[str, Any]], graphs: list[GraphModule]) -> None:
    model = made(kind)
    model.generation_config.eos_token_id = None
    model.compile(backend=compile_backend, options=small.OPTIONS)  # generate() of a wrapper would run the float model
    for way in ways:
        found = generated(model, **way)
        assert torch.equal(found, generated(eager(model), **way)), way
    assert 2 <= len(graphs) <= torch._dynamo.config.recompile_limit


def generated(model: nn.Module, **way: Any) -> torch.Tensor:
    torch.manual_seed(3)
    ids = tiny.ids(batch=2)
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **way)
    return found


def eager(model: nn.Module) -> nn.Module:
    if variants_of(model):
        return reference(model)
    plain = copy.copy(model)
    plain._compiled_call_impl = None
    return plain


@pytest.mark.parametrize("reloaded", [False, *wider(True)])
def test_generation_with_a_compile_config(reloaded: bool, graphs: list[GraphModule], tmp_path: Path) -> None:
    if "bwla" not in {p.name for p in importlib.metadata.entry_points(group="torch_dynamo_backends")}:
        pytest.skip("the package is not installed, so torch finds no backend of this name")
    model: Any = made("packed")
    if reloaded:
        bwla_compiler.quantize(model := made("raw"), recipe="hadamard-rtn", calibration="none")
        bwla_compiler.save(model, tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.generation_config.eos_token_id = None
    expected = generated(model)
    config = CompileConfig(backend="bwla", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on its own for GPUs only
    assert torch.equal(generated(model, cache_implementation="static", compile_config=config), expected)
    assert graphs


def test_copies_and_saving_of_a_raw_model(graphs: list[GraphModule], tmp_path: Path) -> None:
    model, ids = small.llama(), tiny.ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = small.compiled(model)
    with torch.no_grad():
        expected, plain = fast(ids).logits, model(ids).logits
        fast.save_pretrained(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for other in (saved, copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert torch.equal(other(ids).logits, plain)
            assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        assert torch.equal(copy.deepcopy(fast)(ids).logits, expected)


def test_copies_and_saving_of_a_packed_model(graphs: list[GraphModule], tmp_path: Path) -> None:
    model, ids = small.llama(), tiny.ids()
    bwla_compiler.quantize(model, recipe="hadamard-rtn", calibration="none")
    fast = small.compiled(model)
    with torch.no_grad():
        expected = fast(ids).logits
        fast.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        for other in (loaded, copy.deepcopy(model)):
            assert torch.equal(small.compiled(other)(ids).logits, expected)


@pytest.mark.exhaustive
def test_weights_made_in_inference_mode(graphs: list[GraphModule]) -> None:
    with torch.inference_mode():
        model = small.llama()
        found = small.compiled(model)(tiny.ids()).logits
        assert torch.equal(found, small.only_variant(model).quantized(tiny.ids()).logits)
