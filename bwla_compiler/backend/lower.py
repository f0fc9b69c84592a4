"""Hand-over to Inductor: everything that is not ours."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, cast

import torch
from torch.fx import GraphModule

from bwla_compiler.backend.guards import facts_of_anchors
from bwla_compiler.backend.prepare import prepare
from bwla_compiler.backend.vector_isas import recall_isas, remember_isas
from bwla_compiler.runtime.programs import Program

UNCHECKED = {"size_asserts": False, "alignment_asserts": False}
"""Inductor's checks of every tensor at every call, left out: Dynamo's guards or our operators look at the inputs, and
our operators are tested to give what they promise. Hundreds of packed tensors made them a tenth of a small step."""


class HandOver(Protocol):
    """Something that compiles a graph once our operators are in it, as `lower` does."""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
        """Return the callable that computes the graph."""


def lower(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None) -> Callable[..., Any]:
    """Return the compiled graph: our operators, fused with what stands around them, the rest in Inductor's kernels.

    gm: of torch.compile, with its example inputs. mode: Inductor's, None for its default.
    """
    from torch._inductor.compile_fx import compile_fx  # imports Inductor: only when something is compiled

    facts = facts_of_anchors(gm)
    prepared = prepare(gm, example_inputs)
    tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    chosen = torch._inductor.list_mode_options(mode) if mode else {}
    patches = {**UNCHECKED, **chosen, **inductor_passes(tuple(tensors), prepared.exact)}
    recall_isas()
    compiled = cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches))
    remember_isas()
    return Program(prepared.watching(compiled), tensors, facts=facts)


def inductor_passes(names: Sequence[str] = (), exact: Collection[str] = ()) -> dict[str, Any]:
    """Return the passes of ours that Inductor runs, as config_patches of compile_fx; each holds its reports.

    names: of the tensors of the graph's module, in order. exact: of those, factors that are exact in tf32.
    """
    from bwla_compiler.passes.inductor_pass import InductorFusion  # imports Inductor

    return {"post_grad_custom_pre_pass": InductorFusion(names, exact)}
