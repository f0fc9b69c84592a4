"""Plan: what the analysis decided, as frozen data. It names parameters and modules, never graph nodes."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Freedom = Literal["free", "fixes-ones", "pinned"]
Decision = Literal["folded", "partial", "online", "alone"]


@dataclass(frozen=True)
class Expression:
    """The basis of one tensor axis: a leaf, a Kronecker product of parts, or their direct sum.

    text form: "residual", "(1[4] x layers.0.v_proj)", "(a + b)"; a pinned leaf prints as 1[size].
    """

    kind: Literal["leaf", "product", "sum"]
    size: int
    basis: str = ""
    parts: tuple["Expression", ...] = ()

    def leaves(self) -> tuple["Expression", ...]:
        """Return the leaves in order; those of size 1 included."""
        if self.kind == "leaf":
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.leaves())

    def __str__(self) -> str:
        if self.kind == "leaf":
            return self.basis or f"1[{self.size}]"
        return "(" + (" x " if self.kind == "product" else " + ").join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Basis:
    """A space that may be rotated, or not, as a whole.

    name: unique. size: channels. freedom: any orthogonal matrix, one that keeps the all-ones vector
    (a LayerNorm or a mean reads it), or the identity alone. reason: the operation that took freedom away,
    with the node's name. writers, readers: modules (embeddings and norms among the writers).
    """

    name: str
    size: int
    freedom: Freedom
    reason: str
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Linear:
    """One linear and the decision for its input.

    name: of the module. parameter: of the weight. in_axis, out_axis: axes of the weight (GPT-2 stores
    [in, out]). decision: the input's rotation is folded into its writers; partial (one Kronecker factor
    folds, the other is online); online; or the linear is left alone. block: the repeated block that holds it,
    "" outside all. writes_residual: its output is added to the residual stream. experts: how many matrices of these
    sizes the weight holds, one per expert; 0 for a plain linear. Then the name is the parameter's.
    """

    name: str
    parameter: str
    bias: str | None
    in_axis: int
    out_axis: int
    in_features: int
    out_features: int
    decision: Decision
    reason: str
    group: str
    block: str
    input: Expression
    output: Expression
    writes_residual: bool = False
    experts: int = 0

    @property
    def n_weights(self) -> int:
        """How many numbers the weight holds."""
        return max(1, self.experts) * self.in_features * self.out_features


@dataclass(frozen=True)
class Group:
    """Linears that read one input, in the order in which the model calls them. name: the first linear's."""

    name: str
    linears: tuple[str, ...]
    in_features: int
    block: str


@dataclass(frozen=True)
class Norm:
    """A per-channel gain (and shift) and where it goes.

    absorbed_by: linears; empty where the gain stays, and then `reason` says why. gain_offset: the gain is
    gain_offset + parameter.
    """

    gain: str | None
    shift: str | None
    absorbed_by: tuple[str, ...]
    reason: str = ""
    gain_offset: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One axis of one parameter and the basis it lives in: folding multiplies the axis by the basis' matrix."""

    parameter: str
    axis: int
    expression: Expression


@dataclass(frozen=True)
class Plan:
    """Everything that was decided for a model.

    model: class name. bases, linears, groups, norms: see their classes. axes: of every parameter that lives
    in a basis which is not pinned. tied: (embedding weight, head module) where one tensor serves both.
    unknown: operations without a rule, and how often each pinned what it touched.
    """

    model: str
    bases: tuple[Basis, ...]
    linears: tuple[Linear, ...]
    groups: tuple[Group, ...]
    norms: tuple[Norm, ...]
    axes: tuple[Axis, ...]
    tied: tuple[tuple[str, str], ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)

    def linear(self, name: str) -> Linear:
        """Return a linear by module name; KeyError where there is none."""
        return {x.name: x for x in self.linears}[name]

    def basis(self, name: str) -> Basis:
        """Return a basis by name; KeyError where there is none."""
        return {b.name: b for b in self.bases}[name]

    @property
    def free(self) -> tuple[Basis, ...]:
        """The bases that may be rotated, wholly or keeping the ones vector."""
        return tuple(b for b in self.bases if b.freedom != "pinned" and b.size > 1)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Return the plan that `to_json` wrote."""
        d = json.loads(text)
        return Plan(
            model=d["model"],
            bases=tuple(Basis(**_tuples(b)) for b in d["bases"]),
            linears=tuple(
                Linear(**{**x, "input": _expression(x["input"]), "output": _expression(x["output"])})
                for x in d["linears"]
            ),
            groups=tuple(Group(**_tuples(g)) for g in d["groups"]),
            norms=tuple(Norm(**_tuples(n)) for n in d["norms"]),
            axes=tuple(Axis(a["parameter"], a["axis"], _expression(a["expression"])) for a in d["axes"]),
            tied=tuple((e, h) for e, h in d["tied"]),
            unknown=d["unknown"],
        )


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}


def _expression(table: dict[str, Any]) -> Expression:
    return Expression(table["kind"], table["size"], table["basis"], tuple(map(_expression, table["parts"])))
