"""Export as GGUF, which llama.cpp reads: a fully folded model of one binary plane, its values unchanged.

Signs go as Q1_0, int8 ends as Q8_0, int4 ones as Q4_0, vectors as F32, matrices that were left in floats as F16.
Activations are rounded by llama.cpp in its own way (8 bits, 32 channels a scale), not by the recipe's.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bwla_compiler.checkpoint.gguf_blocks import Blocks, code_blocks, nibble_blocks, sign_blocks
from bwla_compiler.checkpoint.gguf_family import Family, family_of
from bwla_compiler.checkpoint.gguf_file import About, Tensors, gguf_package, write_gguf
from bwla_compiler.checkpoint.gguf_floats import add_bias, add_factors, add_floats
from bwla_compiler.errors import CheckpointError
from bwla_compiler.numerics.nibbles import unpack_nibbles
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, TiedHead
from bwla_compiler.runtime.skeleton import packed_modules


def export_gguf(model: Any, path: Path, *, tokenizer: Any = None) -> Path:
    """Write a packed model as one GGUF file, whole or not at all, and return its path; the model is not changed.

    path: the file, or a folder for `model.gguf`. tokenizer: written too where there is one. Raises CheckpointError for
    what GGUF cannot hold: online transforms, low-rank pairs, several planes, column scales, other families.
    """
    gguf_package()
    if not packed_modules(model):
        raise CheckpointError(f"{type(model).__name__} is not packed: llama.cpp's own converter takes it")
    family = family_of(model)
    found = model.config.quantization_config
    recipe, bits = found.recipe.get("name", ""), found.true_bits.get("linears", 0.0)
    about = About(
        f"quantized by bwla-compiler, recipe {recipe}, {bits:.3f} bits a weight of the linears", "MOSTLY_Q1_0"
    )
    return write_gguf(
        path, _tensors(model, family), config=model.config, family=family, about=about, tokenizer=tokenizer
    )


def _tensors(model: Any, family: Family) -> Tensors:
    """Return all tensors. Raises CheckpointError for what has no place."""
    found: Tensors = {}
    packed = packed_modules(model)
    for name, module in model.named_modules():
        if name in packed:
            _packed(found, name, module, family, model.config)
        elif not any(name.startswith(f"{owner}.") for owner in packed):
            add_floats(found, name, module, family=family, model=model)
    add_factors(found, model, family)
    return found


def _packed(found: Tensors, name: str, module: nn.Module, family: Family, config: Any) -> None:
    """Add a packed module. Raises CheckpointError, with the reason, where GGUF cannot hold it."""
    _refuse(name, module)
    there = family.name(name)
    part = there.rpartition(".")[2]
    if isinstance(module, TiedHead):  # llama.cpp takes the embedding where there is no head
        if _bias(module) is not None:
            raise CheckpointError(f"{name}: has a bias, for which GGUF's {family.architecture} has no place")
        return
    order = family.row_order(part, _rows(module), config)
    found[f"{there}.weight"] = _weight(name, module, order)
    bias = _bias(module)
    if bias is not None:
        add_bias(found, there, bias if order is None else bias[order], family=family, name=name)


def _refuse(name: str, module: nn.Module) -> None:
    """Raise CheckpointError, with the reason, where a packed module is more than signs or codes and their scales."""
    why = ""
    if getattr(module, "transform", None) is not None:
        tied = isinstance(module, (EndEmbedding, TiedHead))
        remedy = "quantize with --set tied=untie" if tied else "quantize with --recipe bwla-folded"
        why = f"its input is turned at run time; {remedy}"
    elif isinstance(module, PackedLinear):
        if module.rank:
            why = "has a low-rank pair; quantize with --recipe bwla-folded"
        elif module.planes > 1:
            why = f"has {module.planes} binary planes; quantize with --set weights.planes=1"
    elif not isinstance(module, (EndLinear, EndEmbedding, TiedHead)):
        why = f"a {type(module).__name__} has no GGUF form"
    if not why and not isinstance(module, EndEmbedding) and getattr(module, "column_scale", None) is not None:
        why = "has column scales; quantize with --recipe bwla-folded"
    if isinstance(module, EndEmbedding) and module.gain is not None:
        why = "multiplies its rows by a number of its own"
    if why:
        raise CheckpointError(f"{name}: {why}, or use --to dense")


def _rows(module: nn.Module) -> int:
    return int(module.num_embeddings if isinstance(module, EndEmbedding) else module.out_features)  # type: ignore[arg-type]


def _bias(module: nn.Module) -> Tensor | None:
    found: Tensor | None = getattr(module, "bias", None)
    return found


def _weight(name: str, module: nn.Module, order: Tensor | None) -> tuple[Blocks, str]:
    scale = read_half(module, "row_scale")
    assert scale is not None
    if isinstance(module, PackedLinear):
        signs, rows = module.canonical_signs()[0], scale[0]
        signs, rows = (signs, rows) if order is None else (signs[order], rows[order])
        if module.in_features % 8:
            raise CheckpointError(f"{name}: has {module.in_features} inputs, and GGUF's Q1_0 takes multiples of 128")
        return sign_blocks(signs, rows, name=name), "Q1_0"
    assert isinstance(module, (EndLinear, EndEmbedding))
    if module.coding.bits == 4:
        columns = int(module.in_features if isinstance(module, EndLinear) else module.embedding_dim)
        codes, size = unpack_nibbles(module.codes, columns), module.coding.group_size
        return nibble_blocks(codes, scale, group_size=size, name=name), "Q4_0"
    return code_blocks(module.codes, scale, name=name), "Q8_0"
