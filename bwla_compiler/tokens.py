"""Token batches: int64 [n, length] tensors of ids, from texts, files, tensors, chance, or the model itself."""

import json
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.errors import CalibrationError

log = logging.getLogger(__name__)

TokenBatches = Tensor  # [n, length] int64
Progress = Callable[[str, int, int], None]
Source = str | Path | Tensor | Sequence[str] | Sequence[Tensor]

SHORTEST = 2  # tokens: one to read and one to predict
ID_SUFFIXES = (".pt", ".npy", ".safetensors")


def calibration_tokens(
    source: Source,
    *,
    model: nn.Module,
    tokenizer: Any = None,
    sequences: int,
    length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> TokenBatches | None:
    """Return the tokens that `source` stands for, [at most sequences, length] int64, or None for "none".

    source: "self" (sampled from the model), "random", "none", a file (see `from_file`), a list of texts, or
    ids as a tensor or a list of tensors, whose own length then holds. Raises CalibrationError.
    """
    vocab_size = vocabulary(model)
    if isinstance(source, str) and source == "none":
        return None
    if isinstance(source, str) and source == "self":
        tokens = self_generated(model, sequences=sequences, length=length, seed=seed, progress=progress)
    elif isinstance(source, str) and source == "random":
        tokens = random_tokens(vocab_size, sequences=sequences, length=length, seed=seed)
    elif isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise CalibrationError(
                f'calibration "{source}" is neither "self", "random", "none" nor a file; correct the name'
            )
        tokens = from_file(source, tokenizer, length=length, limit=sequences)
    elif isinstance(source, Tensor):
        tokens = from_ids(source, length=length, limit=sequences)
    elif source and all(isinstance(part, Tensor) for part in source):
        tokens = from_ids(_joined(source), length=length, limit=sequences)
    else:
        tokens = from_texts([str(part) for part in source], tokenizer, length=length, limit=sequences)
    check(tokens, vocab_size=vocab_size)
    check_length(model, tokens.shape[1])
    return tokens


def check(tokens: Tensor, *, vocab_size: int) -> None:
    """Raise CalibrationError unless tokens are int64 [n >= 1, length >= 2] with ids in [0, vocab_size)."""
    if tokens.dtype != torch.int64:
        raise CalibrationError(f"tokens: dtype is {tokens.dtype}; give int64 ids")
    if tokens.ndim != 2:
        raise CalibrationError(f"tokens: shape is {list(tokens.shape)}; give [sequences, length]")
    if tokens.shape[0] == 0:
        raise CalibrationError("tokens: no sequence at all; give at least one")
    if tokens.shape[1] < SHORTEST:
        raise CalibrationError(f"tokens: sequences of length {tokens.shape[1]}; give at least {SHORTEST} tokens each")
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise CalibrationError(
            f"tokens: id {int(tokens[row, column])} at [{row}, {column}] is not in the model's vocabulary of "
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def check_length(model: nn.Module, length: int) -> None:
    """Raise CalibrationError for more tokens than a model has positions in a table; computed ones have no end."""
    most = longest(model)
    if most is None or length <= most:
        return
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and most <= module.num_embeddings <= most + 2  # OPT has two more
        if is_table and re.search(r"pos|wpe", name.rpartition(".")[2]):
            raise CalibrationError(f"sequences of {length} tokens are over the model's {most} positions; ask for less")


def from_texts(texts: Sequence[str], tokenizer: Any, *, length: int, limit: int | None = None) -> TokenBatches:
    """Return the texts as one stream, an end-of-text token after each, cut into at most `limit` rows of `length`.

    tokenizer: any of transformers. -> [n, length] int64; no padding. Raises CalibrationError where there is no
    tokenizer or the texts do not fill one row.
    """
    if tokenizer is None:
        raise CalibrationError("texts were given but no tokenizer; pass tokenizer=, or token ids in place of texts")
    end = [] if getattr(tokenizer, "eos_token_id", None) is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
        if limit is not None and len(ids) >= limit * length:
            break
    return _rows(torch.tensor(ids, dtype=torch.int64), length=length, limit=limit, where=f"{len(texts)} texts")


def from_ids(ids: Tensor, *, length: int, limit: int | None = None, where: str = "token ids") -> TokenBatches:
    """Return at most `limit` rows of ids as int64: rows [n, any length] as they are, a stream [n_tokens] cut.

    ids: any integer dtype. Raises CalibrationError for other dtypes and shapes, and for too short a stream.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{where}: dtype is {ids.dtype}; give integer token ids")
    if ids.ndim == 2:
        return ids[:limit].to(torch.int64)
    if ids.ndim == 1:
        return _rows(ids.to(torch.int64), length=length, limit=limit, where=where)
    raise CalibrationError(f"{where}: shape is {list(ids.shape)}; give [n_tokens] or [sequences, length]")


def from_file(path: str | Path, tokenizer: Any = None, *, length: int, limit: int | None = None) -> TokenBatches:
    """Return the tokens of a file: text, `.jsonl` with a "text" in each line, or ids in `.pt`, `.npy`, `.safetensors`.

    -> [n, length] int64 (ids stored as rows keep their own length). Raises CalibrationError.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"{path}: there is no such file; correct the name")
    if path.suffix in ID_SUFFIXES:
        return from_ids(_stored_ids(path), length=length, limit=limit, where=str(path))
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        named = ", ".join(ID_SUFFIXES)
        raise CalibrationError(f"{path}: is not UTF-8 text ({error.reason}); store ids as {named}") from error
    texts = _json_lines(path, text) if path.suffix == ".jsonl" else [text]
    try:
        return from_texts(texts, tokenizer, length=length, limit=limit)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error


def random_tokens(vocab_size: int, *, sequences: int, length: int, seed: int) -> TokenBatches:
    """Return ids drawn uniformly from the vocabulary, [sequences, length] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (sequences, length), generator=generator)


def longest(model: nn.Module) -> int | None:
    """Return how many positions a model has, None where its config sets no limit."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if most is not None and most > 0 else None  # XLNet's -1 stands for none


def self_generated(
    model: nn.Module,
    *,
    sequences: int,
    length: int,
    seed: int,
    batch: int = 32,
    progress: Progress | None = None,
) -> TokenBatches:
    """Return text sampled from the model at temperature 1 after one random token a sequence.

    -> [sequences, length] int64 on the CPU, without padding: an end-of-text token does not stop a sequence.
    model: a causal LM of transformers; its cache is used where it returns one. Raises CalibrationError where
    `length` exceeds the model's positions or the logits are not finite.
    """
    most = longest(model)
    if most is not None and length > most:
        raise CalibrationError(f"calibration length {length} is over the model's {most} positions; ask for less")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, vocabulary(model), (sequences, 1), generator=generator)
    parts: list[Tensor] = []
    with evaluating(model):
        for chunk in starts.split(batch):
            parts.append(_continue(model, chunk, length=length, generator=generator))
            if progress is not None:
                progress("sampling calibration tokens", sum(len(part) for part in parts), sequences)
    return torch.cat(parts)


def vocabulary(model: nn.Module) -> int:
    """Return the number of ids that the model's embedding knows. Raises CalibrationError where it has none."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text_config, "vocab_size", None)
    if size is None:
        raise CalibrationError(f"{type(model).__name__}: has no config.vocab_size; give a causal LM of transformers")
    return int(size)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer (a packed model may have no parameters)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, without gradients; afterwards each module has its own mode back.

    no_grad rather than inference mode: what a module builds and keeps in there must stay usable outside. Modules that
    are replaced meanwhile are not kept alive: their weights may be most of the memory.
    """
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for reference, training in modes:
            module = reference()
            if module is not None:
                module.training = training


def _continue(model: nn.Module, starts: Tensor, *, length: int, generator: torch.Generator) -> Tensor:
    """Return sampled continuations [n, length], read again from their start where the model's cache does not serve."""
    state = generator.get_state()
    try:
        return _sampled(model, starts, length=length, generator=generator, use_cache=True)
    except CalibrationError:
        raise
    except Exception as error:  # caches of other kinds than attention's fail in their own ways
        log.info("%s samples without its cache: %s", type(model).__name__, error)
        generator.set_state(state)
        return _sampled(model, starts, length=length, generator=generator, use_cache=False)


def _sampled(model: nn.Module, starts: Tensor, *, length: int, generator: torch.Generator, use_cache: bool) -> Tensor:
    tokens, cache, device = starts, None, device_of(model)
    while tokens.shape[1] < length:
        unread = tokens if cache is None else tokens[:, -1:]
        known: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=unread.to(device), use_cache=use_cache, **known)
        cache = getattr(output, "past_key_values", None) if use_cache else None
        chances = output.logits[:, -1].float().softmax(-1).cpu()  # sampled on the CPU: one result on all devices
        if not bool(chances.isfinite().all()):
            raise CalibrationError(f"{type(model).__name__}: logits are not finite; check the weights, or use texts")
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)), dim=1)
    return tokens[:, :length]


def _rows(stream: Tensor, *, length: int, limit: int | None, where: str) -> Tensor:
    if stream.numel() < length:
        raise CalibrationError(f"{where}: {stream.numel()} tokens do not fill one sequence of {length}; give more text")
    rows = stream.numel() // length
    rows = rows if limit is None else min(rows, limit)
    return stream[: rows * length].view(rows, length)


def _joined(parts: Sequence[Any]) -> Tensor:
    rows = [part[None] if part.ndim == 1 else part for part in parts]
    if len({row.shape[1:] for row in rows}) > 1:
        raise CalibrationError(f"token batches of shapes {[list(part.shape) for part in parts]}; give one length")
    return torch.cat(rows)


def _stored_ids(path: Path) -> Tensor:
    try:
        stored: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored = load_file(path)
        elif path.suffix == ".npy":
            import numpy

            stored = torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            stored = torch.load(path, weights_only=True)
    except Exception as error:  # each reader has exceptions of its own; all mean the same to the user
        raise CalibrationError(f"{path}: cannot be read as {path.suffix} ({error})") from error
    if isinstance(stored, dict) and len(stored) == 1:
        stored = next(iter(stored.values()))
    if not isinstance(stored, Tensor):
        raise CalibrationError(f"{path}: holds {type(stored).__name__}; store one tensor of token ids")
    return stored


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):  # JSON may hold what else splitlines splits at
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f'{path}:{number}: has no "text"; give one JSON object a line') from error
        if not isinstance(text, str):
            raise CalibrationError(f'{path}:{number}: "text" is no string but {json.dumps(text)[:40]}; give text')
        texts.append(text)
    return texts
