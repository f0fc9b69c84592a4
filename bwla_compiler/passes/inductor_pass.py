"""Our passes as Inductor runs them: on the decomposed graph, known to its cache by their source."""

import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from bwla_compiler.codegen import triton_spec
from bwla_compiler.graph.dump import GraphDump, graph_text
from bwla_compiler.passes.base import PassReport
from bwla_compiler.passes.bind_calls import BindCalls
from bwla_compiler.passes.expand_anchors import CollapseAnchors, ExpandAnchors
from bwla_compiler.passes.expose_kernels import ExposeKernels
from bwla_compiler.passes.fuse_attention import FuseAttention
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.passes.keep_sines import KeepSines
from bwla_compiler.passes.read_codes import ReadCodes
from bwla_compiler.passes.unrepeat_heads import UnrepeatHeads
from bwla_compiler.runtime import routines, triton_tuner
from bwla_compiler.settings import settings

log = logging.getLogger(__name__)

_SOURCES = (
    "bind_calls", "expand_anchors", "expose_kernels", "fuse_attention", "fuse_kernels", "graph_order", "inductor_pass",
    "keep_sines", "match_activations", "match_graph", "match_norms", "match_prologue", "packed_calls", "read_codes",
    "routine_calls", "unrepeat_heads",
)  # fmt: skip


def _dump() -> GraphDump | None:
    """Return who writes the next graph where BWLA_DUMP asks for that: graph00-..., graph01-..."""
    folder = settings().dump
    if folder is None:
        return None
    number = len(list(folder.glob("graph*-00-decomposed.txt")))
    return GraphDump(folder, before=f"graph{number:02d}-")


class InductorFusion(CustomGraphPass):
    """Runs our passes on each graph.

    names: of the tensors of the graph's module, which routines are written with. exact: of those, factors of a change
    of basis that are exact in tf32. `reports` holds what the passes said; nothing of graphs from Inductor's cache.
    """

    def __init__(self, names: Sequence[str] = (), exact: Collection[str] = ()) -> None:
        self._names, self._exact = tuple(names), frozenset(exact)
        self.reports: list[PassReport] = []

    def __call__(self, graph: Graph) -> None:
        """Rewrite in place."""
        dump = _dump()
        if dump is not None:
            dump.add("decomposed", graph_text(graph))
        last = (ExposeKernels(self._exact),) if settings().inline else ()
        fusion = (UnrepeatHeads(), ReadCodes(), FuseKernels(), FuseAttention(), BindCalls())
        for step in (ExpandAnchors(), *fusion, CollapseAnchors(), *last):
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
        """Return a hash of the source of every file that decides what the pass does, and of all else that does.

        That is the tensors' names, since Inductor's own key holds the order of a graph's inputs and not what they are
        called; and for kernels in the graph, the settings and the tiles that were timed until now.
        """
        home = Path(__file__).parent
        kernels = (*Path(triton_spec.__file__).parent.glob("triton_*.py"), *Path(routines.__file__).parent.glob("*.py"))
        files = (*(str(home / f"{name}.py") for name in _SOURCES), *sorted(map(str, kernels)))
        key: bytes = get_hash_for_files(files)
        words = (*self._names, "", *sorted(self._exact), "", *_kernel_choices())
        return key + hashlib.blake2b("\n".join(words).encode(), digest_size=16).digest()


def _kernel_choices() -> tuple[str, ...]:
    """Return, in words, what the choice of kernels depends on beside their sources."""
    chosen = settings()
    return str(chosen.inline), chosen.kernels, triton_tuner.table_text()
