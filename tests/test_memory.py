"""Memory: the machine's, or less where a container has a limit."""

from pathlib import Path

import pytest

from bwla_compiler import memory


def test_a_limit_counts_where_it_is_a_number_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "absent", path))
    path.write_text("max\n")
    whole = memory.memory_bytes()
    assert whole > 1 << 27
    path.write_text("1000000\n")
    assert memory.memory_bytes() == 1_000_000
    path.write_text(str(1 << 62))
    assert memory.memory_bytes() == whole
