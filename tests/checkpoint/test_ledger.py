"""Bytes by kind: claimed, counted, on the disk; to the byte."""

from pathlib import Path
from typing import Any

import pytest

from bwla_compiler import api
from bwla_compiler.errors import CheckpointError
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = tiny.make("gpt2")
    settings = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1, "tuning.steps": 0}
    api.quantize(model, settings=settings, calibration=tiny.ids(batch=8, length=16, seed=3))
    path = tmp_path_factory.mktemp("packed")
    model.save_pretrained(path)
    return path


def test_the_kinds_add_up_to_the_file(folder: Path) -> None:
    found = api.ledger(folder)
    assert sum(e.stored for e in found.entries) == found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert [e.kind for e in found.entries if e.counted != e.stored] == []
    by_kind = {e.kind: e for e in found.entries}
    assert by_kind["signs"].claimed == by_kind["signs"].stored  # all sizes are multiples of 8
    n_exponents = sum(name.endswith("row_scale_exponent") for name in api.load(folder).model.state_dict())
    assert by_kind["row scales"].stored - by_kind["row scales"].claimed == n_exponents  # one byte a tensor
    assert found.bits.linears == found.claimed_bits["linears"]
    tensors = found.file_bytes - by_kind["file headers"].stored - by_kind["guards"].stored
    assert tensors == found.bits.n_bytes


def test_a_file_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors|do not add up"):
        api.ledger(tmp_path)


def test_a_float_model_has_no_ledger(tmp_path: Path) -> None:
    model: Any = tiny.make("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no packed model"):
        api.ledger(tmp_path)
