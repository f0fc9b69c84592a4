"""The fair table's rows, and models from a folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import quality_folder, quality_model
from benchmarks.quality_rows import LEVELS, fair_rows
from bwla_compiler.demo import DemoConfig
from bwla_compiler.demo.train import new_model
from bwla_compiler.errors import ModelError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.numerics.bits import claimed_bits
from bwla_compiler.passes.group_specs import planned_specs
from bwla_compiler.passes.own_recipes import own_recipes
from bwla_compiler.recipe import load_recipe
from tests import tiny


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


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, Plan]:
    """The embedded model's architecture, not trained: the plan reads no weights but gains."""
    model = new_model(DemoConfig(), DemoConfig().vocab_size)
    return model, make_plan(model)


def second_planes_by_hand(plan: Plan, share: float) -> set[str]:
    """The rule by which results/quality-fair.jsonl was measured at 858781f, on its own."""
    linears = [x for x in plan.linears if x.block]
    wanted, taken, found = share * sum(x.n_weights for x in linears), 0, set()
    for linear in [x for x in linears if x.writes_residual] + [x for x in linears if not x.writes_residual]:
        if taken + linear.n_weights / 2 <= wanted:
            found.add(linear.name)
            taken += linear.n_weights
    return found


# with the true bits that results/quality-fair.jsonl counted, when both factors of a transform were fitted
@pytest.mark.parametrize(
    "planes, bits", [(1.0, 1.1059), (1.18, 1.2999), (1.5, 1.6267), (2.0, 2.158), (2.4, 2.5682)], ids=str
)
def test_means_give_the_planes_that_the_fair_table_was_measured_with(
    demo: tuple[nn.Module, Plan], planes: float, bits: float
) -> None:
    model, plan = demo
    (row,) = [
        r for r in fair_rows() if (r.recipe, r.table) == ("bwla-w1a6", "fair, tuned")
        and r.settings.get("weights.planes", 1) == planes and "psp.hidden_over" in r.settings
    ]  # fmt: skip
    recipe = load_recipe(row.recipe, row.settings | {"transform.right": "fitted"})
    own = own_recipes(plan, recipe)
    more = {name for name, x in own.items() if x is not None and x.weights.planes == int(planes) + 1}
    assert more == second_planes_by_hand(plan, planes - int(planes))
    specs = [spec for _, spec in planned_specs(model, plan, recipe)]
    weights = [spec.in_features * sum(spec.out_features) for spec in specs]
    claimed = sum(claimed_bits(spec) * n for spec, n in zip(specs, weights, strict=True)) / sum(weights)
    assert claimed == pytest.approx(bits, abs=5e-4)  # a byte for each tensor of halves, and four decimals


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
