"""The embedded models by name: the same at every building, cached, with their tokens and clear errors."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bwla_compiler.demo import DemoConfig, demo_path, demo_tokens, is_demo, load_demo
from bwla_compiler.demo import model as demo_model
from bwla_compiler.demo.corpus import read_corpus
from bwla_compiler.errors import DemoError


def test_names() -> None:
    assert is_demo("demo:")
    assert is_demo("demo:outliers")
    assert is_demo("demo:unknown")  # so that its error is the embedded model's own
    assert not is_demo("demo")
    assert not is_demo("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("door", [demo_path, load_demo])
def test_an_unknown_name_lists_the_known(door: object) -> None:
    assert callable(door)
    with pytest.raises(DemoError, match='"demo:big" is no embedded model; there are demo:, demo:outliers'):
        door("demo:big")


def test_the_toy_has_learned(shared_cache: Path, toy: DemoConfig) -> None:
    demo = load_demo("demo:", config=toy)
    tokens = demo_tokens("test", sequences=16, length=toy.length, config=toy)
    train = demo_tokens("train", sequences=200, length=toy.length, config=toy)
    counts = torch.bincount(train.flatten(), minlength=toy.vocab_size) + 1
    unigram = -(counts / counts.sum()).log()[tokens[:, 1:]].mean().item()
    with torch.no_grad():
        logits = demo.model(tokens[:, :-1]).logits
    nats = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert nats < unigram - math.log(1.3)  # measured: perplexity 0.6 of unigram's after the toy's few seconds
    assert not demo.model.training


def test_both_models_are_one_function(shared_cache: Path, toy: DemoConfig) -> None:
    base, heavy = (load_demo(name, config=toy) for name in ("demo:", "demo:outliers"))
    tokens = demo_tokens("test", sequences=4, length=toy.length, config=toy)
    with torch.no_grad():
        first, second = (demo.model(tokens).logits for demo in (base, heavy))
    assert ((first - second).norm() / first.norm()).item() < 1e-4  # float32, channels of very different size
    assert heavy.facts["rewritten_from"] == base.fingerprint
    assert heavy.fingerprint != base.fingerprint
    assert not heavy.model.config.tie_word_embeddings


def test_facts_say_how_it_was_made(shared_cache: Path, toy: DemoConfig) -> None:
    demo = load_demo("demo:", config=toy)
    assert demo.facts["steps"] == toy.steps
    assert demo.facts["n_tokens"] == toy.steps * toy.batch * toy.length
    assert demo.facts["n_parameters"] == sum(parameter.numel() for parameter in demo.model.parameters())
    assert demo.facts["text_sha256"] == read_corpus(n_files=toy.n_files, held_out=toy.held_out).sha256


def test_transformers_auto_classes_read_the_folder(shared_cache: Path, toy: DemoConfig) -> None:
    demo = load_demo("demo:", config=toy)
    model = AutoModelForCausalLM.from_pretrained(demo.path)
    tokenizer = AutoTokenizer.from_pretrained(demo.path)
    tokens = torch.tensor([tokenizer("def the value of")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, demo.model(tokens).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_second_load_trains_nothing(shared_cache: Path, toy: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_demo("demo:", config=toy).fingerprint
    monkeypatch.setattr(demo_model.train, "train", None)
    assert load_demo("demo:", config=toy).fingerprint == before


def test_same_model_at_every_building_and_a_damaged_one_is_rebuilt(own_cache: Path, toy: DemoConfig) -> None:
    short = replace(toy, steps=3)
    first = load_demo("demo:", config=short)
    weights = first.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"damaged \(model.safetensors differs"):
        second = load_demo("demo:", config=short)
    assert second.fingerprint == first.fingerprint


def test_the_key_follows_what_decides_the_model(shared_cache: Path, toy: DemoConfig) -> None:
    path = demo_model._folder("base", toy)
    assert demo_model._folder("base", replace(toy, second_limit=1.0)) == path
    for change in ({"steps": 9}, {"seed": 1}, {"n_files": 39}, {"held_out": 0.3}, {"vocab_size": 400}):
        assert demo_model._folder("base", replace(toy, **change)) != path
    assert demo_model._folder("text", replace(toy, steps=9)) == demo_model._folder("text", toy)


def test_rows_of_the_splits(shared_cache: Path, toy: DemoConfig) -> None:
    for split in ("train", "test", "ood"):
        tokens = demo_tokens(split, sequences=5, length=16, config=toy)
        assert tokens.shape == (5, 17)
        assert tokens.dtype == torch.int64
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < toy.vocab_size
        assert torch.equal(tokens, demo_tokens(split, sequences=5, length=16, config=toy))
    assert not torch.equal(
        demo_tokens("train", sequences=5, length=16, seed=1, config=toy),
        demo_tokens("train", sequences=5, length=16, seed=2, config=toy),
    )


def test_test_rows_span_the_held_out_text(shared_cache: Path, toy: DemoConfig) -> None:
    loaded = load_demo("demo:", config=toy).tokenizer
    text = read_corpus(n_files=toy.n_files, held_out=toy.held_out).test
    first, last = (loaded.decode(row) for row in demo_tokens("test", sequences=9, length=16, config=toy)[[0, -1]])
    assert first.startswith("<|endoftext|>" + text[0].text[:10])
    assert text[-1].text.endswith(last[-10:])


def test_impossible_tokens_are_clear_errors(shared_cache: Path, toy: DemoConfig) -> None:
    with pytest.raises(DemoError, match='"valid" is no split'):
        demo_tokens("valid", sequences=1, length=4, config=toy)  # type: ignore[arg-type]
    with pytest.raises(DemoError, match="ask for fewer"):
        demo_tokens("test", sequences=100_000, length=256, config=toy)
    with pytest.raises(DemoError, match="ask for fewer"):
        demo_tokens("train", sequences=1, length=10**7, config=toy)


def test_code_hash_ignores_words_but_not_code(tmp_path: Path) -> None:
    import importlib.util

    def digest(name: str, source: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        return demo_model.code_sha256(importlib.util.module_from_spec(spec))

    plain = digest("a", 'def f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest("b", "# why\n\n\ndef f(x):\n    return (x + 1)\n") == plain
    assert digest("c", "def f(x):\n    return x + 2\n") != plain
