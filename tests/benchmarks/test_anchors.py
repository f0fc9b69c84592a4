"""Published figures: complete, by key, and the verdict on a tiny model with a local text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bwla_compiler as bwla
from benchmarks.anchors import Anchor, anchor, anchors, check_model, verdict
from benchmarks.errors import ResultsError
from benchmarks.protocol import measure_anchor, split_text, windows
from bwla_compiler.errors import CalibrationError
from tests import tiny

TEXT = "".join(chr(97 + i * i % 26) for i in range(200))


def test_every_figure_has_a_key_of_its_own_a_source_and_a_command() -> None:
    known = anchors()
    assert len({a.key for a in known}) == len(known) == 96
    for a in known:
        assert a.perplexity > 3
        assert a.source
        assert a.activations in (4, 6, 16)
        assert 1 <= a.bits <= 16
        assert a.key in a.command()
        assert ("--activations" in a.command()) is not a.floats
    assert anchor("bwla/BWLA/A6/Qwen3-32B").perplexity == 11.92
    assert anchor("nanoquant/BiLLM/A16/Qwen3-8B-Base").counted == "true"
    with pytest.raises(ResultsError, match="no published figure is called 'bwla/bwla/a6'; there are bwla/BWLA/A6/"):
        anchor("bwla/bwla/a6")


FLOAT = Anchor("t", "FP16", "M", "o/M", (64, 2), 16, 16.0, "claimed", 10.0, "s")
PACKED = Anchor("t", "X", "M", "o/M", (64, 2), 6, 1.2, "claimed", 10.0, "s")


@pytest.mark.parametrize(
    "wanted, perplexity, bits, passed",
    [
        (FLOAT, 10.04, None, True),
        (FLOAT, 9.96, None, True),
        (FLOAT, 10.06, None, False),
        (FLOAT, 9.94, None, False),  # better than the paper's own float model: not the same protocol
        (PACKED, 9.0, 1.2, True),
        (PACKED, 10.1, 1.1, False),
        (PACKED, 9.0, 1.3, False),
    ],
)
def test_verdicts(wanted: Anchor, perplexity: float, bits: float | None, passed: bool) -> None:
    assert verdict(wanted, perplexity=perplexity, true_bits=bits).passed is passed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float model with a tokenizer of letters, and the text beside it."""
    path = tmp_path_factory.mktemp("anchored") / "float"
    core = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)} | {"?": 26}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model: Any = tiny.make("llama")
    bwla.save(model, path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"))
    bwla.quantize(model, recipe="rtn", calibration="none")
    bwla.save(model, path.with_name("packed"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"))
    (path.parent / "test.txt").write_text(TEXT)
    return path


def test_a_model_is_measured_beside_a_figure(folder: Path) -> None:
    data = str(folder.parent / "test.txt")
    row = measure_anchor(FLOAT, model=str(folder), data=data, context=32)
    assert row["windows"] == 6  # 200 letters: six whole windows, the rest is left out
    loaded = bwla.load(folder)
    tokens = windows(TEXT, loaded.tokenizer, context=32)
    assert row["perplexity"] == pytest.approx(bwla.perplexity(loaded.model, tokens), rel=1e-4)  # rounded
    assert row["verdict"] == "fail"
    met = measure_anchor(replace(FLOAT, perplexity=row["perplexity"]), model=str(folder), data=data, context=32)
    assert met["verdict"] == "pass"
    beaten = replace(PACKED, perplexity=1e6, bits=8.0)
    packed = measure_anchor(beaten, model=str(folder.with_name("packed")), data=data, context=32, activations=6)
    assert packed["verdict"] == "pass"
    assert packed["true_bits"] > 1


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    data, packed = str(folder.parent / "test.txt"), str(folder.with_name("packed"))
    with pytest.raises(ResultsError, match="this one 64 in 2: figures of different models"):
        measure_anchor(replace(FLOAT, shape=(4096, 32)), model=str(folder), data=data)
    with pytest.raises(ResultsError, match="is of floats, unlike"):
        measure_anchor(FLOAT, model=packed, data=data)
    with pytest.raises(ResultsError, match="is of a packed model, unlike"):
        measure_anchor(PACKED, model=str(folder), data=data)
    with pytest.raises(ResultsError, match=r"rounds activations to 6 bits, the model to \[8\]: give --activations 6"):
        measure_anchor(PACKED, model=packed, data=data, activations=8)
    with pytest.raises(CalibrationError, match="200 tokens do not fill one sequence of 2048"):
        measure_anchor(FLOAT, model=str(folder), data=data)
    check_model(tiny.CONFIGS["llama"](), FLOAT)


def test_the_split_is_joined_as_the_papers_do(tmp_path: Path) -> None:
    raw, lines = tmp_path / "wiki.test.raw", tmp_path / "wiki.jsonl"
    raw.write_text(" \n = Title = \n \n Words . \n")
    lines.write_text('{"text": ""}\n{"text": " = Title = \\n"}\n{"text": ""}\n{"text": " Words . \\n"}\n')
    joined = "\n\n = Title = \n\n\n\n\n Words . \n"
    assert split_text(str(lines)) == joined
    assert split_text(str(raw)).rstrip("\n") == joined.rstrip("\n")
    with pytest.raises(ResultsError, match="no such file"):
        split_text(str(tmp_path / "absent"))
    with pytest.raises(ResultsError, match="no tokenizer"):
        windows("text", None, context=8)


def test_windows_hold_whole_contexts() -> None:
    def tokenizer(text: str, *, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    assert torch.equal(windows("x" * 11, tokenizer, context=4), torch.arange(8).view(2, 4))
