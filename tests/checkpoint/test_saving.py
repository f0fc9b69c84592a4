"""A save is whole or absent, and refused where it would not read back equal."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bwla_compiler import api
from bwla_compiler.errors import CheckpointError
from tests import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    packed: Any = tiny.make("llama")
    api.quantize(packed, recipe="rtn")
    return packed


def test_into_a_new_an_empty_and_a_used_folder(model: Any, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "used"):
        api.save(model, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new", "used"]


def test_what_reads_back_otherwise_is_not_kept(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = type(model).save_pretrained

    def forgetful(self: Any, folder: Path, **options: Any) -> None:
        gain = self.model.norm.weight.detach().clone()
        self.model.norm.weight.data.add_(1)
        write(self, folder, **options)
        self.model.norm.weight.data.copy_(gain)

    monkeypatch.setattr(type(model), "save_pretrained", forgetful)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight reads back as another"):
        api.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_answers_otherwise_is_not_kept(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = lambda module, inputs: (inputs[0] * 2,)  # noqa: E731  (a hook is not saved)
    handle = model.model.layers[0].mlp.register_forward_pre_hook(changed)
    try:
        with pytest.raises(CheckpointError, match="answers otherwise"):
            api.save(model, tmp_path / "out")
    finally:
        handle.remove()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="no space left"):
        api.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_written_as_it_is(tmp_path: Path) -> None:
    model: nn.Module = tiny.make("llama")
    api.save(model, tmp_path / "out")
    again = api.load(tmp_path / "out").model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
