"""Whole models: what a contender answers, wrong logits are not timed, missing peers are rows, and budgets."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import models, peers
from benchmarks.budget import Budget
from benchmarks.contender import TorchRunner, model_bytes, serve
from benchmarks.errors import ContenderError, ResultsError
from benchmarks.models import Race, Work, compare
from benchmarks.peers import named, ways
from benchmarks.step_profile import OVERHEAD, profile_step, region_of
from benchmarks.subject import Subject, make_subject
from bwla_compiler import api
from bwla_compiler.errors import ModelError
from tests import tiny


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny model of a config with fewer blocks and words than it says, and its packed twin."""
    folder = tmp_path_factory.mktemp("subject")
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 3
    config.save_pretrained(folder / "family")
    return make_subject(str(folder / "family" / "config.json"), work=folder / "work", layers=1, vocab=64)


def test_a_config_becomes_a_float_model_and_a_packed_one(subject: Subject) -> None:
    assert subject.label == "family, 1 of 3 layers, vocabulary 64, random weights"
    assert subject.vocab_size == 64
    assert subject.folder("float") == subject.floats != subject.folder("packed") == subject.packed
    assert (
        json.loads((Path(subject.packed) / "config.json").read_text())["quantization_config"]["quant_method"] == "bwla"
    )
    packed = make_subject(subject.packed, work=Path("unused"))
    assert (packed.floats, packed.packed) == (None, subject.packed)


def test_layers_are_left_out_of_configs_alone_and_folders_without_a_config_are_refused(
    subject: Subject, tmp_path: Path
) -> None:
    assert subject.floats is not None
    with pytest.raises(ModelError, match="config alone"):
        make_subject(subject.floats, work=tmp_path, layers=1)
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        make_subject(str(tmp_path), work=tmp_path)


def test_blocks_that_are_alike_are_copies_of_one(tmp_path: Path) -> None:
    config = tiny.CONFIGS["qwen3"]()
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.save_pretrained(tmp_path / "family")
    source = str(tmp_path / "family" / "config.json")
    found = make_subject(source, work=tmp_path / "work", alike=True)
    assert found.label == "family, random weights, all blocks alike"
    assert found.floats is not None
    floats = AutoModelForCausalLM.from_pretrained(found.floats).model.layers
    packed: Any = api.load(found.packed).model
    assert len(floats) == len(packed.model.layers) == 3
    for i in (1, 2):
        assert packed.model.layers[i].self_attn.layer_idx == i
        for blocks in (floats, packed.model.layers):
            first, other = blocks[0].state_dict(), blocks[i].state_dict()
            assert all(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ModelError, match="config alone"):
        make_subject(found.floats, work=tmp_path, alike=True)


def runner(subject: Subject, name: str) -> TorchRunner:
    """Return a way of the subject, loaded in this process."""
    (way,) = [way for way in ways((name,)) if way.name == name]
    return TorchRunner(way, str(subject.folder(way.source)), subject.ids(12), prompt=8)


def test_a_contender_reads_the_tokens_it_was_given_through_its_cache(subject: Subject) -> None:
    found = runner(subject, "eager fp32")
    found.first()
    with torch.no_grad():
        plain = found.model(input_ids=found.ids, use_cache=False).logits[0]
    for _ in range(2):  # the cache is forgotten before each prompt
        assert torch.allclose(found.logits(), plain, atol=1e-4)  # the order of float32 sums alone
    seconds = found.round()
    assert 0 < seconds["prefill"] < seconds["first_token"]
    assert seconds["decode"] > 0
    assert model_bytes(found.model) == sum(p.nbytes for p in found.model.parameters()) + sum(
        b.nbytes for b in found.model.buffers()
    )


def test_a_way_may_keep_its_cache_in_int8(subject: Subject) -> None:
    way = dataclasses.replace(named("bwla, eager"), int8_cache=True)
    found = TorchRunner(way, subject.packed, subject.ids(12), prompt=8)
    exact = runner(subject, "bwla, eager")
    for each in (found, exact):
        each.first()
    assert {layer.codes.keys.dtype for layer in found.cache.layers} == {torch.int8}
    # 7 bits of keys and values; activations are rounded to as many or fewer
    assert (found.logits() - exact.logits()).norm() < 0.2 * exact.logits().norm()


def test_a_contender_answers_commands(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(subject.ids(10), tmp_path / "ids.pt")
    job = {"way": "bwla, eager", "path": subject.packed, "ids": str(tmp_path / "ids.pt"), "prompt": 8, "threads": 1}
    commands = ["first\n", f"logits {tmp_path / 'logits.pt'}\n", "round\n", "memory\n"]
    monkeypatch.setattr(sys, "stdin", iter(commands))
    answers: list[dict[str, Any]] = []
    serve(job, answers.append)
    assert len(answers) == 5
    assert answers[0]["n_bytes"] > 0
    assert torch.load(tmp_path / "logits.pt").shape == (10, 64)
    assert answers[-1]["peak_mib"] >= answers[-1]["recent_mib"] > 0
    monkeypatch.setattr(sys, "stdin", iter(["dance\n"]))
    with pytest.raises(ValueError, match="no command is called 'dance'"):
        serve(job, answers.append)


def test_a_way_brings_what_it_is_held_against() -> None:
    assert [way.name for way in ways(("bwla",))] == ["bwla, eager", "bwla"]
    unasked = [way.name for way in ways()]
    assert "llama.cpp F16" not in unasked
    assert {"inductor bf16, max-autotune", "llama.cpp Q8_0", "llama.cpp Q4_0", "llama.cpp Q1_0"} < set(unasked)
    with pytest.raises(ResultsError, match="no way is called 'fast'; there are: eager fp32"):
        ways(("fast",))


def test_wrong_logits_are_refused() -> None:
    right = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    (inductor,) = [way for way in ways(("inductor fp32",)) if way.name == "inductor fp32"]
    near = compare(inductor, {"eager fp32": right, "inductor fp32": right * (1 + 1e-5)})
    assert near == {"top1_reference": 1.0, "top1_fp32": 1.0, "error": 1e-5}
    wrong = compare(inductor, {"eager fp32": right, "inductor fp32": right * 1.01})
    assert wrong["refused"] == "wrong by 1.0e-02 (at most 0.001): not timed"
    nan = compare(inductor, {"eager fp32": right, "inductor fp32": right * torch.nan})
    assert "not finite" in nan["refused"]


class FakeContender:
    """Answers without a process: `behaviour` says per way what is wrong with it."""

    behaviour: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, job: dict[str, Any], *, caches: Path) -> None:
        self.way = job["way"]

    def __enter__(self) -> "FakeContender":
        return self

    def __exit__(self, *details: object) -> None:
        self.asked.append((self.way, "end"))

    def answer(self) -> dict[str, Any]:
        if self.behaviour.get(self.way) == "dies":
            raise ContenderError("RuntimeError: no kernel")
        return {"load_seconds": 1.0, "n_bytes": 100, "version": ""}

    def ask(self, command: str) -> dict[str, Any]:
        self.asked.append((self.way, command.split()[0]))
        if command.startswith("logits"):
            scale = 2.0 if self.behaviour.get(self.way) == "wrong" else 1.0
            torch.save(scale * torch.arange(12.0).view(4, 3), command.split()[1])
        answers = {
            "first": {"first_prefill_seconds": 2.0, "first_decode_seconds": 3.0},
            "round": {"first_token": 0.02, "prefill": 0.01, "decode": 0.002 if self.way == "bwla" else 0.004},
            "memory": {"peak_mib": 10.0, "recent_mib": 5.0},
        }
        return answers.get(command.split()[0], {})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeContender]:
    """Put fakes in the place of processes, and no package of a peer anywhere."""
    FakeContender.behaviour, FakeContender.asked = {}, []
    monkeypatch.setattr(models, "Contender", FakeContender)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    return FakeContender


def race(tmp_path: Path, names: tuple[str, ...] = (), budget: Budget | None = None) -> dict[str, dict[str, Any]]:
    """Return the rows of a race of fakes by way."""
    subject = Subject("s", "float", "packed", 16)
    work = Work(prompt=2, steps=2, rounds=3)
    rows = Race(subject, ways(names), work, tmp_path, lambda *_: None, budget or Budget()).run()
    return {row["way"]: row for row in rows}


def test_a_race_gives_each_way_a_row(fakes: type[FakeContender], tmp_path: Path) -> None:
    fakes.behaviour = {"inductor fp32": "wrong", "inductor bf16": "dies"}
    rows = race(tmp_path)
    assert rows["bwla"]["decode_tokens_per_second"] == 500
    assert rows["eager fp32"]["times_ours"] == 2
    assert rows["bwla"]["compile_cold_seconds"] == rows["bwla"]["compile_warm_seconds"] == 5
    assert "compile_warm_seconds" not in rows["eager fp32"]  # there is nothing that it would find again
    assert rows["bwla"]["peak_mib"] == 10
    assert "wrong by 1.0e+00" in rows["inductor fp32"]["refused"]
    assert rows["inductor bf16"]["failed"] == "RuntimeError: no kernel"
    assert rows["torchao int4 weight-only"]["missing"] == "torchao is not installed"
    assert rows["llama.cpp Q1_0"]["missing"] == "llama-cpp-python is not installed"
    assert ("inductor fp32", "round") not in fakes.asked
    rounds = [way for way, command in fakes.asked if command == "round"]
    timed = list(dict.fromkeys(rounds))
    assert rounds[: 2 * len(timed)] == [*timed, *timed[1:], timed[0]]  # in turn, another first each time


def test_a_short_budget_leaves_out_what_matters_least(fakes: type[FakeContender], tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 4))
    rows = race(tmp_path, budget=Budget(116, clock=lambda: float(next(now))))
    assert {"decode_tokens_per_second"} < rows["bwla"].keys() & rows["inductor bf16"].keys()
    assert rows["inductor bf16, max-autotune"]["missing"] == "left out: the time budget was spent"


def test_what_compiles_is_begun_in_the_order_of_its_worth_and_what_starts_at_once_is_not_left_out_for_it(
    fakes: type[FakeContender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(fakes):  # type: ignore[valid-type,misc]  # a class that a fixture gives
        def answer(self) -> dict[str, Any]:
            now[0] += 40.0 if "inductor" in self.way or self.way == "bwla" else 1.0
            found: dict[str, Any] = super().answer()
            return found

    now = [0.0]
    monkeypatch.setattr(models, "Contender", Slow)
    rows = race(tmp_path, budget=Budget(200, clock=lambda: now[0]))
    assert {name for name, row in rows.items() if "missing" not in row} == {
        "eager fp32", "eager bf16", "bwla, eager", "bwla", "inductor bf16", "inductor fp32"
    }  # fmt: skip


@pytest.mark.exhaustive
def test_contenders_in_processes_of_their_own(subject: Subject, tmp_path: Path) -> None:
    rows = {
        row["way"]: row
        for row in Race(
            subject, ways(("bwla, eager", "eager bf16")), Work(8, 4, 2, 1), tmp_path, lambda *_: None, Budget()
        ).run()
    }
    for way in ("eager fp32", "eager bf16", "bwla, eager"):
        assert rows[way]["decode_tokens_per_second"] > 0
        assert rows[way]["peak_mib"] > 50


def test_kernels_belong_to_regions() -> None:
    assert region_of("bwla::routine4").endswith("attention")  # which is one of its steps over a static cache
    assert region_of("bwla::attend") == region_of("bwla::cached_attention") == "attention"
    assert region_of("bwla::int8_linear").startswith("head")
    assert region_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert region_of("aten::mm") == "float products"
    assert region_of("graph_0_cpp_fused_add_3") == "loops of Inductor"
    assert region_of("aten::index_copy_") == "other operators of torch"
    assert region_of("Torch-Compiled Region: 0/0") == OVERHEAD


def test_a_step_is_profiled_and_traced(subject: Subject, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = profile_step(subject, way="bwla, eager", prompt=4, steps=3, trace=trace)
    regions = dict(found.regions())
    assert any(region.startswith("1-bit linears") for region in regions)
    assert sum(regions.values()) == pytest.approx(found.profiled_us, rel=0.3)  # what lies outside of steps
    assert "bwla::linear" in " ".join(kernel.name for kernel in found.kernels)
    assert json.loads(trace.read_text())["traceEvents"]
    rows = found.rows("tiny")
    assert sum(row["share"] for row in rows) == pytest.approx(sum(regions.values()) / found.profiled_us, abs=0.01)
    with pytest.raises(ResultsError, match="cannot be profiled: torch's profiler does not see"):
        profile_step(subject, way="llama.cpp Q4_0")
    with pytest.raises(ResultsError, match="cannot be profiled: the float model was not given"):
        profile_step(Subject("s", None, subject.packed, 64), way="eager fp32")
