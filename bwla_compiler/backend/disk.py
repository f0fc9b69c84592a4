"""Packed weights of raw models on disk, by the hash of everything that they depend on."""

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import bwla_compiler
from bwla_compiler.backend.options import Options
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.modules import Int8Embedding, Int8Linear, PackedLinear, TiedHead
from bwla_compiler.runtime.skeleton import build_skeleton, describe
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)
_PACKED = (PackedLinear, PackedExperts, Int8Linear, Int8Embedding, TiedHead)


def pack_key(model: nn.Module, plan: Plan, recipe: Recipe, options: Options) -> str:
    """Return the hash of a model's weights and structure, plan, recipe, calibration, seed and this version."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    calibration = calibration_key(options.calibration)
    rest = [bwla_compiler.__version__, str(model), plan.to_json(), recipe.to_dict(), calibration, options.seed]
    digest.update(json.dumps(rest, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def calibration_key(calibration: str | Tensor) -> str:
    """Return what tells one calibration from another: its name, or the hash of its tokens."""
    if not isinstance(calibration, Tensor):
        return calibration
    return f"tokens {list(calibration.shape)} {hashlib.blake2b(_bytes(calibration), digest_size=20).hexdigest()}"


def _bytes(tensor: Tensor) -> Any:
    """Return a view of a tensor's bytes in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


def _path(key: str) -> Path:
    return settings().cache / "packs" / f"{key}.safetensors"


def save_pack(key: str, quantized: nn.Module) -> None:
    """Write a quantized copy; where that fails the run goes on, with a warning."""
    packed = {name: m for name, m in quantized.named_modules() if isinstance(m, _PACKED)}
    modules = json.dumps({name: describe(m, packed) for name, m in packed.items()})
    tensors = _apart((*quantized.named_parameters(), *quantized.named_buffers()))
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        os.close(handle)
        try:
            safetensors.torch.save_file(tensors, part, metadata={"modules": modules})
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("packed weights are not kept for the next process: %s cannot be written (%s)", path, error)


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
    # the copy shares the model's tensors until they are replaced: no second set of float weights
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    quantized = copy.deepcopy(model, shared)
    for name, module in build_skeleton(modules).items():
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
