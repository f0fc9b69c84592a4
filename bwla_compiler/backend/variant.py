"""A variant: the quantized copy of a model under one plan, with the state of the weights that it was made from."""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bwla_compiler.backend import disk
from bwla_compiler.backend.options import Options
from bwla_compiler.calibrate.hooks import drop_hooks
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.errors import WeightError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.device_signs import settle_signs
from bwla_compiler.runtime.seen import Seen
from bwla_compiler.tokens import calibration_tokens, longest

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass
class Variant:
    """See the module's docstring. quantized: the copy. seen: by parameter of the original."""

    plan: Plan
    recipe: Recipe
    options: Options
    quantized: nn.Module
    seen: dict[str, Seen]
    freed: set[str] = field(default_factory=set)

    def refresh(self, model: nn.Module, *, progress: Progress | None = None) -> None:
        """Quantize again what the model holds now, into the tensors that compiled code already reads.

        Raises WeightError where the float weights were freed.
        """
        if self.freed:
            raise WeightError(
                f"{min(self.freed)}: a weight was edited after free_weights=True had released the float weights; "
                "load the model anew, or compile it without free_weights"
            )
        log.warning("weights of %s were edited: quantizing them again", type(model).__name__)
        again = quantized_copy(model, self.plan, self.recipe, self.options, progress=progress)
        settle_signs(again)
        fresh = dict(_state(again))
        with torch.no_grad():
            for name, tensor in _state(self.quantized):
                tensor.copy_(fresh[name])
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Take note of the model's parameters as they are now."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.seen:  # other names: the structure changed, and this copy serves what was there before
                self.seen[name].look(parameter)

    def forget(self) -> None:
        """Make the next call quantize anew."""
        for seen in self.seen.values():
            seen.forget()

    def free(self, model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Release the storage of matrices that compiled code no longer reads; their shapes stay, as guards ask.

        Vectors are small, and the analysis of later graphs reads the values of gains. Copies and files of what is left
        are refused.
        """
        for name, parameter in parameters:
            if parameter.ndim < 2 or parameter.untyped_storage().nbytes() == 0:
                continue
            with torch.no_grad():
                empty = torch.empty_like(parameter)
                empty.untyped_storage().resize_(0)
                parameter.data = empty
            parameter.__deepcopy__ = _refuse_copy  # type: ignore[method-assign]  # torch's own reads address 0
            model.get_submodule(name.rpartition(".")[0]).register_state_dict_pre_hook(_refuse_copy)
            self.freed.add(name)


def _refuse_copy(*_: object) -> None:
    raise WeightError("float weights were released by free_weights=True: the model can be neither copied nor saved")


def make_variant(
    model: nn.Module, plan: Plan, recipe: Recipe, options: Options, *, progress: Progress | None = None
) -> Variant:
    """Return the quantized copy of a model, from the disk where it was made before from these very weights.

    Raises WeightError where float weights were freed, which only the copy made before can stand for.
    """
    _check_present(model)
    seen = {name: Seen(p, hold=True) for name, p in model.named_parameters(remove_duplicate=False)}
    key = disk.pack_key(model, plan, recipe, options) if options.cache else ""
    quantized = disk.load_pack(key, model) if options.cache else None
    if quantized is None:
        quantized = quantized_copy(model, plan, recipe, options, progress=progress)
        if options.cache:
            disk.save_pack(key, quantized)
    settle_signs(quantized)
    return Variant(plan, recipe, options, quantized, seen)


def _check_present(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.device.type != "meta" and not parameter.untyped_storage().nbytes():
            raise WeightError(
                f"{name} was released by free_weights=True, and this way of calling the model (or these options) needs "
                "weights quantized in another way; load the model anew, and compile it without free_weights"
            )


def quantized_copy(
    model: nn.Module, plan: Plan, recipe: Recipe, options: Options, *, progress: Progress | None = None
) -> nn.Module:
    """Return a quantized copy; the model stays as it is. Folding and fitting are in float32, whatever its dtype."""
    quantized = copy.deepcopy(model).requires_grad_(False).eval()
    dtypes = {name: tensor.dtype for name, tensor in _state(quantized)}
    quantized.float()
    tokens = _tokens(quantized, recipe, options, progress)
    quantize_model(quantized, recipe, tokens, plan=plan, seed=options.seed, progress=progress)
    drop_hooks(quantized)  # Dynamo has traced what they do into the graph
    common = next((d for d in dtypes.values() if d.is_floating_point), torch.float32)
    for name, tensor in _state(quantized):
        wanted = dtypes.get(name, common)  # mixed models keep each tensor's own dtype
        if tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
    return quantized.requires_grad_(False)


def _tokens(model: nn.Module, recipe: Recipe, options: Options, progress: Progress | None) -> Tensor | None:
    if not recipe.needs_calibration or (isinstance(options.calibration, str) and options.calibration == "none"):
        return None
    if not is_causal_lm(model):
        log.warning(
            "%s is no causal LM that could generate its calibration: fitted to its weights alone", type(model).__name__
        )
        return None
    return calibration_tokens(
        options.calibration,
        model=model,
        sequences=recipe.calibration.sequences,
        length=min(recipe.calibration.length, longest(model) or recipe.calibration.length),
        seed=options.seed,
        progress=progress,
    )


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is a causal LM of transformers, which takes token ids and gives logits."""
    return bool(getattr(model, "can_generate", lambda: False)()) and hasattr(model, "config")


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return every parameter and buffer once, by name."""
    return [*module.named_parameters(), *module.named_buffers()]
