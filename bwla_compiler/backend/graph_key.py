"""What tells one graph of torch.compile from another across processes: everything that planning it depends on."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import bwla_compiler
from bwla_compiler.backend.owner import Owner
from bwla_compiler.recipe import Recipe

SMALL = 1 << 16
"""Entries of a tensor whose values count: the analysis reads gains, and of matrices only shapes."""


def graph_key(gm: GraphModule, inputs: Sequence[Any], owner: Owner, recipe: Recipe) -> str:
    """Return the hash of a graph, its inputs' shapes, its model's structure and gains, the recipe and all versions.

    gm, inputs: as Dynamo passes them to a backend. Where two keys are equal, planning gives the same.
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in (
        *_versions(),
        str(torch.is_autocast_enabled("cpu")),
        repr(recipe.to_dict()),
        *_code(gm),
        *(f"{names} {_shaped(value)}" for names, value in zip(_names(gm, owner), inputs, strict=True)),
        str(owner.module),
    ):
        digest.update(part.encode() + b"\0")
    state = (*owner.module.named_parameters(remove_duplicate=False), *owner.module.named_buffers())
    constants = [(name, value) for name, value in vars(gm).items() if isinstance(value, Tensor)]
    for name, tensor in (*state, *gm.named_buffers(), *constants):
        digest.update(f"{name} {_shaped(tensor)}".encode())
        digest.update(tensor_bytes(tensor) if _readable(tensor) else b"")
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """Return a view of a tensor's bytes in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


@cache
def code_version() -> str:
    """Return the version and a hash of the package's own files: an edited checkout does not read what another kept."""
    digest = hashlib.blake2b(digest_size=20)
    root = Path(bwla_compiler.__file__).parent
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.toml"))):
        digest.update(path.read_bytes())
    return f"{bwla_compiler.__version__} {digest.hexdigest()}"


def _versions() -> tuple[str, ...]:
    return code_version(), str(torch.__version__), transformers.__version__


def _code(gm: GraphModule) -> Iterable[str]:
    """Return the text of a graph and of the graphs inside it."""
    return (f"{name}: {m.code}" for name, m in gm.named_modules() if isinstance(m, GraphModule))


def _names(gm: GraphModule, owner: Owner) -> Iterable[tuple[str, ...]]:
    return (owner.names.get(node, ()) for node in gm.graph.nodes if node.op == "placeholder")


def _shaped(value: Any) -> str:
    """Return what a trace knows of a value: its type, and a tensor's dtype, device and sizes."""
    if isinstance(value, Tensor):
        sizes = [_size(s) for s in (*value.shape, *value.stride())]
        return f"{isinstance(value, nn.Parameter)} {value.dtype} {value.device} {value.requires_grad} {sizes}"
    return f"{type(value).__name__} {_size(value)}"


def _size(value: Any) -> str:
    return f"{value}={value.node.hint}" if isinstance(value, torch.SymInt) else repr(value)


def _readable(tensor: Tensor) -> bool:
    """Whether a tensor's values count, and are there: free_weights=True releases those of matrices."""
    return tensor.numel() <= SMALL and tensor.device.type != "meta" and tensor.untyped_storage().nbytes() > 0
