"""The planner: analysis of a captured graph -> Plan, in the model's own names.

Analysis and plan take time in proportion to the graph, a hundredth of what its capture takes, so repeated blocks are
analysed one by one: nothing has to be proven of their likeness.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule, Node

from bwla_compiler.errors import PlanError
from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.analysis import Analysis, Site
from bwla_compiler.graph.basis import analyse
from bwla_compiler.graph.capture import capture
from bwla_compiler.graph.experts import experts_form, projections, routers
from bwla_compiler.graph.plan import Axis, Basis, Decision, Embedding, Expression, Freedom, Group, Linear, Norm, Plan
from bwla_compiler.graph.spaces import Freedom as SpaceFreedom
from bwla_compiler.graph.spaces import Space, leaves

_FREEDOM: dict[SpaceFreedom, Freedom] = {
    SpaceFreedom.FREE: "free",
    SpaceFreedom.FIXES_ONES: "fixes-ones",
    SpaceFreedom.PINNED: "pinned",
}


LINEAR_CLASSES = frozenset({"Conv1D", "FalconLinear"})
"""Classes of transformers, by name, that compute what nn.Linear does: Conv1D with its weight as [in, out]."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear: nn.Linear itself, or one of LINEAR_CLASSES. Others may do more."""
    return type(module) is nn.Linear or type(module).__name__ in LINEAR_CLASSES


def _is_adapter(model: nn.Module, name: str) -> bool:
    """Whether a linear belongs to an adapter that stands beside a `base_layer`, as PEFT arranges them."""
    parts = name.split(".")
    outer = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(hasattr(m, "base_layer") and parts[i] != "base_layer" for i, m in enumerate(outer))


def _weights_of_one(model: nn.Module) -> frozenset[int]:
    """Return the ids of the weights that one linear has, subclasses too, and no other linear shares.

    A bias that such a module gets is added, as a router or experts would not, and by it alone; a head among them may
    get a copy of the embedding's tensor. An id that two modules share is in neither case theirs to change.
    """
    linears = (m for m in model.modules() if isinstance(m, nn.Linear) or is_linear(m))
    count = Counter(id(m.weight) for m in linears)
    return frozenset(key for key, n in count.items() if n == 1)


def block_of(name: str) -> str:
    """Return the repeated block of a module name, "model.layers.3" of "model.layers.3.mlp.up_proj"; else ""."""
    found = re.match(r"^(.*?\.\d+)\.", name)
    return found.group(1) if found else ""


def make_plan(model: nn.Module, *, graph: GraphModule | None = None) -> Plan:
    """Return the plan of a model: captured here, or given as its captured graph.

    Raises CaptureError where it cannot be traced, PlanError where it has no linears.
    """
    owned = _weights_of_one(model)
    analysis = analyse(graph if graph is not None else capture(model), biasable=owned, untieable=owned)
    return _Planner(model, analysis).plan()


class _Planner:
    """Translates spaces and nodes into names."""

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model, self.analysis = model, analysis
        self.names = self._weight_names()
        self.basis_names: dict[Space, str] = {}
        self.calls = self._calls()
        self.routers = routers(analysis)
        experts = [(self.names[s.weight], s.n_experts) for s in analysis.sites.values() if s.n_experts]
        self.expert_calls = Counter(name for name, _ in experts)
        self.expert_counts = {(block_of(name), n) for name, n in experts}
        self.refusals = {site.weight: self._refusal(site) for site in analysis.sites.values()}
        self._taken: set[str] = set()

    def _weight_names(self) -> dict[str, str]:
        """Map the analysis' parameter names to the model's; a tied linear's copy gets its module's name."""
        by_tensor: dict[int, list[str]] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            by_tensor.setdefault(id(tensor), []).append(name)
        names: dict[str, str] = {}
        for own in self.analysis.parameters:
            plain = self.analysis.tied.get(own, own)
            aliases = by_tensor[id(self.model.get_parameter(plain))]
            wants_linear = own in self.analysis.tied
            fitting = [a for a in aliases if is_linear(self._owner(a)) == wants_linear]
            names[own] = (fitting or aliases)[0]
        return names

    def _owner(self, parameter: str) -> nn.Module:
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def plan(self) -> Plan:
        sites = [calls[0] for calls in self.calls.values()]
        if not sites:
            raise PlanError(
                f"{type(self.model).__name__} has no linears with weights of their own: nothing to quantize. "
                "Is it a causal LM with nn.Linear or Conv1D layers?"
            )
        self._name_bases(sites)
        groups = self._groups()
        linears = tuple(self._linear(site, groups) for site in sites)
        return Plan(
            model=type(self.model).__name__,
            bases=tuple(self._bases(linears)),
            linears=linears,
            groups=self._group_entries(linears),
            norms=tuple(self._norms()),
            axes=tuple(self._axes()),
            tied=tuple((self.names[plain], self._module(own)) for own, plain in self.analysis.tied.items()),
            unknown=dict(self.analysis.unknown),
            embeddings=tuple(self._embeddings()),
        )

    # ---- names

    def _module(self, parameter: str) -> str:
        """Name of the module that a parameter makes a linear; of the parameter, where a module holds several."""
        module, _, leaf = self.names[parameter].rpartition(".")
        return module if leaf == "weight" else self.names[parameter]

    def _name_bases(self, sites: list[Site]) -> None:
        """Name each rotatable leaf after the first parameter that writes it; the first embedding's is the residual."""
        for i, parameter in enumerate(dict.fromkeys(self.analysis.embeddings.values())):
            name = self._module(parameter) if i else "residual"
            self._name_leaves(self.analysis.parameters[parameter].axes[1], name)
        for site in sites:
            value = self.analysis.parameters[site.weight]
            self._name_leaves(value.axes[site.out_axis], self._module(site.weight))
            self._name_leaves(value.axes[site.in_axis], f"{self._module(site.weight)}.input")
        for name, value in self.analysis.parameters.items():
            for axis in value.axes:
                self._name_leaves(axis, self.names[name])

    def _name_leaves(self, space: Space, name: str) -> None:
        fresh = [x for x in dict.fromkeys(leaves(space)) if x.size > 1 and x not in self.basis_names]
        fresh = [x for x in fresh if x.freedom != SpaceFreedom.PINNED]
        for i, leaf in enumerate(fresh):
            wanted = name if len(fresh) == 1 else f"{name}[{i}]"
            spellings = itertools.chain((wanted,), (f"{wanted}:{n}" for n in itertools.count(2)))
            self.basis_names[leaf] = next(x for x in spellings if x not in self._taken)
            self._taken.add(self.basis_names[leaf])

    def expression(self, space: Space) -> Expression:
        root = space.find()
        if root.kind is None:
            return Expression("leaf", root.size, self.basis_names.get(root, ""))
        return Expression(root.kind, root.size, "", tuple(self.expression(p) for p in root.parts))

    # ---- linears and their groups

    def _calls(self) -> dict[str, list[Site]]:
        """Return the calls of each linear, by its weight, in the order of the graph."""
        found: dict[str, list[Site]] = {}
        for site in self.analysis.sites.values():
            found.setdefault(site.weight, []).append(self._with_bias(site))
        return found

    def _with_bias(self, site: Site) -> Site:
        """Return a site that ends where its module does: after the bias, where that is added by itself."""
        bias = getattr(self._owner(self.names[site.weight]), "bias", None)
        if site.bias is not None or bias is None or len(site.node.users) != 1:
            return site
        adding = next(iter(site.node.users))
        added = [self.analysis.parameter_of(n) for n in adding.all_input_nodes if n is not site.node]
        if adding.target not in ops.SUM or len(added) != 1 or added[0] not in self.names:
            return site
        own = self.model.get_parameter(self.names[added[0]]) is bias
        return dataclasses.replace(site, node=adding, bias=added[0]) if own else site

    def _groups(self) -> dict[str, list[str]]:
        """Return each weight's group: all that read one input, views that keep the channels looked through.

        A linear that is called more than once, each time among others, is a group of its own.
        """
        by_input: dict[Node, list[str]] = {}
        for site in self.analysis.sites.values():
            by_input.setdefault(self._root_of(site.source), []).append(site.weight)
        found: dict[str, list[list[str]]] = {}
        for site in self.analysis.sites.values():
            found.setdefault(site.weight, []).append(by_input[self._root_of(site.source)])
        alone = {weight for weight, groups in found.items() if any(g != groups[0] for g in groups)}
        return {w: [w] if w in alone else [x for x in g[0] if x not in alone] for w, g in found.items()}

    def _root_of(self, node: Node) -> Node:
        channels = self.analysis.shape(node)[-1]
        while node.target in ops.SAME | ops.VIEW:
            source = node.args[0]
            assert isinstance(source, Node)
            if self.analysis.shape(source)[-1] != channels:
                break
            node = source
        return node

    def _linear(self, site: Site, groups: dict[str, list[str]]) -> Linear:
        value = self.analysis.parameters[site.weight]
        source, target = value.axes[site.in_axis], value.axes[site.out_axis]
        name = self._module(site.weight)
        decision, reason = self._decision(site, source)
        # a router or an adapter may come first, and no transform is put before it
        first = next((w for w in groups[site.weight] if not self.refusals[w]), site.weight)
        return Linear(
            name=name,
            parameter=self.names[site.weight],
            bias=self.names[site.bias] if site.bias else None,
            in_axis=site.in_axis,
            out_axis=site.out_axis,
            in_features=source.size,
            out_features=target.size,
            decision=decision,
            reason=reason,
            group=self._module(first),
            block=block_of(name),
            input=self.expression(source),
            output=self.expression(target),
            writes_residual=any(self.basis_names.get(leaf) == "residual" for leaf in leaves(target)),
            experts=site.n_experts,
        )

    def _decision(self, site: Site, source: Space) -> tuple[Decision, str]:
        if refusal := self.refusals[site.weight]:
            return "alone", refusal
        atoms = [x for x in dict.fromkeys(leaves(source)) if x.size > 1]
        held = [x for x in atoms if x.freedom == SpaceFreedom.PINNED]
        kept = [x for x in atoms if x.freedom == SpaceFreedom.FIXES_ONES]
        if not held:
            note = f"; the rotation keeps the ones vector ({kept[0].reason})" if kept else ""
            return "folded", "every writer of its input can take the rotation" + note
        if len(held) < len(atoms):
            sizes = " and ".join(str(x.size) for x in held)
            return "partial", f"the factor of {sizes} is pinned by {held[0].reason}; the rest folds"
        return "online", f"pinned by {held[0].reason}"

    def _refusal(self, site: Site) -> str:
        """Return why a linear is left alone, or ""."""
        module = self._owner(self.names[site.weight])
        if site.n_experts and (refusal := self._experts_refusal(site, module)):
            return refusal
        if self._is_router(site, module):
            return "a router: kept in float on purpose, since a rounded one sends tokens to other experts"
        if not site.n_experts and not is_linear(module):
            return f"its weight belongs to a {type(module).__name__}, not to a plain linear"
        if _is_adapter(self.model, self.names[site.weight]):
            return "an adapter beside a quantized linear keeps its precision"
        return ""

    def _experts_refusal(self, site: Site, module: nn.Module) -> str:
        """Return why the experts of a module cannot be packed, or ""; they are packed together or not at all."""
        if not experts_form(module):
            return f"its weight belongs to a {type(module).__name__}, whose way of calling its experts is not known"
        owner = self.names[site.weight].rpartition(".")[0]
        for leaf in projections(module):
            calls = self.expert_calls[f"{owner}.{leaf}"]
            if calls != 1:
                return f"{leaf} of its experts is called {calls} times as a product of {type(module).__name__}"
        return ""

    def _is_router(self, site: Site, module: nn.Module) -> bool:
        """Whether a linear decides where rows go: by the graph, or a module of its own with a row per expert."""
        if site.node in self.routers:
            return True
        rows = self.analysis.parameters[site.weight].axes[site.out_axis].size
        own = not site.n_experts and not is_linear(module)
        return own and (block_of(self.names[site.weight]), rows) in self.expert_counts

    def _group_entries(self, linears: tuple[Linear, ...]) -> tuple[Group, ...]:
        members: dict[str, list[Linear]] = {}
        for linear in linears:
            if linear.decision != "alone":
                members.setdefault(linear.group, []).append(linear)
        return tuple(
            Group(name, tuple(x.name for x in found), found[0].in_features, found[0].block)
            for name, found in members.items()
        )

    # ---- bases, norms, axes

    def _bases(self, linears: tuple[Linear, ...]) -> Iterable[Basis]:
        writers: dict[str, list[str]] = {}
        readers: dict[str, list[str]] = {}
        for parameter in dict.fromkeys(self.analysis.embeddings.values()):
            axis = self.expression(self.analysis.parameters[parameter].axes[1])
            for leaf in axis.leaves():
                writers.setdefault(leaf.basis, []).append(self._module(parameter))
        for linear in linears:
            for leaf in linear.output.leaves():
                writers.setdefault(leaf.basis, []).append(linear.name)
            for leaf in linear.input.leaves():
                readers.setdefault(leaf.basis, []).append(linear.name)
        for space, name in self.basis_names.items():
            wrote, read = (tuple(dict.fromkeys(t.get(name, ()))) for t in (writers, readers))
            yield Basis(name, space.size, _FREEDOM[space.freedom], space.reason, wrote, read)
        yield from self._pinned_bases(linears)

    def _pinned_bases(self, linears: tuple[Linear, ...]) -> Iterable[Basis]:
        """One entry per linear whose input is pinned: the reasons that the inspector shows."""
        for (site, *_), linear in zip(self.calls.values(), linears, strict=True):
            axis = self.analysis.parameters[site.weight].axes[site.in_axis]
            held = [x for x in leaves(axis) if x.size > 1 and x.freedom == SpaceFreedom.PINNED]
            if held:
                yield Basis(f"{linear.name}.input", held[0].size, "pinned", held[0].reason, (), (linear.name,))

    def _norms(self) -> Iterable[Norm]:
        sites = self.analysis.sites
        for found in self.analysis.absorptions:
            gain, shift = (self.names[p] if p else None for p in (found.gain, found.shift))
            readers = tuple(self._module(sites[r].weight) for r in found.readers)
            yield Norm(gain, shift, readers, gain_offset=found.gain_offset)
        for parameter, reason in self.analysis.kept:
            yield Norm(self.names.get(parameter, parameter), None, (), reason)

    def _embeddings(self) -> Iterable[Embedding]:
        for parameter in dict.fromkeys(self.analysis.embeddings.values()):
            rows = self.expression(self.analysis.parameters[parameter].axes[1])
            yield Embedding(self._module(parameter), self.names[parameter], rows)

    def _axes(self) -> Iterable[Axis]:
        for own, value in self.analysis.parameters.items():
            for i, space in enumerate(value.axes):
                if any(leaf in self.basis_names for leaf in leaves(space)):
                    yield Axis(self.names[own], i, self.expression(space))


def site_modules(model: nn.Module, analysis: Analysis) -> dict[str, list[Site]]:
    """Return the calls of each linear of a captured graph by module name, in the order of the graph."""
    planner = _Planner(model, analysis)
    return {planner._module(weight): calls for weight, calls in planner.calls.items()}
