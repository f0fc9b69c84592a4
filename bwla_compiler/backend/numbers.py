"""Numbers of a raw model that Dynamo made inputs of its graph, as it does of every float under dynamic=True."""

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def settle_numbers(gm: GraphModule) -> None:
    """Put floats that come in as tensors into the graph as the constants they are, in place.

    An epsilon, a scale or an offset is part of what the plan is proven for. Dynamo guards on each: where one changes,
    the model is compiled anew. The placeholders stay, unread.
    """
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        if not getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False):
            continue
        for item in list(placeholder.users):
            if item.op == "call_method" and item.target == "item":
                _put(float(item.meta["example_value"]), item)  # float() has Dynamo guard on this very value
                gm.graph.erase_node(item)
    gm.recompile()


def _put(number: float, item: Node) -> None:
    for user in list(item.users):
        user.args = map_arg(user.args, lambda n: number if n is item else n)
        user.kwargs = map_arg(user.kwargs, lambda n: number if n is item else n)
