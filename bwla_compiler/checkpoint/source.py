"""A float checkpoint read parameter by parameter: shards stay on the disk, names and layouts are transformers' own.

What transformers does to a checkpoint's tensors on their way into a model (renaming, stacking experts, turning
matrices) is asked of transformers, for the parameters that are wanted alone.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from bwla_compiler.checkpoint.files import opened
from bwla_compiler.errors import CheckpointError, WeightError, first_line
from bwla_compiler.numerics.finite import all_finite

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError)
"""What transformers raises for configs and indices that are damaged: it looks at little before it computes."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class _Origin:
    """Where a parameter comes from: tensors of the checkpoint, and the conversion that makes it of them, if any."""

    keys: list[str] = field(default_factory=list)
    converter: Any = None
    pattern: dict[str, str] = field(default_factory=dict)


class SourceWeights:
    """The tensors of a model folder, by the names that a model gives its parameters and persistent buffers.

    model: built from the same config, without values. Raises CheckpointError for missing shards, missing tensors and
    files that are no safetensors.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.model = folder, model
        self.files = shard_of(folder)
        self._expected = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
        self._origins = self._map()
        self._ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._aliases = aliases(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._check_ties()
        missing = [n for n in self._expected if n in self._parameters and not self.has(n)]
        if missing:
            raise incomplete(folder, missing, model)

    def _check_ties(self) -> None:
        """Raise CheckpointError where the config ties two tensors that the checkpoint holds apart.

        transformers then leaves them apart, and one of them would be lost here.
        """
        for name, other in self._ties.items():
            keys = [self._origins[n].keys[0] for n in (name, other) if n in self._origins]
            if len(keys) == 2 and not torch.equal(self._read(keys[0]), self._read(keys[1])):
                raise CheckpointError(
                    f"{self.folder}: {keys[0]} differs from {keys[1]}, to which the config ties it; set "
                    "tie_word_embeddings to false in its config.json"
                )

    def _map(self) -> dict[str, _Origin]:
        conversions = get_model_conversion_mapping(self.model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix, known = self.model.base_model_prefix, self.model.state_dict(keep_vars=True)
        origins: dict[str, _Origin] = {}
        for key in sorted(self.files, key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            origin = origins.setdefault(name, _Origin())
            origin.keys.append(key)
            if pattern is not None:
                origin.converter = origin.converter or by_pattern[pattern]
                origin.pattern[key] = pattern
        return self._split(origins)

    def _split(self, origins: dict[str, _Origin]) -> dict[str, _Origin]:
        """Give every target of a conversion that makes several parameters its origin."""
        found = dict(origins)
        for name, origin in origins.items():
            first, *others = getattr(origin.converter, "target_patterns", [""])
            for other in others:
                if first in name:
                    found.setdefault(name.replace(first, other), origin)
        return found

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor, under this name or one that is tied to it."""
        return self._stored(name) in self._origins

    def _stored(self, name: str) -> str:
        """Return the name under which a parameter is stored: of tied ones, that which the others follow."""
        own = (self._ties.get(name, name), name, *self._aliases.get(name, ()))
        return next((alias for alias in own if alias in self._origins), name)

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return parameters by name, floats as float32, each with memory of its own.

        Raises WeightError for NaN, infinities and integers in parameters, CheckpointError for wrong shapes.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:
                origin = self._origins[self._stored(name)]
                found |= self._made(name, origin) if origin.converter else {name: self._read(origin.keys[0])}
        wanted = {name: found[name] for name in names}
        return {name: self._checked(name, tensor) for name, tensor in wanted.items()}

    def _read(self, key: str) -> Tensor:
        with opened(self.files[key]) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _made(self, name: str, origin: _Origin) -> dict[str, Tensor]:
        converter = copy.deepcopy(origin.converter)
        for key in origin.keys:
            converter.add_tensor(name, key, origin.pattern[key], self._read(key))
        try:
            made = converter.convert(name, model=self.model, config=getattr(self.model, "config", None))
        except Exception as error:  # conversions of transformers fail in ways of their own
            raise CheckpointError(f"{self.folder}: {name} cannot be made of {origin.keys[0]} ...: {error}") from error
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        expected = self._expected.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, its config asks for {list(expected)}: the "
                "config belongs to another model, or the file is damaged"
            )
        if not tensor.is_floating_point():
            if name in self._parameters:
                raise WeightError(f"{name} is {tensor.dtype}: only floating-point weights can be quantized")
            return tensor.clone()
        values = tensor.to(torch.float32, copy=True)
        if not all_finite(values):
            bad = int((~torch.isfinite(values)).sum())
            raise WeightError(
                f"{name} holds {bad} NaN or infinite values of {values.numel()}: the checkpoint is damaged or "
                "overflowed its dtype; download it again"
            )
        return values

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def incomplete(source: str | Path, missing: Sequence[str], model: nn.Module) -> CheckpointError:
    """Return the error of a checkpoint that lacks tensors which a model needs."""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return CheckpointError(
        f"{source}: the checkpoint lacks {', '.join(missing[:3])}{more}, which {type(model).__name__} needs: it is "
        "incomplete, or its config.json belongs to another model"
    )


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for each parameter that has several names, the others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(x for x in own if x != name) for own in names.values() if len(own) > 1 for name in own}


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Order numbers in names as numbers, so that expert 10 comes after expert 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def shard_of(folder: Path) -> Mapping[str, Path]:
    """Return the file of each tensor of a model folder. Raises CheckpointError where shards are missing."""
    if (folder / SINGLE).is_file():
        with opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    try:
        table: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise TypeError("weight_map names no file for each tensor")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder}: has neither {SINGLE} nor {INDEX}; only safetensors are read block by block. Save the model "
            "with save_pretrained first"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: is damaged ({error}); copy or download it again") from error
    for name in dict.fromkeys(table.values()):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is missing; copy or download the model again")
    return {key: folder / name for key, name in table.items()}


def source_folder(source: str) -> Path:
    """Return the folder of a model, downloaded to the hub's cache where it is a hub id. Raises CheckpointError."""
    path = Path(source)
    if path.is_dir():
        return path
    try:
        found = cached_file(source, SINGLE, _raise_exceptions_for_missing_entries=False)
        if found is None:
            index = cached_file(source, INDEX)
            for name in sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())):
                cached_file(source, name)
            found = index
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: neither a folder nor a model of the hub: {first_line(error)}") from error
    return Path(found).parent
