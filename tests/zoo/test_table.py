import dataclasses
import json

from bwla_compiler.zoo.compiled import Compiled, Packed
from bwla_compiler.zoo.run import Kind, ZooRow
from bwla_compiler.zoo.table import summary, to_json, to_markdown, versions

KINDS = (
    Kind("model.layers.N.q_proj", "folded", "writers take the rotation", 2),
    Kind("model.layers.N.down_proj", "online", "pinned by silu: acts on each channel by itself", 2),
    Kind("model.layers.N.experts", "alone", "its weight belongs to an Experts", 1),
)
ROWS = (
    ZooRow("good", "exact", "GoodForCausalLM", "", 3, 2e-15, KINDS, 0.75, {"aten.topk.default": 2}, 1.5, True),
    ZooRow("bad", "wrong", "BadForCausalLM", "relative logit error 0.1", 2, 0.1, KINDS[:1], 1.0, {}, 1.0, True),
    ZooRow("odd", "refused", "OddForCausalLM", "torch.export could not trace a|b"),
    ZooRow("none", "not built", reason="ValueError: no"),
)
VERSIONS = {"torch": "1"}


def test_the_summary_counts() -> None:
    assert summary(ROWS) == "4 architectures: 3 built, 2 captured; 1 exact, 1 wrong, 1 refused"


def test_markdown_holds_every_row_its_reasons_and_its_origin() -> None:
    text = to_markdown(ROWS, command="bwla-compile zoo", versions=VERSIONS)
    assert "`bwla-compile zoo` with torch 1" in text
    assert "| good | GoodForCausalLM | 2 | 0 | 2 | 1 | 75% | 3 | 2e-15 |" in text
    assert "`down_proj` online (pinned by silu: acts on each channel by itself)" in text
    assert "`experts` alone (its weight belongs to an Experts)" in text
    assert "## Wrong\n\n- **bad**: relative logit error 0.1" in text
    assert "## Refused\n\n- **odd**: torch.export could not trace a\\|b" in text
    assert "## Not built\n\n- **none**: ValueError: no" in text
    assert "`aten.topk.default`, in 1: good" in text
    assert all(row.name in text for row in ROWS)


def test_compiled_models_have_a_section_and_counts() -> None:
    made = Compiled("exact", "whole", n_graphs=1, n_lengths=2, error=0.004)
    failed = Compiled("wrong", "door", "relative error 0.5", 1, 2, error=0.5, cached=False)
    rows = (
        dataclasses.replace(ROWS[0], packed=Packed(0.71, 1.7, 3.21), compiled=made, raw=failed),
        dataclasses.replace(ROWS[1], compiled=Compiled("refused", "door", "quantizing: no|t")),
        *ROWS[2:],
    )
    told = summary(rows)
    assert "compiled in one graph 1 of 2 (50.0%), 1 of them the whole way; 0 wrong, 1 refused" in told
    assert "compiled raw in one graph 0 of 1 (0.0%), 0 of them the whole way; 1 wrong" in told
    text = to_markdown(rows, command="c", versions=VERSIONS)
    assert "| good | 71% | 1.70, 3.21 | 1, 2 | exact, whole | 4e-03 | wrong, door, no cache |" in text
    assert "| bad |  |  |  | refused, door |  |  |" in text
    assert "- **bad**, refused: quantizing: no\\|t" in text
    assert "- **good**, raw, wrong: relative error 0.5" in text
    assert "## Quantized" not in to_markdown(ROWS, command="c", versions=VERSIONS)


def test_sections_without_rows_are_left_out() -> None:
    text = to_markdown(ROWS[:1], command="c", versions=VERSIONS)
    assert "## Wrong" not in text
    assert "## Refused" not in text


def test_json_gives_the_rows() -> None:
    found = json.loads(to_json(ROWS, command="c", versions=VERSIONS))
    assert found["command"] == "c"
    assert [row["status"] for row in found["rows"]] == [row.status for row in ROWS]
    assert found["rows"][0]["kinds"][1]["decision"] == "online"


def test_versions_name_what_decides() -> None:
    assert set(versions()) == {"Python", "torch", "transformers"}
