"""The fair table's rows, models from a folder, and what AdamW trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import adamw, quality_folder, quality_model
from benchmarks.quality_rows import LEVELS, Row, fair_rows, recipe_for
from bwla_compiler.demo import DemoConfig
from bwla_compiler.errors import ModelError
from bwla_compiler.recipe import load_recipe
from tests import planned, tiny


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
    assert subject.ood.numel() > 0
    assert subject.load().config.hidden_size == 64
    assert subject.calibration(3, seed=0).shape == (3, 16)
    save_file({"train": stream}, tmp_path / "llama" / "tokens.safetensors")
    with pytest.raises(ModelError, match="held out"):  # its end was trained on: perplexity there says nothing
        quality_folder.from_folder(tmp_path / "llama", None, files=4)
    torch.save(stream, tmp_path / "ids.pt")
    plain = quality_folder.from_folder(tmp_path / "llama", tmp_path / "ids.pt", files=4)
    assert plain.ood.numel() == 0
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
