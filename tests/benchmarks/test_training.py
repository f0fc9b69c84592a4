"""Training of other families: a run that was stopped goes on to the same weights; families have what they are for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality_folder, training
from benchmarks.families import FAMILIES, Size, new_model
from benchmarks.training import CHECKPOINT, Job, batch_at, rate_at, train_family
from bwla_compiler.demo.corpus import Document
from bwla_compiler.errors import ModelError

DOCUMENTS = [Document(f"f{i}", f"words and numbers {i} {i * i} in a file of text. " * 8) for i in range(12)]
SMALL = {"size": Size(64, 1), "vocab_size": 300, "batch": 2, "length": 16}


def quiet(label: str, done: int, total: int) -> None:
    """Report to nobody."""


def job(folder: Path, family: str = "llama", **changes: Any) -> Job:
    """Return a training of a few steps."""
    return Job(family, folder, **{**SMALL, "steps": 6, **changes})


def test_families_differ_in_what_the_compiler_meets() -> None:
    llama, gpt2, moe, qwen3 = (new_model(family, Size(128, 1), 300, seed=0) for family in FAMILIES)
    assert qwen3.get_input_embeddings().weight is qwen3.get_output_embeddings().weight  # type: ignore[operator]
    keys = next(p for name, p in qwen3.named_parameters() if "k_proj" in name)
    assert keys.shape == (64, 128)  # one of two heads
    assert llama.get_input_embeddings().weight is not llama.get_output_embeddings().weight  # type: ignore[operator]
    assert any(isinstance(m, torch.nn.LayerNorm) for m in gpt2.modules())
    assert any("experts" in name for name, _ in moe.named_parameters())
    again = new_model("llama", Size(128, 1), 300, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("family", "optimizer"), [*((family, "muon") for family in FAMILIES), ("llama", "adamw")])
def test_a_stopped_training_goes_on_to_the_same_model(family: str, optimizer: str, tmp_path: Path) -> None:
    whole = train_family(job(tmp_path / "whole", family, optimizer=optimizer), progress=quiet, documents=DOCUMENTS)
    assert whole["steps"] == 6
    parts = tmp_path / "parts"

    def stop(label: str, done: int, total: int) -> None:
        if done >= 500:
            raise KeyboardInterrupt

    stopped = job(parts, family, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.training.SAVE_SECONDS", -1.0)  # a checkpoint at every step
        with pytest.raises(KeyboardInterrupt):
            train_family(stopped, progress=stop, documents=DOCUMENTS)
    assert (parts / CHECKPOINT).is_file()
    assert not (parts / "training.json").exists()
    assert train_family(stopped, progress=quiet)["steps"] == 6
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_and_another_job_is_refused(tmp_path: Path) -> None:
    facts = train_family(job(tmp_path, steps=40), progress=quiet, documents=DOCUMENTS)
    assert facts["loss"] < 5  # the logarithm of 300 words is 5.7
    assert json.loads((tmp_path / "training.json").read_text())["family"] == "llama"
    with pytest.raises(ModelError, match="holds another training"):
        train_family(job(tmp_path, seed=1), progress=quiet)


def test_adamw_alone_moves_every_parameter_and_is_remembered(tmp_path: Path) -> None:
    facts = train_family(job(tmp_path, steps=40, optimizer="adamw"), progress=quiet, documents=DOCUMENTS)
    assert facts["optimizer"] == "adamw"
    assert facts["loss"] < 5
    start = new_model("llama", SMALL["size"], facts["vocab_size"], seed=0)  # type: ignore[arg-type]
    trained = load_file(tmp_path / "model.safetensors")
    assert not any(torch.equal(trained[name], before) for name, before in start.named_parameters())
    with pytest.raises(ModelError, match="holds another training"):
        train_family(job(tmp_path, steps=50), progress=quiet)


def test_compiled_steps_give_the_same_model_but_for_the_order_of_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, compiled = torch.nn.Module.compile, []

    def traced(module: torch.nn.Module) -> None:  # without a compiler of C++: what matters here is what is traced
        compiled.append(type(module).__name__)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    exact = {"steps": 3, "products": "float32"}
    for name in ("plain", "compiled"):
        train_family(job(tmp_path / name, **exact, compiled=name == "compiled"), progress=quiet, documents=DOCUMENTS)
    assert compiled == ["LlamaForCausalLM"]
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == other.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


def test_batches_follow_from_the_step_and_short_texts_are_refused(tmp_path: Path) -> None:
    stream = torch.arange(100)
    assert torch.equal(batch_at(stream, 3, job=job(tmp_path)), batch_at(stream, 3, job=job(tmp_path)))
    assert not torch.equal(batch_at(stream, 3, job=job(tmp_path)), batch_at(stream, 4, job=job(tmp_path)))
    with pytest.raises(ModelError, match="fewer than one sequence of 16"):
        batch_at(torch.arange(10), 0, job=job(tmp_path))


def test_what_a_seed_holds_out_is_kept_for_the_quality_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Document(f"f{i}", f"held out {i} words and numbers in a file of text. " * 200) for i in range(4)]
    monkeypatch.setattr(training, "texts", lambda seed, *, fraction, packages: (DOCUMENTS, long[:2], long[2:]))
    train_family(job(tmp_path, steps=1), progress=quiet)
    subject = quality_folder.from_folder(tmp_path, None, files=2)
    assert subject.files.unique().tolist() == [0, 1]
    assert subject.ood_files.unique().tolist() == [0, 1]
    assert torch.equal(subject.train, load_file(tmp_path / "tokens.safetensors")["train"])
    assert subject.load().config.model_type == "llama"
    assert subject.trained_tokens == 2 * 16


def test_the_rate_rises_stays_and_falls() -> None:
    assert rate_at(0.01, "level") == pytest.approx(0.5)
    assert rate_at(0.5, "level") == 1
    assert rate_at(0.85, "level") == pytest.approx(0.5)
    assert rate_at(1.0, "level") == 0.02


def test_the_rate_falls_in_a_cosine() -> None:
    assert rate_at(0.01, "cosine") == pytest.approx(0.5, abs=1e-3)
    assert rate_at(0.02, "cosine") == pytest.approx(1, abs=1e-2)
    assert rate_at(0.5, "cosine") == pytest.approx(0.51)
    assert rate_at(1.0, "cosine") == pytest.approx(0.02)


def test_the_schedule_makes_another_model(tmp_path: Path) -> None:
    losses = {
        name: train_family(job(tmp_path / name, schedule=name), progress=quiet, documents=DOCUMENTS)["loss"]
        for name in ("level", "cosine")
    }
    assert losses["level"] != losses["cosine"]


def test_an_unfinished_folder_is_no_subject(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has finished"):
        quality_folder.from_folder(tmp_path, None, files=2)
    assert replace(job(tmp_path), minutes=5).fixed() == job(tmp_path).fixed()


def test_products_of_bfloat16_train_as_well_and_leave_the_weights_float32(tmp_path: Path) -> None:
    losses = {}
    for products in ("bfloat16", "float32"):
        facts = train_family(job(tmp_path / products, steps=40, products=products), progress=quiet, documents=DOCUMENTS)
        assert facts["products"] == products
        losses[products] = facts["loss"]
    weights = load_file(tmp_path / "bfloat16" / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)  # 8 bits of mantissa, 40 steps of them
    with pytest.raises(ModelError, match="holds another training"):  # it would go on to other weights
        train_family(job(tmp_path / "float32", steps=50, products="bfloat16"), progress=quiet)


def test_products_follow_from_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, products in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(training, "native_bfloat16", lambda native=native: native)
        assert training.native_products() == products
