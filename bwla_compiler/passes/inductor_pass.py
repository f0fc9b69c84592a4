"""Our passes as Inductor runs them: on the decomposed graph, known to its cache by their source."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from bwla_compiler.graph.dump import GraphDump, graph_text
from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.bind_calls import BindCalls
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.passes.keep_sines import KeepSines
from bwla_compiler.passes.unrepeat_heads import UnrepeatHeads
from bwla_compiler.runtime import routines
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)

_SOURCES = (
    "bind_calls", "fuse_kernels", "graph_order", "inductor_pass", "keep_sines", "match_activations", "match_graph",
    "match_norms", "match_prologue", "packed_calls", "unrepeat_heads",
)  # fmt: skip


def _dump() -> GraphDump | None:
    """Return who writes the next graph where BWLA_DUMP asks for that: graph00-..., graph01-..."""
    folder = settings().dump
    if folder is None:
        return None
    number = len(list(folder.glob("graph*-00-decomposed.txt")))
    return GraphDump(folder, before=f"graph{number:02d}-")


class InductorFusion(CustomGraphPass):
    """Runs our passes on each graph. names: of the tensors of the graph's module, which routines are written with.

    `reports` holds what UnrepeatHeads, FuseKernels and BindCalls said; nothing of graphs from Inductor's cache.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = tuple(names)
        self.reports: list[PassReport] = []

    def __call__(self, graph: Graph) -> None:
        """Rewrite in place."""
        dump = _dump()
        if dump is not None:
            dump.add("decomposed", graph_text(graph))
        for step in (UnrepeatHeads(), FuseKernels(), BindCalls()):
            report = step.run(graph)
            notes = [f"{what}: {outcome}" for what, outcome in (*report.changed, *report.skipped)]
            log.info("%s: %d changed, %d left alone", report.name, len(report.changed), len(report.skipped))
            for note in notes:
                log.debug("%s", note)
            self.reports.append(report)
            if dump is not None:
                dump.add(report.name, graph_text(graph), notes=notes)
        KeepSines().run(graph)

    def uuid(self) -> bytes:
        """Return a hash of the source of every file that decides what the pass does, and of the tensors' names.

        Inductor's own key holds the order of a graph's inputs, and not what they are called.
        """
        home = Path(__file__).parent
        files = (*(str(home / f"{name}.py") for name in _SOURCES), routines.__file__)
        key: bytes = get_hash_for_files(files)
        return key + hashlib.blake2b("\n".join(self._names).encode(), digest_size=16).digest()
