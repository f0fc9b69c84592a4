"""Hand-over to Inductor: everything that is not ours."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule


def lower(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
    """Return the compiled graph: our operators, fused with what stands around them, the rest in Inductor's kernels.

    gm: of torch.compile, with its example inputs. mode: Inductor's, None for its default.
    """
    from torch._inductor.compile_fx import compile_fx  # imports Inductor: only when something is compiled

    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **inductor_passes()}
    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches))


def inductor_passes() -> dict[str, Any]:
    """Return the passes of ours that Inductor runs, as config_patches of compile_fx; each holds its reports."""
    from bwla_compiler.passes.inductor_pass import InductorFusion  # imports Inductor

    return {"post_grad_custom_pre_pass": InductorFusion()}
