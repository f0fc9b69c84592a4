"""Which weights a captured graph multiplies by: what the share of quantized weights is a share of."""

from torch import nn
from torch.fx import GraphModule, Node

from bwla_compiler.graph import opkinds as ops
from bwla_compiler.graph.capture import attribute, parameter_name


def product_weights(gm: GraphModule) -> tuple[str, ...]:
    """Return the names of the parameters, of two axes or more, that matrix products of the graph read, each once.

    A table that is looked up by id alone is none of them; one that also serves as head is.
    """
    sources: dict[Node, set[Node]] = {}
    found: dict[int, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            sources[node] = {node}
            continue
        inputs = node.all_input_nodes
        constant = bool(inputs) and node.target not in ops.EMBEDDING and all(i in sources for i in inputs)
        if constant:
            sources[node] = set().union(*(sources[i] for i in inputs))
        elif _multiplies(node):
            for source in set().union(*(sources.get(i, set()) for i in inputs)):
                tensor = attribute(gm, source)
                if isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
                    found.setdefault(id(tensor), parameter_name(source))
    return tuple(found.values())


def _multiplies(node: Node) -> bool:
    return node.target in ops.LINEAR | ops.ADDMM | ops.MATMUL or str(node.target) in ops.GROUPED
