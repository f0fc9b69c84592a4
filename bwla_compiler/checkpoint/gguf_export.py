"""Export as GGUF, which llama.cpp reads: a fully folded model of one binary plane, its values unchanged.

Signs go as Q1_0, int8 ends as Q8_0, int4 ones as Q4_0, vectors as F32, matrices that were left in floats as F16.
Activations are rounded by llama.cpp in its own way (8 bits, 32 channels a scale), not by the recipe's.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.checkpoint.files import sync_folder, writing
from bwla_compiler.checkpoint.gguf_blocks import Blocks, code_blocks, nibble_blocks, sign_blocks
from bwla_compiler.checkpoint.gguf_family import Family, family_of, figures, rotary_factors
from bwla_compiler.checkpoint.gguf_tokens import read_vocabulary
from bwla_compiler.errors import CheckpointError
from bwla_compiler.numerics.nibbles import unpack_nibbles
from bwla_compiler.runtime.halves import read_half
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, TiedHead
from bwla_compiler.runtime.skeleton import packed_modules

SUFFIX = ".gguf"

Tensors = dict[str, tuple[Any, str | None]]
"""Values and ggml type (None: as numpy has it) of each tensor by its name there."""


def export_gguf(model: Any, path: Path, *, tokenizer: Any = None) -> Path:
    """Write a packed model as one GGUF file, whole or not at all, and return its path; the model is not changed.

    path: the file, or a folder for `model.gguf`. tokenizer: written too where there is one. Raises CheckpointError for
    what GGUF cannot hold: online transforms, low-rank pairs, several planes, column scales, other families.
    """
    gguf = _package()
    if not packed_modules(model):
        raise CheckpointError(f"{type(model).__name__} is not packed: llama.cpp's own converter takes it")
    family = family_of(model)
    tensors = _tensors(model, family)
    file = path if path.suffix == SUFFIX else path / f"model{SUFFIX}"
    beside = file.with_name(f".{file.name}.tmp")
    with writing(file, room=sum(values.nbytes for values, _ in tensors.values())):
        file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(beside, family.architecture)
    _describe(writer, gguf, model, family)
    _tell_tokens(writer, tokenizer, size=model.config.vocab_size)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    with writing(file, room=sum(values.nbytes for values, _ in tensors.values())):
        _write(writer, beside, file)
    return file


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "the GGUF export needs the package gguf: pip install 'bwla-compiler[gguf]', or use --to dense"
        ) from error
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise CheckpointError("the package gguf is too old for Q1_0: pip install 'gguf>=0.19'")
    return gguf


def _write(writer: Any, beside: Path, file: Path) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
        writer.close()
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, file)
        sync_folder(file.parent)
    finally:
        beside.unlink(missing_ok=True)


def _describe(writer: Any, gguf: Any, model: Any, family: Family) -> None:
    config, recipe = model.config, model.config.quantization_config.recipe.get("name", "")
    bits = model.config.quantization_config.true_bits.get("linears", 0.0)
    writer.add_name(getattr(config, "name_or_path", "") or config.model_type)
    writer.add_description(f"quantized by bwla-compiler, recipe {recipe}, {bits:.3f} bits a weight of the linears")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q1_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in figures(config, vocabulary=config.vocab_size, head_width=width).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family.architecture}.{key}", value)


def _tell_tokens(writer: Any, tokenizer: Any, *, size: int) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    found = read_vocabulary(tokenizer, size=size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types(list(found.types))
    writer.add_token_merges(list(found.merges))
    for role, number in found.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
    writer.add_add_bos_token(found.begins)
    if found.template:
        writer.add_chat_template(found.template)


def _tensors(model: Any, family: Family) -> Tensors:
    """Return all tensors. Raises CheckpointError for what has no place."""
    found: Tensors = {}
    packed = packed_modules(model)
    for name, module in model.named_modules():
        if name in packed:
            _packed(found, name, module, family, model.config)
        elif not any(name.startswith(f"{owner}.") for owner in packed):
            _floats(found, name, module, family, model)
    factors = rotary_factors(model, family)
    if factors is not None:
        found["rope_freqs.weight"] = (factors.numpy(), None)
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
        _add_bias(found, there, bias if order is None else bias[order], family, name)


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
        signs, rows = module.signs[0], scale[0]
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


def _add_bias(found: Tensors, there: str, bias: Tensor, family: Family, name: str) -> None:
    if there.rpartition(".")[2] not in family.biases:
        raise CheckpointError(f"{name}: has a bias, for which GGUF's {family.architecture} has no place")
    found[f"{there}.bias"] = (bias.float().cpu().numpy(), None)


def _floats(found: Tensors, name: str, module: nn.Module, family: Family, model: Any) -> None:
    """Add what a module holds itself in floats: norms' gains, and linears that were kept."""
    own: Mapping[str, Tensor] = {n: p.detach() for n, p in module._parameters.items() if p is not None}
    if not own:
        return
    there = family.name(name)
    if name == "lm_head" and own["weight"].data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return
    order = family.row_order(there.rpartition(".")[2], own["weight"].shape[0], model.config)
    values = {leaf: value if order is None else value[order] for leaf, value in own.items()}
    dtype = torch.float16 if values["weight"].ndim == 2 else torch.float32
    found[f"{there}.weight"] = (values["weight"].to(dtype).cpu().contiguous().numpy(), None)
    if "bias" in values:
        _add_bias(found, there, values["bias"], family, name)
