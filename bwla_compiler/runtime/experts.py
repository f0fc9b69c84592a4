"""PackedExperts, their float counterpart before they are packed, and families' experts run through either.

A family's experts module stays, with its gate, its biases and its norms; what was a parameter of three axes becomes a
child of the same name, and the module's forward one of those here (`adopt`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from bwla_compiler.errors import ShapeError
from bwla_compiler.graph.experts import experts_form, experts_of_batches, projections
from bwla_compiler.numerics.planes import BinaryWeight, pack_signs
from bwla_compiler.runtime.ends import int8_step
from bwla_compiler.runtime.halves import read_half, register_empty_half, register_half
from bwla_compiler.runtime.online import OnlineTransform
from bwla_compiler.runtime.portable import GROUP
from bwla_compiler.runtime.transformed import counter_rotated
from bwla_compiler.runtime.weight_spec import scale_kind, spec_of_weight
from bwla_compiler.spec import LinearSpec, TransformSpec

EXPERTS = torch.ops.bwla.experts.default


class PackedExperts(nn.Module):
    """Rows times the matrices of the experts that they are sent to; every expert reads one transformed, rounded input.

    Saved: signs uint8 [E, planes, out, ceil(in / 8)]; row_scale [E, planes, out, groups], column_scale [E, in],
    low_rank_scale [E, rank] as int16 float16 bits with int8 exponents; low_rank_in int8 [E, rank, in] and low_rank_out
    int8 [E, out, rank]; the submodule `transform`, one for all experts. PackedExperts(spec, E, device=...) is empty, to
    be loaded; spec is that of one expert, without bias, which stays with the family's module.
    """

    signs: Tensor
    row_scale: Tensor
    low_rank_in: Tensor | None
    low_rank_out: Tensor | None

    def __init__(self, spec: LinearSpec, n_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        columns, out, rank = spec.in_features, spec.out_features[0], spec.rank
        self.n_experts, self.in_features, self.out_features = n_experts, columns, out
        self.activation_bits = spec.activation_bits
        online = spec.transform if spec.transform.online else None
        self.transform = OnlineTransform(online, device=device) if online else None
        self._kind = spec.transform.kind
        sizes = (n_experts, spec.planes, out, -(-columns // 8))
        self.register_buffer("signs", torch.zeros(sizes, dtype=torch.uint8, device=device))
        groups = -(-columns // GROUP) if spec.scale_kind == "group" else 1
        register_empty_half(self, "row_scale", (n_experts, spec.planes, out, groups), device=device)
        has_columns = spec.scale_kind == "row+column"
        register_empty_half(self, "column_scale", (n_experts, columns) if has_columns else None, device=device)
        for name, shape in (("low_rank_in", (rank, columns)), ("low_rank_out", (out, rank))):
            codes = torch.zeros(n_experts, *shape, dtype=torch.int8, device=device) if rank else None
            self.register_buffer(name, codes)
        register_empty_half(self, "low_rank_scale", (n_experts, rank) if rank else None, device=device)

    @classmethod
    def from_binary(
        cls, weights: Sequence[BinaryWeight], *, activation_bits: int, transform: OnlineTransform | None = None
    ) -> Self:
        """Return the experts of these weights, one each, all of one format, in the basis that `transform` leads to.

        Scales are rounded to float16, the low-rank pairs to int8 by component. Raises ShapeError where the formats
        differ, or have groups other than of 128 columns, or groups and column scales together.
        """
        _check_alike(weights)
        basis = transform.spec if transform is not None else None
        spec = spec_of_weight(weights[0], transform=basis, activation_bits=activation_bits)
        experts = cls(spec, len(weights), device="meta")
        experts.transform = transform
        experts.signs = torch.stack([pack_signs(w.signs) for w in weights])
        register_half(experts, "row_scale", torch.stack([w.scale for w in weights]))
        columns = [w.column_scale for w in weights if w.column_scale is not None]
        register_half(experts, "column_scale", torch.stack(columns) if columns else None)
        experts._take_low_rank(weights)
        return experts

    @property
    def spec(self) -> LinearSpec:
        """The shape and format of one expert's linear, as it is now."""
        has_columns = getattr(self, "column_scale") is not None  # noqa: B009 (a buffer that may be None)
        return LinearSpec(
            in_features=self.in_features,
            out_features=(self.out_features,),
            planes=self.signs.shape[1],
            scale_kind=scale_kind(groups=self.row_scale.shape[3], columns=has_columns),
            group_size=GROUP,
            rank=0 if self.low_rank_in is None else self.low_rank_in.shape[1],
            transform=self.transform.spec if self.transform is not None else TransformSpec(kind=self._kind),
            activation_bits=self.activation_bits,
        )

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [N, in], experts [N] or [N, k] integers -> [N, out] or [N, k, out], dtype of x; zeros for no expert."""
        b = self._buffers
        y: Tensor = EXPERTS(
            x if self.transform is None else self.transform(x.float()),
            experts,
            b["signs"],
            b["row_scale"],
            b["column_scale"],
            b["low_rank_in"],
            b["low_rank_out"],
            b["low_rank_scale"],
            self.activation_bits,
            b["row_scale_exponent"],
            b["column_scale_exponent"],
            b["low_rank_scale_exponent"],
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.n_experts} experts, in={self.in_features}, out={self.out_features}, A{self.activation_bits}"

    def _take_low_rank(self, weights: Sequence[BinaryWeight]) -> None:
        """Store each expert's pair as int8; its input side reads x * column_scale, hence / it."""
        pairs = [(w.low_rank_in, w.low_rank_out) for w in weights]
        into = torch.stack([a.float() for a, _ in pairs if a is not None]) if weights[0].rank else None
        onto = torch.stack([b.float() for _, b in pairs if b is not None]) if weights[0].rank else None
        if into is None or onto is None:
            return
        column_scale = read_half(self, "column_scale")
        if column_scale is not None:
            columns = column_scale[:, None]
            into = torch.where(columns == 0, 0.0, into / columns)
        in_scale, out_scale = int8_step(into, 2), int8_step(onto, 1)
        register_half(self, "low_rank_scale", (in_scale * out_scale.mT).flatten(1))
        self.low_rank_in = (into / in_scale).round().to(torch.int8)
        self.low_rank_out = (onto / out_scale).round().to(torch.int8)


def _check_alike(weights: Sequence[BinaryWeight]) -> None:
    formats = {(w.signs.shape, w.scale.shape, w.rank, w.column_scale is None, w.columns_per_scale()) for w in weights}
    if len(formats) > 1:
        raise ShapeError(f"the weights of {len(weights)} experts have {len(formats)} formats: one is needed")


class TransformedExperts(nn.Module):
    """Float experts behind an online change of basis, computing what they did before; see TransformedLinear.

    weight: of the experts, [E, out, in] through `in_axis` last. Saved: transform, weight W' [E, out, in].
    """

    def __init__(self, transform: OnlineTransform, weight: Tensor, *, in_axis: int) -> None:
        super().__init__()
        self.transform = transform
        rotated = torch.stack([counter_rotated(w, transform) for w in weight.detach().movedim(in_axis, -1)])
        self.weight = nn.Parameter(rotated, requires_grad=False)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [N, in], experts [N] or [N, k] -> [N, out] or [N, k, out]."""
        return float_products(self.transform(x), experts, self.weight)


def float_products(x: Tensor, experts: Tensor, weight: Tensor) -> Tensor:
    """Return each row times its experts' matrices: x [N, in], experts [N] or [N, k], weight [E, out, in] float.

    In a compiled graph, whose sizes may not depend on the routing, each row takes a copy of its matrix.
    """
    chosen = experts.flatten()
    choices = chosen.shape[0] // max(1, x.shape[0])
    if torch.compiler.is_compiling():
        own = weight[chosen.clamp(0, weight.shape[0] - 1)]
        rows = x.repeat_interleave(choices, 0).to(weight.dtype)
        inside = ((chosen >= 0) & (chosen < weight.shape[0]))[:, None]
        products = torch.where(inside, (own @ rows[:, :, None])[:, :, 0], 0.0)
        return products.to(x.dtype).view(*experts.shape, weight.shape[1])
    y = x.new_zeros(chosen.shape[0], weight.shape[1])
    for expert in chosen.unique().tolist():
        if 0 <= expert < weight.shape[0]:
            rows = (chosen == expert).nonzero()[:, 0]
            y[rows] = (x[rows // choices].to(weight.dtype) @ weight[expert].T).to(y.dtype)
    return y.view(*experts.shape, y.shape[-1])


# ---------------------------------------------------------------- families' modules


def adopt(owner: nn.Module) -> None:
    """Have a family's experts module compute through its children where its weights became such.

    Raises ShapeError for a module whose way of calling its experts is not known.
    """
    forwards: dict[str, Callable[..., Tensor]] = {"routed": _routed, "batched": _batched}
    form = experts_form(owner)
    if not form:
        raise ShapeError(f"{type(owner).__name__}: its way of calling its experts is not known")
    owner.forward = functools.partial(forwards[form], owner)


def _routed(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, h], top_k_index and top_k_weights [T, k] -> [T, h]: what transformers' interface asks for."""
    first, last = projections(self)
    y = _project(self, first, hidden_states, top_k_index).flatten(0, 1)
    y = self._apply_gate(y) if first == "gate_up_proj" else self.act_fn(y)
    y = _project(self, last, y, top_k_index.reshape(-1))
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1, 1)
    return y.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def _batched(self: Any, hidden_states: Tensor) -> Tensor:
    """hidden_states [E * T, h], the rows of one expert after those of another -> [E * T, h]."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    experts = experts_of_batches(self.num_experts, rows)
    gate, up = _project(self, "gate_up_proj", rows, experts).chunk(2, -1)
    return _project(self, "down_proj", up * self.act_fn(gate), experts)


def _project(self: Any, name: str, x: Tensor, experts: Tensor) -> Tensor:
    """Return x times the experts' matrices of one name, plus biases: packed, transformed, or still a parameter."""
    projection = getattr(self, name)
    y: Tensor
    if isinstance(projection, nn.Module):
        y = projection(x, experts)
    else:
        transposed = getattr(self, "is_transposed", experts_form(self) == "batched")
        y = float_products(x, experts, projection.mT if transposed else projection)
    if not getattr(self, "has_bias", False):
        return y
    bias: Tensor = getattr(self, f"{name}_bias")
    return y + bias[experts.clamp(0, bias.shape[0] - 1)].to(y.dtype)
