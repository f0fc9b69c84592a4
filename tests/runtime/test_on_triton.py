"""The Triton side in Triton's interpreter, in a process of its own; and who is chosen to compute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bwla_compiler.codegen import triton_module
from bwla_compiler.errors import BuildError, SettingsError
from bwla_compiler.runtime import native, on_triton
from bwla_compiler.settings import settings

CHECKS = Path(__file__).parent / "interpreted_triton.py"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with environment variables added; PATH-like ones are inherited."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        cwd=CHECKS.parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_equal_float64_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    chosen = ("-q", "-p", "no:cacheprovider", "-m", pytestconfig.getoption("-m"))
    done = run("-m", "pytest", *chosen, str(CHECKS), TRITON_INTERPRET="1", BWLA_KERNELS="triton")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_package_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"  # an import of it raises ImportError
        "import torch\n"
        "from bwla_compiler.errors import BuildError\n"
        "from bwla_compiler.codegen import triton_module\n"
        "import bwla_compiler.api, bwla_compiler.cli, bwla_compiler.emit\n"
        "from bwla_compiler.runtime import on_triton\n"
        "assert not on_triton.serves(torch.ones(2, 4))\n"
        "assert not triton_module.installed()\n"
        "try: triton_module.require_triton()\n"
        "except BuildError as error: print(error)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "install it with: pip install 'triton>=3.6'" in done.stdout


@pytest.mark.exhaustive
def test_no_import_of_triton_until_it_is_needed() -> None:
    code = "import sys, bwla_compiler.runtime.on_triton, bwla_compiler.emit; sys.exit('triton' in sys.modules)"
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize("chosen, cpp", [("auto", True), ("cpp", True), ("torch", False), ("", True)])
def test_the_environment_chooses_who_computes(chosen: str, cpp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_KERNELS", chosen)
    assert settings().kernels == (chosen or "auto")
    assert native.wanted() is cpp
    assert not on_triton.serves(torch.ones(2, 4))


def test_an_unknown_choice_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_KERNELS", "gpu")
    with pytest.raises(SettingsError, match="BWLA_KERNELS is 'gpu': expected one of auto, triton, cpp, torch"):
        settings()


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_KERNELS", "triton")
    assert not triton_module.interpreted(), "this file runs without TRITON_INTERPRET"
    with pytest.raises(BuildError, match="set TRITON_INTERPRET=1 before Python starts"):
        on_triton.serves(torch.ones(2, 4))
    assert not on_triton.serves(torch.ones(0, 4))
