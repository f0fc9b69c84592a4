"""The quality table: intervals over files, splits by seed, a row measured, and the plot."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import endings, quality, quality_model
from benchmarks.quality import ROWS, Row, Table, ratio
from benchmarks.record import latest, read
from bwla_compiler.demo.corpus import Document
from bwla_compiler.demo.outliers import Tails
from bwla_compiler.recipe import load_recipe
from tests import tiny


def test_the_ratio_is_that_of_perplexities_and_its_interval_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    fp = torch.rand(30, generator=generator, dtype=torch.float64) + 3
    files = torch.arange(30) // 5
    quantized = fp + 0.1 + 0.02 * torch.randn(30, generator=generator, dtype=torch.float64)
    low, middle, high = ratio(quantized, fp, files, seed=0)
    assert middle == pytest.approx(math.exp(quantized.mean()) / math.exp(fp.mean()))
    assert low < middle < high < middle + 0.05
    assert ratio(quantized, fp, files, seed=0) == (low, middle, high)


def test_one_file_that_differs_widens_the_interval() -> None:
    fp, files = torch.zeros(12, dtype=torch.float64), torch.arange(12) // 3
    even, odd = torch.full((12,), 0.1, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    odd[:3] = 0.4
    low, _, high = ratio(even, fp, files, seed=0)
    assert high - low < 1e-12  # rounding
    low, middle, high = ratio(odd, fp, files, seed=0)
    assert low == pytest.approx(1)
    assert high > middle + 0.1


def test_splits_follow_the_seed_and_share_no_file() -> None:
    documents = [Document(f"f{i}", "x" * (50 + i)) for i in range(100)]
    splits = [quality_model.split(documents, seed, fraction=0.1) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    held_out, kept = splits[0]
    assert sorted(d.name for d in held_out + kept) == sorted(d.name for d in documents)
    assert 0.1 <= sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents) < 0.13


def test_recipes_of_all_rows_load_and_every_baseline_has_a_fair_row() -> None:
    for row in ROWS:
        load_recipe(row.recipe, row.settings)
    published = {r.way for r in ROWS if r.table == "as published"}
    assert {"rounding", "GPTQ", "BiLLM-like", "ARB-like"} <= published & {r.way for r in ROWS if r.table == "fair"}
    assert set(quality.QUICK) <= {r.way for r in ROWS}


def test_rows_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "LENGTH", 16)
    monkeypatch.setattr(quality_model, "LENGTH", 16)
    monkeypatch.setattr(endings, "PREFIX", 4)
    monkeypatch.setattr(endings, "ENDING", 4)
    windows, files = tiny.ids(batch=8, length=17), torch.arange(8) // 2
    subject = quality_model.Subject(
        "tiny", lambda: tiny.make("llama"), tiny.ids(batch=1, length=400)[0], windows, files, windows, files
    )
    told: list[str] = []
    table = Table(subject, sequences=8, seed=0, progress=lambda label, done, total: told.append(label))
    rows = table.run([Row("rounding", "rtn", "as published"), Row("BiLLM-like", "billm-like", "fair")])
    assert [row["way"] for row in rows] == ["rounding", "BiLLM-like"]
    assert rows[0].keys() == rows[1].keys()
    assert rows[0]["n_parameters"] == sum(parameter.numel() for parameter in tiny.make("llama").parameters())
    assert (rows[0]["trained_tokens"], rows[0]["calibration_sequences"]) == (None, 8)
    assert all(row["a16"] > 0 and row["true_bits"] > 1 for row in rows)
    for row in rows:
        assert [row[f"a{bits}_kl"] > 0 and 0 < row[f"a{bits}_top1"] <= 1 for bits in quality.BITS] == [True] * 3
        assert len({row[f"a{bits}_kl"] for bits in quality.BITS}) == 3
        assert row["questions"] == 16  # two of each window
        assert {16 * row[f"a{bits}_task"] for bits in quality.BITS} <= {float(n) for n in range(17)}
    assert rows[0]["fp_task"] == rows[1]["fp_task"]
    assert told == ["quality, tiny: rounding", "quality, tiny: BiLLM-like", "quality"]
    pytest.importorskip("matplotlib")
    path = quality.plot(rows, tmp_path / "plot.svg")
    assert path is not None
    drawn = path.read_text("utf-8")
    assert drawn.startswith("<?xml")
    assert "fair, tuned" not in drawn  # no such row, no such mark


def test_every_table_of_rows_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables = {row.table for row in (*quality.ROWS, *quality.fair_rows())}
    figures = {f"a{bits}": 1.1 for bits in quality.BITS} | {f"a{bits}_95": "1.05-1.15" for bits in quality.BITS}
    rows = [{"way": "x", "table": table, "true_bits": 1.2, **figures} for table in tables]
    path = quality.plot(rows, tmp_path / "plot.svg")
    assert path is not None
    drawn = path.read_text("utf-8")
    assert all(f"<!-- {table} -->" in drawn for table in tables)


def test_text_without_questions_has_no_figures_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "LENGTH", 16)
    monkeypatch.setattr(quality_model, "LENGTH", 16)
    windows, files, nothing = tiny.ids(batch=4, length=17), torch.arange(4), tiny.ids(batch=0, length=17)
    subject = quality_model.Subject(
        "tiny", lambda: tiny.make("llama"), tiny.ids(batch=1, length=400)[0], windows, files, nothing, files[:0]
    )
    (row,) = Table(subject, sequences=8, seed=0, progress=lambda *_: None).run([Row("rounding", "rtn", "ours")])
    assert "a6_kl" in row
    assert not [name for name in row if "task" in name or name in ("questions", "a6_ood")]


def test_a_row_that_no_table_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row is called best; there are rounding, "):
        quality.measure(lambda *_: None, ways=["best"])


def test_of_rows_measured_again_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    device = {"cpu": "x", "cores": 1, "isa": "portable"}
    path.write_text(
        "".join(json.dumps({"way": way, "a6": value, **device}) + "\n" for way, value in ("a1", "b2", "a3"))
    )
    assert [(row["way"], row["a6"]) for row in latest(read(path), by=("way",))] == [("a", "3"), ("b", "2")]


@pytest.mark.parametrize("tails", ["pca", "heavy"])
def test_a_subject_with_tails_computes_the_same_and_says_so(tails: Tails) -> None:
    windows, files = tiny.ids(batch=4, length=17), torch.arange(4)
    stream = tiny.ids(batch=1, length=4000)[0]
    subject = quality_model.Subject("tiny", lambda: tiny.make("llama"), stream, windows, files, windows, files)
    changed = quality_model.with_tails(subject, tails)
    assert changed.label == {"pca": "tiny-pca", "heavy": "tiny-outliers"}[tails]
    with torch.no_grad():
        before, after = (made.load()(windows).logits for made in (subject, changed))
    assert (before - after).norm() / before.norm() < 1e-4  # float32 between channels of very different size
