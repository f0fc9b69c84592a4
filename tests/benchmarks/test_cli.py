"""The harness' command line: one road from `bwla-compile bench`, one line for errors, no harness without a clone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cli, quality
from benchmarks.budget import Budget
from benchmarks.demo_table import rows_of
from benchmarks.errors import ResultsError
from benchmarks.everything import measure_everything
from benchmarks.kernel_peers import SHORT
from bwla_compiler import cli as face
from bwla_compiler.cli_bench import harness
from bwla_compiler.errors import HarnessError
from tests.benchmarks.test_compare import EVEN, run

KINDS = (
    "kernels",
    "models",
    "quality",
    "quantize",
    "gguf",
    "demo",
    "compile-time",
    "text",
    "kv-cache",
    "profile",
    "train",
    "report",
    "compare",
    "all",
)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return (exit code, output, errors) of bwla-compile bench."""
    code = face.main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_help_with_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, kind, "--help")
    assert code == 0
    assert f"bwla-compile bench {kind}" in out
    assert kind in call(capsys, "--help")[1]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("kernel",), 2, "kernel"),
        (("models", "demo:", "--rounds", "x"), 2, "--rounds"),
        (("kernels", "--shape", "9B"), 1, "no shape is called '9B'"),
        (("kernels", "--peer", "fast"), 1, "no peer is called 'fast'"),
        (("models", "demo:", "--way", "fast"), 1, "no way is called 'fast'"),
        (("quality", "--row", "best"), 1, "no row is called best"),
        (("quality", "--anchor", "nothing"), 1, "no published figure is called 'nothing'"),
        (("quality", "--anchor", "bwla/BWLA/A6/Qwen3-32B"), 2, "which model?"),
        (("train", "bert", "-o", "x"), 2, "no family is called 'bert'"),
        (("compare", "absent.jsonl", "absent.jsonl"), 1, "no such file of results"),
        (("quantize", "demo:", "--recipe", "rtm"), 1, "Did you mean 'rtn'"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = call(capsys, *arguments)
    assert found == code
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err


def test_without_a_checkout_bench_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="needs the source checkout"):
        harness(tmp_path)


def test_comparing_exits_with_1_where_something_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("old.jsonl", "equal.jsonl", "slow.jsonl")]
    for path, scale, seed in zip(files, (1.0, 1.0, 1.4), (0, 1, 2), strict=True):
        rows = run({**EVEN, "bwla A6": scale}, seed=seed)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(capsys, "compare", str(files[0]), str(files[1]))[0] == 0
    data = tmp_path / "changes.json"
    code, out, _ = call(capsys, "compare", str(files[0]), str(files[2]), "--json", str(data))
    assert code == 1
    assert "worse" in out
    assert json.loads(data.read_text())[0]["worse"] is True


def test_anchors_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    code, out, _ = call(capsys, "quality", "--anchors")
    assert code == 0
    assert "bwla/BWLA/A6/Qwen3-32B" in out
    assert "arXiv 2602.06694v3" in " ".join(out.split())


def test_the_main_job_becomes_rows() -> None:
    recipes = {"bwla": {"true_bits": 1.2, "a6": 20.0, "n_bytes": 5}}
    speed: dict[str, Any] = {"eager fp32": 10.0, "bwla": 30.0, "method": "m", "spread": "s", "machine": "x"}
    result = {"models": {"demo:": {"fp": {"perplexity": 19.0, "n_bytes": 9}, "recipes": recipes}}, "speed": speed}
    assert rows_of(result) == [
        {"model": "demo:", "recipe": "fp", "perplexity": 19.0, "n_bytes": 9},
        {"model": "demo:", "recipe": "bwla", "true_bits": 1.2, "a6": 20.0, "n_bytes": 5},
        {"way": "eager fp32", "tokens_per_second": 10.0, "method": "m", "rounds": "s"},
        {"way": "bwla", "tokens_per_second": 30.0, "method": "m", "rounds": "s"},
    ]


KINDS_OF_ALL = (
    ("demo", "demo_table"), ("quantize", "quantize"), ("models", "models"), ("kernels", "kernels"),
    ("quality", "quality"),
)  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Put fakes in the place of every kind that `all` measures; return the options of their calls by kind."""
    seen: dict[str, list[dict[str, Any]]] = {}

    def fake(kind: str) -> Any:
        def measure(progress: Any, **options: Any) -> list[dict[str, Any]]:
            seen.setdefault(kind, []).append(options)
            return [{"model": "demo"}]

        return measure

    for kind, module in KINDS_OF_ALL:
        monkeypatch.setattr(f"benchmarks.everything.{module}.measure", fake(kind))
    return seen


def test_all_kinds_are_measured_within_the_budget(measured: dict[str, list[dict[str, Any]]]) -> None:
    parts = list(measure_everything(lambda *_: None, budget=Budget(900)))
    assert [part.kind for part in parts] == ["demo", "quantize", "kernels", "models", "models", "quality", "quality"]
    assert not any(part.failed for part in parts)
    assert parts[-1].label == "quality-demo"
    wide, demo = measured["models"]
    assert 350 < wide["budget"].seconds < 365  # 45% of what is left of 810 seconds
    assert Path(wide["model"]).is_file()
    assert "model" not in demo
    assert measured["kernels"][0]["peers"] == SHORT
    assert [call["ways"] for call in measured["quality"]] == [("ours",), ("rounding",)]
    list(measure_everything(lambda *_: None, budget=Budget(0)))
    assert len(measured["quality"]) == 2  # nothing that is left out is begun


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record and write nothing; return the names of what would have been, in order."""
    names: list[str] = []
    monkeypatch.setattr("benchmarks.record.record", lambda name, rows, *, command: names.append(name) or Path(name))
    monkeypatch.setattr("benchmarks.report.report", lambda: names.append("report") or [])
    return names


@pytest.mark.parametrize("kind, module", KINDS_OF_ALL)
def test_a_kind_that_fails_loses_neither_the_others_nor_the_report(
    kind: str, module: str, measured: Any, kept: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(progress: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(f"benchmarks.everything.{module}.measure", fails)
    code, _, err = call(capsys, "all")
    assert code == 1
    everything = ["demo", "quantize", "kernels", "models", "models", "quality-demo", "quality-demo", "report"]
    assert kept == [name for name in everything if name.removesuffix("-demo") != kind]
    last = err.splitlines()[-1]
    assert last.startswith(f"error: failed: {kind} ")
    assert "(RuntimeError: no compiler is here)" in last
    assert last.count("no compiler") == (2 if kind in ("models", "quality") else 1)
    assert "Traceback" not in err


def test_all_exits_with_0_where_nothing_fails(
    measured: Any, kept: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "all")
    assert (code, kept[-1]) == (0, "report")
    assert "error" not in err


def test_a_report_that_fails_and_a_kind_without_rows_are_said_together(
    measured: Any, kept: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ResultsError("marks do not match")

    monkeypatch.setattr("benchmarks.everything.quality.measure", lambda progress, **_: [])
    monkeypatch.setattr("benchmarks.report.report", broken)
    code, _, err = call(capsys, "all")
    assert code == 1
    last = err.splitlines()[-1]
    assert "quality ours (IndexError: " in last
    assert "report (ResultsError: marks do not match)" in last


def test_an_interrupt_ends_all(measured: Any, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(progress: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.everything.quantize.measure", interrupted)
    assert face.main(["bench", "all"]) == 130
    assert kept == ["demo"]


def test_the_command_that_is_recorded_is_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = quality.measure

    def measured(*_: Any, keep: Callable[[dict[str, Any]], None], **__: Any) -> list[dict[str, Any]]:
        keep({"model": "demo", "way": "ours"})
        return [{"model": "demo", "way": "ours"}]

    monkeypatch.setattr("benchmarks.quality.measure", measured)
    monkeypatch.setattr(
        "benchmarks.record.record",
        lambda name, rows, *, command: seen.update(name=name, command=list(command)) or Path(name),
    )
    assert cli.main(["quality", "--row", "ours"]) == 0
    assert seen == {"name": "quality-demo", "command": ["quality", "--row", "ours"]}
    with pytest.raises(ResultsError):
        real(lambda *_: None, ways=["best", "worst"])
    assert "benchmarks.cli" in sys.modules
