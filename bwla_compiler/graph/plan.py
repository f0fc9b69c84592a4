"""Plan: what the analysis decided, as frozen data. It names parameters and modules, never graph nodes."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from bwla_compiler.errors import PlanError
from bwla_compiler.graph.reading import read

SCHEMA = "bwla-plan/1"
"""Name and version of the JSON form; the version rises when a field comes, goes or changes its meaning."""

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
class Embedding:
    """A table that is looked up by id. name: of the module; parameter: of the table; output: basis of its rows."""

    name: str
    parameter: str
    output: Expression


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
    unknown: operations without a rule, and how often each pinned what it touched. embeddings: tables that are looked
    up by id. Equal models give equal plans, byte for byte in JSON.
    """

    model: str
    bases: tuple[Basis, ...]
    linears: tuple[Linear, ...]
    groups: tuple[Group, ...]
    norms: tuple[Norm, ...]
    axes: tuple[Axis, ...]
    tied: tuple[tuple[str, str], ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()

    def linear(self, name: str) -> Linear:
        """Return a linear by module name; KeyError where there is none."""
        return self._linears[name]

    def basis(self, name: str) -> Basis:
        """Return a basis by name; KeyError where there is none."""
        return self._bases[name]

    @cached_property
    def _linears(self) -> dict[str, Linear]:
        return {x.name: x for x in self.linears}

    @cached_property
    def _bases(self) -> dict[str, Basis]:
        return {b.name: b for b in self.bases}

    @property
    def free(self) -> tuple[Basis, ...]:
        """The bases that may be rotated, wholly or keeping the ones vector."""
        return tuple(b for b in self.bases if b.freedom != "pinned" and b.size > 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, with the schema's name first."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @staticmethod
    def from_dict(table: Any) -> "Plan":
        """Return the plan that `to_dict` gave. Raises PlanError where it is damaged or of another version."""
        if not isinstance(table, dict) or "schema" not in table:
            raise PlanError("this is no plan: the key 'schema' is missing; make it anew with bwla-compile plan")
        if table["schema"] != SCHEMA:
            raise PlanError(
                f"the plan is of version {table['schema']!r}, this bwla-compiler reads {SCHEMA!r}: plan anew"
            )
        plan = read(Plan, {k: v for k, v in table.items() if k != "schema"}, where="plan")
        for problem in _contradictions(plan):
            raise PlanError(f"the plan is damaged: {problem}; make it anew with bwla-compile plan")
        return plan

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Return the plan that `to_json` wrote. Raises PlanError where it is damaged or of another version."""
        try:
            table = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is damaged: {error}; make it anew with bwla-compile plan") from error
        return Plan.from_dict(table)


def _contradictions(plan: Plan) -> Iterator[str]:
    """Yield what no planner would have written: names that lead nowhere, sizes that do not add up."""
    linears, bases = {x.name for x in plan.linears}, {b.name for b in plan.bases}
    members = [(f"group {g.name}", name) for g in plan.groups for name in g.linears]
    members += [(f"norm {n.gain or n.shift}", name) for n in plan.norms for name in n.absorbed_by]
    for where, name in members:
        if name not in linears:
            yield f"{where} names {name}, which is no linear"
    for x in plan.linears:
        if (x.input.size, x.output.size) != (x.in_features, x.out_features):
            yield f"{x.name} has sizes that differ from its bases'"
    for axis in plan.axes:
        for leaf in axis.expression.leaves():
            if leaf.basis and leaf.basis not in bases:
                yield f"axis {axis.axis} of {axis.parameter} names {leaf.basis}, which is no basis"
