"""Per-layer error: how far the output of each repeated block is from the original's, in the original's basis.

A quantized model's hidden states live in a rotated basis, hq = h R + error. R is found from the embedding tables of the
two models, E and E': the orthogonal R that minimises ||E R - E'|| is U V^T of the SVD of E^T E' (Schoenemann 1966).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bwla_compiler.errors import ModelError
from bwla_compiler.graph.planner import block_of
from bwla_compiler.tokens import check, device_of, evaluating, vocabulary

Progress = Callable[[str, int, int], None]

SEQUENCES = 16
"""Sequences that are compared at most."""

ROWS = 8
"""Embeddings that R is found from, at most, as a multiple of their width."""


def layer_errors(
    reference: nn.Module, model: nn.Module, tokens: Tensor, *, progress: Progress | None = None
) -> dict[str, float]:
    """Return ||hq R^T - h|| / ||h|| of each repeated block's output, over tokens [n, length] int64.

    reference: the model before it was quantized. Blocks whose output has another width than the embedding, and those
    that only one of the two models has, are left out. Raises CalibrationError for unusable tokens, ModelError for
    models of different widths.
    """
    check(tokens, vocab_size=vocabulary(reference))
    _check_widths(reference, model)
    chosen = tokens[:SEQUENCES]
    energy: dict[str, float] = {}
    error: dict[str, float] = {}
    with evaluating(reference), evaluating(model):
        turn = residual_turn(reference, model)
        for done, row in enumerate(chosen):
            wanted, found = (_outputs(m, row[None], width=turn.shape[0]) for m in (reference, model))
            for name in (n for n in wanted if n in found):
                h = wanted[name].double()
                off = found[name].double() @ turn.T - h
                energy[name] = energy.get(name, 0.0) + h.square().sum().item()
                error[name] = error.get(name, 0.0) + off.square().sum().item()
            if progress is not None:
                progress("layers", done + 1, len(chosen))
    return {name: (error[name] / max(energy[name], 1e-300)) ** 0.5 for name in energy}


def _check_widths(reference: nn.Module, model: nn.Module) -> None:
    """Raise ModelError where two models' embeddings have other widths: one was not made from the other."""
    widths = [_rows(m, torch.zeros(1, dtype=torch.int64)).shape[-1] for m in (reference, model)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"the models are {widths[0]} and {widths[1]} wide: one was not made from the other; compare a quantized "
            "model with its original"
        )


def _rows(model: Any, ids: Tensor) -> Tensor:
    """Return the embeddings of ids."""
    found: Tensor = model.get_input_embeddings()(ids.to(device_of(model)))
    return found


def residual_turn(reference: nn.Module, model: nn.Module) -> Tensor:
    """Return the orthogonal R [h, h] float64, on the CPU, that turns the reference's embeddings into the model's."""
    n = vocabulary(reference)
    width = _rows(reference, torch.zeros(1, dtype=torch.int64)).shape[-1]
    ids = torch.linspace(0, n - 1, min(n, ROWS * width)).long()
    rows, turned = (_rows(m, ids).double().cpu() for m in (reference, model))
    u, _, v = torch.linalg.svd(rows.T @ turned)
    turn: Tensor = u @ v
    return turn


def _outputs(model: nn.Module, ids: Tensor, *, width: int) -> dict[str, Tensor]:
    """Return what each repeated block gives [tokens, width] on the CPU, of its last call."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(hidden, Tensor) and hidden.shape[-1] == width:
                found[name] = hidden.detach().reshape(-1, width).cpu()

        return hook

    blocks = [(name, m) for name, m in model.named_modules() if name and block_of(f"{name}.") == name]
    handles = [module.register_forward_hook(keep(name)) for name, module in blocks]
    try:
        model(input_ids=ids.to(device_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
