"""Where a model's weights are while it is quantized: all in memory, or block by block from and to a disk.

A block is fetched before its first linear is fitted and stored after the streams have passed it; what stands outside
all blocks (embedding, head, last norm) comes with `fetch_rest`. Names are those of parameters and modules.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bwla_compiler.graph.capture import attribute
from bwla_compiler.graph.plan import Plan
from bwla_compiler.passes.apply import check_weights
from bwla_compiler.passes.base import Pass, PassContext, PassReport
from bwla_compiler.passes.pipeline import run_pass


class Residency(Protocol):
    """Who holds the weights. Records are JSON data, opaque here: what a block's fit reported."""

    def check(self) -> None:
        """Raise WeightError for weights that cannot be quantized, as far as they are in memory."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Have the values at hand that folding passes read."""
        ...

    def watch(self, look: Callable[[str, Tensor], None]) -> None:
        """Show each parameter of two axes or more, by name, to `look`, as it comes and before it is folded."""
        ...

    def fold(self, step: Pass, ctx: PassContext) -> PassReport:
        """Run a folding pass; a parameter that is not in memory takes its edits when it comes."""
        ...

    def value(self, gm: GraphModule, node: Node) -> Tensor:
        """Return what a get_attr node of the captured model stands for, folded."""
        ...

    def fetch(self, *prefixes: str) -> None:
        """Bring the parameters of these modules into memory, folded."""
        ...

    def fetch_rest(self) -> None:
        """Bring in what stands outside all blocks."""
        ...

    def finished(self, block: str, *, floats: bool) -> dict[str, Any] | None:
        """Return the record of a block that an earlier run has stored, with its packed modules in place; else None.

        floats: whether the folded float weights are wanted too, for the fp stream.
        """
        ...

    def store(self, block: str, record: dict[str, Any]) -> None:
        """Take a block that is done and that nothing will read again."""
        ...

    def gather(self) -> str:
        """Bring all packed modules back; return "", or the reason why they cannot all be in memory."""
        ...


class InMemory:
    """All weights are in the model already, and stay."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def check(self) -> None:
        """Raise WeightError, naming the parameter."""
        check_weights(self.model)

    def prepare(self, plan: Plan) -> None:
        """Nothing to do."""

    def watch(self, look: Callable[[str, Tensor], None]) -> None:
        """Show all of them at once."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim >= 2:
                look(name, parameter.detach())

    def fold(self, step: Pass, ctx: PassContext) -> PassReport:
        """Run the pass on the model."""
        return run_pass(self.model, step, ctx)

    def value(self, gm: GraphModule, node: Node) -> Tensor:
        """Return the tensor that the graph holds, which is the model's own."""
        return attribute(gm, node)

    def fetch(self, *prefixes: str) -> None:
        """Nothing to do."""

    def fetch_rest(self) -> None:
        """Nothing to do."""

    def finished(self, block: str, *, floats: bool) -> dict[str, Any] | None:
        """Return None: there was no earlier run."""
        return None

    def store(self, block: str, record: dict[str, Any]) -> None:
        """Nothing to do."""

    def gather(self) -> str:
        """Return "": they are all here."""
        return ""
