"""Imports point down the layers; strangers of one layer do not know each other; the package imports cheaply."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bwla_compiler"

LAYERS = {
    "errors": 0,
    **dict.fromkeys(("settings", "recipe", "recipe_reading", "spec", "tokens"), 1),
    **dict.fromkeys(("numerics", "cost", "workers", "memory"), 1),
    **dict.fromkeys(("graph", "codegen"), 2),
    "runtime": 3,
    "passes": 4,
    **dict.fromkeys(("calibrate", "checkpoint", "inspector", "evaluate", "demo", "emit"), 5),
    "backend": 6,
    **dict.fromkeys(
        ("main_job", "comparison", "inspection", "dumping", "streaming", "serving", "generation", "zoo", "api"), 7
    ),
    **dict.fromkeys(("cli", "cli_bench", "cli_options", "cli_inspect", "cli_packing", "__main__"), 7),
}
STRANGERS = {2, 5}


def place_of(module: str) -> str:
    """Return the second part of a dotted name: the place; "" for the package itself."""
    return (module.split(".") + [""])[1]


def imports(source: str, *, module: str, is_package: bool) -> set[str]:
    """Return the dotted names that a file imports anywhere, inside functions and TYPE_CHECKING too.

    `from a import b` gives both a and a.b, since b may be a module. Relative names are made absolute.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({name, *(f"{name}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            found.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """Return a line for every import that points up, or sideways to a stranger."""
    own = place_of(module)
    lines = []
    for name in sorted(imported):
        other = place_of(name)
        if name.split(".")[0] != "bwla_compiler" or other in ("", own) or other not in LAYERS:
            continue
        up = LAYERS[other] > LAYERS[own]
        stranger = LAYERS[other] == LAYERS[own] and LAYERS[own] in STRANGERS
        if up or stranger:
            lines.append(f"{module} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[other]})")
    return lines


def modules() -> list[tuple[str, Path]]:
    """Return every module of the package but its root, with its dotted name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "bwla_compiler":
            found.append((name, path))
    return found


def test_every_module_has_a_layer() -> None:
    assert {place_of(name) for name, _ in modules()} <= set(LAYERS)


def test_imports_point_down() -> None:
    broken = []
    for name, path in modules():
        found = imports(path.read_text("utf-8"), module=name, is_package=path.name == "__init__.py")
        broken += violations(name, found)
        broken += [f"{name}: star import" for f in found if f.startswith("bwla_compiler") and f.endswith(".*")]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "module, source, breaks",
    [
        ("bwla_compiler.passes.base", "from bwla_compiler.graph.plan import Plan", False),
        ("bwla_compiler.passes.base", "from bwla_compiler import errors", False),
        ("bwla_compiler.passes.base", "def f():\n    from bwla_compiler import api", True),
        ("bwla_compiler.graph.plan", "import bwla_compiler.codegen.build", True),
        ("bwla_compiler.inspector.page", "from bwla_compiler.calibrate.report import X", True),
        ("bwla_compiler.inspector.page", "from . import report", False),
        ("bwla_compiler.inspector.page", "from ..calibrate import report", True),
        ("bwla_compiler.recipe", "from bwla_compiler.settings import settings", False),
        ("bwla_compiler.recipe", "import importlib\nimportlib.import_module('bwla_compiler.graph')", True),
        ("bwla_compiler.errors", "import bwla_compiler.spec", True),
    ],
)
def test_the_check_itself_can_fail(module: str, source: str, breaks: bool) -> None:
    assert bool(violations(module, imports(source, module=module, is_package=False))) is breaks


def test_packages_hold_a_docstring_and_names_only() -> None:
    for name, path in modules():
        if path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), f"{name}: no docstring"
        rest = [node for node in tree.body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))]
        assert not rest, f"{name}/__init__.py holds code: {ast.unparse(rest[0])[:80]}"


def test_every_module_opens_with_a_docstring() -> None:
    missing = [name for name, path in modules() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not missing


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, bwla_compiler; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_the_root_names_agree_with_their_homes() -> None:
    import bwla_compiler

    assert sorted(bwla_compiler.__all__) == sorted(bwla_compiler._HOMES)
    for name in bwla_compiler.__all__:
        assert getattr(bwla_compiler, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bwla_compiler.nothing  # noqa: B018
