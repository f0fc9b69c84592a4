"""torch.compile(model, backend="bwla"): packed linears fused, the rest of the graph left to Inductor.

Found by torch through the entry point `torch_dynamo_backends`, so that no import is needed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule

from bwla_compiler.errors import PlanError, RecipeError
from bwla_compiler.runtime import ops

log = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return the compiled form of one graph of a packed model.

    gm, example_inputs: from torch.compile. mode: Inductor's, passed on. options: none are known yet.
    Raises RecipeError for unknown options or modes, and PlanError for a model that is not packed.
    """
    _check_options(mode, options)
    if not _is_packed(gm):
        raise PlanError(
            'backend="bwla" compiles packed models, and this graph has no packed linear. Quantize the model first: '
            "bwla_compiler.quantize(model), or load a packed checkpoint"
        )
    return _inductor(gm, example_inputs, mode)


def _check_options(mode: str | None, options: Mapping[str, Any] | None) -> None:
    if options:
        raise RecipeError(f"backend option {next(iter(options))!r} is not known: packed models take none")
    if mode is not None and mode not in MODES:
        raise RecipeError(f"mode {mode!r} is not known; Inductor's modes: {', '.join(MODES)}")


def _is_packed(gm: GraphModule) -> bool:
    """Whether any operator of ours is in the graph."""
    return any(str(node.target).startswith(f"{ops.LIBRARY.ns}.") for node in gm.graph.nodes)


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # imports Inductor: only when something is compiled

    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **inductor_passes()}
    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches))


def inductor_passes() -> dict[str, Any]:
    """Return the passes of ours that Inductor runs, as config_patches of compile_fx; each holds its reports."""
    from bwla_compiler.passes.inductor_pass import InductorFusion  # imports Inductor

    return {"post_grad_custom_pre_pass": InductorFusion()}
