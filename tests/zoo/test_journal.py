from collections.abc import Iterator
from pathlib import Path

import pytest

from bwla_compiler.errors import ModelError
from bwla_compiler.zoo.compiled import Compiled, Packed
from bwla_compiler.zoo.journal import Journal
from bwla_compiler.zoo.run import Kind, ZooRow
from bwla_compiler.zoo.workers import run_zoo

CONDITIONS = {"seed": 0, "versions": {"torch": "1"}}
FULL = ZooRow(
    "full",
    "exact",
    "FullForCausalLM",
    kinds=(Kind("layers.N.q_proj", "folded", "writers take the rotation", 2),),
    error=2e-15,
    unknown={"aten.topk.default": 2},
    packed=Packed(0.71, 1.7, 3.21),
    compiled=Compiled("broken", "whole", "a break", 1, 2, ("a break",), 0.004),
    raw=Compiled("exact", "door"),
)
BARE = ZooRow("bare", "not built", reason="ValueError: no")


def never(name: str, seed: int) -> Iterator[ZooRow]:
    raise AssertionError(f"{name} was made again")


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "zoo.jsonl", CONDITIONS)
    assert journal.rows() == {}
    for row in (FULL, BARE):
        journal.add(row)
    assert journal.rows() == {"full": FULL, "bare": BARE}


def test_rows_under_other_conditions_are_passed_over_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    Journal(path, CONDITIONS).add(FULL)
    other = Journal(path, {**CONDITIONS, "seed": 1})
    assert other.rows() == {}
    other.add(BARE)
    assert Journal(path, CONDITIONS).rows() == {"full": FULL}
    assert other.rows() == {"bare": BARE}


def test_a_line_cut_off_costs_its_row_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "zoo.jsonl", CONDITIONS)
    journal.add(FULL)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:50])
    assert journal.rows() == {"full": FULL}
    journal.add(BARE)
    assert journal.rows() == {"full": FULL, "bare": BARE}


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("milk\nbread\n")
    with pytest.raises(ModelError, match="line 1 is not a row of the zoo"):
        Journal(tmp_path / "notes", CONDITIONS).rows()


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "zoo.jsonl", CONDITIONS)
    journal.add(FULL)
    journal.add(BARE)
    assert run_zoo(("bare", "full"), job=never, keep=journal) == (BARE, FULL)
