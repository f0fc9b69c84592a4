"""The way into transformers: a quantization config and a quantizer that builds packed modules on meta.

Importing this module registers `quant_method: bwla`, so that from_pretrained of a packed checkpoint never
makes a float weight, and save_pretrained writes the packed one.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bwla_compiler import __version__
from bwla_compiler.checkpoint.files import check_file, checksums, shapes
from bwla_compiler.checkpoint.guards import guard_names, with_guards
from bwla_compiler.errors import CheckpointError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.passes.shared_attention import share_attention
from bwla_compiler.passes.shared_functions import share_functions
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.device_signs import settle_signs
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.kv_cache import set_cache_bits
from bwla_compiler.runtime.skeleton import FORMAT_VERSION, build_skeleton, describe, packed_modules
from bwla_compiler.spec import FLOAT_BITS

METHOD = "bwla"

CACHE_LINE = 64
"""Bytes; what torch allocates begins at a multiple of it."""


@register_quantization_config(METHOD)
class BwlaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a packed model.

    modules: name -> description of the packed module (see `runtime.skeleton`). recipe, plan: how it came
    to be. true_bits: bits per weight of the block linears and of the whole model, and the model's bytes. written_by:
    the release that wrote it. Raises CheckpointError for a format that this release does not read.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        recipe: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        true_bits: dict[str, float] | None = None,
        format_version: int = FORMAT_VERSION,
        written_by: str = __version__,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"packed format version {format_version} is not known; bwla-compiler {__version__} reads version "
                f"{FORMAT_VERSION}: upgrade bwla-compiler to {written_by} or later, which wrote it"
            )
        if unknown:
            raise CheckpointError(f"quantization_config has unknown keys {sorted(unknown)}: upgrade bwla-compiler")
        self.quant_method = METHOD
        self.format_version, self.written_by = format_version, written_by
        self.modules = modules or {}
        self.recipe = recipe or {}
        self.plan = plan or {}
        self.true_bits = true_bits or {}


class _OneEntry(dict[str, str]):
    """Metadata that takes no second entry: safetensors writes several in random order, and equal models must give
    equal bytes. transformers adds `format`, which nothing reads since its version 5.
    """

    def __setitem__(self, key: str, value: str) -> None:
        if key in self:
            super().__setitem__(key, value)


@register_quantizer(METHOD)
class BwlaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds empty packed modules on meta before the weights arrive."""

    requires_calibration = True
    simulated = False
    """Whether the model's weights are floats that stand for a format which is not packed."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        """Build the packed modules; raise CheckpointError for another class, damaged files, or a tensor that lacks."""
        stranger = _stranger(model)
        if stranger and not all(_has(model, name) for name in self.quantization_config.modules):
            raise CheckpointError(stranger)
        with torch.device("meta"):
            for name, module in build_skeleton(self.quantization_config.modules).items():
                replace_module(model, name, module)
                _mark_initialized(
                    model.get_submodule(name.rpartition(".")[0]), always=isinstance(module, PackedExperts)
                )
        guards = guard_names(packed_modules(model))
        _expect(model, {f"^{re.escape(name)}$" for name in guards})
        paths = [Path(file) for file in checkpoint_files or ()]
        for path in paths:
            check_file(path)
        if paths:
            found = {n: s for path in paths for n, s in shapes(path).items() if n not in guards}
            _check_complete(model, found, stranger=stranger)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what save_pretrained writes: tensors with guards, and their checksums."""
        tensors = with_guards(model.state_dict(), packed_modules(model))
        return tensors, _OneEntry(checksums(tensors))

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Return no conversions: packed tensors go by the model's own names, and are no weights to merge or turn."""
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Have norms and activation functions computed as the kernels do, and the cache as the recipe says."""
        _align_floats(model)
        share_functions(model)
        share_attention(model)
        settle_signs(model)
        set_cache_bits(model, self.quantization_config.recipe.get("cache", {}).get("bits", FLOAT_BITS))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether save_pretrained works: yes; raises CheckpointError where the model's recipe is simulated."""
        if self.simulated:
            raise CheckpointError(
                "this model's weights are floats that stand for a format which is not packed: it can be measured, "
                "but not saved; quantize with a recipe that is not simulated"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained: no."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether generate may compile the model: yes."""
        return True


def _stranger(model: Any) -> str:
    """Return what to say where a model is of another class than was packed, and does not fit; "" for the same."""
    packed_as = getattr(model.config, "architectures", None) or ()
    if not packed_as or {cls.__name__ for cls in type(model).__mro__}.intersection(packed_as):
        return ""
    return (
        f"the checkpoint was packed as {packed_as[0]}, of which no {type(model).__name__} can be made; load it with "
        "AutoModelForCausalLM (output_hidden_states=True gives what is below the head)"
    )


def _has(model: nn.Module, name: str) -> bool:
    """Whether a model has a module, or a parameter of experts, of a name."""
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return False
    return leaf in owner._modules or leaf in owner._parameters


def _expect(model: Any, patterns: set[str]) -> None:
    """Have transformers say nothing of tensors that no parameter takes: guards."""
    known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    model._keys_to_ignore_on_load_unexpected = known | patterns


def _check_complete(model: Any, found: Mapping[str, tuple[int, ...]], *, stranger: str) -> None:
    """Raise CheckpointError where a model's tensors are missing or have other shapes: none is ever made up.

    stranger: what to say of missing ones where the class is another one than was packed.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in found and tied.get(name) not in found:
            raise CheckpointError(
                stranger or f"the checkpoint lacks {name}: it is incomplete; copy or quantize it again"
            )
        if name in found and found[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {list(found[name])}, its config says {list(tensor.shape)}: files of two models are "
                "mixed; copy or quantize it again"
            )


def _mark_initialized(parent: Any, *, always: bool = False) -> None:
    """Keep transformers from initialising a parent's children by name (GPT-2 writes to `c_proj.weight`).

    What the parent has itself is in the checkpoint, but for buffers that are not saved: those only its own
    initialisation can give, so that it is left alone then. always: even then.
    """
    if always or not parent._non_persistent_buffers_set:
        parent._is_hf_initialized = True


def attach(model: Any, *, recipe: Recipe, plan: Plan, bits: Bits) -> None:
    """Make a model that was quantized in place what from_pretrained would give: with its config and operators."""
    if not recipe.simulated:
        share_functions(model)
        share_attention(model)
    modules = packed_modules(model)
    config = BwlaConfig(
        modules={name: describe(module, modules) for name, module in modules.items()},
        recipe=recipe.to_dict(),
        plan=json.loads(plan.to_json()),
        true_bits=dataclasses.asdict(bits),
    )
    model.config.quantization_config = config
    tied = len(dict(model.named_parameters(remove_duplicate=False))) > len(dict(model.named_parameters()))
    model.config.tie_word_embeddings = tied  # a packed head shares codes by itself: it is none of transformers' ties
    model.hf_quantizer = BwlaQuantizer(config)
    model.hf_quantizer.simulated = recipe.simulated
    model._weight_conversions = []  # save_pretrained would look for weights of experts to cut apart
    model.is_quantized = True
    model.quantization_method = METHOD
    settle_signs(model)
    set_cache_bits(model, recipe.cache.bits)


def save_config(model: Any, folder: Path) -> None:
    """Write what save_pretrained writes beside the tensors of a model, whose values need not be here."""
    model.config.dtype = "float32"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def packed_skeleton(folder: Path, *, check: bool = False) -> Any:
    """Return the packed model of a folder on meta, built from its config alone; check: and see that the files fit it.

    Raises CheckpointError where the config describes no packed model, or where files are damaged or lack a tensor.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no folder with a config.json; give a folder that quantize wrote")
    config = AutoConfig.from_pretrained(folder)
    table = getattr(config, "quantization_config", None)
    if table is None or (isinstance(table, dict) and table.get("quant_method") != METHOD):
        raise CheckpointError(f"{folder}: holds no packed model; give a folder that quantize wrote")
    config.quantization_config = BwlaConfig(**table) if isinstance(table, dict) else table
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    files = sorted(map(str, folder.glob("*.safetensors"))) if check else None
    BwlaQuantizer(config.quantization_config)._process_model_before_weight_loading(model, files)
    return model


def _align_floats(model: nn.Module) -> None:
    """Copy floats that lie across cache lines, as those of a mapped file do, to where an allocation puts them.

    Products of some libraries add up in another order there, and a model is to answer like the one that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.is_cpu and tensor.data_ptr() % CACHE_LINE:
            tensor.data = tensor.data.clone()
