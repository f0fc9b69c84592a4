"""Our kernels held to an instruction set below the processor's best, to time the path that other processors take."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from benchmarks.errors import ResultsError
from bwla_compiler.codegen import isa as isas
from bwla_compiler.codegen.library import load


@contextmanager
def held_to(isa: str) -> Iterator[None]:
    """Emit and load kernels for an instruction set, and name it in results; peers compute as they are. "": the best.

    Holds in a process that has not loaded kernels yet. Raises ResultsError for a set that there is not, that this
    processor lacks, or where kernels are loaded already.
    """
    if not isa:
        yield
        return
    known = [name for name in isas.ISAS if isas.supported(name)]
    wanted = next((name for name in known if name == isa), None)
    if wanted is None:
        raise ResultsError(f"no instruction set {isa!r} here; there are: {', '.join(known)}")
    if load.cache_info().currsize:
        raise ResultsError(f"kernels are loaded already: --isa {isa} needs a process of its own")
    with patch.object(isas, "cpu_flags", lambda: isas.NEEDS[wanted]):
        yield
