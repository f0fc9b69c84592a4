"""The bytes of a packed folder by kind of tensor: what formulas claim, what its modules take, what is on the disk."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bwla_compiler.checkpoint.files import header_bytes, tensor_sizes
from bwla_compiler.checkpoint.guards import guard_names
from bwla_compiler.checkpoint.hf import packed_skeleton
from bwla_compiler.checkpoint.source import shard_of
from bwla_compiler.errors import CheckpointError
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.runtime.bits import measure_bits
from bwla_compiler.runtime.modules import (
    EndEmbedding,
    EndLinear,
    OnlineTransform,
    PackedExperts,
    PackedLinear,
    TiedHead,
)
from bwla_compiler.runtime.skeleton import packed_modules

HEADERS = "file headers"
FLOATS = "left in floating point"
_KINDS = {
    "signs": "signs",
    "row_scale": "row scales",
    "column_scale": "column scales",
    "low_rank_in": "low-rank pairs",
    "low_rank_out": "low-rank pairs",
    "low_rank_scale": "low-rank pairs",
    "codes": "codes",
    "gain": "embeddings' own scales",
    "bias": "biases",
}


@dataclass(frozen=True)
class Entry:
    """Bytes of one kind of tensor. claimed: by formula, 0 where there is none to hold it to; counted: by the modules
    that the config describes; stored: in the files.
    """

    kind: str
    claimed: int
    counted: int
    stored: int


@dataclass(frozen=True)
class Ledger:
    """Entries whose stored bytes add up to those of all files. bits: counted; claimed_bits: what the config says."""

    entries: tuple[Entry, ...]
    file_bytes: int
    bits: Bits
    claimed_bits: Mapping[str, Any]


def ledger(folder: Path) -> Ledger:
    """Return the ledger of a packed model's folder. Raises CheckpointError where it is none, or where bytes differ."""
    model = packed_skeleton(folder)
    modules = packed_modules(model)
    guards = guard_names(modules)
    files = sorted(set(shard_of(folder).values()))
    stored: Counter[str] = Counter()
    for path in files:
        stored[HEADERS] += header_bytes(path)
        for name, n_bytes in tensor_sizes(path).items():
            stored["guards" if name in guards else _kind(name, modules)] += n_bytes
    counted: Counter[str] = Counter({HEADERS: stored[HEADERS], "guards": len(guards)})
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            counted[_kind(name, modules)] += tensor.numel() * tensor.element_size()
    claimed = _claimed(modules)
    entries = tuple(Entry(k, claimed[k], counted[k], stored[k]) for k in sorted({*stored, *counted}, key=_order))
    total = sum(path.stat().st_size for path in files)
    if sum(e.stored for e in entries) != total:
        raise CheckpointError(f"{folder}: its tensors and headers do not add up to its {total} bytes: it is damaged")
    return Ledger(entries, total, measure_bits(model), model.config.quantization_config.true_bits)


def _order(kind: str) -> tuple[int, str]:
    """Signs first, then what stands beside them, headers last."""
    known = [*dict.fromkeys(_KINDS.values()), "transforms", FLOATS, "guards", HEADERS]
    return (known.index(kind) if kind in known else len(known), kind)


def _kind(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the kind of a saved tensor by its name and the packed module that it belongs to."""
    owner, _, leaf = name.rpartition(".")
    if owner.endswith(".transform") and owner.removesuffix(".transform") in modules:
        return "transforms"
    if owner not in modules:
        return FLOATS
    return _KINDS[leaf.removesuffix("_exponent")]


def _claimed(modules: Mapping[str, nn.Module]) -> Counter[str]:
    """Return bytes by formula: a bit a sign, 16 bits a scale or factor, 8 bits an entry of a pair or a code."""
    found: Counter[str] = Counter()
    for module in modules.values():
        if isinstance(module, (PackedLinear, PackedExperts)):
            spec, times = module.spec, module.n_experts if isinstance(module, PackedExperts) else 1
            n, m = spec.in_features, sum(spec.out_features)
            groups = -(-n // spec.group_size) if spec.scale_kind == "group" else 1
            found["signs"] += times * spec.planes * m * n // 8
            found["row scales"] += times * 2 * spec.planes * m * groups
            found["column scales"] += times * 2 * n * (spec.scale_kind == "row+column")
            found["low-rank pairs"] += times * spec.rank * (n + m + 2)
        elif isinstance(module, TiedHead):
            found["column scales"] += 2 * module.in_features * (getattr(module, "column_scale") is not None)  # noqa: B009
        else:
            assert isinstance(module, (EndLinear, EndEmbedding))
            if isinstance(module, EndLinear):
                rows, columns = module.out_features, module.in_features
            else:
                rows, columns = module.num_embeddings, module.embedding_dim
            found["codes"] += rows * module.coding.code_bytes(columns)
            found["row scales"] += 2 * rows * module.coding.scales(columns)
        transform = getattr(module, "transform", None)
        if isinstance(transform, OnlineTransform):
            t = transform.spec
            n = int(getattr(module, "in_features", 0) or getattr(module, "embedding_dim", 0))
            found["transforms"] += 2 * (t.scaled * n + t.numbers)
    return found
