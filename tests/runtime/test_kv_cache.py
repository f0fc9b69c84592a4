"""The int8 KV cache: what is rounded, what attention reads, what generate makes, and what is refused."""

import copy
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from bwla_compiler import api
from bwla_compiler.errors import CacheError
from bwla_compiler.runtime import kv_cache
from bwla_compiler.runtime.kv_cache import Int8Layer, int8_cache, set_cache_bits
from bwla_compiler.runtime.kv_rounding import restored, rounded
from tests import tiny

STATIC = {"cache_implementation": "static"}


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=9), st.integers(-90, 90))
@settings(deadline=None, max_examples=50)
def test_a_value_comes_back_within_half_a_step(values: list[int], power: int) -> None:
    x = torch.tensor([values, [0] * len(values)]) * 2.0**power
    codes, scale = rounded(x)
    error = (restored(codes, scale, x.dtype) - x).abs()
    # the division, the product and the scale are rounded to float32, each by 6e-8 of at most 127 steps
    assert bool((error <= scale * (0.5 + 127 * 2e-7)).all())
    assert not error[1].any()


def test_the_dtype_of_the_model_comes_back_and_nan_is_not_hidden() -> None:
    codes, scale = rounded(torch.tensor([[1.0, float("nan")], [-127.0, 64.0]], dtype=torch.bfloat16))
    found = restored(codes, scale, torch.bfloat16)
    assert (codes.dtype, scale.dtype, found.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert found[0].isnan().any()
    assert found[1].tolist() == [-127.0, 64.0]


def read(model: Any, ids: Tensor, cache: Any, *, step: int) -> Tensor:
    """Return the logits of tokens that are read `step` at a time."""
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(step, 1)]
    return torch.cat(parts, 1)


def n_bytes(cache: Any) -> int:
    pairs = (p for layer in cache.layers for p in ((layer.codes, layer.scales) if hasattr(layer, "codes") else [layer]))
    return sum(t.nbytes for pair in pairs for t in (pair.keys, pair.values))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_reading_in_pieces_is_reading_at_once_and_near_the_floats(name: str, static: bool) -> None:
    model: Any = tiny.make(name)
    ids = tiny.ids(batch=2, length=40)  # more than Gemma's window of 32

    def cache() -> Any:
        return StaticCache(model.config, max_cache_len=40) if static else DynamicCache(config=model.config)

    exact = cache()
    expected = read(model, ids, exact, step=40)
    ours = int8_cache(cache())
    found = read(model, ids, ours, step=40)
    assert all(isinstance(layer, Int8Layer) for layer in ours.layers)
    error = (found - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05  # 8 bits of each entry; measured 0.01 and less, and 0 where floats were kept
    pieces = read(model, ids, int8_cache(cache()), step=8)
    # float32 sums in another order move an entry over the edge of a code now and then, by 1 of 127 steps
    assert (pieces - found).norm() / found.norm() < 0.01
    head = model.config.hidden_size // model.config.num_attention_heads
    assert n_bytes(ours) / n_bytes(exact) == (head + 4) / (4 * head)


def test_generate_keeps_int8_until_it_is_told_otherwise() -> None:
    model: Any = tiny.make("llama")
    ids = tiny.ids(batch=2, length=5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    set_cache_bits(model, 8)
    twin = copy.deepcopy(model)
    del model  # a copy makes its caches by itself
    texts = []
    for more in ({}, STATIC, {"num_beams": 3}):
        found = twin.generate(ids, **options, **more)
        assert {type(layer) for layer in found.past_key_values.layers} == {Int8Layer}
        texts.append(found.sequences)
    assert torch.equal(texts[0], texts[1])
    own = DynamicCache(config=twin.config)
    assert twin.generate(ids, past_key_values=own, **options).past_key_values is own
    assert Int8Layer not in {type(layer) for layer in own.layers}
    set_cache_bits(twin, 16)
    again = twin.generate(ids, **options)
    assert Int8Layer not in {type(layer) for layer in again.past_key_values.layers}
    assert torch.equal(again.sequences, plain.sequences)


def test_a_copy_and_a_pickled_model_keep_int8_themselves() -> None:
    model: Any = tiny.make("llama")
    set_cache_bits(model, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        hook = vars(other)["_prepare_cache_for_generation"]
        assert hook.args == (other,)
        found = other.generate(tiny.ids(batch=1), max_new_tokens=2, return_dict_in_generate=True)
        assert all(isinstance(layer, Int8Layer) for layer in found.past_key_values.layers)


def test_a_cache_that_makes_its_layers_itself_is_pickled() -> None:
    model: Any = tiny.make("llama", layers=1)
    ids, cache = tiny.ids(batch=1, length=9), int8_cache(DynamicCache())
    read(model, ids[:, :6], cache, step=6)
    other = pickle.loads(pickle.dumps(cache))
    assert torch.equal(read(model, ids[:, 6:], other, step=3), read(model, ids[:, 6:], cache, step=3))


@pytest.mark.parametrize("bits", [(16, 8), (8, 8)])
def test_an_assistant_takes_back_tokens_beyond_its_window(bits: tuple[int, int]) -> None:
    models: list[Any] = []
    for n_bits in bits:
        torch.manual_seed(0)
        config = tiny.CONFIGS["mistral"]()
        config.sliding_window = 6
        models.append(transformers.AutoModelForCausalLM.from_config(config).eval())
        set_cache_bits(models[-1], n_bits)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 1, "do_sample": False}
    found = models[0].generate(tiny.ids(batch=1, length=9), assistant_model=models[1], **options)
    assert torch.equal(found, models[0].generate(tiny.ids(batch=1, length=9), **options))


def test_a_cache_can_be_emptied_cropped_and_repeated() -> None:
    model: Any = tiny.make("llama", layers=1)
    ids = tiny.ids(batch=2, length=9)
    cache = int8_cache(DynamicCache())  # one that makes its layers itself
    whole = read(model, ids, cache, step=9)
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    assert torch.allclose(read(model, ids[:, 5:], cache, step=4), whole[:, 5:], atol=1e-4)  # float32 sums
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-4)
    assert torch.allclose(read(model, ids[:, 5:], cache, step=4), whole[:, 5:], atol=1e-4)
    cache.reset()
    assert torch.equal(read(model, ids, cache, step=9), whole)


def test_a_recipe_chooses_it_and_the_checkpoint_remembers(tmp_path: Path) -> None:
    model: Any = tiny.make("llama-tied")
    api.quantize(model, recipe="hadamard-rtn", settings={"cache.bits": 8}, calibration="none")
    api.save(model, tmp_path / "out")
    loaded: Any = api.load(tmp_path / "out").model
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = (m.generate(tiny.ids(length=5), **options) for m in (model, loaded))
    assert {type(layer) for layer in theirs.past_key_values.layers} == {Int8Layer}
    assert torch.equal(ours.sequences, theirs.sequences)


def test_what_cannot_be_int8_is_one_clear_error() -> None:
    model: Any = tiny.make("llama", layers=1)
    with pytest.raises(CacheError, match="a cache of 4 bits: expected 8 or 16"):
        set_cache_bits(model, 4)
    with pytest.raises(CacheError, match="Linear has no generate"):
        set_cache_bits(torch.nn.Linear(2, 2), 8)
    cache = DynamicCache(config=model.config)
    read(model, tiny.ids(), cache, step=11)
    with pytest.raises(CacheError, match="holds tokens already"):
        int8_cache(cache)
    with pytest.raises(CacheError, match="cannot be kept in int8: give a DynamicCache"):
        int8_cache(transformers.EncoderDecoderCache(DynamicCache(), DynamicCache()))
    set_cache_bits(model, 8)
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with pytest.raises(CacheError, match="Fp8QuantizedLayer, which cannot be kept in int8"):
        model.generate(tiny.ids(), max_new_tokens=2, **quantized)


def test_recurrent_layers_are_refused_before_anything_is_done() -> None:
    config = transformers.Lfm2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CacheError, match=r"layer 0 of the cache is a LinearAttentionLayer.*use cache\.bits = 16"):
        api.quantize(model, recipe="rtn", settings={"cache.bits": 8})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_versions_of_transformers_without_layers_that_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.cache_utils, "DummyLayer", raising=False)  # 5.17 has none
    assert kv_cache.__file__ is not None
    spec = importlib.util.spec_from_file_location("kv_cache_of_an_older_transformers", kv_cache.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    cache = again.int8_cache(DynamicCache())
    assert type(cache.layer_class_to_replicate()) is again.Int8Layer
