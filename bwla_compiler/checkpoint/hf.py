"""The way into transformers: a quantization config and a quantizer that builds packed modules on meta.

Importing this module registers `quant_method: bwla`, so that from_pretrained of a packed checkpoint never
makes a float weight, and save_pretrained writes the packed one.
"""

import dataclasses
import json
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bwla_compiler.errors import CheckpointError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.modules import Int8Embedding, Int8Linear, PackedLinear, TiedHead
from bwla_compiler.runtime.skeleton import build_skeleton, describe

METHOD = "bwla"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class BwlaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a packed model.

    modules: name -> description of the packed module (see `runtime.skeleton`). recipe, plan: how it came
    to be. true_bits: bits per weight of the block linears and of the whole model, and the model's bytes.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        recipe: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        true_bits: dict[str, float] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"packed format version {format_version} is not known; this bwla-compiler reads version "
                f"{FORMAT_VERSION}: upgrade bwla-compiler"
            )
        if unknown:
            raise CheckpointError(f"quantization_config has unknown keys {sorted(unknown)}: upgrade bwla-compiler")
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = modules or {}
        self.recipe = recipe or {}
        self.plan = plan or {}
        self.true_bits = true_bits or {}


@register_quantizer(METHOD)
class BwlaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds empty packed modules on meta before the weights arrive."""

    requires_calibration = True
    simulated = False
    """Whether the model's weights are floats that stand for a format which is not packed."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            for name, module in build_skeleton(self.quantization_config.modules).items():
                replace_module(model, name, module)
                _mark_initialized(
                    model.get_submodule(name.rpartition(".")[0]), always=isinstance(module, PackedExperts)
                )
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Return no conversions: packed tensors go by the model's own names, and are no weights to merge or turn."""
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
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


def _mark_initialized(parent: Any, *, always: bool = False) -> None:
    """Keep transformers from initialising a parent's children by name (GPT-2 writes to `c_proj.weight`).

    always: also where it has tensors of its own (biases of experts), which then must be in the checkpoint.
    """
    own = (*parent.parameters(recurse=False), *parent.buffers(recurse=False))
    if always or not own:
        parent._is_hf_initialized = True


def attach(model: Any, *, recipe: Recipe, plan: Plan, bits: Bits) -> None:
    """Give a model that was quantized in place the config that save_pretrained writes."""
    packed = (PackedLinear, PackedExperts, Int8Linear, Int8Embedding, TiedHead)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, packed)}
    config = BwlaConfig(
        modules={name: describe(module, modules) for name, module in modules.items()},
        recipe=recipe.to_dict(),
        plan=json.loads(plan.to_json()),
        true_bits=dataclasses.asdict(bits),
    )
    model.config.quantization_config = config
    model.config.tie_word_embeddings = (
        False  # a packed head shares codes by itself; transformers would look for a weight
    )
    model.hf_quantizer = BwlaQuantizer(config)
    model.hf_quantizer.simulated = recipe.simulated
    model._weight_conversions = []  # save_pretrained would look for weights of experts to cut apart
    model.is_quantized = True
    model.quantization_method = METHOD
