"""QuantizeEnds: embedding and head become int8 or int4, and share one set of codes again where they were tied."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import is_linear
from bwla_compiler.passes.base import PassContext, PassReport, ReplaceModule
from bwla_compiler.passes.fold_rotations import RESIDUAL, FoldRotations, KroneckerRotation, residual_rotation
from bwla_compiler.runtime.ends import ROWS
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, OnlineTransform, TiedHead
from bwla_compiler.spec import Coding

TIE_TOLERANCE = 1e-3
"""Relative distance up to which a head counts as the embedding times a gain; folding in float32 leaves 1e-6."""


@dataclass(frozen=True)
class QuantizeEnds:
    """Codes of 8 bits with one scale per row, or of 4 with one per group, for embeddings and heads (recipe.head).

    rotated: whether FoldRotations has rotated the residual stream. Where an embedding and a head were one
    tensor E and recipe.tied is "online", E is stored once in its own basis: R follows the embedding and
    R^T diag(gain) precedes the head. That spares V x h bytes for two transforms of h (n1 + n2) operations.
    """

    rotated: bool
    name: ClassVar[str] = "quantize-ends"

    def run(self, ctx: PassContext) -> PassReport:
        """Emit a replacement for each embedding and head."""
        report = PassReport(self.name)
        heads = head_names(ctx.model, ctx.plan)
        embeddings = embedding_names(ctx.model)
        if ctx.recipe.head.coding is None:
            for name in (*embeddings, *heads):
                report.skip(name, "the recipe keeps embeddings and head in their dtype")
            return report
        tied = {}
        if ctx.recipe.tied == "online":
            tied = {head: e.rpartition(".")[0] for e, head in ctx.plan.tied if head in heads}
        kept = {name for name in (*embeddings, *heads) if _kept(ctx, name)}
        for name in sorted(kept):
            report.skip(name, "an override keeps it as it is")
        for head, embedding in tied.items():
            if not kept.intersection((head, embedding)):
                self._tie(ctx, report, embedding, head)
        done = kept | {what for what, _ in report.changed}
        for name in (n for n in embeddings if n not in done):
            self._embedding(ctx, report, name)
        for name in (n for n in heads if n not in done):
            self._head(ctx, report, name)
        return report

    def _embedding(self, ctx: PassContext, report: PassReport, name: str) -> None:
        module = ctx.model.get_submodule(name)
        if not is_embedding(module):
            report.skip(name, f"a {type(module).__name__}, not a plain embedding")
            return
        weight, padding = module.weight.detach(), module.padding_idx
        coding = _coding(ctx, name)
        packed = EndEmbedding.from_weight(weight, padding_idx=padding, gain=_gain_of(module), coding=coding)
        report.change(name, ReplaceModule(name, packed))

    def _head(self, ctx: PassContext, report: PassReport, name: str) -> None:
        module = ctx.model.get_submodule(name)
        if not _is_head(module):
            report.skip(name, f"a {type(module).__name__}, not a plain linear")
            return
        packed = EndLinear.from_weight(module.weight.detach(), bias=module.bias, coding=_coding(ctx, name))
        report.change(name, ReplaceModule(name, packed))

    def _tie(self, ctx: PassContext, report: PassReport, embedding: str, head: str) -> None:
        table, linear = ctx.model.get_submodule(embedding), ctx.model.get_submodule(head)
        if not is_embedding(table) or not _is_head(linear):
            report.skip(head, "tied, but not a plain embedding and a plain linear: stored twice")
            return
        rotation = self._rotation(ctx)
        original = rotation.undo(table.weight.detach())
        columns = _columns(original, rotation.undo(linear.weight.detach()))
        if columns is None:
            report.skip(head, "no longer the embedding times a gain: stored twice")
            return
        packed = EndEmbedding.from_weight(
            original,
            padding_idx=table.padding_idx,
            transform=_online(rotation.signs, rotation.left, rotation.right),
            gain=_gain_of(table),
            coding=_coding(ctx, embedding),
        )
        column_scale = columns if rotation.signs is None else columns * rotation.signs.to(columns)
        tied_head = TiedHead(
            packed,
            transform=_online(None, *rotation.inverse_factors()),
            column_scale=None if bool((column_scale == 1).all()) else column_scale,
            bias=linear.bias,
        )
        report.change(embedding, ReplaceModule(embedding, packed))
        report.change(head, ReplaceModule(head, tied_head))

    def _rotation(self, ctx: PassContext) -> KroneckerRotation:
        """Return how FoldRotations has turned what the embedding writes: not at all where that basis is pinned."""
        for basis in ctx.plan.bases if self.rotated else ():
            if basis.name == RESIDUAL and not FoldRotations().refusal(basis):
                return residual_rotation(ctx, basis)
        return KroneckerRotation.identity()


def _kept(ctx: PassContext, name: str) -> bool:
    """Whether an override leaves an end in its dtype."""
    own = ctx.recipe.override_for(name)
    return own is None or own.head.coding is None


def _coding(ctx: PassContext, name: str) -> Coding:
    """Return how an end that is not kept is stored."""
    own = ctx.recipe.override_for(name)
    coding = None if own is None else own.head.coding
    assert coding is not None
    return coding


def head_names(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Names of the linears that give logits: outside the repeated blocks, and the model's output embeddings."""
    output = _ask(model, "get_output_embeddings")
    modules = dict(model.named_modules(remove_duplicate=False))
    return tuple(
        x.name
        for x in plan.linears
        if modules.get(x.name) is output or (x.block == "" and x.output.size == _vocabulary(model))
    )


def _ask(model: nn.Module, method: str) -> Any:
    """What a transformers model answers, None for a module that does not know the question."""
    question: Any = getattr(model, method, None)
    return None if question is None else question()


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", -1))


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """Name of the token embedding (positions and others are small and stay)."""
    table = _ask(model, "get_input_embeddings")
    return tuple(name for name, module in model.named_modules() if module is table)


def is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module gives rows of its weight, and nothing else: at most all times one number, its `embed_scale`.

    So nn.Embedding itself, and transformers' scaled word embeddings. Others may do more: each row is looked up and
    compared.
    """
    if type(module) is nn.Embedding:
        return module.max_norm is None
    gain = _gain_of(module)
    if not isinstance(module, nn.Embedding) or gain is None or gain.numel() != 1:
        return False
    weight = module.weight.detach()
    with torch.no_grad():
        for ids in torch.arange(len(weight), device=weight.device).split(ROWS):
            if not torch.equal(module(ids), weight[ids] * gain.to(weight.dtype)):
                return False
    return True


def _gain_of(module: nn.Module) -> Tensor | None:
    """Return the number [] that an embedding of transformers multiplies its rows by; None where it has none."""
    gain = getattr(module, "embed_scale", None)
    return gain if gain is None or isinstance(gain, Tensor) else torch.tensor(float(gain))


def _is_head(module: nn.Module) -> TypeGuard[nn.Linear]:
    return is_linear(module) and isinstance(module, nn.Linear)


def _online(scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> OnlineTransform | None:
    if scale is None and left is None and right is None:
        return None
    return OnlineTransform.from_factors(scale, left, right, kind="hadamard")


def _columns(table: Tensor, head: Tensor) -> Tensor | None:
    """Return g [h] with head = table * g, or None where there is none; table, head [V, h]."""
    energy = table.square().sum(0)
    gain = (table * head).sum(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    distance = (head - table * gain).norm() / head.norm().clamp_min(torch.finfo(energy.dtype).tiny)
    return gain if float(distance) <= TIE_TOLERANCE else None
