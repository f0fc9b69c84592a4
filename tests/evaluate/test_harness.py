"""Tasks of lm-eval: a local file, offline, on a packed model; and what is said where something is missing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bwla_compiler import api
from bwla_compiler.errors import CalibrationError
from bwla_compiler.evaluate.harness import run_tasks
from tests import tiny

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(["<end>", "sky", "grass", "blue", "green", "is"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>", unk_token="<end>")


def written(folder: Path) -> Path:
    rows = [{"question": f"{x} is", "choices": ["blue", "green"], "answer": i} for i, x in enumerate(("sky", "grass"))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "colours.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder / "colours.yaml"


def test_a_local_task_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model: Any = tiny.make("llama")
    api.quantize(model, recipe="rtn")
    found = run_tasks(model, tokenizer(), [str(written(tmp_path))])
    import torch

    ids = torch.tensor([[1, 5], [2, 5]])
    with torch.no_grad():
        logits = model(ids).logits[:, -1, 3:5]
    right = (logits.argmax(-1) == torch.arange(2)).float().mean()
    assert found["colours"]["acc"] == float(right)


def test_without_the_package_or_a_tokenizer_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        run_tasks(tiny.make("llama"), None, ["piqa"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CalibrationError, match=r"pip install 'bwla-compiler\[eval\]'"):
        run_tasks(tiny.make("llama"), tokenizer(), ["piqa"])


def test_an_unknown_task_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(CalibrationError, match=r"missing\.yaml"):
        run_tasks(tiny.make("llama"), tokenizer(), [str(tmp_path / "missing.yaml")])
