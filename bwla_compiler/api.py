"""The public functions: load, plan, rotate, quantize, save, measure, generate."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bwla_compiler import tokens as token_sources
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.calibrate.report import BlockReport, QuantizeReport
from bwla_compiler.checkpoint import hf
from bwla_compiler.checkpoint.dense import export_dense
from bwla_compiler.checkpoint.gguf_export import export_gguf
from bwla_compiler.checkpoint.ledger import Ledger
from bwla_compiler.checkpoint.ledger import ledger as checkpoint_ledger
from bwla_compiler.checkpoint.saving import save_checked
from bwla_compiler.checkpoint.source import DAMAGED, incomplete, source_folder
from bwla_compiler.demo import demo_path, is_demo, load_demo
from bwla_compiler.errors import (
    BwlaError,
    CalibrationError,
    CheckpointError,
    DeviceError,
    ModelError,
    PlanError,
    first_line,
)
from bwla_compiler.evaluate.fidelity import Fidelity
from bwla_compiler.evaluate.fidelity import fidelity as fidelity_to
from bwla_compiler.evaluate.harness import run_tasks
from bwla_compiler.evaluate.layers import layer_errors
from bwla_compiler.evaluate.perplexity import perplexity
from bwla_compiler.evaluate.verification import Verification, verify_rotations
from bwla_compiler.evaluate.windows import Windowed
from bwla_compiler.evaluate.windows import windowed_perplexity as by_windows
from bwla_compiler.generation import generate
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.graph.repetition import Repetition, plan_deep
from bwla_compiler.inspector.cost import CostReport, cost_report
from bwla_compiler.memory import memory_bytes, told_of_shortage
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.passes.apply import check_weights
from bwla_compiler.passes.base import PassContext, PassReport
from bwla_compiler.passes.fold_norms import FoldNorms
from bwla_compiler.passes.fold_rotations import FoldRotations
from bwla_compiler.passes.model_shape import packed_shape, planned_shape
from bwla_compiler.passes.pipeline import run_pass
from bwla_compiler.passes.untie import Untie
from bwla_compiler.recipe import Recipe, load_recipe
from bwla_compiler.runtime.bits import measure_bits
from bwla_compiler.runtime.kv_cache import check_cache_bits, int8_cache, set_cache_bits
from bwla_compiler.runtime.modules import PackedExperts, PackedLinear, set_activation_bits
from bwla_compiler.streaming import Job, float_bytes, quantize_folder

Progress = Callable[[str, int, int], None]

__all__ = [
    "LoadedModel",
    "bits",
    "cost",
    "export",
    "fidelity",
    "generate",
    "int8_cache",
    "layer_errors",
    "ledger",
    "load",
    "perplexity",
    "plan",
    "quantize",
    "quantize_to",
    "rotate",
    "run_tasks",
    "save",
    "set_activation_bits",
    "set_cache_bits",
    "skeleton",
    "verify",
    "windowed_perplexity",
]


log = logging.getLogger(__name__)

SHORT_OF_MEMORY = "quantize_to (bwla-compile quantize) needs one block at a time; or take a machine with more"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer (None where the folder has none) and the name that it was loaded by."""

    model: nn.Module
    tokenizer: Any
    source: str


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> LoadedModel:
    """Return the causal LM of a directory, a hub id, "demo:" or "demo:outliers"; packed checkpoints too.

    dtype: of the float weights, None for float32. Raises CheckpointError, saying what is wrong with the folder,
    OutOfMemory and DeviceError.
    """
    name = str(source)
    _check_device(device)
    if is_demo(name):
        demo = load_demo(name, progress=progress)
        return LoadedModel(demo.model.to(dtype or torch.float32).to(device), demo.tokenizer, name)
    path = Path(name)
    if path.is_file():
        raise CheckpointError(f"{name} is a file; give the folder that holds the config and the weights")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{name}: the folder has no config.json; give the folder that save_pretrained wrote")
    try:
        with told_of_shortage(name, remedy=SHORT_OF_MEMORY):
            model, found = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype or torch.float32, output_loading_info=True
            )
    except (*DAMAGED, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, BwlaError):
            raise
        raise CheckpointError(
            f"{name}: cannot be loaded as a causal LM: {first_line(error)}. Give a model folder, a hub id, or demo:"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise incomplete(name, missing, model)
    return LoadedModel(model.eval().to(device), _tokenizer(name), name)


def _check_device(name: str) -> None:
    """Raise DeviceError where torch does not know a device, the machine does not have it, or it holds no values."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"device {name!r} cannot be used: {first_line(error)}. `bwla-compile doctor` lists what is here"
        ) from error


def skeleton(source: str | Path, *, device: str = "cpu", progress: Progress | None = None) -> LoadedModel:
    """Return a float model without its weights: on meta, from its config alone, which is all that `plan` needs.

    source: as for `load`, or a config.json. demo: and packed checkpoints come whole, as `load` gives them. Raises
    CheckpointError, saying what is wrong with the config.
    """
    name = str(source)
    if is_demo(name):
        return load(name, device=device, progress=progress)
    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            return load(Path(name).parent if name.endswith(".json") else name, device=device, progress=progress)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except DAMAGED as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{name}: its config does not describe a causal LM: {first_line(error)}. Give a model folder, a "
            "config.json, a hub id, or demo:"
        ) from error
    return LoadedModel(model.eval(), None, name)


TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def _tokenizer(name: str) -> Any:
    """Return the tokenizer of a folder or hub id, None where there is none.

    transformers would make one without a vocabulary for some types of model; hence the look at the folder.
    """
    folder = Path(name)
    if folder.is_dir() and not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if folder.is_dir():
            log.warning("%s: its tokenizer cannot be read and is left out: %s", name, first_line(error))
        return None  # many test models have none; whoever needs one says so


def plan(model: nn.Module) -> Plan:
    """Return the plan: bases, groups, what folds, what is online, and why. The model is not changed.

    Raises CaptureError where the model cannot be traced, PlanError where it has no linears or is packed already.
    """
    _refuse_packed(model, "planned")
    return make_plan(model)


def quick_plan(model: nn.Module) -> tuple[Plan, Repetition | None]:
    """Return what `plan` does, of a deep model by a few of its blocks, and what was repeated; see graph.repetition."""
    _refuse_packed(model, "planned")
    return plan_deep(model)


def cost(
    model: nn.Module, *, plan: Plan | None = None, recipe: str | Path | Recipe = "bwla-w1a6", context: int = 2048
) -> CostReport:
    """Return modelled (never measured) bytes and times of a model on each device of cost.devices.

    A float model is costed as quantizing it by the recipe would leave it, a packed one as it is. plan: of the model,
    None to make it here.
    """
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        return cost_report(packed_shape(model), context=context)
    chosen = load_recipe(recipe)
    shape = planned_shape(model, plan or make_plan(model), chosen)
    return cost_report(shape, recipe=chosen.name, context=context)


def rotate(
    model: nn.Module, *, seed: int = 0, kind: Literal["hadamard", "haar"] = "hadamard"
) -> tuple[PassReport, ...]:
    """Fold norm gains and random rotations into every free basis, in place; the function does not change.

    A head tied to the embedding gets its own weight. Returns what each pass did.
    """
    _refuse_packed(model, "rotated")
    check_weights(model)
    context = PassContext(model, make_plan(model), load_recipe("bwla-w1a16"), seed)
    steps = (Untie(), FoldNorms(), FoldRotations(kind=kind, every=True))
    return tuple(run_pass(model, step, context) for step in steps)


def quantize(
    model: nn.Module,
    *,
    recipe: str | Path | Recipe = "bwla-w1a6",
    settings: dict[str, Any] | None = None,
    calibration: str | Path | Sequence[str] | Tensor = "self",
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a causal LM in place and return the report; `model.save_pretrained` then writes packed weights.

    recipe: name, TOML file or Recipe; settings: dotted fields to change, {"psp.hidden_over": 32}. calibration:
    "self" (the model generates it), "random", "none", a file, texts (then a tokenizer is needed), or token ids
    [sequences, length] int64. Raises ModelError, RecipeError, CalibrationError, WeightError, CaptureError, PlanError,
    and CacheError where the recipe asks for a cache that the model cannot have.
    """
    _refuse_other(model)
    _refuse_packed(model, "quantized")
    chosen = load_recipe(recipe, settings)
    check_weights(model)
    check_cache_bits(model, chosen.cache.bits)
    batches = None
    if chosen.needs_calibration:
        batches = token_sources.calibration_tokens(
            calibration,
            model=model,
            tokenizer=tokenizer,
            sequences=chosen.calibration.sequences,
            length=chosen.calibration.length,
            seed=seed,
            progress=progress,
        )
    with told_of_shortage(type(model).__name__, remedy=SHORT_OF_MEMORY):
        report = quantize_model(model, chosen, batches, seed=seed, progress=progress)
    hf.attach(model, recipe=chosen, plan=report.plan, bits=report.bits)
    return report


def quantize_to(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "bwla-w1a6",
    settings: dict[str, Any] | None = None,
    calibration: str | Path | Sequence[str] | Tensor = "self",
    seed: int = 0,
    spill: bool = False,
    progress: Progress | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    beside: Callable[[QuantizeReport], Mapping[str, str]] | None = None,
) -> QuantizeReport:
    """Quantize a model folder (or hub id, or demo:) into the folder `out`, block by block, and return the report.

    Memory: one block, its statistics, embedding and head, and the calibration activations; with spill, these are in
    files. calibration = "self" samples from the whole float model first, and so needs memory for that. What is done
    is kept in OUT.partial: a killed call, made again, goes on and gives the same bytes. on_block: told of each block.
    beside: texts of more files of the folder, by name, made of the report before the folder appears.
    Raises CheckpointError, RecipeError, CalibrationError, WeightError, CaptureError, PlanError.
    """
    name = str(source)
    folder = demo_path(name, progress=progress) if is_demo(name) else source_folder(name)
    job = Job(
        folder,
        Path(out),
        load_recipe(recipe, settings),
        calibration=calibration,
        tokenizer=_tokenizer(str(folder)),
        seed=seed,
        spill=spill,
        beside=beside,
    )
    return quantize_folder(replace(job, sampler=partial(_sampled, job, progress)), progress=progress, on_block=on_block)


def _sampled(job: Job, progress: Progress | None) -> Tensor:
    """Return calibration tokens of the float model itself, which is in memory for that long."""
    needed = float_bytes(job.folder)
    if needed > memory_bytes() // 2:
        raise CalibrationError(
            f"{job.folder}: calibration = self samples from the whole float model, {needed / 2**30:.0f} GiB, which "
            "does not fit into half of the memory; give a file of text, or random"
        )
    tokens = token_sources.calibration_tokens(
        "self",
        model=load(job.folder).model,
        sequences=job.recipe.calibration.sequences,
        length=job.recipe.calibration.length,
        seed=job.seed,
        progress=progress,
    )
    assert tokens is not None
    return tokens


def _refuse_other(model: object) -> None:
    """Raise ModelError for what is no decoder: a name, an encoder, a model without its head."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{model!r} is no model: load it first, or give a folder's name to quantize_to")
    if not isinstance(model, PreTrainedModel):
        return
    headless = not model.can_generate() and model.get_output_embeddings() is None
    if headless or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is no decoder that predicts next tokens: give what AutoModelForCausalLM loads"
        )


def _refuse_packed(model: nn.Module, verb: str) -> None:
    if any(isinstance(m, (PackedLinear, PackedExperts)) for m in model.modules()):
        raise PlanError(f"{type(model).__name__} is already packed: it cannot be {verb}; load the float model")


def save(model: nn.Module, path: str | Path, *, tokenizer: Any = None) -> None:
    """Write a model, packed or float, with its tokenizer into a folder that `load` reads; whole, or not at all.

    A packed model is read again first, which takes its memory twice. Raises CheckpointError where the folder cannot
    be written, or where what was read differs by a bit, in a tensor or in logits.
    """
    save_checked(model, Path(path), tokenizer=tokenizer)


def ledger(folder: str | Path) -> Ledger:
    """Return the bytes of a packed folder by kind: claimed, counted, and on the disk. Raises CheckpointError."""
    return checkpoint_ledger(Path(folder))


def bits(model: nn.Module) -> Bits:
    """Return the true bits: per block-linear weight, per weight of the model, and the model's bytes."""
    return measure_bits(model)


def verify(model: nn.Module, *, seed: int = 0, progress: Progress | None = None) -> Verification:
    """Rotate every free basis of a float64 copy and compare logits; see `Verification.passed`."""
    _refuse_packed(model, "verified")
    return verify_rotations(model, seed=seed, progress=progress)


def windowed_perplexity(
    model: nn.Module, stream: Tensor, *, context: int, stride: int = 0, progress: Progress | None = None
) -> Windowed:
    """Return the perplexity of a stream of tokens [n_tokens] by sliding windows; see `evaluate.windows`."""
    return by_windows(model, stream, context=context, stride=stride, progress=progress)


def fidelity(reference: nn.Module, model: nn.Module, tokens: Tensor, *, progress: Progress | None = None) -> Fidelity:
    """Return KL(reference || model) in nats per token and the share of tokens with the same best next token."""
    return fidelity_to(reference, model, tokens, progress=progress)


def export(model: nn.Module, path: str | Path, *, to: str = "dense", tokenizer: Any = None) -> None:
    """Write a packed model in another form.

    "dense": float16 weights that any reader of its family takes, marked so. "gguf": one file for llama.cpp, of a fully
    folded model without low-rank pairs (recipe bwla-folded); needs the package gguf. Raises CheckpointError where the
    form cannot hold the model, with the reason.
    """
    forms: dict[str, Callable[..., object]] = {"dense": export_dense, "gguf": export_gguf}
    if to not in forms:
        raise CheckpointError(f"{to!r} is no form that is known; there are {', '.join(map(repr, forms))}")
    forms[to](model, Path(path), tokenizer=tokenizer)
