"""Compiled models over an int8 KV cache: the text of the eager model, and one graph for all steps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import DynamicCache, StaticCache

from bwla_compiler.backend import compile_backend
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.passes.shared_functions import share_functions
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.kv_cache import int8_cache, set_cache_bits
from tests import tiny
from tests.backend import small
from tests.wider import wider


def greedy(model: Any, run: Any, cache: Any, *, steps: int) -> Tensor:
    """Return the tokens of a prompt that the model reads and `run` continues, each the likeliest."""
    found = [model(tiny.ids(), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)]
    for _ in range(steps):
        found.append(run(found[-1], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("static", [True, *wider(False)])
def test_steps_give_the_text_of_the_eager_model(static: bool, graphs: list[GraphModule]) -> None:
    model = small.architecture("llama")
    quantize_model(model, load_recipe("hadamard-rtn"), None)

    def cache() -> Any:
        return int8_cache(StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config))

    with torch.no_grad():
        expected = greedy(model, model, cache(), steps=5)
        used = cache()
        found = greedy(model, small.compiled(model), used, steps=5)
    assert torch.equal(found, expected)
    assert len(graphs) <= (1 if static else 2)  # a cache that grows has one graph for its first length
    assert {layer.codes.keys.dtype for layer in used.layers} == {torch.int8}
    held = {str(node.target) for node in graphs[0].graph.nodes}
    assert "bwla.linear_of.default" in held


@pytest.mark.exhaustive
def test_generate_with_inductors_code_gives_the_text_of_the_eager_model() -> None:
    model: Any = small.architecture("llama")
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    share_functions(model)
    set_cache_bits(model, 8)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    with torch.no_grad():
        expected = model.generate(tiny.ids(), **options)
        model.compile(backend=compile_backend)
        assert torch.equal(model.generate(tiny.ids(), **options), expected)
