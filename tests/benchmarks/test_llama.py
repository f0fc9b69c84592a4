"""llama.cpp as a contender: files that hold the weights, ids in and logits out, and what cannot be had is said."""

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import gguf_model, llama, models
from benchmarks.budget import Budget
from benchmarks.errors import ContenderError, ResultsError
from benchmarks.ggml import ggml
from benchmarks.gguf_model import blocks, write_float_gguf
from benchmarks.llama import Llama, LlamaModule, LlamaRunner
from benchmarks.models import Race, Work, compare
from benchmarks.peers import ways
from benchmarks.subject import Subject
from tests import tiny
from tests.checkpoint.test_gguf import dequantized, paired

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
IDS = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(3))


def made(config: Any, folder: Path) -> Any:
    """Return a random model of a config, saved in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # gains and biases that matter
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose head is its embedding, and its folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    return made(transformers.Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True), folder), folder


def tensors(file: Path) -> dict[str, Any]:
    """Return the tensors of a file by name."""
    return {tensor.name: tensor for tensor in pytest.importorskip("gguf").GGUFReader(file).tensors}


def values(tensor: Any) -> np.ndarray:
    """Return what llama.cpp takes a tensor for, float32."""
    gguf = pytest.importorskip("gguf")
    if tensor.tensor_type.name == "Q1_0":
        return dequantized(tensor)
    found: np.ndarray = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return found.reshape(tuple(int(n) for n in reversed(tensor.shape)))


# Of normal weights, relative to their norm. float16 keeps 11 bits and bfloat16 8; a step of Q8_0 is 2/255 of a block's
# range, of Q4_0 its 16th; the nearest sign times the mean leaves sqrt(1 - 2 / pi) = 0.6; TQ2_0's scale is the largest
# weight of 256, so that it keeps little but the tails.
ERRORS = {"F16": 3e-4, "BF16": 3e-3, "Q8_0": 8e-3, "Q4_0": 0.1, "Q1_0": 0.61, "TQ2_0": 1.0}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_file_holds_the_weights_as_its_type_allows(kind: str, qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = qwen3
    found = tensors(write_float_gguf(folder, tmp_path / "m.gguf", kind=kind))
    assert len(found) == 1 + 1 + 11  # embedding, last norm, and of a block four norms and seven linears
    for name, weight in (
        ("blk.0.attn_k", model.model.layers[0].self_attn.k_proj.weight),
        ("blk.0.ffn_down", model.model.layers[0].mlp.down_proj.weight),
        ("token_embd", model.model.embed_tokens.weight),
    ):
        tensor = found[f"{name}.weight"]
        expected = "Q8_0" if name == "token_embd" else kind
        assert tensor.tensor_type.name == expected
        error = np.linalg.norm(values(tensor) - weight.numpy()) / np.linalg.norm(weight.numpy())
        assert ERRORS[expected] / 20 < error < ERRORS[expected]
    gain = found["blk.0.attn_q_norm.weight"]
    assert gain.tensor_type.name == "F32"
    assert np.array_equal(values(gain), model.model.layers[0].self_attn.q_norm.weight.numpy())


def test_queries_of_llama_stand_in_pairs_and_biases_go_along(tmp_path: Path) -> None:
    model = made(transformers.LlamaConfig(**SIZES, attention_bias=True), tmp_path / "m")
    found = tensors(write_float_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="F16"))
    own = model.model.layers[0].self_attn
    half = own.q_proj.weight.half().float().numpy()
    assert np.array_equal(values(found["blk.0.attn_q.weight"]), paired(half, 4))
    assert np.array_equal(values(found["blk.0.attn_k.bias"])[:, None], paired(own.k_proj.bias.numpy()[:, None], 2))
    assert np.array_equal(values(found["blk.0.attn_v.weight"]), own.v_proj.weight.half().float().numpy())
    assert found["output.weight"].tensor_type.name == "Q8_0"


@needs_llama
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "TQ2_0", "Q1_0"])
def test_rounding_is_that_of_ggml_itself(kind: str) -> None:
    library = ggml()
    assert library is not None
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(blocks("w", weight, kind=kind).reshape(-1), library.packed(weight, kind))


def test_widths_that_blocks_do_not_divide_become_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ResultsError, match=r"blk\.0\.ffn_down has 96 inputs, and Q1_0 takes multiples of 128"):
        blocks("blk.0.ffn_down", torch.zeros(2, 96), kind="Q1_0")
    monkeypatch.setattr(gguf_model, "ggml", lambda: None)
    with pytest.raises(ResultsError, match="llama-cpp-python is not installed"):
        blocks("w", torch.zeros(2, 256), kind="IQ1_S")
    tiny.make("llama").save_pretrained(tmp_path / "narrow")  # type: ignore[operator]
    monkeypatch.setattr("benchmarks.peers.Way.missing", lambda way: "")
    monkeypatch.setattr(models, "Contender", None)  # none is begun
    subject = Subject("s", str(tmp_path / "narrow"), "", 128)
    rows = Race(subject, [w for w in ways(("llama.cpp Q1_0",)) if w.ggml], Work(2, 1), tmp_path, _quiet, Budget()).run()
    assert "inputs, and Q1_0 takes multiples of 128" in rows[0]["missing"]


def _quiet(*_: object) -> None: ...


class FakeApi(SimpleNamespace):
    """llama_cpp's low-level functions: its logits of a token are the token, its position, and how long the text is."""

    LLAMA_LOAD_MODE_NONE = 0
    wide = 3

    def __init__(self, *, broken: str = "") -> None:
        super().__init__(broken=broken, cache=[], seen=[], out=None)
        self.llama_log_callback = self.llama_log_set = lambda *_: None
        self.llama_backend_init = lambda: None
        self.llama_model_default_params = self.llama_context_default_params = SimpleNamespace
        self.llama_model_load_from_file = lambda path, parameters: None if broken == "load" else path
        self.llama_init_from_model = lambda model, parameters: self.seen.append(parameters) or "context"
        self.llama_model_get_vocab = self.llama_get_memory = lambda handle: handle
        self.llama_vocab_n_tokens = lambda vocab: self.wide
        self.llama_memory_clear = lambda memory, data: self.cache.clear()
        self.llama_print_system_info = lambda: b"CPU : SSE3 = 1 | AVX2 = 1 | AMX = 0 | REPACK = 1 |"
        self.llama_batch_free = self.llama_free = self.llama_model_free = lambda handle: self.seen.append("freed")

    def llama_batch_init(self, n: int, embeddings: int, sequences: int) -> SimpleNamespace:
        lists = {name: [None] * n for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[None] for _ in range(n)], **lists)

    def llama_decode(self, context: str, batch: SimpleNamespace) -> int:
        if self.broken == "decode":
            return -1
        assert all(batch.logits)
        rows = []
        for i in range(batch.n_tokens):
            self.cache.append(batch.token[i])
            rows.append([batch.token[i], batch.pos[i], len(self.cache)])
        self.out = np.array(rows, dtype=np.float32)
        return 0

    def llama_get_logits(self, context: str) -> Any:
        return self.out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeApi, Path]:
    """The fake in the place of the package, and a file."""
    api = FakeApi()
    monkeypatch.setitem(sys.modules, "llama_cpp", api)
    monkeypatch.setattr(llama.importlib.metadata, "version", lambda name: "0.0")
    (tmp_path / "m.gguf").write_bytes(bytes(77))
    return api, tmp_path / "m.gguf"


def test_ids_go_in_with_their_places_and_each_prompt_begins_anew(fake: tuple[FakeApi, Path]) -> None:
    api, file = fake
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    runner = LlamaRunner(file, ids, prompt=3, threads=2)
    expected = torch.tensor([[5, 0, 1], [6, 1, 2], [7, 2, 3], [8, 3, 4], [9, 4, 5]])
    for _ in range(2):
        assert torch.equal(runner.logits(), expected.float())
    assert (runner.n_bytes, runner.about) == (77, "llama-cpp-python 0.0 (SSE3 AVX2 REPACK)")
    assert (api.seen[0].n_threads, api.seen[0].n_threads_batch, api.seen[0].n_ctx) == (2, 2, 5)
    assert runner.round()["decode"] > 0
    module = LlamaModule(runner.llama)
    found = module(input_ids=torch.tensor([[1, 2], [3, 4]])).logits
    assert found.tolist() == [[[1, 0, 1], [2, 1, 2]], [[3, 0, 1], [4, 1, 2]]]
    runner.llama.close()
    assert api.seen[1:] == ["freed"] * 5  # batches of 3, 1 and 2 tokens, context and model


def test_what_llama_cpp_cannot_do_is_said(fake: tuple[FakeApi, Path]) -> None:
    api, file = fake
    loaded = Llama(file, length=4, threads=1)
    api.broken = "decode"
    with pytest.raises(ContenderError, match="llama_decode fails with -1"):
        loaded.decode([1], position=0)
    api.llama_model_load_from_file = lambda path, parameters: None
    with pytest.raises(ContenderError, match=r"cannot load m\.gguf"):
        Llama(file, length=4, threads=1)


@needs_llama
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "TQ2_0", "Q1_0"])
def test_llama_cpp_is_near_the_float_model(kind: str, qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = qwen3
    (way,) = [way for way in ways((f"llama.cpp {kind}",)) if way.ggml]
    assert way.missing() == ""
    runner = LlamaRunner(write_float_gguf(folder, tmp_path / "m.gguf", kind=kind), IDS, prompt=8, threads=1)
    wanted: Tensor = model(input_ids=IDS).logits[0]
    compared = compare(way, {"eager fp32": wanted, way.name: runner.logits()})
    runner.llama.close()
    assert "refused" not in compared
    shuffled = compare(way, {"eager fp32": wanted.roll(1, 0), way.name: wanted})
    assert ("refused" in shuffled) == bool(way.reference)


@needs_llama
def test_a_file_that_is_none_is_refused_in_llama_cpps_words(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model at all")
    with pytest.raises(ContenderError, match=r"llama\.cpp cannot load m\.gguf: .*magic"):
        Llama(tmp_path / "m.gguf", length=4, threads=1)


@needs_llama
@pytest.mark.exhaustive
def test_llama_cpp_in_a_process_of_its_own(qwen3: tuple[Any, Path], tmp_path: Path) -> None:
    chosen = ways(("llama.cpp Q8_0", "llama.cpp Q1_0"))
    subject = Subject("s", str(qwen3[1]), "", 96)
    rows = {row["way"]: row for row in Race(subject, chosen, Work(8, 4, 2, 1), tmp_path, _quiet, Budget()).run()}
    for kind in ("Q8_0", "Q1_0"):
        row = rows[f"llama.cpp {kind}"]
        assert row["decode_tokens_per_second"] > 0
        assert row["version"].startswith("llama-cpp-python")
        assert row["n_bytes"] == (tmp_path / f"{kind}.gguf").stat().st_size
    assert rows["llama.cpp Q8_0"]["error"] < 0.1  # the way's tolerance
