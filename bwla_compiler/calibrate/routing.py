"""Rows that the two streams send to experts, each with its expert and its twin in the fp stream.

The streams route by their own routers, so a row of one has its twin elsewhere in the other, or nowhere: rows are
matched by token and expert, which the permutation that sorted them tells.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from bwla_compiler.calibrate.experts import Rows, matched
from bwla_compiler.calibrate.stream import TwinStream, experts_of
from bwla_compiler.graph.analysis import Site
from bwla_compiler.graph.experts import sorting_of
from bwla_compiler.numerics.activations import fake_quantize
from bwla_compiler.runtime.online import OnlineTransform


def keep_routing(stream: TwinStream, sites: Iterable[Site]) -> None:
    """Keep alive what says how the rows of each product of experts were sorted, until that product."""
    for site in sites:
        order = None if site.offsets is None else sorting_of(site.offsets)
        if order is not None:
            stream.keep(order[0], until=site.node)


def routed_rows(
    stream: TwinStream, site: Site, *, transform: OnlineTransform | None, bits: int, drift: bool
) -> list[Rows]:
    """Return the rows that a product of experts reads, by batch, transformed, the quantized ones rounded to `bits`."""
    order = None if site.offsets is None else sorting_of(site.offsets)
    routing = _pairs(stream, site.offsets)
    orders = _pairs(stream, None if order is None else order[0])
    found = []
    for (fp, q), ends, orders_here in zip(stream.pairs(site.source), routing, orders, strict=True):
        experts = [experts_of(x, offsets, site.n_experts) for x, offsets in zip((fp, q), ends, strict=True)]
        if transform is not None:
            fp, q = transform(fp), transform(q)
        fp, seen = fp.float(), fake_quantize(q.float(), bits=bits)
        choices = 1 if order is None else order[1]
        keys = [_keys(e, o, choices, site.n_experts) for e, o in zip(experts, orders_here, strict=True)]
        twin, alike = matched(seen, keys[1], fp, keys[0])
        error = torch.where(alike[:, None], twin - seen, 0.0) if drift else None
        found.append(Rows(seen, experts[1], error, alike))
    return found


def _pairs(stream: TwinStream, node: Node | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return a node's values in both streams by batch; Nones where there is no node."""
    return [(None, None)] * len(stream.batches) if node is None else list(stream.values(node))


def _keys(experts: Tensor, order: Tensor | None, choices: int, n_experts: int) -> Tensor:
    """Return a number [N] for each row that its token and expert alone decide; its place, where nothing was sorted.

    Rows of no expert (EP) get numbers of their own tokens too: no expert's fit reads them.
    """
    if order is None:
        return torch.arange(experts.shape[0], device=experts.device)
    return order // choices * (n_experts + 1) + experts
