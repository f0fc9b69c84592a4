"""Compilation of the C++ operators against the installed torch."""

import sys
from pathlib import Path

import torch

from bwla_compiler.codegen.build import build_library
from bwla_compiler.codegen.cpp_ops import emit_operators
from bwla_compiler.settings import settings


def build_operators() -> Path | None:
    """Return the shared library of the operators, built at most once for a torch and a compiler.

    None where there is no compiler. Raises BuildError where torch's headers are missing or do not compile.
    """
    home = Path(torch.__file__).parent
    includes = [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"]
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    flags += _openmp()
    source = emit_operators()
    if dump := settings().dump:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "operators.cpp").write_text(source)
    return build_library(
        source,
        "operators",
        flags=[*flags, *(part for folder in includes for part in ("-isystem", str(folder)))],
        links=[f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"],
        key=[torch.__version__, str(torch.version.git_version)],
    )


def _openmp() -> list[str]:
    """Return what makes at::parallel_for, which torch's headers define, use torch's threads: without it, it uses one.

    The library that this asks for is the one that torch has loaded.
    """
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return []
    return ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
