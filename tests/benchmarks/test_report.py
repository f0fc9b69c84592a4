"""Pages from results: blocks rewritten, no figure of their own, the best bold whoever has it, one device a table."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.blocks import MARK, OPENING, rewrite_file, rewritten
from benchmarks.errors import ResultsError
from benchmarks.markdown import LESS, MORE, Column, missing_line, table
from benchmarks.record import RESULTS, context, devices, latest, machines, one_device, read, record
from benchmarks.report import PAGES, draw
from benchmarks.tables import BLOCKS, block_text


def test_pages_hold_what_their_blocks_make_of_the_results_and_nothing_else() -> None:
    """Every figure of a marked block is in a file of results: the block is made from them again, and is the same."""
    for page in PAGES:
        text = page.read_text("utf-8")
        assert OPENING.findall(text), f"{page.name} has no marked block"
        assert rewritten(text, partial(block_text, folder=RESULTS)) == text, (
            f"{page.name}: a marked block is not what the results make; run: python -m benchmarks report"
        )


def test_a_figure_that_no_result_holds_is_seen() -> None:
    text = PAGES[0].read_text("utf-8")
    found = MARK.search(text)
    assert found is not None
    figure = re.search(r"\d+\.\d+", found["text"])
    assert figure is not None
    start = found.start("text") + figure.start()
    forged = text[:start] + "9" + text[start:]
    assert rewritten(forged, partial(block_text, folder=RESULTS)) == text != forged


def test_blocks_are_replaced_and_the_rest_is_left(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- bench:demo -->\nold 1.0\n<!-- /bench:demo -->\nend 2.0\n")
    assert rewrite_file(page, lambda name: f"new of {name}")
    assert page.read_text() == "# Title\n<!-- bench:demo -->\nnew of demo\n<!-- /bench:demo -->\nend 2.0\n"
    assert not rewrite_file(page, lambda name: f"new of {name}")


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!-- bench:demo -->\n", "marks do not match"),
        ("<!-- bench:demo -->\n<!-- /bench:kernels -->\n", "marks do not match"),
        ("<!-- bench:nothing -->\n<!-- /bench:nothing -->\n", "no block is called 'nothing'"),
    ],
)
def test_broken_marks_are_errors(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=words):
        rewritten(text, partial(block_text, folder=tmp_path))


def test_the_best_is_bold_whoever_has_it_down_and_across() -> None:
    columns = [Column("way", left=True), Column("us", LESS, 1), Column("rate", MORE, 1), Column("size")]
    down = table(columns, [["ours", 2.04, 5.0, 1.0], ["peer", 2.0, 4.0, 0.5], ["none", None, None, None]])
    assert down.splitlines()[2:] == [
        "| ours | **2.0** | **5.0** | 1.00 |",  # as good as what prints alike
        "| peer | **2.0** | 4.0 | 0.50 |",
        "| none | - | - | - |",
    ]
    across = table([Column("l", left=True), Column("a", LESS), Column("b", LESS)], [["x", 3.0, 1000.0]], across=True)
    assert across.splitlines()[2] == "| x | **3.00** | 1,000 |"


def test_missing_ways_are_said_with_their_reasons() -> None:
    rows = [{"way": "a", "missing": "not installed"}, {"way": "b", "us": 1.0}, {"way": "c", "refused": "wrong by 1"}]
    assert missing_line(rows) == "Without figures: a (not installed); c (wrong by 1)."
    assert missing_line(rows[1:2]) == ""


def kernel_rows(
    cpu: str, when: str, us: float, *, linear: str = "0.6B q", isa: str = "avx2", peer: str = "torch bf16"
) -> list[dict[str, Any]]:
    """Return rows as the kind `kernels` records them."""
    about = {"linear": linear, "out": 2048, "in": 1024, "tokens": 1, "threads": 1}
    device = {"cpu": cpu, "cores": 2, "isa": isa, "when": when, "command": f"run on {cpu}", "commit": "abc",
              "torch": "2", "python": "3", "load_before": 0.5, "load_after": 1.5, "steal": 0.01}  # fmt: skip
    ways = {"bwla A6": 1.0, peer: 0.5, "pure read": 0.4}
    rows = [
        {**about, "way": way, "us": us * factor, "us_low": us * factor, "us_high": us * factor, "gb_per_second": 5.0,
         "gmac_per_second": 40.0, "times_ours": factor, "times_low": factor, "times_high": factor, **device}
        for way, factor in ways.items()
    ]  # fmt: skip
    ceilings = [("pure read", {"gb_per_second": 9.5}), ("float32 multiply-adds", {"gmac_per_second": 80.0})]
    rows += [{"linear": "ceiling", "way": way, "threads": 1, **rate, **device} for way, rate in ceilings]
    return [*rows, {"linear": "", "way": "ggml", "missing": "llama-cpp-python is not installed", **device}]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of two devices, the second one later."""
    rows = [*kernel_rows("old machine", "2026-01-01", 400.0), *kernel_rows("new machine", "2026-02-01", 200.0)]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_table_is_of_one_device_and_says_where_it_is_from(results: Path) -> None:
    text, _, older = block_text("kernels", results).partition("| linear |")[2].partition("| linear |")
    assert "| 0.6B q | 2048 x 1024 | 1 | 1 | 200 | **100** | 80 | torch bf16: 0.50 (0.50-0.50) |" in text
    assert "`run on new machine` at abc, 2026-02-01" in text
    assert "old machine" not in text
    assert "`run on old machine` at abc, 2026-01-01" in older
    assert "new machine" not in older
    assert "load 0.5 to 1.5, steal up to 1.0%" in text
    assert "Without figures: ggml (llama-cpp-python is not installed)." in text
    assert "pure read 9.5 GB/s on 1" in text


def kernels_file(folder: Path, *runs: list[dict[str, Any]]) -> Path:
    """Write runs of kernels as a file of results and return its folder."""
    (folder / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for rows in runs for row in rows))
    return folder


def test_a_run_that_was_cut_short_hides_no_case_of_an_earlier_one(tmp_path: Path) -> None:
    long = [*kernel_rows("m", "2026-01-01", 100.0), *kernel_rows("m", "2026-01-01", 300.0, linear="8B q")]
    short = kernel_rows("m", "2026-02-01", 90.0, peer="torch fp32")
    over = {"missing": "left out: the time budget was spent", "way": "", "tokens": 1, "threads": 1}
    short += [{**short[0], "way": "torchao", "refused": "wrong by 1"}]
    del short[-1]["us"]
    short += [{**short[-2], **over, "linear": name} for name in ("8B q", "8B down", "transform of 64")]
    text = block_text("kernels", kernels_file(tmp_path, long, short))
    assert "| bwla A6 | torch fp32 | torch bf16 |" in text
    assert "| 0.6B q | 2048 x 1024 | 1 | 1 | 90 | **45** | - |" in text  # its contenders met in one run
    assert "| 8B q | 2048 x 1024 | 1 | 1 | 300 | - | **150** |" in text
    assert all(f"`run on m` at abc, {day}" in text for day in ("2026-01-01", "2026-02-01"))
    assert "torchao: 0.6B q, tokens 1, threads 1 (wrong by 1)" in text
    assert "Left out, the time budget being spent: 8B down (tokens 1, threads 1)." in text


def test_a_block_without_rows_of_its_own_says_so_and_one_with_older_ones_keeps_them(tmp_path: Path) -> None:
    rows = kernel_rows("m", "2026-02-01", 90.0)
    assert block_text("transforms", kernels_file(tmp_path, rows)) == "Not measured yet: `python -m benchmarks kernels`."
    older = kernel_rows("before", "2026-01-01", 50.0, linear="transform of 64", peer="torch dense fp32")
    text = block_text("transforms", kernels_file(tmp_path, older, rows))
    assert "| 64 | 1 | 1 | 50.0 | **25.0** | 20.0 |".replace("**", "") in text.replace("**", "")
    assert "before, 2 cores" in text
    assert "before" not in block_text("kernels", tmp_path)


def test_instruction_sets_of_one_machine_have_a_table_each_the_best_first(tmp_path: Path) -> None:
    best, forced = (
        kernel_rows("m", when, us, isa=isa)
        for when, us, isa in (("2026-01-01", 10.0, "avx512"), ("2026-02-01", 30.0, "avx2"))
    )
    first, second = block_text("kernels", kernels_file(tmp_path, best, forced)).split("cores, avx512")
    assert "| 10 | **5** |" in first
    assert "| 30 | **15** |" in second
    assert "cores, avx2" in second


def test_every_block_says_how_it_is_made_where_there_are_no_results(tmp_path: Path) -> None:
    for name in BLOCKS:
        kind = {"transforms": "kernels", "prologues": "kernels", "ends": "quality --ends"}.get(
            name, name.replace("_", "-")
        )
        assert block_text(name, tmp_path) == f"Not measured yet: `python -m benchmarks {kind}`."


def test_kernels_are_drawn(results: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw(results)
    assert [path.name for path in drawn] == ["roofline.svg", "speed.svg"]
    before = [path.read_bytes() for path in drawn]
    assert before == [path.read_bytes() for path in draw(results)]  # the same bytes: no day, no random ids


def test_results_are_appended_with_their_context_and_read_again(tmp_path: Path) -> None:
    path = record("kind", [{"way": "a", "us": 1.0}], command=["kind", "--row", "two words"], folder=tmp_path)
    record("kind", [{"way": "a", "us": 2.0}], command=["kind"], folder=tmp_path)
    rows = read(path)
    assert [row["us"] for row in rows] == [1.0, 2.0]
    assert rows[0]["command"] == "python -m benchmarks kind --row 'two words'"
    assert set(context([])) <= set(rows[0])
    assert [row["us"] for row in latest(rows, by=("way",))] == [2.0]
    assert machines(rows) == devices(rows) == [rows]
    unmeasured = {**rows[1], "missing": "the time budget was spent"}
    assert [row["us"] for row in latest([*rows, unmeasured], by=("way",))] == [2.0]
    assert latest([unmeasured, {**unmeasured, "missing": "b"}], by=("way",))[0]["missing"] == "b"
    assert one_device(rows, what="test")
    with pytest.raises(ResultsError, match="no such file"):
        read(tmp_path / "absent.jsonl")
    path.write_text("{")
    with pytest.raises(ResultsError, match="no file of JSON lines"):
        read(path)


def test_the_main_job_is_shown_as_its_last_run_found_it(tmp_path: Path) -> None:
    device = {"cpu": "x", "cores": 2, "isa": "avx2", "command": "demo", "commit": "abc", "torch": "2", "python": "3"}
    size = {"calibration_sequences": 96, "test_sequences": 32, "length": 256}
    rows = []
    for when, a6 in (("2026-01-01", 30.0), ("2026-02-01", 20.0)):
        figures = {"true_bits": 1.2, "n_bytes": 2048, "a16": 19.5, "a8": 19.5, "a6": a6, "a4": 25.0}
        rows += [
            {"model": "demo:", "recipe": "fp", "perplexity": 19.0, "n_bytes": 9 << 20},
            {"model": "demo:", "recipe": "rtn", **figures, "a6": 90.0},
            {"model": "demo:", "recipe": "bwla", **figures},
            {"way": "bwla", "tokens_per_second": 10.0, "method": "greedy", "rounds": "bwla 9-11"},
        ]
        rows = [{**row, **size, **device, "when": row.get("when", when)} for row in rows]
    (tmp_path / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = block_text("demo", tmp_path)
    assert "32 sequences of 256 tokens; 96 sequences of calibration" in text
    assert "| fp | 19.00 |  |  |  | - | 9.0 MiB |" in text
    assert "| bwla | **19.50** | **19.50** | **20.00** | **25.00** | 1.20 | 2.0 KiB |" in text
    assert "30.00" not in text
    assert "greedy; rounds: bwla 9-11." in text


def test_raw_models_are_held_to_the_rotation_that_needs_no_calibration(tmp_path: Path) -> None:
    about = {"model": "demo", "inductor": True, "test_sequences": 96, "fp_perplexity": 50.0, "seconds": 9.0, "cpu": "x",
             "cores": 2, "isa": "avx2", "torch": "2", "python": "3", "when": "2026-01-01", "command": "raw",
             "commit": "abc"}  # fmt: skip
    rows = [
        {**about, "way": way, "perplexity": perplexity, "a6": perplexity / 50}
        for way, perplexity in (("hadamard-rtn, calibration none", 80.0), ("bwla-w1a6, calibration self", 60.0))
    ]
    rows.append({**rows[1], "inductor": False, "perplexity": 61.0})
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = block_text("raw", tmp_path)
    assert "**demo**, float perplexity 50.00, 96 sequences of held-out text\n" in text
    assert "| bwla-w1a6, calibration self | **60.00** | **1.200** | **0.750** | **9** |" in text
    assert "| hadamard-rtn, calibration none | 80.00 | 1.600 | 1.000 | **9** |" in text
    alone = text.partition("graphs as they are, without Inductor's code")[2]
    assert "| bwla-w1a6, calibration self | 61.00 | 1.200 | - | 9 |" in alone  # its rival was read by other code


def test_greedy_text_is_shown_by_prompt_as_it_was_last_read(tmp_path: Path) -> None:
    about = {"cpu": "x", "cores": 2, "isa": "avx2", "torch": "2", "python": "3", "when": "2026-01-01",
             "command": "text", "commit": "abc"}  # fmt: skip
    found = ((119, 0.0116, 0.995), (200, None, 1.0))
    rows = [{**about, "prompt": 0, "equal_tokens": n, "gap": gap, "teacher_forced": t} for n, gap, t in found]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| 1 | 200 | - | 100.0 |" in (text := block_text("text", tmp_path))
    assert "119" not in text


def quality_rows(**more: Any) -> list[dict[str, Any]]:
    """Return rows as the kind `quality` recorded them at first, the second one with more figures."""
    device = {"cpu": "x", "cores": 2, "isa": "avx2", "torch": "2", "python": "3", "when": "2026-01-01",
              "command": "quality", "commit": "abc"}  # fmt: skip
    figures = {"a16": 1.05, "a6": 1.06, "a4": 1.1, "a6_95": "1.050-1.070", "a6_ood": 1.06, "fit_seconds": 70.0}
    about = {"model": "demo", "files": 21, "fp_perplexity": 51.1, "table": "ours", **figures, **device}
    return [{**about, "way": "old", "true_bits": 1.1}, {**about, "way": "new", "true_bits": 1.2, **more}]


def of_widths(name: str, *values: float) -> dict[str, float]:
    return {f"a{bits}_{name}": value for bits, value in zip((16, 6, 4), values, strict=True)}


def quality_text(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "quality-demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return block_text("quality", folder)


def test_rows_without_divergence_make_the_table_that_they_made(tmp_path: Path) -> None:
    text = quality_text(tmp_path, quality_rows())
    assert text.count("|---|") == 1
    assert "KL" not in text
    assert "| old | ours | 1.10 | **1.050** | **1.060** | **1.100** | 1.050-1.070 | **1.060** | **70.0** |" in text


def test_divergence_agreement_and_the_task_have_a_table_of_the_rows_that_have_them(tmp_path: Path) -> None:
    near = of_widths("kl", 0.05, 0.0512, 0.09) | of_widths("top1", 0.91, 0.905, 0.8)
    text = quality_text(tmp_path, quality_rows(**near))
    assert "| new | ours | 0.050 | 0.051 | 0.090 | 91.0 | 90.5 | 80.0 |" in text
    assert "task" not in text
    asked = of_widths("task", 0.6, 0.59, 0.5) | {"questions": 256, "fp_task": 0.625}
    rows = [*quality_rows(**near), {**quality_rows(**near, **asked)[1], "way": "newer", "a6_kl": 0.04, "a4_top1": 0.9}]
    text = quality_text(tmp_path, rows)
    assert "| new | ours | 0.050 | 0.051 | 0.090 | 91.0 | 90.5 | 80.0 | - | - | - |" in text.replace("**", "")
    assert "| **0.040** |" in text  # of divergences the least, of agreements the most
    assert "| **90.0** | 60.0 | 59.0 | 50.0 |" in text
    assert "of 256 beginnings of held-out text" in text
    assert "(float model 62.5, chance 25.0; one standard deviation of so many questions is 3.0)" in text
    assert "| old |" in text.split("KL")[0]
    assert "| old |" not in text.split("KL", 1)[1]


def test_rows_of_one_name_say_what_else_differs(tmp_path: Path) -> None:
    new = {**quality_rows()[1], "calibration_sequences": 96, "n_parameters": 10_227_072, "trained_tokens": 10_035_200}
    rows = [{**new, "seed": 0}, {**new, "seed": 1}, {**new, "seed": 0, "calibration_sequences": 512}]
    text = quality_text(tmp_path, rows)
    for says in (
        "96 sequences, calibration seed 0",
        "96 sequences, calibration seed 1",
        "512 sequences, calibration seed 0",
    ):
        assert f"| new, {says} |" in text
    assert "10.2M parameters, 10.0M tokens" in text
    (alone := tmp_path / "alone").mkdir()
    assert "| new | ours |" in quality_text(alone, rows[:1])


def test_a_model_without_text_of_another_kind_is_shown(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "a6_ood"} for row in quality_rows()]
    assert "| 1.050-1.070 | - | **70.0** |" in quality_text(tmp_path, rows)


def test_perplexities_are_shown_of_every_machine_each_in_a_table_of_its_own(tmp_path: Path) -> None:
    new = [{**row, "cpu": "y", "when": "2026-02-01"} for row in quality_rows()]
    text = quality_text(tmp_path, [*quality_rows(), *new])
    assert text.count("| old |") == text.count("| new |") == 2
    assert text.index("y, 2 cores") < text.index("x, 2 cores")


def test_models_are_shown_with_what_is_missing(tmp_path: Path) -> None:
    about = {"model": "m", "prompt": 8, "steps": 4, "threads": 1, "cpu": "x", "cores": 2, "isa": "avx2", "torch": "2",
             "when": "2026-01-01", "command": "models m", "commit": "abc", "python": "3"}  # fmt: skip
    figures = {"decode_low": 9.0, "decode_high": 11.0, "prefill_tokens_per_second": 50.0, "first_token_ms": 3.0}
    rows = [
        {**about, "way": "bwla", "decode_tokens_per_second": 10.0, "times_ours": 1.0, **figures},
        {**about, "way": "inductor bf16", "decode_tokens_per_second": 12.0, "top1_fp32": 0.5, **figures},
        {**about, "way": "torchao", "missing": "not installed"},
        {**about, "way": "broken", "refused": "wrong by 1"},
    ]
    (tmp_path / "models.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = block_text("models", tmp_path)
    assert "| bwla | 10.0 | 9.0-11.0 | 1.00 | **50.0** |" in text
    assert "| inductor bf16 | **12.0** | 9.0-11.0 | - | **50.0** |" in text
    assert "| 50.0 |" in text
    assert "Without figures: torchao (not installed); broken (wrong by 1)." in text
    later = [{**row, "when": "2026-02-01", "commit": "def", "decode_tokens_per_second": 13.0} for row in rows[:1]]
    later += [{**about, "when": "2026-02-01", "commit": "def", "way": "inductor bf16", "missing": "no time"}]
    (tmp_path / "models.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *later]))
    text = block_text("models", tmp_path)
    assert "| bwla | **13.0** |" in text
    assert "| inductor bf16 (earlier, at abc) | 12.0 |" in text
    assert "no time" not in text
