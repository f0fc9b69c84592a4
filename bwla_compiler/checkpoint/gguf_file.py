"""A GGUF file of a model: its figures, its tokenizer and its tensors, written whole or not at all."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwla_compiler.checkpoint.files import sync_folder, writing
from bwla_compiler.checkpoint.gguf_family import Family, figures
from bwla_compiler.checkpoint.gguf_tokens import read_vocabulary
from bwla_compiler.errors import CheckpointError

SUFFIX = ".gguf"

Tensors = dict[str, tuple[Any, str | None]]
"""Values and ggml type (None: as numpy has it) of each tensor by its name there."""


@dataclass(frozen=True)
class About:
    """What a file says of itself: a description, and llama.cpp's name of the type that most of it has."""

    description: str
    kind: str


def gguf_package() -> Any:
    """Return the package gguf. Raises CheckpointError where it is not installed, or too old."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "the GGUF export needs the package gguf: pip install 'bwla-compiler[gguf]', or use --to dense"
        ) from error
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise CheckpointError("the package gguf is too old for Q1_0: pip install 'gguf>=0.19'")
    return gguf


def write_gguf(
    path: Path, tensors: Tensors, *, config: Any, family: Family, about: About, tokenizer: Any = None
) -> Path:
    """Write a file of these tensors, whole or not at all, and return its path.

    path: the file, or a folder for `model.gguf`. config: the model's. tokenizer: written too where there is one.
    Raises CheckpointError for a tokenizer that cannot be told, and where there is no room.
    """
    gguf = gguf_package()
    file = path if path.suffix == SUFFIX else path / f"model{SUFFIX}"
    beside = file.with_name(f".{file.name}.tmp")
    room = sum(values.nbytes for values, _ in tensors.values())
    with writing(file, room=room):
        file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(beside, family.architecture)
    _describe(writer, gguf, config, family, about)
    _tell_tokens(writer, tokenizer, size=config.vocab_size)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    with writing(file, room=room):
        _write(writer, beside, file)
    return file


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


def _describe(writer: Any, gguf: Any, config: Any, family: Family, about: About) -> None:
    writer.add_name(getattr(config, "name_or_path", "") or config.model_type)
    writer.add_description(about.description)
    writer.add_file_type(gguf.LlamaFileType[about.kind])
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
