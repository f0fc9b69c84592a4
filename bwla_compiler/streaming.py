"""Quantize a model folder into another, block by block: memory for one block, and a killed run goes on."""

import contextlib
import dataclasses
import gc
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from bwla_compiler import tokens as token_sources
from bwla_compiler.calibrate.affordable import affordable
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.calibrate.report import BlockReport, QuantizeReport
from bwla_compiler.calibrate.spill import Spill
from bwla_compiler.checkpoint import hf
from bwla_compiler.checkpoint.empty import empty_model, meta_model
from bwla_compiler.checkpoint.files import file_sha256, write_json, writing
from bwla_compiler.checkpoint.source import DAMAGED, INDEX, SourceWeights
from bwla_compiler.checkpoint.streamed import StreamedWeights
from bwla_compiler.checkpoint.work import WorkFolder
from bwla_compiler.errors import CheckpointError, RecipeError, first_line
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.memory import release, told_of_shortage
from bwla_compiler.recipe import Recipe, Tuning
from bwla_compiler.runtime.kv_cache import check_cache_bits

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Sampler = Callable[[], Tensor]
"""Samples calibration tokens from the float model as a whole."""

CALIBRATION = "calibration.safetensors"
SHORTAGE = (
    "give --spill, a recipe without data (rtn) or a machine with more, and start again: with the same recipe it goes "
    "on where it stopped"
)


@dataclass(frozen=True)
class Job:
    """What is to be done: folder of the float model, recipe, calibration (see `api.quantize_to`), tokenizer, seed.

    spill: keep activations in files. sampler: of calibration = "self". beside: texts of files that stand beside the
    weights, by name, made of the report.
    """

    folder: Path
    out: Path
    recipe: Recipe
    calibration: str | Path | Sequence[str] | Tensor = "self"
    tokenizer: Any = None
    seed: int = 0
    spill: bool = False
    sampler: Sampler | None = None
    beside: Callable[[QuantizeReport], Mapping[str, str]] | None = None


def quantize_folder(
    job: Job, *, progress: Progress | None = None, on_block: Callable[[BlockReport], None] | None = None
) -> QuantizeReport:
    """Do the job, or what an earlier run has left of it, and return the report.

    Raises CheckpointError, WeightError, RecipeError, CalibrationError, CaptureError, PlanError, OutOfMemory,
    and CacheError where the recipe asks for a cache that the model cannot have.
    """
    if job.recipe.simulated:
        raise RecipeError(
            f"recipe {job.recipe.name}: its weights are not packed, so they cannot be saved; give another recipe"
        )
    with told_of_shortage(str(job.folder), remedy=SHORTAGE):
        return _quantized(job, progress, on_block)


def _quantized(job: Job, progress: Progress | None, on_block: Callable[[BlockReport], None] | None) -> QuantizeReport:
    model = _empty(job.folder)
    check_cache_bits(model, job.recipe.cache.bits)
    source = SourceWeights(job.folder, model)
    generation = _generation_config(job.folder)
    with WorkFolder(job.out, _facts(job, source, progress)) as work, _same_threads(work):
        weights = StreamedWeights(model, source, work, *_tuning(job, model, work))
        report = quantize_model(
            model,
            job.recipe,
            _tokens(job, model, work, progress),
            plan=_plan(model),
            seed=job.seed,
            progress=progress,
            weights=weights,
            keep=Spill(work.path) if job.spill else None,
            on_block=on_block,
        )
        hf.attach(model, recipe=report.recipe, plan=report.plan, bits=report.bits)
        _publish(job, model, generation, weights, work, {} if job.beside is None else job.beside(report))
    return report


def _generation_config(folder: Path) -> GenerationConfig | None:
    """Return how a folder's model generates, None where it does not say. Raises CheckpointError where it is damaged."""
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        path = folder / "generation_config.json"
        raise CheckpointError(f"{path}: is damaged; copy or download it again, or remove it") from error


def float_bytes(folder: Path) -> int:
    """Return the bytes that a folder's model takes as float32. Raises CheckpointError as quantize_folder does."""
    return 4 * sum(p.numel() for p in _empty(folder).parameters())


def _empty(folder: Path) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(f"{folder}: is quantized already; give the float model")
        return empty_model(config)
    except DAMAGED as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder}: its config does not describe a causal LM: {first_line(error)}. Give a model folder or a hub id"
        ) from error


def _plan(model: nn.Module) -> Plan:
    """Return the plan; what making it took, some MB a layer in graphs that refer to themselves, is given back."""
    plan = make_plan(meta_model(model.config))
    gc.collect()
    release()
    return plan


def _facts(job: Job, source: SourceWeights, progress: Progress | None) -> dict[str, Any]:
    """Return what a run depends on; a run that goes on must have the same."""
    shards, hashes = sorted(set(source.files.values())), []
    for n_read, path in enumerate(shards, start=1):
        hashes.append([path.name, file_sha256(path)])
        if progress is not None:
            progress("reading weights", n_read, len(shards))
    return {
        "recipe": job.recipe.to_dict(),
        "seed": job.seed,
        "calibration": _calibration_fact(job) if job.recipe.needs_calibration else None,
        "model": [file_sha256(job.folder / "config.json"), *hashes],
    }


def _calibration_fact(job: Job) -> str:
    given = job.calibration
    if isinstance(given, Tensor):
        return hashlib.sha256(given.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(given, (str, Path)):
        path = Path(given)
        return file_sha256(path) if path.is_file() else str(given)
    return hashlib.sha256("\0".join(map(str, given)).encode()).hexdigest()


def _tuning(job: Job, model: nn.Module, work: WorkFolder) -> tuple[Tuning, str]:
    """Return the tuning that there is memory for, or was when this run was begun, and what was changed for that."""
    tuning, change = affordable(job.recipe.tuning, model)
    found = work.state.setdefault("tuning", {"fields": dataclasses.asdict(tuning), "change": change})
    return Tuning(**found["fields"]), found["change"]


@contextlib.contextmanager
def _same_threads(work: WorkFolder) -> Iterator[None]:
    """Compute with as many threads as the run was begun with: sums of another order round otherwise."""
    before = torch.get_num_threads()
    wanted = work.state.setdefault("threads", before)
    try:
        torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)


def _tokens(job: Job, model: nn.Module, work: WorkFolder, progress: Progress | None) -> Tensor | None:
    """Return the calibration tokens, those of the first run where this one goes on."""
    recipe = job.recipe
    if not recipe.needs_calibration:
        return None
    path = work.path / CALIBRATION
    if path.is_file() and work.state["calibration"] == file_sha256(path):
        return load_file(path)["tokens"]
    given: Any = job.calibration
    if isinstance(given, str) and given == "self" and job.sampler is not None:
        given = job.sampler()
    tokens = token_sources.calibration_tokens(
        given,
        model=model,
        tokenizer=job.tokenizer,
        sequences=recipe.calibration.sequences,
        length=recipe.calibration.length,
        seed=job.seed,
        progress=progress,
    )
    if tokens is not None:
        work.state["calibration"] = work.write(CALIBRATION, {"tokens": tokens})
        work.save()
    return tokens


def _publish(
    job: Job,
    model: nn.Module,
    generation: GenerationConfig | None,
    weights: StreamedWeights,
    work: WorkFolder,
    beside: Mapping[str, str],
) -> None:
    """Write what stands beside the shards, see that all of it can be read again, and give the folder its name."""
    files, n_bytes = weights.write()
    with writing(work.path):
        write_json(work.path / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": files})
        hf.save_config(model, work.path)
        if generation is not None:
            generation.save_pretrained(work.path)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(work.path)
        for name, text in beside.items():
            (work.path / name).write_text(text, "utf-8")
    hf.packed_skeleton(work.path, check=True)
    others = {p.name for p in work.path.iterdir() if p.is_file() and not p.name.startswith(".")}
    own = {name for name in others if name.startswith("untuned-") or name == CALIBRATION}
    work.publish(others - own)
