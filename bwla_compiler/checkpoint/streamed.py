"""StreamedWeights: a model whose weights come from shards block by block and leave, packed, as shards.

In memory are, beside the block at work, the vectors of norms. Folds are kept as edits and performed on a module's
parameters whenever these come. See `calibrate.residency` for what a run asks of it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.checkpoint.files import data_bytes, opened
from bwla_compiler.checkpoint.guards import guard_names, with_guards
from bwla_compiler.checkpoint.source import SourceWeights, aliases
from bwla_compiler.checkpoint.work import WorkFolder
from bwla_compiler.graph.capture import attribute, parameter_name
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import block_of
from bwla_compiler.memory import release
from bwla_compiler.passes.apply import apply_module, replace_module
from bwla_compiler.passes.base import Edit, Pass, PassContext, PassReport, ShiftBias, Untie
from bwla_compiler.recipe import Tuning
from bwla_compiler.runtime.skeleton import build_skeleton, describe, packed_modules


class StreamedWeights:
    """The weights of an empty model (see `checkpoint.empty`) between a source and a work folder.

    tuning: of the packed model as a whole; where it has steps, what is stored first is not final. change: what was
    given up of the tuning asked for.
    """

    def __init__(
        self, model: nn.Module, source: SourceWeights, work: WorkFolder, tuning: Tuning, change: str = ""
    ) -> None:
        self.model, self.source, self.work = model, source, work
        self.tuning, self.change, self.tuned = tuning, change, tuning.steps > 0
        self._modules = _parameters_by_module(model)
        self._here: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._edits: dict[str, list[Edit]] = {}
        self._created: set[str] = set()
        self._placed = dict(model.named_parameters(remove_duplicate=False))
        names = [name for own in self._modules.values() for name in own]
        self.blocks = tuple(dict.fromkeys(block for name in names if (block := block_of(name))))
        self._stored: set[str] = set()
        self._gathered = False
        self._look: Callable[[str, Tensor], None] = lambda name, values: None

    # ---- what a run asks for, in its order

    def check(self) -> None:
        """Each weight is checked when it is read."""

    def afford(self, tuning: Tuning) -> tuple[Tuning, str]:
        """Return what was decided on when the run was begun."""
        return self.tuning, self.change

    def prepare(self, plan: Plan) -> None:
        """Load norms' vectors and buffers, and what the plan's norms name wherever it is."""
        inside = {name for own in self._modules.values() for name in own}
        wanted = [n for n in self.model.state_dict(keep_vars=True) if n not in inside and self.source.has(n)]
        named = {name for norm in plan.norms for name in (norm.gain, norm.shift) if name}
        self._assign(self.source.load([*wanted, *sorted(named & inside)]))

    def watch(self, look: Callable[[str, Tensor], None]) -> None:
        """Have each weight shown when it is read."""
        self._look = look

    def fold(self, step: Pass, ctx: PassContext) -> PassReport:
        """Run a pass; edits of parameters that are not here wait for them."""
        start = time.perf_counter()
        report = step.run(ctx)
        for edit in report.edits:
            self._take(edit)
        report.seconds = time.perf_counter() - start
        return report

    def value(self, gm: GraphModule, node: Node) -> Tensor:
        """Return the folded values of what a get_attr node names, read for this once where they are not here."""
        name = parameter_name(node)
        owner = name.rpartition(".")[0]
        if name not in self._modules.get(owner, ()):
            return attribute(gm, node)
        if name in self._held:
            return self._held[name]
        if owner in self._here:
            return self.model.get_parameter(name).detach()
        self._load(owner)
        value = self.model.get_parameter(name).detach()
        self._drop([owner])
        return value

    def fetch(self, *prefixes: str) -> None:
        """Load the modules under these names, and hold their folded values for the fp stream."""
        for module in self._under(prefixes):
            if module not in self._here:
                self._load(module)
                self._held |= {n: self.model.get_parameter(n).detach() for n in self._modules[module]}

    def fetch_rest(self) -> None:
        """Store the blocks that have nothing to quantize, then load what stands outside all blocks."""
        for block in self.blocks:
            if block not in self._stored:
                if self.work.unit(block) is None:
                    self.fetch(block)
                self.store(block, {"linears": [], "passes": []} if self.work.unit(block) is None else {})
        for module, names in self._modules.items():
            if module not in self._here and not block_of(names[0]):
                self._load(module)

    def finished(self, block: str, *, floats: bool) -> dict[str, Any] | None:
        """Return what the fit of a block reported, its packed modules put in place; None where it is to be done.

        Raises CheckpointError where the shard was lost or damaged.
        """
        record = self.work.unit(block)
        if record is None:
            return None
        if floats:
            self.fetch(block)
        self._restore(block, record, real=floats)
        fit: dict[str, Any] = record["fit"]
        return fit

    def store(self, block: str, record: dict[str, Any]) -> None:
        """Write a block's shard, unless an earlier run has (then `record` is empty), and free its memory."""
        if record:
            modules = packed_modules(self.model, within=block)
            kept = {"modules": {n: describe(m, modules) for n, m in modules.items()}, "fit": record}
            self.work.put(block, self._file(block), self._shard(block), kept)
        self._stored.add(block)
        self._free(block)
        release()

    def gather(self) -> None:
        """Load all packed modules."""
        for block in self.blocks:
            record = self.work.unit(block)
            assert record is not None
            self._restore(block, record, real=True)
        self._gathered = True

    def write(self) -> tuple[dict[str, str], int]:
        """Write what is not stored yet under its final name; return the file of each tensor, and the bytes of all."""
        if self.tuned and not self._gathered:
            self.gather()
        for block in self.blocks if self.tuned else ():
            self.work.write(self._final(block), self._shard(block))
        rest = _outside(self.model, self.blocks)
        ends = {n: m for n, m in packed_modules(self.model).items() if not block_of(f"{n}.")}
        self.work.write(self._final(""), with_guards(rest, ends))
        files: dict[str, str] = {}
        for name in (*map(self._final, self.blocks), self._final("")):
            with opened(self.work.path / name) as file:
                files |= dict.fromkeys(file.keys(), name)
        return files, sum(data_bytes(self.work.path / name) for name in set(files.values()))

    def _shard(self, block: str) -> dict[str, Tensor]:
        state = dict(self.model.get_submodule(block).state_dict(prefix=f"{block}."))
        return with_guards(state, packed_modules(self.model, within=block))

    # ---- parameters that come and go

    def _take(self, edit: Edit) -> None:
        if isinstance(edit, Untie):
            self._untie(edit)
            return
        owner = edit.linear if isinstance(edit, ShiftBias) else _owner_of(edit)
        if owner not in self._modules:
            apply_module(self.model, [edit])
            return
        if isinstance(edit, ShiftBias) and getattr(self.model.get_submodule(owner), "bias", None) is None:
            size = self._placed[f"{owner}.weight"].shape[1 - edit.in_axis]
            bias = nn.Parameter(torch.zeros(size), requires_grad=False)
            self.model.get_submodule(owner).register_parameter("bias", bias)
            self._created.add(f"{owner}.bias")
            self._modules[owner] = (*self._modules[owner], f"{owner}.bias")
            self._placed[f"{owner}.bias"] = bias
        self._edits.setdefault(owner, []).append(edit)

    def _untie(self, edit: Untie) -> None:
        head = self.model.get_submodule(edit.head)
        own = nn.Parameter(self._placed[edit.embedding].detach(), requires_grad=False)
        head.register_parameter("weight", own)
        self._placed[f"{edit.head}.weight"] = own
        self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]

    def _load(self, module: str) -> None:
        """Read a module's parameters and fold them; a parameter that is tied to one that is here is that one."""
        tied = aliases(self.model)
        names = self._modules[module]
        shared = {n: a for n in names for a in tied.get(n, ()) if a.rpartition(".")[0] in self._here}
        fresh = [n for n in names if n not in self._created and n not in shared]
        values = self.source.load(fresh)
        for name, read in values.items():
            self._look(name, read)
        for name in names:
            if name in shared:
                self._set(name, self.model.get_parameter(shared[name]))
            else:
                value = values.get(name, torch.zeros_like(self._placed[name]) if name in self._created else None)
                assert value is not None
                self._set_tied(name, nn.Parameter(value, requires_grad=False), tied)
        apply_module(self.model, self._edits.get(module, ()))
        self._here.add(module)

    def _set_tied(self, name: str, parameter: nn.Parameter, tied: Mapping[str, tuple[str, ...]]) -> None:
        for own in (name, *tied.get(name, ())):
            self._set(own, parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = parameter

    def _drop(self, modules: Iterable[str]) -> None:
        """Put what takes no memory in the place of modules' parameters, and of those tied to them."""
        tied = aliases(self.model)
        for module in modules:
            for name in self._modules[module]:
                for own in (name, *tied.get(name, ())):
                    self._set(own, self._placed[own])
            self._here.discard(module)

    def _under(self, prefixes: Iterable[str]) -> list[str]:
        """Return the modules with parameters at or under these names; a name may be that of a parameter."""
        owners = [p if p not in self._placed else p.rpartition(".")[0] for p in prefixes]
        return [m for m in self._modules if any(m == owner or m.startswith(f"{owner}.") for owner in owners)]

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers these values."""
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    # ---- blocks that are done

    def _restore(self, block: str, record: Mapping[str, Any], *, real: bool) -> None:
        """Put a stored block's packed modules in place, with their values where they are wanted."""
        with torch.device("cpu" if real else "meta"):
            built = build_skeleton(record["modules"])
        for name, module in built.items():
            replace_module(self.model, name, module)
        if real:
            with opened(self.work.path / record["file"]) as file:
                guards = guard_names(built)
                self._assign({n: file.get_tensor(n).clone() for n in file.keys() if n not in guards})  # noqa: SIM118

    def _free(self, block: str) -> None:
        for packed in packed_modules(self.model, within=block).values():
            packed.to("meta")
        for module in self._under([block]):
            self._here.discard(module)
            parameters = self.model.get_submodule(module)._parameters
            for name in self._modules[module]:
                self._held.pop(name, None)
                left = parameters.get(name.rpartition(".")[2])
                if left is not None:  # else a packed module has taken its place
                    self._set(name, nn.Parameter(left.detach().to("meta"), requires_grad=False))

    def _final(self, unit: str) -> str:
        total = len(self.blocks) + 1
        number = self.blocks.index(unit) + 1 if unit else total
        return f"model-{number:05d}-of-{total:05d}.safetensors"

    def _file(self, block: str) -> str:
        return f"untuned-{self._final(block)}" if self.tuned else self._final(block)


def _parameters_by_module(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each module that has a matrix; those of vectors alone stay in memory."""
    found = {}
    for name, module in model.named_modules():
        own = module._parameters
        if any(p is not None and p.ndim >= 2 for p in own.values()):
            found[name] = tuple(f"{name}.{leaf}".lstrip(".") for leaf, p in own.items() if p is not None)
    return found


def _owner_of(edit: Edit) -> str:
    return str(getattr(edit, "parameter")).rpartition(".")[0]  # noqa: B009 (edits of folds name a parameter)


def _outside(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the saved tensors outside all blocks; of tied ones, the first."""
    starts = tuple(f"{block}." for block in blocks)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(starts) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found
