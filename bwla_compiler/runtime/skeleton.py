"""Descriptions of packed modules as plain data, and empty modules made from them: what a checkpoint needs to load."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from bwla_compiler.errors import CheckpointError
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.halves import register_empty_half
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, OnlineTransform, PackedLinear, TiedHead
from bwla_compiler.spec import INT8_ROWS, Coding, LinearSpec, TransformSpec

FORMAT_VERSION = 1
"""Of the packed format that docs/format.md specifies; raised by whatever an older reader would misread."""

PACKED = (PackedLinear, PackedExperts, EndLinear, EndEmbedding, TiedHead)


def packed_modules(model: nn.Module, *, within: str = "") -> dict[str, nn.Module]:
    """Return the packed modules of a model by name, at or under a name alone where one is given."""
    start = f"{within}." if within else ""
    return {n: m for n, m in model.named_modules() if isinstance(m, PACKED) and f"{n}.".startswith(start)}


def describe(module: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return a packed module's shape and format as JSON data; modules: all packed ones, to name a tied embedding."""
    transform = getattr(module, "transform", None)
    entry: dict[str, Any] = {"kind": _kind(module), "transform": _transform(transform)}
    match module:
        case PackedLinear():
            entry["spec"] = dataclasses.asdict(module.spec)
        case PackedExperts():
            entry |= {"spec": dataclasses.asdict(module.spec), "experts": module.n_experts}
        case EndLinear():
            entry |= {"in": module.in_features, "out": module.out_features, **_ends(module), **_group(module)}
        case EndEmbedding():
            entry |= {"rows": module.num_embeddings, "width": module.embedding_dim, "padding": module.padding_idx}
            entry |= {"gain": module.gain is not None, **_group(module)}
        case TiedHead():
            entry |= {"embedding": next(n for n, m in modules.items() if m is module.embedding), **_ends(module)}
        case _:
            raise CheckpointError(f"a {type(module).__name__} has no packed form")
    return entry


def _kind(module: nn.Module) -> str:
    """Return the name that the format has for a module's kind: its class's, and of ends the bits of a code too."""
    match module:
        case EndLinear():
            return f"Int{module.coding.bits}Linear"
        case EndEmbedding():
            return f"Int{module.coding.bits}Embedding"
    return type(module).__name__


def _group(module: EndLinear | EndEmbedding) -> dict[str, int]:
    return {"group_size": module.coding.group_size} if module.coding.bits == 4 else {}


def _ends(module: EndLinear | TiedHead) -> dict[str, bool]:
    return {"bias": module.bias is not None, "column_scale": getattr(module, "column_scale", None) is not None}


def _transform(transform: OnlineTransform | None) -> dict[str, Any] | None:
    return None if transform is None else dataclasses.asdict(transform.spec)


def build_skeleton(described: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Return empty modules by name, on the default device (meta while a checkpoint loads).

    Raises CheckpointError, naming the module, where a description is not understood.
    """
    built: dict[str, nn.Module] = {}
    for name, entry in sorted(described.items(), key=lambda item: item[1].get("kind") == "TiedHead"):
        try:
            built[name] = _build(entry, built)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"quantization_config.modules[{name!r}] is damaged: {type(error).__name__} {error}"
            ) from error
    return built


def _build(entry: Mapping[str, Any], built: Mapping[str, nn.Module]) -> nn.Module:
    transform = None if entry["transform"] is None else OnlineTransform(TransformSpec(**entry["transform"]))
    match entry["kind"]:
        case "PackedLinear":
            return PackedLinear(_spec(entry["spec"]))
        case "PackedExperts":
            return PackedExperts(_spec(entry["spec"]), entry["experts"])
        case "Int8Linear" | "Int4Linear":
            return EndLinear(
                entry["in"],
                entry["out"],
                bias=entry["bias"],
                column_scale=entry["column_scale"],
                transform=transform,
                coding=_coding(entry),
            )
        case "Int8Embedding" | "Int4Embedding":
            size, gain, coding = (entry["rows"], entry["width"]), entry.get("gain", False), _coding(entry)
            return EndEmbedding(*size, padding_idx=entry["padding"], transform=transform, gain=gain, coding=coding)
        case "TiedHead":
            return _tied_head(entry, built, transform)
        case kind:
            raise ValueError(f"kind {kind!r} is not known")


def _coding(entry: Mapping[str, Any]) -> Coding:
    return Coding(4, entry["group_size"]) if entry["kind"].startswith("Int4") else INT8_ROWS


def _spec(entry: Mapping[str, Any]) -> LinearSpec:
    transform, out_features = TransformSpec(**entry["transform"]), tuple(entry["out_features"])
    return LinearSpec(**{**entry, "out_features": out_features, "transform": transform})


def _tied_head(entry: Mapping[str, Any], built: Mapping[str, nn.Module], transform: OnlineTransform | None) -> TiedHead:
    embedding = built[entry["embedding"]]
    assert isinstance(embedding, EndEmbedding)
    head = TiedHead(embedding, transform=transform)
    width = (head.in_features,) if entry["column_scale"] else None
    register_empty_half(head, "column_scale", width, device=None)
    if entry["bias"]:
        head.bias = embedding.codes.new_empty(head.out_features, dtype=embedding.typed.dtype)
    return head
