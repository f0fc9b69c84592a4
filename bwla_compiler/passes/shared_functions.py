"""Norm and activation modules of a packed model become operators, where a trial shows that they compute the same.

What they compute is found by trying, not by their names: every family has classes of its own.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.passes.apply import apply_module
from bwla_compiler.passes.base import ReplaceModule
from bwla_compiler.runtime import portable
from bwla_compiler.runtime.functions import ACTIVATIONS, NORMS, Activation, Norm

TOLERANCE = 1e-5
"""Relative error of a trial; many norms round to float32 inside, whatever they are given, and gelu has three forms."""

INEXACT = tuple(kind for kind in ACTIVATIONS if kind != "relu")
"""Activation functions whose results depend on who computes them."""

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")


def share_functions(model: nn.Module) -> tuple[str, ...]:
    """Replace norm and activation modules by operators, in place, and return their names.

    Left alone: what a trial does not show to be a norm or activation of `runtime.functions`, and what has hooks.
    """
    tried: dict[Any, Norm | Activation | None] = {}
    edits = []
    for name, module in _candidates(model):
        key = _key(module)
        if key not in tried:
            tried[key] = _recognised(module)
        if (found := tried[key]) is not None:
            edits.append(ReplaceModule(name, _like(found, module)))
    apply_module(model, edits)
    return tuple(edit.name for edit in edits)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that hold nothing but a gain and a shift, under each of their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (module._forward_hooks, module._forward_pre_hooks, hasattr(module, "_hf_hook"))
        plain = not module._modules and not module._buffers and not any(hooks)
        vectors = all(
            key in ("weight", "bias") and (p is None or p.dim() == 1) for key, p in module._parameters.items()
        )
        if name and plain and vectors and not isinstance(module, (Norm, Activation)):
            yield name, module


def _key(module: nn.Module) -> Any:
    """Return what modules have in common that compute the same function of their input and parameters."""
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items())
    own = tuple((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))
    return type(module), shapes, own


def _like(found: Norm | Activation, module: nn.Module) -> nn.Module:
    """Return the operator for another module of the kind, with its very parameters."""
    if isinstance(found, Activation):
        replacement: nn.Module = Activation(found.kind)
    else:
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        replacement = Norm(found.kind, found.eps, weight, bias, offset=found.offset)
    return replacement.train(module.training)


@torch.no_grad()
def _recognised(module: nn.Module) -> Norm | Activation | None:
    """Return the operator that equals a module on random inputs and parameters; None where none does."""
    generator = torch.Generator().manual_seed(0)
    width = next((len(p) for p in module.parameters()), 12)
    # small rows, so that eps counts, and an offset, so that a mean that is taken away does
    x = torch.randn(6, width, generator=generator, dtype=torch.float64) + 0.5
    x[3:] *= 1e-3
    try:
        trial = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        for parameter in trial.parameters():
            parameter.copy_(torch.randn(width, generator=generator))
        y = trial(x.clone())
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None  # not a function of one tensor of this width
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((one for one in _guesses(trial) if _equal(_in_float64(one, x), y)), None)


def _guesses(module: nn.Module) -> Iterator[Norm | Activation]:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None:
        if bias is None:
            yield from map(Activation, INEXACT)
        return
    for eps in {float(e) for name in EPS_NAMES if isinstance(e := getattr(module, name, None), float)}:
        for kind in NORMS:
            for offset in (0.0, 1.0):
                yield Norm(kind, eps, weight, bias, offset=offset)


def _in_float64(one: Norm | Activation, x: Tensor) -> Tensor:
    """Return what an operator stands for, by its formula in float64."""
    if isinstance(one, Activation):
        return portable.ACTIVATIONS[one.kind](x)
    centred = x - x.mean(-1, keepdim=True) if one.kind == "layer_norm" else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + one.eps)
    gain, shift = one._parameters["weight"], one._parameters["bias"]
    assert gain is not None
    y = y * (gain + one.offset)
    return y if shift is None else y + shift


def _equal(y: Tensor, expected: Tensor) -> bool:
    """Whether each row is equal, by its own size."""
    error = (y.double() - expected.double()).norm(dim=-1)
    return bool((error <= TOLERANCE * expected.double().norm(dim=-1)).all())
