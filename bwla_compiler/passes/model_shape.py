"""What the cost model knows of a model: a packed one as it is, a float one as a recipe would leave it."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from bwla_compiler.cost.factors import kronecker_factors
from bwla_compiler.cost.model import NOTHING, AttentionShape, GroupShape, KeptShape, ModelShape, TableShape
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.fold_rotations import RESIDUAL
from bwla_compiler.passes.group_specs import NamedSpec, packed_specs, planned_specs, shifted_linears
from bwla_compiler.passes.quantize_ends import embedding_names, head_names
from bwla_compiler.recipe import Recipe
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedExperts, TiedHead
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.spec import LinearSpec, TransformSpec


def planned_shape(model: nn.Module, plan: Plan, recipe: Recipe, *, float_bytes: int = 2) -> ModelShape:
    """Return the shape of a float model as quantizing it by a recipe would leave it. The model may be on meta.

    float_bytes: of the floats that are kept.
    """
    specs = planned_specs(model, plan, recipe)
    heads, embeddings = head_names(model, plan), embedding_names(model)
    tables = tuple(_planned_tables(model, plan, recipe, heads, embeddings))
    quantized = {name for names, _ in specs for name in names}
    rest = dict(model.named_parameters())
    for linear in plan.linears:
        if linear.name in quantized:
            rest.pop(linear.parameter, None)
            rest.pop(linear.bias or "", None)
    for name in (*heads, *embeddings):
        rest.pop(f"{name}.weight", None)
        rest.pop(f"{name}.bias", None)
    kept = tuple(_kept(model, plan, rest))
    experts = {linear.name: linear.experts for linear in plan.linears}
    for shape in kept:
        rest.pop(shape.name)
    n_rest = sum(parameter.numel() for parameter in rest.values())
    attention, unknown = attention_shapes(getattr(model, "config", None))
    groups = _groups(specs, experts=experts, used=_used_experts(model))
    return ModelShape(groups, tables, kept, attention, n_rest, unknown, float_bytes)


def packed_shape(model: nn.Module, *, float_bytes: int = 2) -> ModelShape:
    """Return the shape of a packed model: its modules as they are."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    specs = [*packed_specs(model), *(((name,), module.spec) for name, module in packed.items())]
    experts = {name: module.n_experts for name, module in packed.items()}
    tables = tuple(_packed_tables(model))
    rest = dict(model.named_parameters())
    kept = [
        KeptShape(f"{name}.weight", module.weight.numel())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for name in (*(shape.name for shape in kept), *(f"{table.name}.weight" for table in tables)):
        rest.pop(name, None)
    attention, unknown = attention_shapes(getattr(model, "config", None))
    n_rest = sum(parameter.numel() for parameter in rest.values())
    groups = _groups(specs, experts=experts, used=_used_experts(model))
    return ModelShape(groups, tables, tuple(kept), attention, n_rest, unknown, float_bytes)


def _groups(specs: Iterable[NamedSpec], *, experts: Mapping[str, int], used: int) -> tuple[GroupShape, ...]:
    """Return one entry per spec and kind of linears: q, k and v of all layers are one. experts: of those that have."""
    alike: dict[tuple[str, LinearSpec, int], int] = {}
    for names, spec in specs:
        label = ", ".join(name.rpartition(".")[2] for name in names)
        key = (label, spec, experts.get(names[0], 0))
        alike[key] = alike.get(key, 0) + 1
    return tuple(
        GroupShape(label, spec, count, max(1, n), min(used, n) if n else 1) for (label, spec, n), count in alike.items()
    )


def _used_experts(model: nn.Module) -> int:
    """Return how many experts a token takes; all, for a config that does not tell."""
    text = _text_config(getattr(model, "config", None))
    names = ("num_experts_per_tok", "moe_top_k", "moe_topk", "num_experts_per_token", "top_k_experts")
    return next((n for n in (int(getattr(text, name, 0) or 0) for name in names) if n), sys.maxsize)


def _kept(model: nn.Module, plan: Plan, rest: Mapping[str, nn.Parameter]) -> Iterator[KeptShape]:
    """Yield the weights of linears that are left alone; those of experts with how many of them a token takes."""
    for linear in {x.parameter: x for x in plan.linears if x.parameter in rest}.values():
        experts = max(1, linear.experts)
        n_weights = rest[linear.parameter].numel()
        yield KeptShape(linear.parameter, n_weights, experts, min(experts, _used_experts(model)))


# ---------------------------------------------------------------- embeddings and heads


def _planned_tables(
    model: nn.Module, plan: Plan, recipe: Recipe, heads: tuple[str, ...], embeddings: tuple[str, ...]
) -> Iterator[TableShape]:
    """Yield embeddings and heads as QuantizeEnds would leave them."""
    coding = recipe.head.coding
    partner = {head: table.rpartition(".")[0] for table, head in plan.tied}
    # in codes, one copy serves both; in floats an untied head has a copy of its own
    one_copy = (coding is not None and recipe.tied == "online") or recipe.transform.kind == "none"
    turned = NOTHING if coding is None else _turned(plan, recipe)
    for name in embeddings:
        rows, width = model.get_submodule(name).get_parameter("weight").shape
        transform = turned if one_copy and name in partner.values() else NOTHING
        yield TableShape(name, rows, width, coding, looked_up=True, transform=transform)
    for name in heads:
        linear = plan.linear(name)
        tied = one_copy and partner.get(name) in embeddings
        unscaled = TransformSpec(turned.kind, turned.n1, turned.n2, turned.left, turned.right)
        yield TableShape(
            name,
            linear.out_features,
            linear.in_features,
            coding,
            looked_up=False,
            shared=tied,
            transform=unscaled if tied else NOTHING,
            column_scaled=tied and coding is not None and (turned.scaled or _takes_gain(plan, recipe, name)),
            bias=linear.bias is not None or name in shifted_linears(plan, recipe),
        )


def _turned(plan: Plan, recipe: Recipe) -> TransformSpec:
    """Return the residual stream's rotation as a tied embedding applies it at run time."""
    if recipe.transform.kind == "none" or recipe.residual != "folded":
        return NOTHING
    found = [b for b in plan.free if b.name == RESIDUAL]
    if not found:
        return NOTHING
    n1, n2 = kronecker_factors(found[0].size)
    return TransformSpec("hadamard", n1, n2, True, True, scaled=found[0].freedom == "free")


def _takes_gain(plan: Plan, recipe: Recipe, head: str) -> bool:
    return recipe.transform.kind != "none" and any(n.gain and head in n.absorbed_by for n in plan.norms)


def _packed_tables(model: nn.Module) -> Iterator[TableShape]:
    for name, module in model.named_modules():
        transform: OnlineTransform | None = getattr(module, "transform", None)
        spec = transform.spec if isinstance(transform, OnlineTransform) else NOTHING
        if isinstance(module, EndEmbedding):
            size, coding = (module.num_embeddings, module.embedding_dim), module.coding
            yield TableShape(name, *size, coding, looked_up=True, transform=spec)
        elif isinstance(module, (EndLinear, TiedHead)):
            yield TableShape(
                name,
                module.out_features,
                module.in_features,
                (module.embedding if isinstance(module, TiedHead) else module).coding,
                looked_up=False,
                shared=isinstance(module, TiedHead),
                transform=spec,
                column_scaled=module._buffers["column_scale"] is not None,
                bias=module.bias is not None,
            )
        elif isinstance(module, nn.Embedding):
            yield TableShape(name, module.num_embeddings, module.embedding_dim, None, looked_up=True)


# ---------------------------------------------------------------- attention


def attention_shapes(config: Any) -> tuple[tuple[AttentionShape, ...], str]:
    """Return the attention that a transformers config describes, and what of it is not modelled, "" for nothing.

    One entry per kind of layer: all tokens seen, or a window of them. Layers of another kind are not modelled.
    """
    text = _text_config(config)
    layers, heads = (int(getattr(text, k, 0) or 0) for k in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return (), "attention: the config does not tell layers and heads"
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    head_dim = int(getattr(text, "head_dim", 0) or getattr(text, "hidden_size", 0) // heads)
    kinds = Counter(getattr(text, "layer_types", None) or ["full_attention"] * layers)
    window = int(getattr(text, "sliding_window", 0) or 0)
    known = {"full_attention": 0, "sliding_attention": window}
    found = [AttentionShape(n, heads, kv_heads, head_dim, known[k]) for k, n in kinds.items() if k in known]
    return tuple(found), ", ".join(f"{n} layers of {k}" for k, n in kinds.items() if k not in known)


def _text_config(config: Any) -> Any:
    """Return the part of a config that tells of the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
