"""GGUF: read back by a reader of our own, values are those of the packed model; what it cannot hold is refused."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bwla_compiler import api
from bwla_compiler.checkpoint.gguf_blocks import code_blocks, nibble_blocks, sign_blocks
from bwla_compiler.checkpoint.gguf_family import FAMILIES, rotary_factors
from bwla_compiler.checkpoint.gguf_tokens import CUTS, read_vocabulary
from bwla_compiler.errors import CheckpointError
from bwla_compiler.evaluate.fidelity import fidelity
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.runtime.reference import int4_weight
from bwla_compiler.spec import LinearSpec, TransformSpec
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ROUNDED = {"signs.method": "round", "target.drift": False}
"""The folded recipe without data: what it stores has the same form."""


def folded(config: Any, settings: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    api.quantize(model, recipe="bwla-folded", settings=ROUNDED | (settings or {}))
    return model


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return folded(transformers.Qwen3Config(**SIZES))


def dequantized(tensor: Any) -> np.ndarray:
    """Return the float32 values of a tensor of GGUFReader, by what llama.cpp says of its types."""
    rows = np.asarray(tensor.data)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if tensor.tensor_type.name == "Q1_0":
        blocks = rows.reshape(-1, 18)
        codes = 2.0 * np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") - 1.0
    elif tensor.tensor_type.name == "Q8_0":
        blocks = rows.reshape(-1, 34)
        codes = blocks[:, 2:].view(np.int8).astype(np.float32)
    elif tensor.tensor_type.name == "Q4_0":
        blocks = rows.reshape(-1, 18)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
    else:
        return rows.astype(np.float32).reshape(shape)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (scale * codes).astype(np.float32).reshape(shape)


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Move a rotary pair's rows from half a head apart to side by side."""
    half = rows.shape[0] // heads // 2
    found = np.empty_like(rows)
    for head in range(heads):
        for i in range(half):
            for part in (0, 1):
                found[2 * (head * half + i) + part] = rows[(2 * head + part) * half + i]
    return found


def expected(model: Any, *, pairs: bool) -> dict[str, np.ndarray]:
    """Return the values of a model by GGUF's names, written out."""
    found = {"output_norm": model.model.norm.weight}
    for name, module in (("token_embd", model.model.embed_tokens), ("output", model.lm_head)):
        scale = module.row_scale.view(torch.float16).float() * 2.0 ** float(module.row_scale_exponent)
        int4 = module.codes.dtype == torch.uint8
        found[name] = int4_weight(module.codes, scale, 128, 64) if int4 else module.codes.float() * scale[:, None]
    for i, layer in enumerate(model.model.layers):
        own, mlp = layer.self_attn, layer.mlp
        parts = {"attn_q": own.q_proj, "attn_k": own.k_proj, "attn_v": own.v_proj, "attn_output": own.o_proj}
        parts |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        found |= {f"blk.{i}.{name}": part.dense_weight() for name, part in parts.items()}
        norms = {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        if hasattr(own, "q_norm"):
            norms |= {"attn_q_norm": own.q_norm, "attn_k_norm": own.k_norm}
        found |= {f"blk.{i}.{name}": norm.weight for name, norm in norms.items()}
    arrays = {f"{name}.weight": tensor.detach().numpy() for name, tensor in found.items()}
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        for i in range(2 if pairs else 0):
            arrays[f"blk.{i}.{name}.weight"] = paired(arrays[f"blk.{i}.{name}.weight"], heads)
    return arrays


def check(model: Any, file: Path, *, pairs: bool) -> Any:
    """Hold a file's tensors to the model's, bit by bit; return the reader."""
    reader = pytest.importorskip("gguf").GGUFReader(file)
    found = {tensor.name: dequantized(tensor) for tensor in reader.tensors}
    wanted = expected(model, pairs=pairs)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []
    return reader


def test_a_folded_model_is_the_same_numbers(qwen3: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    api.export(qwen3, tmp_path / "out", to="gguf")
    reader = check(qwen3, tmp_path / "out" / "model.gguf", pairs=False)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_down.weight"] == "Q1_0"
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.head_count_kv"] == 2
    assert fields["qwen3.attention.key_length"] == 32
    assert fields["qwen3.rope.freq_base"] == 10000.0
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.model"] == "none"
    packed = [t for t in reader.tensors if t.tensor_type.name == "Q1_0"]
    assert 8 * sum(t.n_bytes for t in packed) / sum(t.n_elements for t in packed) == 1.125
    assert not list((tmp_path / "out").glob(".*"))


def test_rotary_pairs_of_llama_stand_side_by_side_and_ends_have_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = folded(transformers.LlamaConfig(**SIZES), {"head.bits": 4})
    api.export(model, tmp_path / "model.gguf", to="gguf")
    reader = check(model, tmp_path / "model.gguf", pairs=True)
    assert {t.tensor_type.name for t in reader.tensors if t.name.startswith(("token_embd", "output.w"))} == {"Q4_0"}


def test_blocks_by_hand() -> None:
    signs = torch.zeros(1, 32, dtype=torch.uint8)
    signs[0, 0], signs[0, 16] = 0b101, 0x80  # columns 0, 2 and 135 are plus
    found = sign_blocks(signs, torch.tensor([[0.5, -2.0]]), name="w")
    assert found.tolist() == [[0x00, 0x38, 0b101, *[0] * 15, 0x00, 0xC0, 0x80, *[0] * 15]]
    codes = torch.arange(-32, 32, dtype=torch.int8)[None]
    rows = code_blocks(codes, torch.tensor([1.0]), name="w")
    assert rows.tolist() == [[0x00, 0x3C, *range(224, 256), 0x00, 0x3C, *range(32)]]
    four = torch.cat([torch.arange(32) // 2 - 8, torch.full((64,), 7)]).to(torch.int8)[None]
    halves = nibble_blocks(four, torch.tensor([[-0.5, 1.0]]), group_size=64, name="w")
    first = [j // 2 + 16 * (j // 2 + 8) for j in range(16)]  # column j, and column j + 16 in the high bits
    top = [0xFF] * 16
    assert halves.tolist() == [[0x00, 0xB8, *first, 0x00, 0xB8, *top, 0x00, 0x3C, *top]]


@pytest.mark.parametrize("value", [1e6, 1e-9])
def test_scales_outside_float16_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match=r"w: its scales, .* outside float16"):
        sign_blocks(torch.zeros(2, 16, dtype=torch.uint8), torch.full((2, 1), value), name="w")


def test_widths_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="has 64 inputs, and GGUF's Q1_0 takes multiples of 128"):
        sign_blocks(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1), name="w")
    with pytest.raises(CheckpointError, match="has 48 columns, and GGUF's Q8_0 takes multiples of 32"):
        code_blocks(torch.zeros(2, 48, dtype=torch.int8), torch.ones(2), name="w")


DOWN = "model.layers.1.mlp.down_proj"
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "pair": ({"rank": 2}, "has a low-rank pair; quantize with --recipe bwla-folded"),
    "planes": ({"planes": 2}, "has 2 binary planes"),
    "columns": ({"scale_kind": "row+column"}, "has column scales"),
    "bias": ({"bias": True}, "has a bias, for which GGUF's qwen3 has no place"),
    "online": ({"transform": TransformSpec("hadamard", 16, 16, left=True, right=True)}, "is turned at run time"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_gguf_cannot_hold_is_refused_by_name(what: str, qwen3: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    options, message = OTHERS[what]
    base = {"in_features": 256, "out_features": (128,), "activation_bits": 16}
    model = copy.deepcopy(qwen3)
    replace_module(model, DOWN, PackedLinear(LinearSpec(**{**base, **options})))
    with pytest.raises(CheckpointError, match=f"{DOWN}: .*{message}"):
        api.export(model, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def changed(config: Any, **fields: Any) -> Any:
    for key, value in fields.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gpt2"}, "gpt2: the GGUF export knows llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attends to a sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary frequencies of type 'yarn'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    fields: dict[str, Any], message: str, qwen3: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    model = copy.deepcopy(qwen3)
    changed(model.config, **fields)
    with pytest.raises(CheckpointError, match=message):
        api.export(model, tmp_path / "out", to="gguf")


def test_float_models_and_unknown_forms_are_refused(qwen3: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are 'dense', 'gguf'"):
        api.export(qwen3, tmp_path / "out", to="onnx")
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="is not packed"):
        api.export(tiny.make("llama"), tmp_path / "out", to="gguf")


def test_without_the_package_the_error_names_the_extra(
    qwen3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'bwla-compiler\[gguf\]'"):
        api.export(qwen3, tmp_path / "out", to="gguf")


def test_frequencies_of_llama_3_become_factors() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), dtype=torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(transformers.LlamaConfig(**SIZES, rope_parameters=rope))
    changed(model.config, rope_parameters=rope)
    factors = rotary_factors(model, FAMILIES["llama"])
    assert factors is not None
    assert factors.shape == (16,)
    assert float(factors[0]) == pytest.approx(1.0)  # wave lengths far below 64 stay
    assert float(factors[-1]) == pytest.approx(8.0)  # those far above are stretched


def bpe(before: Any) -> PreTrainedTokenizerFast:
    vocabulary = {"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = before
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|end|>")


def split(pattern: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def test_a_byte_level_vocabulary_is_told_whole() -> None:
    found = read_vocabulary(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), size=6)
    assert found.cut == "gpt-2"
    assert found.tokens == ("<|end|>", "a", "b", "ab", "Ġ", "[PAD5]")
    assert found.types == (3, 1, 1, 1, 1, 5)
    assert found.merges == ("a b",)
    assert found.special == {"bos": 0, "eos": 0}
    assert not found.begins
    assert [read_vocabulary(bpe(split(pattern)), size=6).cut for pattern in CUTS] == ["qwen2", "llama-bpe"]


def test_other_tokenizers_are_refused() -> None:
    for before in (split("x"), pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace()):
        with pytest.raises(CheckpointError, match=r"a pre-tokenizer that llama\.cpp has no name for"):
            read_vocabulary(bpe(before), size=6)
    with pytest.raises(CheckpointError, match="5 tokens for an embedding of 4 rows"):
        read_vocabulary(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), size=4)
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CheckpointError, match="a WordLevel model"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), size=4)


def test_llama_cpp_computes_the_same(qwen3: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    api.export(qwen3, tmp_path / "model.gguf", to="gguf")
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0
    )
    ids = tiny.ids(batch=1, length=33, seed=5)
    # ggml sets the tiles of AMX up once a thread, and oneDNN, which other tests have used on this one, drops them
    with ThreadPoolExecutor(1) as fresh_thread:
        fresh_thread.submit(theirs.eval, ids[0, :-1].tolist()).result()

    class Answer(nn.Module):
        config = qwen3.config

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = torch.from_numpy(np.array(theirs.scores[: input_ids.shape[1]]))[None]
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    near = fidelity(qwen3, Answer(), ids)
    # llama.cpp rounds activations to 8 bits, and logits here are all but flat
    assert near.kl < 1e-3
    ratio = api.perplexity(Answer(), ids) / api.perplexity(qwen3, ids)
    assert abs(math.log(ratio)) < 0.01
