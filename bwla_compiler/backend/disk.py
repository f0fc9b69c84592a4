"""What is kept of raw models on disk, by the hash of all that it depends on: packed weights, and plans of graphs."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bwla_compiler.backend.graph_key import code_version, tensor_bytes
from bwla_compiler.backend.options import Options
from bwla_compiler.backend.twin import twin
from bwla_compiler.errors import BwlaError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.skeleton import build_skeleton, describe, packed_modules
from bwla_compiler.settings import settings
from bwla_compiler.tokens import device_of

log = logging.getLogger(__name__)


def pack_key(model: nn.Module, plan: Plan, recipe: Recipe, options: Options) -> str:
    """Return the hash of a model's weights and structure, plan, recipe, calibration, seed and this version."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    calibration = calibration_key(options.calibration)
    rest = [code_version(), str(model), plan.to_json(), recipe.to_dict(), calibration, options.seed]
    digest.update(json.dumps(rest, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def calibration_key(calibration: str | Tensor) -> str:
    """Return what tells one calibration from another: its name, or the hash of its tokens."""
    if not isinstance(calibration, Tensor):
        return calibration
    return f"tokens {list(calibration.shape)} {hashlib.blake2b(tensor_bytes(calibration), digest_size=20).hexdigest()}"


def _path(key: str) -> Path:
    return settings().cache / "packs" / f"{key}.safetensors"


def write_whole(path: Path, write: Callable[[str], object], *, what: str) -> None:
    """Have a file written beside `path`, then put in its place; where that fails the run goes on, with a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        os.close(handle)
        try:
            write(part)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("%s are not kept for the next process: %s cannot be written (%s)", what, path, error)


@dataclass(frozen=True)
class Verdict:
    """What planning found for a graph: the model's plan, and why the graph forbids its folds, "" where it does not."""

    plan: Plan
    reason: str


def save_verdict(key: str, verdict: Verdict) -> None:
    """Write a verdict; where that fails the run goes on, with a warning."""
    text = json.dumps({"plan": verdict.plan.to_json(), "reason": verdict.reason})
    write_whole(_verdict_path(key), lambda part: Path(part).write_text(text, "utf-8"), what="plans")


def load_verdict(key: str) -> Verdict | None:
    """Return the verdict that was saved under this key, None where there is none; a damaged file is removed."""
    path = _verdict_path(key)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        return Verdict(Plan.from_json(found["plan"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError, BwlaError) as error:
        log.warning("%s is damaged and is made anew: %s", path, error)
        path.unlink(missing_ok=True)
        return None


def _verdict_path(key: str) -> Path:
    return settings().cache / "plans" / f"{key}.json"


def save_pack(key: str, quantized: nn.Module) -> None:
    """Write a quantized copy; where that fails the run goes on, with a warning."""
    packed = packed_modules(quantized)
    modules = json.dumps({name: describe(m, packed) for name, m in packed.items()})
    saved = quantized.state_dict()  # signs in the canonical layout, wherever they are
    named = (*quantized.named_parameters(), *quantized.named_buffers())
    tensors = _apart((name, saved.get(name, tensor)) for name, tensor in named)
    write_whole(
        _path(key),
        lambda part: safetensors.torch.save_file(tensors, part, metadata={"modules": modules}),
        what="packed weights",
    )


def _apart(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors that share no storage, as safetensors asks: views of one tensor are copied."""
    storages: set[int] = set()
    apart = {}
    for name, tensor in named:
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.detach().clone() if address in storages else tensor.detach().contiguous()
        storages.add(address)
    return apart


def load_pack(key: str, model: nn.Module) -> nn.Module | None:
    """Return the quantized copy that was saved under this key, on the model's device; None where there is none.

    A file that does not load is removed, with a warning, and made anew.
    """
    path = _path(key)
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            modules = json.loads(file.metadata()["modules"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _assembled(model, modules, tensors)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        log.warning("%s is damaged and is made anew: %s", path, error)
        path.unlink(missing_ok=True)
        return None


def _assembled(model: nn.Module, modules: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the model's structure with these modules and tensors in it."""
    quantized = twin(model)
    with torch.device(device_of(model)):
        skeleton = build_skeleton(modules)
    for name, module in skeleton.items():
        replace_module(quantized, name, module)
    wanted = {n for n, _ in (*quantized.named_parameters(), *quantized.named_buffers())}
    if wanted != set(tensors):
        raise ValueError(f"its tensors are not those of the model: {sorted(wanted.symmetric_difference(tensors))[:3]}")
    for name, tensor in tensors.items():
        _put(quantized, name, tensor)
    return quantized.eval()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    if tuple(old.shape) != tuple(tensor.shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(old.shape)}")
    tensor = tensor.to(old.device)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)
