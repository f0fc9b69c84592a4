"""FuseKernels and FlattenCalls as Inductor runs them: on the decomposed graph, known to its cache by their source."""

import logging
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.flatten_calls import FlattenCalls
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.runtime import flat

log = logging.getLogger(__name__)

_SOURCES = (
    "flatten_calls", "fuse_kernels", "graph_order", "inductor_pass", "match_activations", "match_graph", "match_norms",
    "match_prologue", "packed_calls",
)  # fmt: skip


class InductorFusion(CustomGraphPass):
    """Runs FuseKernels on each graph; `reports` holds what it said, none for graphs that came from Inductor's cache."""

    def __init__(self) -> None:
        self.reports: list[PassReport] = []

    def __call__(self, graph: Graph) -> None:
        """Fuse in place."""
        report = FuseKernels().run(graph)
        log.info("fused %d groups of linears, left %d", len(report.changed), len(report.skipped))
        for what, outcome in (*report.changed, *report.skipped):
            log.debug("%s: %s", what, outcome)
        self.reports.append(report)
        FlattenCalls().run(graph)

    def uuid(self) -> bytes:
        """Return a hash of the source of every file that decides what the pass does."""
        home = Path(__file__).parent
        files = (*(str(home / f"{name}.py") for name in _SOURCES), flat.__file__)
        key: bytes = get_hash_for_files(files)
        return key
