"""The basis analysis as a whole: one table of rules, applied to a captured graph."""

from collections.abc import Collection
from typing import Any

from torch.fx import GraphModule

from bwla_compiler.graph.analysis import Analysis, Rule
from bwla_compiler.graph.rules_arithmetic import ARITHMETIC_RULES
from bwla_compiler.graph.rules_contraction import CONTRACTION_RULES
from bwla_compiler.graph.rules_indexing import INDEXING_RULES
from bwla_compiler.graph.rules_layout import LAYOUT_RULES

KINDS: tuple[tuple[frozenset[Any], Rule], ...] = (
    *CONTRACTION_RULES,
    *LAYOUT_RULES,
    *INDEXING_RULES,
    *ARITHMETIC_RULES,
)
"""Kinds of operations, and the rule of each."""

RULES: dict[Any, Rule] = {target: rule for targets, rule in KINDS for target in targets}
"""One rule per operation of the normal form."""


def analyse(
    gm: GraphModule, *, biasable: Collection[int] | None = None, untieable: Collection[int] | None = None
) -> Analysis:
    """Return which axes of a captured graph live in which space, and what each space may be rotated by.

    biasable: ids of the weights whose module adds a bias once it has one; untieable: ids of the embeddings that may
    part with the head they share a tensor with; all, where not given.
    """
    return Analysis(gm, RULES, biasable=biasable, untieable=untieable)
