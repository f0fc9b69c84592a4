"""Graphs after each pass, what each changed, and kernel sources as files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bwla_compiler.codegen import triton_module
from bwla_compiler.dumping import dump_passes
from bwla_compiler.errors import CheckpointError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.recipe import load_recipe
from bwla_compiler.zoo.models import tiny_model
from tests import tiny
from tests.wider import wider

STAGES = [
    "00-capture", "01-untie", "02-fold-norms", "03-fold-rotations", "04-insert-online", "05-quantize-linears",
    "06-quantize-ends", "07-decompose", "08-fuse-kernels",
]  # fmt: skip


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny Llama whose head is tied; the folder is made."""
    folder = tmp_path_factory.mktemp("dump") / "new"
    model = tiny.make("llama-tied", layers=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    files = dump_passes(model, folder, load_recipe("bwla-w1a6"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    return folder


def text(folder: Path, name: str) -> str:
    return (folder / name).read_text("utf-8")


def added(folder: Path, stage: str) -> list[str]:
    """Return the lines that a diff adds."""
    return [line[1:] for line in text(folder, f"{stage}.diff").splitlines() if line[:1] == "+" and line[:3] != "+++"]


def test_stages_are_numbered_in_their_order(dumped: Path) -> None:
    assert sorted(path.stem for path in dumped.glob("0*.txt")) == STAGES
    assert sorted(path.stem for path in dumped.glob("0*.diff")) == STAGES[1:]


def test_the_first_graph_is_the_model(dumped: Path) -> None:
    lines = text(dumped, "00-capture.txt").splitlines()
    assert any(" = model.layers.0.mlp.up_proj.weight  # rms " in line for line in lines)
    assert any(line.startswith("silu: float32[3, 11, 96] = silu(") for line in lines)
    assert sum("scaled_dot_product_attention(" in line for line in lines) == 1
    assert lines[-1].startswith("return ")


def test_a_fold_shows_as_weights_with_other_values(dumped: Path) -> None:
    changed = [line for line in added(dumped, "02-fold-norms") if "crc" in line]
    assert any("model.layers.0.input_layernorm.weight  # rms 1," in line for line in changed)  # the gain is gone
    assert any("q_proj.weight" in line for line in changed)
    assert not any("down_proj" in line for line in changed)
    assert "# fold-norms: 9 changed, 0 left alone" in text(dumped, "02-fold-norms.diff")
    assert "left alone, model.layers.0.mlp.down_proj.input: silu" in text(dumped, "03-fold-rotations.diff")


def test_transforms_and_packed_linears_are_operators(dumped: Path) -> None:
    assert sum("bwla.transform(" in line for line in added(dumped, "04-insert-online")) == 2  # o and down
    assert sum("bwla.linear(" in line for line in added(dumped, "05-quantize-linears")) == 7
    assert text(dumped, "06-quantize-ends.txt").count("bwla.linear(") == 7
    assert any("bwla.int8" in line for line in added(dumped, "06-quantize-ends"))
    fused = added(dumped, "08-fuse-kernels")
    assert sum("bwla.fused_group(" in line for line in fused) == 4
    assert "one call of rms_norm, 3 linears" in text(dumped, "08-fuse-kernels.diff")


def test_plan_and_kernels_are_there(dumped: Path) -> None:
    assert Plan.from_json(text(dumped, "plan.json")).free
    assert {path.suffix for path in (dumped / "kernels").iterdir()} >= {".cpp"}
    assert "bwla_" in text(dumped, "kernels/operators.cpp")
    if triton_module.installed():
        assert any("@triton.jit" in path.read_text() for path in (dumped / "kernels" / "cuda-90").iterdir())


def test_of_a_config_the_first_graph_is_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        bare: nn.Module = type(model := tiny.make("llama", layers=1))(model.config)  # type: ignore[call-arg, operator]
    dump_passes(bare, tmp_path, load_recipe("bwla-w1a6"))
    assert [path.name for path in tmp_path.glob("0*")] == ["00-capture.txt"]
    assert "crc" not in text(tmp_path, "00-capture.txt")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        dump_passes(tiny.make("llama", layers=1), tmp_path / "file", load_recipe("rtn"))


@pytest.mark.parametrize("name", wider("gpt2", "mixtral"))
def test_other_architectures_are_dumped(name: str, tmp_path: Path) -> None:
    model = tiny.make(name) if name in tiny.CONFIGS else tiny_model(name)
    dump_passes(model, tmp_path, load_recipe("bwla-w1a6"))
    assert sorted(path.stem for path in tmp_path.glob("0*.txt")) == STAGES
