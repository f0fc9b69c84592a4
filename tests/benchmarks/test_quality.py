"""The quality table: intervals over files, splits by seed, a row measured, and the plot."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import adamw, quality, quality_folder, quality_model
from benchmarks.quality import Asked, Table, ratio
from benchmarks.quality_plot import plot
from benchmarks.quality_rows import LEVELS, QUICK, ROWS, Row, fair_rows, recipe_for
from benchmarks.record import latest
from bwla_compiler.demo import DemoConfig
from bwla_compiler.demo.corpus import Document
from bwla_compiler.recipe import load_recipe
from tests import planned, tiny


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
    splits = [quality_model._split(documents, seed, fraction=0.1) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    held_out, kept = splits[0]
    assert sorted(d.name for d in held_out + kept) == sorted(d.name for d in documents)
    assert 0.1 <= sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents) < 0.13


def test_recipes_of_all_rows_load_and_every_baseline_has_a_fair_row() -> None:
    for row in ROWS:
        load_recipe(row.recipe, row.settings)
    published = {r.way for r in ROWS if r.table == "as published"}
    assert {"rounding", "GPTQ", "BiLLM-like", "ARB-like"} <= published & {r.way for r in ROWS if r.table == "fair"}
    assert set(QUICK) <= {r.way for r in ROWS}


def test_the_fair_table_has_every_way_at_every_level_with_the_same_help() -> None:
    rows = fair_rows()
    assert len({(row.way, row.table) for row in rows}) == len(rows)
    for table in ("fair", "fair, tuned"):
        for recipe in ("rtn", "gptq", "bwla-w1a6"):
            found = [
                load_recipe(row.recipe, row.settings) for row in rows if (row.table, row.recipe) == (table, recipe)
            ]
            assert len(found) >= len(LEVELS)
            helped = {(r.transform, r.residual, r.smoothing, r.target, r.tuning, r.signs.damping) for r in found}
            assert helped == {(found[0].transform, "folded", found[0].smoothing, found[0].target, found[0].tuning, 0.2)}
    ours, theirs = (load_recipe(row.recipe, row.settings) for row in (rows[2], rows[1]))
    assert (ours.transform, ours.smoothing, ours.target) == (theirs.transform, theirs.smoothing, theirs.target)


@pytest.mark.parametrize("planes", [1.0, 1.18, 1.5, 2.0, 2.4])
def test_planes_are_a_mean_over_the_weights_of_the_blocks(planes: float) -> None:
    plan = planned.plan("llama")
    recipe = recipe_for(Row("GPTQ", "gptq", "fair", planes=planes), plan)
    linears = [x for x in plan.linears if x.block]
    chosen = {x.name: recipe.override_for(x.name) for x in linears}
    total = sum(x.n_weights for x in linears)
    found = sum(x.n_weights * chosen[x.name].weights.planes for x in linears) / total  # type: ignore[union-attr]
    # whole linears take the extra plane: off by half the largest
    assert found == pytest.approx(planes, abs=max(x.n_weights for x in linears) / total / 2)


def test_rows_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "LENGTH", 16)
    monkeypatch.setattr(quality_model, "LENGTH", 16)
    windows, files = tiny.ids(batch=8, length=17), torch.arange(8) // 2
    subject = quality_model.Subject(
        "tiny", lambda: tiny.make("llama"), tiny.ids(batch=1, length=400)[0], windows, files, windows, files
    )
    told: list[str] = []
    table = Table(subject, sequences=8, seed=0, progress=lambda label, done, total: told.append(label))
    rows = [*table.run([Row("rounding", "rtn", "as published"), Row("BiLLM-like", "billm-like", "fair")])]
    assert [row["way"] for row in rows] == ["rounding", "BiLLM-like"]
    assert rows[0].keys() == rows[1].keys()
    assert all(row["a16"] > 0 and row["true_bits"] > 1 for row in rows)
    assert told == ["quality, tiny: rounding", "quality, tiny: BiLLM-like", "quality"]
    pytest.importorskip("matplotlib")
    path = plot(rows, tmp_path / "plot.svg", bits=quality.BITS)
    assert path is not None
    assert path.read_text("utf-8").startswith("<?xml")


def test_a_row_that_no_table_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row is called best; there are rounding, "):
        next(quality.measure(lambda *_: None, Asked(ways=["best"])))


def test_of_rows_measured_again_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps({"way": way, "a6": value}) + "\n" for way, value in ("a1", "b2", "a3")))
    assert latest(path, by=("way",)) == [{"way": "a", "a6": "3"}, {"way": "b", "a6": "2"}]


def test_a_folder_with_streams_or_with_one_stream_is_a_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quality_model, quality_folder):
        monkeypatch.setattr(module, "LENGTH", 16)
    tiny.make("llama").save_pretrained(tmp_path / "llama")
    stream = tiny.ids(batch=1, length=4000)[0] + 2  # without the end of text, which is 1
    stream[stream > 127] = 2
    test = stream[:900].clone()
    test[::90] = 1
    save_file(
        {"train": stream, "test": test.int(), "ood": stream[:50].clone()}, tmp_path / "llama" / "tokens.safetensors"
    )
    subject = quality_folder.from_folder(tmp_path / "llama", None, files=4)
    assert subject.label == "llama"
    assert subject.windows.shape[1] == 17
    assert subject.files.unique().tolist() == [0, 1, 2, 3]
    assert not (subject.windows[:, :-1] == 1).any()  # no window reaches into the next file
    assert subject.ood is not None
    assert subject.load().config.hidden_size == 64
    assert subject.calibration(3, seed=0).shape == (3, 16)
    torch.save(stream, tmp_path / "ids.pt")
    plain = quality_folder.from_folder(tmp_path / "llama", tmp_path / "ids.pt", files=4)
    assert plain.ood is None
    assert plain.train.numel() == 3600
    assert plain.files.unique().tolist() == [0, 1, 2, 3]


def test_text_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="10 held-out tokens hold no window of 256"):
        quality_folder.windows_of(torch.zeros(10, dtype=torch.int64), end=None, files=4)


def test_adamw_alone_lowers_the_loss_and_follows_the_seed() -> None:
    config = DemoConfig(steps=12, batch=4, length=16, warmup_steps=2, learning_rate=3e-3)
    stream = torch.arange(2000) % 17
    states = []
    for _ in range(2):
        model = tiny.make("llama").requires_grad_(True)
        before = adamw.train(model, stream, config=replace(config, steps=1), progress=lambda *_: None)
        after = adamw.train(model, stream, config=config, progress=lambda *_: None)
        states.append(model.state_dict())
        assert after["loss"] < before["loss"]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
