"""Exported models in llama.cpp: one perplexity there and here, one verdict, and text passed as ids."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import cli, gguf_agreement
from benchmarks.errors import ResultsError
from benchmarks.gguf_agreement import compared, measure
from benchmarks.record import context
from benchmarks.tables import gguf_table
from bwla_compiler import api
from tests import tiny
from tests.checkpoint.test_gguf import SIZES, folded

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


def quiet(*_: object) -> None: ...


def fake_llama(model: Any, *, factor: float, seen: list[Any]) -> Any:
    """Return a class in the place of Llama: the model's own logits times a factor."""

    class Fake:
        vocabulary, n_bytes, about = 128, 1234, "llama-cpp-python 0.0 (SSE3)"

        def __init__(self, file: Path, *, length: int, threads: int) -> None:
            seen.append((file, length, threads))

        def forget(self) -> None: ...

        def decode(self, ids: list[int], *, position: int) -> Tensor:
            seen.append((ids, position))
            logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
            return factor * logits

        def close(self) -> None:
            seen.append("closed")

    return Fake


@pytest.fixture(scope="module")
def model() -> Any:
    """A folded model whose logits are not flat."""
    return folded(transformers.Qwen3Config(**SIZES, initializer_range=0.1))


@pytest.mark.parametrize("factor, agrees", [(1.0, True), (3.0, False)])
def test_perplexity_there_is_held_to_ours(
    factor: float, agrees: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(gguf_agreement, "Llama", fake_llama(model, factor=factor, seen=seen))
    ids = tiny.ids(batch=2, length=17, seed=5)
    a16, a8, there = compared(model, Path("m.gguf"), ids, threads=1, progress=quiet)
    assert [row["way"] for row in (a16, a8, there)] == ["ours, A16", "ours, A8", "llama.cpp"]
    assert a16["perplexity"] == api.perplexity(model, ids)  # the model is left as the recipe has it
    assert a8["perplexity"] != a16["perplexity"]
    assert there["against_a16"] == pytest.approx(there["perplexity"] / a16["perplexity"], abs=1e-5)
    assert (there["agrees"], there["n_bytes"]) == (agrees, 1234)
    assert (there["kl"] < 1e-6) == agrees  # sums of one sequence and of several may differ in order
    assert seen[0] == (Path("m.gguf"), 16, 1)
    assert seen[1] == (ids[0, :-1].tolist(), 0)
    assert seen[-1] == "closed"


def test_without_llama_cpp_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_agreement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResultsError, match=r"llama-cpp-python is not installed: pip install 'bwla-compiler\[peers\]'"):
        measure(quiet)


def test_disagreement_is_exit_code_1_and_no_place_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    rows = [{"way": "llama.cpp", "perplexity": 2.0, "agrees": False}]
    monkeypatch.setattr(gguf_agreement, "measure", lambda *_, **options: kept.update(options) or rows)
    monkeypatch.setattr("benchmarks.record.record", lambda name, rows, *, command: kept.update(name=name) or Path(name))
    assert cli.main(["gguf", "/there/model", "--sequences", "3", "--tokens", "/there/wiki.txt"]) == 1
    assert (kept["name"], kept["model"], kept["sequences"]) == ("gguf", "/there/model", 3)
    command = context(["gguf", "/there/model", "--tokens=/there/wiki.txt", "--quick", "demo:"])["command"]
    assert command == "python -m benchmarks gguf model --tokens=wiki.txt --quick demo:"


def test_rows_become_a_table() -> None:
    about = {"model": "demo:", "recipe": "bwla-folded", "sequences": 2, "length": 8, "cpu": "c", "cores": 2, "isa": "i",
             "torch": "2", "python": "3", "command": "x", "commit": "abc", "when": "2026-01-01"}  # fmt: skip
    ours = {"way": "ours, A16", "perplexity": 20.0, "against_a16": 1.0, "against_a8": 0.999}
    there = {
        "way": "llama.cpp",
        "perplexity": 20.1,
        "against_a16": 1.005,
        "against_a8": 1.004,
        "kl": 1e-4,
        "top1": 0.99,
    }
    text = gguf_table(
        [{**about, "way": "float", "perplexity": 19.0}, {**about, **ours}, {**about, **there, "version": "v 1"}]
    )
    assert "**demo:**, bwla-folded, 2 sequences of 8 tokens" in text
    assert "| float | 19.000 | - | - | - | - |" in text
    assert "| llama.cpp | 20.100 | 1.0050 | 1.0040 | 1.0e-04 | 99.0 |" in text
    assert "Peers: v 1." in text


@needs_llama
def test_a_folder_is_quantized_exported_and_read_by_llama_cpp(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, initializer_range=0.06)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "m")
    torch.save(tiny.ids(batch=1, length=2560, seed=4)[0], tmp_path / "ids.pt")
    rows = measure(quiet, model=str(tmp_path / "m"), tokens=tmp_path / "ids.pt", length=32, quick=True)
    assert [row["way"] for row in rows] == ["float", "ours, A16", "ours, A8", "llama.cpp"]
    assert {(row["model"], row["sequences"], row["recipe"]) for row in rows} == {("m", 7, "bwla-folded, fit cut short")}
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    assert rows[3]["agrees"]  # within the 1% that is promised
    assert rows[3]["kl"] < 1e-2  # 8 bits of activations


@needs_llama
@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_embedded_model_has_one_perplexity_here_and_in_llama_cpp() -> None:
    rows = {row["way"]: row for row in measure(quiet, model="demo:", sequences=8, quick=True)}
    assert rows["llama.cpp"]["agrees"]
    assert rows["llama.cpp"]["top1"] > 0.95  # ties of 8 bits of activations alone
    assert rows["ours, A16"]["perplexity"] > rows["float"]["perplexity"]
