"""What is said of the machine."""

from pathlib import Path

import pytest

from bwla_compiler.inspector.machine import cpu_model

NAMED = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 97\nmodel name\t: AMD Ryzen 9 7950X\n"
HIDDEN = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel\t\t: 2\n"


@pytest.mark.parametrize(
    "text, name",
    [
        (NAMED, "AMD Ryzen 9 7950X"),
        (HIDDEN, "AMD EPYC (family 25, model 1)"),
        ("model name\t: Some Processor\n", "Some Processor"),
    ],
)
def test_a_processor_without_a_number_is_named_by_family_and_model(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert cpu_model() == name
