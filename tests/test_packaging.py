"""Wheel and sdist hold one import name; the installed package works beside foreign codegen/ and passes/."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta as b; import sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"


def build(source: Path, kind: str, out: Path) -> Path:
    """Build a wheel or an sdist from a source tree, offline, with the setuptools of this interpreter."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (artefact,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return artefact


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds that matters for packaging, so that the work tree stays clean."""
    copy = tmp_path_factory.mktemp("clone") / "bwla"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "bwla_compiler", copy / "bwla_compiler", ignore=shutil.ignore_patterns("__pycache__"))
    for link in ("passes", "codegen"):
        (copy / link).symlink_to(Path("bwla_compiler") / link)
    return copy


def expected_files() -> set[str]:
    """Return the Python files, recipes and style sheets of the package, as a wheel names them."""
    package = REPOSITORY / "bwla_compiler"
    page = [path for kind in ("css", "js") for path in (package / "inspector").glob(f"*.{kind}")]
    files = [*package.rglob("*.py"), *(package / "recipes").glob("*.toml"), *page]
    return {str(f.relative_to(REPOSITORY)) for f in files}


def wheel_files(wheel: Path) -> set[str]:
    """Return the files of a wheel without its metadata folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


def test_links_show_the_layout() -> None:
    for link in ("passes", "codegen"):
        path = REPOSITORY / link
        if not path.is_symlink():
            pytest.skip(f"{link} is no link here: this is not a clone")
        assert path.resolve() == (REPOSITORY / "bwla_compiler" / link).resolve()


def test_wheel_holds_the_package_and_nothing_else(source: Path, tmp_path: Path) -> None:
    wheel = build(source, "wheel", tmp_path)
    assert wheel_files(wheel) == expected_files()
    with zipfile.ZipFile(wheel) as archive:
        texts = {n.rpartition("/")[2]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    assert "bwla-compile = bwla_compiler.cli:main" in texts["entry_points.txt"]
    assert texts["top_level.txt"].split() == ["bwla_compiler"]
    assert "Requires-Python: >=3.11" in texts["METADATA"]


def test_sdist_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        tops = {n.split("/")[1] for n in archive.getnames() if "/" in n}
        archive.extractall(tmp_path / "tree", filter="data")
    assert not tops & {"passes", "codegen"}
    (tree,) = (tmp_path / "tree").iterdir()
    assert wheel_files(build(tree, "wheel", tmp_path / "wheel")) == expected_files()


@pytest.mark.slow
def test_installed_wheel_works_beside_foreign_modules(source: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel = build(source, "wheel", tmp_path / "wheel")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True)
    for name in ("passes", "codegen"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "__init__.py").write_text("raise ImportError('a stranger was imported')")
    # The site folder comes before the interpreter's own editable install, and the foreign folders before both.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "work"), str(site)])}
    code = (
        "import bwla_compiler, sys; from bwla_compiler.cli import main; code = main(['recipes']);"
        "import bwla_compiler.passes, bwla_compiler.codegen;"
        "print(bwla_compiler.__file__); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bwla-w1a6" in done.stdout
    assert str(site) in done.stdout
