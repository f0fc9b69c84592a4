"""From folder to folder, block by block: the same bytes as in memory, after any interruption, and clear refusals."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bwla_compiler import api
from bwla_compiler.calibrate.report import BlockReport
from bwla_compiler.checkpoint import files
from bwla_compiler.checkpoint.streamed import StreamedWeights
from bwla_compiler.errors import BwlaError, CalibrationError, CheckpointError, OutOfMemory, RecipeError, WeightError
from bwla_compiler.passes.own_recipes import own_recipes
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import PackedLinear
from bwla_compiler.zoo.models import tiny_model
from tests import planned, tiny
from tests.letters import letters
from tests.wider import wider

FAST = {"transform.iterations": 2, "psp.iterations": 1, "signs.sweeps": 1, "tuning.steps": 0}
TOKENS = tiny.ids(batch=8, length=16, seed=3)
Edit = Callable[[Path], None]


def made(name: str, folder: Path) -> Path:
    """Save a tiny float model; in shards where its name is llama, so that the index is read."""
    model: Any = tiny.make(name) if name in tiny.CONFIGS else tiny_model(name)
    model.save_pretrained(folder, max_shard_size="100KB" if name == "llama" else "1GB")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("llama", tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted calibrated run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    api.quantize_to(source, out, settings=FAST, calibration=TOKENS)
    return out


def rounded(source: Path, out: Path, **options: Any) -> None:
    """Quantize without data and, once a plan was made, by that plan, which takes the least time: llama alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bwla_compiler.streaming.make_plan", lambda model: planned.plan("llama"))
        api.quantize_to(source, out, recipe="rtn", **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(seed=4), use_cache=False).logits


class Killed(Exception):
    pass


def kill_after(number: int) -> Callable[[BlockReport], None]:
    def told(block: BlockReport) -> None:
        if block.done == number:
            raise Killed

    return told


def assert_same_as_in_memory(name: str, folder: Path, settings: dict[str, Any], recipe: str = "bwla-w1a6") -> None:
    made(name, folder / "float")
    report = api.quantize_to(folder / "float", folder / "out", recipe=recipe, settings=settings, calibration=TOKENS)
    model = api.load(folder / "float").model
    expected = api.quantize(model, recipe=recipe, settings=settings, calibration=TOKENS)
    again = api.load(folder / "out").model
    mine, theirs = again.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key, value in mine.items() if not torch.equal(value, theirs[key])] == []
    assert torch.equal(logits(again), logits(model))
    assert report.bits == expected.bits
    assert [x.output_error for x in report.linears] == [x.output_error for x in expected.linears]
    for x, y in zip(report.linears, expected.linears, strict=True):  # the float model's inputs are not seen in streams
        assert x.spread is not None
        assert y.spread is not None
        assert dataclasses.replace(x.spread, input_before=y.spread.input_before) == y.spread


@pytest.mark.parametrize(
    "name", ["opt", *wider("llama-tied", "gpt2", "phi3", "gemma2", "mixtral", "gpt_oss", "falcon")]
)
def test_streamed_and_in_memory_are_the_same_bits(name: str, tmp_path: Path) -> None:
    assert_same_as_in_memory(name, tmp_path, FAST)


@pytest.mark.parametrize("bits", [16, *wider(4)])
def test_a_tied_model_that_is_only_rounded(bits: int, tmp_path: Path) -> None:
    assert_same_as_in_memory("llama-tied", tmp_path, {"head.bits": bits}, "rtn")


def test_a_mean_of_planes_is_the_same_bits_and_read_again(tmp_path: Path) -> None:
    assert_same_as_in_memory("llama", tmp_path, {**FAST, "weights.planes": 1.5}, "bwla-mixed-a6")
    again = api.load(tmp_path / "out").model
    planes = {name: m.planes for name, m in again.named_modules() if isinstance(m, PackedLinear)}
    own = own_recipes(planned.plan("llama"), load_recipe("bwla-mixed-a6", {"weights.planes": 1.5}))
    assert planes == {name: recipe.weights.planes for name, recipe in own.items() if recipe and name in planes}
    assert len(planes) == 14
    assert set(planes.values()) == {1, 2}
    split = "model.layers.1.self_attn."
    assert (planes[f"{split}q_proj"], planes[f"{split}k_proj"]) == (2, 1)  # members of one call may differ
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["recipe"]["weights"]["planes"] == 1.5


@pytest.mark.exhaustive
def test_tuning_works_on_what_was_streamed(tmp_path: Path) -> None:
    assert_same_as_in_memory("llama", tmp_path, {**FAST, "tuning.steps": 2})


@pytest.mark.exhaustive
def test_a_tuned_run_that_was_killed_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FAST, "tuning.steps": 6, "tuning.signs": 0.6}  # near chance, so that signs flip in so few steps
    api.quantize_to(source, tmp_path / "whole", settings=settings, calibration=TOKENS)
    with pytest.raises(Killed):
        api.quantize_to(source, tmp_path / "out", settings=settings, calibration=TOKENS, on_block=kill_after(1))
    # what the first run could afford holds: with less memory the same would be done
    monkeypatch.setattr("bwla_compiler.calibrate.affordable.memory_bytes", lambda: 0)
    report = api.quantize_to(source, tmp_path / "out", settings=settings, calibration=TOKENS)
    assert report.recipe.tuning.steps == 6
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    signs = {"tuning.signs": 0.0}
    api.quantize_to(source, tmp_path / "still", settings=settings | signs, calibration=TOKENS)
    assert content(tmp_path / "still") != content(tmp_path / "whole")


def test_where_memory_is_short_the_checkpoint_tells_what_was_tuned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwla_compiler.calibrate.affordable.memory_bytes", lambda: 0)
    report = api.quantize_to(source, tmp_path / "out", settings={**FAST, "tuning.steps": 2}, calibration=TOKENS)
    assert report.recipe.tuning.steps == 0
    assert any("nothing is tuned" in why for p in report.passes for _, why in p.skipped)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["recipe"]["tuning"]["steps"] == 0


def test_blocks_are_told_and_files_are_few(source: Path, tmp_path: Path) -> None:
    told: list[BlockReport] = []
    rounded(source, tmp_path / "out", on_block=told.append)
    assert [(b.name, b.done, b.total, b.restored) for b in told] == [
        ("model.layers.0", 1, 2, False),
        ("model.layers.1", 2, 2, False),
    ]
    assert all(0 < b.output_error < 1 and 1 < b.true_bits < 2 for b in told)
    assert sorted(content(tmp_path / "out")) == [
        "config.json",
        "generation_config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_float_weights_of_a_block_that_is_done_are_gone(source: Path, tmp_path: Path) -> None:
    def alive() -> dict[int, tuple[int, ...]]:
        tensors = [x for x in gc.get_objects() if type(x) is nn.Parameter and x.ndim == 2 and not x.is_meta]
        # stand-ins share one stretch of memory, as large as the embedding, which is no block's
        return {id(x): tuple(x.shape) for x in tensors if x.untyped_storage().nbytes() == 4 * x.numel() < 4 * 128 * 64}

    gc.collect()
    before: set[int] = set(alive())
    found: list[list[tuple[int, ...]]] = []
    rounded(
        source,
        tmp_path / "out",
        on_block=lambda block: found.append([s for i, s in alive().items() if i not in before]),
    )
    assert found == [[], []]


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", []
    with pytest.raises(Killed):
        api.quantize_to(source, out, settings=FAST, calibration=TOKENS, on_block=kill_after(1))
    assert not out.exists()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        api.load(tmp_path / "out.partial")
    report = api.quantize_to(
        source, out, settings=FAST, calibration=TOKENS, on_block=told.append, beside=lambda report: {"a.txt": "é"}
    )
    assert (out / "a.txt").read_text("utf-8") == "é"
    (out / "a.txt").unlink()
    assert [block.restored for block in told] == [True, False]
    assert content(out) == content(whole)
    assert {x.name.split(".")[2] for x in report.linears} == {"0", "1"}
    said = [sorted(what) for done in report.passes for what in (done.changed, done.skipped)]
    assert all(len(what) == len(set(what)) for what in said)  # nothing is told twice


def test_spilled_activations_change_nothing(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwla_compiler.calibrate.spill.LEAST", 1)
    api.quantize_to(source, tmp_path / "out", settings=FAST, calibration=TOKENS, spill=True)
    assert content(tmp_path / "out") == content(whole)


DYING = """
import os, signal, sys
from bwla_compiler import api
from tests.test_streaming import FAST

source, out, tokens, name, number = sys.argv[1:]
real, calls = getattr(os, name), []

def dying(*arguments):
    calls.append(name)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(os, name, dying)
api.quantize_to(source, out, settings=FAST, calibration=tokens)
"""
"""A run that is killed, as by kill -9, at one of its calls of a function of os; number 0: never."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, number", [("fsync", 3), ("replace", 3), ("fsync", 8), ("replace", 6)])
def test_kill_9_at_any_moment(source: Path, whole: Path, tmp_path: Path, name: str, number: int) -> None:
    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = [str(source), str(tmp_path / "out"), str(tmp_path / "tokens.pt")]

    def run(at: int) -> int:
        command = [sys.executable, "-c", DYING, *paths, name, str(at)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert run(number) == -signal.SIGKILL
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
    assert run(0) == 0
    assert content(tmp_path / "out") == content(whole)


def begun(source: Path, out: Path) -> Path:
    """Leave a run without data behind that was killed after its first block; return its folder."""
    with pytest.raises(Killed):
        rounded(source, out, on_block=kill_after(1))
    return out.with_name("out.partial")


def test_what_a_run_depends_on_may_not_change(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out\.partial: was begun with another recipe"):
        rounded(source, tmp_path / "out", settings={"activations.bits": 8})
    with pytest.raises(CheckpointError, match="was begun with another seed"):
        rounded(source, tmp_path / "out", seed=1)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="was begun with another model"):
        rounded(other, tmp_path / "out")


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.input_layernorm", "layers.1.mlp.up_proj"])
def test_weights_that_changed_in_place_are_noticed(source: Path, tmp_path: Path, name: str) -> None:
    changed = tmp_path / "float"
    shutil.copytree(source, changed)
    begun(changed, tmp_path / "out")
    edit(changed, f"model.{name}.weight", lambda w: w.add_(1))
    with pytest.raises(CheckpointError, match="was begun with another model"):
        rounded(changed, tmp_path / "out")


def test_a_link_to_an_empty_folder_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rounded(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_a_mount_point_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(CheckpointError, match="out: is a mount point"):
        rounded(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_is_killed_while_it_cleans_up_has_its_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: bool) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: killed(path) if path.parent.name == "out" else os.unlink(path))
        with pytest.raises(Killed):
            rounded(source, tmp_path / "out")
    assert (tmp_path / "out" / "progress.json").is_file()
    assert not (tmp_path / "out.partial").exists()
    api.load(tmp_path / "out")


def test_a_damaged_generation_config_is_told_before_the_work(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "float"
    shutil.copytree(source, damaged)
    (damaged / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"float/generation_config\.json: is damaged"):
        rounded(damaged, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    tiny.make("llama-tied").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    same = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": same.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    api.quantize_to(folder, tmp_path / "out", recipe="rtn")
    save_file({**tensors, "lm_head.weight": 2 * same}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"differs from .* to which the config ties it; set tie_word_embeddings"):
        api.quantize_to(folder, tmp_path / "other", recipe="rtn")


def test_a_float_model_that_lacks_a_tensor_is_not_loaded(source: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "float"
    shutil.copytree(source, lacking)
    edit(lacking, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, which Llama"):
        api.load(lacking)
    shutil.copytree(source, tmp_path / "shaped")
    edit(tmp_path / "shaped", "model.norm.weight", None)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "shaped" / "more.safetensors", {"format": "pt"})
    index = json.loads((tmp_path / "shaped" / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "more.safetensors"
    (tmp_path / "shaped" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="shaped: cannot be loaded as a causal LM"):
        api.load(tmp_path / "shaped")


def test_a_tokenizer_that_cannot_be_read_is_told(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "float"
    shutil.copytree(source, damaged)
    (damaged / "tokenizer.json").write_text('{"x":1')
    assert api.load(damaged).tokenizer is None
    assert "its tokenizer cannot be read and is left out" in caplog.text


def test_lost_and_damaged_shards_of_a_begun_run(source: Path, tmp_path: Path) -> None:
    folder = begun(source, tmp_path / "out")
    shard = folder / "model-00001-of-00003.safetensors"
    flip(shard)
    with pytest.raises(CheckpointError, match=r"differs from its hash.*remove"):
        rounded(source, tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"this shard of model\.layers\.0 is missing"):
        rounded(source, tmp_path / "out")
    (folder / "progress.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"progress\.json: is damaged"):
        rounded(source, tmp_path / "out")


def test_a_full_disk_leaves_what_can_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded(source, tmp_path / "whole")
    synced = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"no space left on its disk.*start the same command again"):
        rounded(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob(".*.tmp"))
    monkeypatch.undo()
    rounded(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_places_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        rounded(source, tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        rounded(source, tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match="no permission to write there; choose another folder"):
        rounded(source, tmp_path / "out")


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], Any] | None) -> None:
    """Change a stored tensor in place, or take it out."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            if change is None:
                del tensors[name]
            else:
                changed = change(tensors[name])
                tensors[name] = tensors[name] if changed is None else changed
            save_file(tensors, path, {"format": "pt"})


def flip(path: Path) -> None:
    """Flip one bit of a file's last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


UP = "model.layers.1.mlp.up_proj.weight"


def nan(weight: torch.Tensor) -> None:
    weight[0, 0] = torch.nan


def without_index_entry(folder: Path) -> None:
    table = json.loads((folder / "model.safetensors.index.json").read_text())
    del table["weight_map"][UP]
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def truncated(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])


def encoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))


DAMAGE: dict[str, tuple[Edit, type[BwlaError], str]] = {
    "NaN": (lambda f: edit(f, UP, nan), WeightError, f"{UP} holds 1 NaN or infinite"),
    "infinity": (lambda f: edit(f, UP, lambda w: w.mul_(torch.inf)), WeightError, f"{UP} holds .* NaN or infinite"),
    "shape": (lambda f: edit(f, UP, lambda w: w[:5].clone()), CheckpointError, rf"{UP} has shape \[5, 64\]"),
    "integers": (lambda f: edit(f, UP, lambda w: w.to(torch.int32)), WeightError, "only floating-point"),
    "missing": (without_index_entry, CheckpointError, f"lacks {UP}"),
    "shard": (lambda f: max(f.glob("*.safetensors")).unlink(), CheckpointError, "this shard is missing"),
    "truncated": (truncated, CheckpointError, "truncated or damaged"),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), CheckpointError, "is damaged"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safe*")], CheckpointError, "has neither"),  # type: ignore[dict-item,return-value]
    "no decoder": (encoder, CheckpointError, "does not describe a causal LM"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_bad_input_is_one_clear_error(what: str, source: Path, tmp_path: Path) -> None:
    change, error, message = DAMAGE[what]
    shutil.copytree(source, tmp_path / "float")
    change(tmp_path / "float")
    with pytest.raises(error, match=message):
        rounded(tmp_path / "float", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_name_the_linear(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "float")
    for name in ("gate_proj", "up_proj"):
        edit(tmp_path / "float", f"model.layers.0.mlp.{name}.weight", lambda w: w.mul_(1e17))
    settings = {"signs.sweeps": 1, "transform.kind": "none", "psp.hidden_over": 0, "tuning.steps": 0}
    with pytest.raises(
        CalibrationError, match=r"layers\.0\.mlp\.down_proj: its input: activations hold NaN or infinity"
    ):
        api.quantize_to(tmp_path / "float", tmp_path / "out", settings=settings, calibration=TOKENS)
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_is_one_clear_error_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = StreamedWeights.fetch

    def short(self: StreamedWeights, *prefixes: str) -> None:
        if "model.layers.1" in prefixes:
            torch.empty(1 << 60, dtype=torch.uint8)
        fetch(self, *prefixes)

    monkeypatch.setattr(StreamedWeights, "fetch", short)
    with pytest.raises(OutOfMemory, match=r"llama: out of memory \(asked for \d+ bytes\); give --spill"):
        rounded(source, tmp_path / "out")
    monkeypatch.undo()
    told: list[BlockReport] = []
    rounded(source, tmp_path / "out", on_block=told.append)
    assert [block.restored for block in told] == [True, False]


def test_calibration_that_is_none(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    torch.save(torch.arange(5), tmp_path / "short.pt")
    with pytest.raises(CalibrationError, match="no tokenizer"):
        api.quantize_to(source, tmp_path / "out", calibration=tmp_path / "empty.txt")
    with pytest.raises(CalibrationError, match="5 tokens do not fill one sequence of 256"):
        api.quantize_to(source, tmp_path / "out2", calibration=tmp_path / "short.pt")
    shutil.copytree(source, tmp_path / "read")
    letters().save_pretrained(tmp_path / "read")
    with pytest.raises(CalibrationError, match=r"empty\.txt: .*1 tokens do not fill"):
        api.quantize_to(tmp_path / "read", tmp_path / "out4", calibration=tmp_path / "empty.txt")
    (tmp_path / "few.txt").write_text("abc")
    with pytest.raises(CalibrationError, match="4 tokens do not fill one sequence of 256"):
        api.quantize_to(tmp_path / "read", tmp_path / "out5", calibration=tmp_path / "few.txt")
    with pytest.raises(CalibrationError, match='is neither "self"'):
        api.quantize_to(source, tmp_path / "out3", calibration="nothing.txt")


def test_what_cannot_be_saved_or_is_packed_is_refused_at_once(source: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be saved"):
        api.quantize_to(source, tmp_path / "out", recipe="billm-like", calibration=TOKENS)
    with pytest.raises(CheckpointError, match="is quantized already"):
        rounded(whole, tmp_path / "out")


def test_a_model_without_values_takes_no_memory() -> None:
    from bwla_compiler.checkpoint.empty import empty_model

    model = empty_model(tiny.CONFIGS["llama-tied"]())
    assert len({p.data_ptr() for p in model.parameters()}) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0  # buffers are real
