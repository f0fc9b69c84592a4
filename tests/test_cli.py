"""The command line: what reaches the api, what is printed, exit codes, and one clear line for each error."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bwla_compiler
from bwla_compiler import cli, dumping, inspection
from bwla_compiler.calibrate.report import QuantizeReport
from bwla_compiler.cost.model import AttentionShape, GroupShape, ModelShape
from bwla_compiler.errors import WeightError
from bwla_compiler.evaluate import stages
from bwla_compiler.evaluate.fidelity import Fidelity
from bwla_compiler.evaluate.stages import Stage
from bwla_compiler.evaluate.windows import Windowed
from bwla_compiler.graph.plan import Basis, Expression, Linear, Plan
from bwla_compiler.graph.repetition import Repetition
from bwla_compiler.inspector.cost import cost_report
from bwla_compiler.inspector.diff import compare_reports
from bwla_compiler.inspector.report import build_report
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.recipe import Override, Recipe
from bwla_compiler.spec import LinearSpec

COMMANDS = (
    "demo",
    "quantize",
    "inspect",
    "plan",
    "eval",
    "generate",
    "serve",
    "export",
    "verify",
    "zoo",
    "bench",
    "recipes",
    "doctor",
    "emit",
)

LEAF, LEAF8 = Expression("leaf", 4, "residual"), Expression("leaf", 8)
PLAN = Plan(
    "TinyForCausalLM",
    (Basis("residual", 4, "free", ""),),
    (Linear("lm_head", "lm_head.weight", None, 1, 0, 4, 8, "folded", "all rotate", "lm_head", "", LEAF, LEAF8),),
    (),
    (),
    (),
)


class FakeApi(ModuleType):
    """Stands for bwla_compiler.api: records its calls and answers with fixed data."""

    def __init__(self) -> None:
        super().__init__("bwla_compiler.api")
        self.calls: dict[str, dict[str, Any]] = {}
        self.verification = SimpleNamespace(n_free=3, error=2e-15, tolerance=1e-10, plan=PLAN, passed=True)

    def load(self, source: str, *, device: str = "cpu", progress: Any = None) -> Any:
        self.calls["load"] = {"source": source, "device": device}
        progress("loading", 1, 1)
        return SimpleNamespace(model="model", tokenizer="tokenizer", source=source)

    def skeleton(self, source: str, *, device: str = "cpu", progress: Any = None) -> Any:
        self.calls["skeleton"] = {"source": source, "device": device}
        return SimpleNamespace(model="model", tokenizer=None, source=source)

    def plan(self, model: Any) -> Plan:
        return PLAN

    def quick_plan(self, model: Any) -> tuple[Plan, Repetition | None]:
        return PLAN, Repetition("model.layers", 64)

    def inspect(self, model: str, *, recipe: str = "", context: int, device: str, progress: Any = None) -> Any:
        self.calls["inspect"] = {"source": model, "recipe": recipe, "context": context, "device": device}
        groups = (GroupShape("q, k", LinearSpec(4096, (4096, 512)), 3),)
        shape = ModelShape(groups, attention=(AttentionShape(3, 32, 4, 128),))
        cost = cost_report(shape, context=context, chosen=device)
        return build_report(self.plan(model), source=model, recipe=recipe, cost=cost)

    def inspect_module(self, module: Any, *, source: str, outcome: Any) -> Any:
        return build_report(PLAN, source=source, outcome=outcome)

    def compare(self, model: str, a: str, b: str, **options: Any) -> Any:
        self.calls["compare"] = {"model": model, "a": a, "b": b}
        report = build_report(PLAN)
        return compare_reports(report, report, names=(a, b))

    def quantize_to(self, source: str, out: Path, **options: Any) -> Any:
        self.calls["quantize"] = {"source": source, "out": out, **options}
        options["on_block"]("model.layers.0: done")
        out.mkdir(parents=True, exist_ok=True)
        report = QuantizeReport(options["recipe"], PLAN, (), (), Bits(1.25, 3.0, 2048), {"fit": 2.0})
        for name, text in options["beside"](report).items():
            (out / name).write_text(text)
        return report

    def bits(self, model: Any) -> Any:
        return SimpleNamespace(linears=1.25, model=3.0, n_bytes=2048)

    def verify(self, model: Any, *, seed: int, progress: Any) -> Any:
        self.calls["verify"] = {"seed": seed}
        return self.verification

    def perplexity(self, model: Any, tokens: torch.Tensor, *, progress: Any) -> float:
        self.calls["perplexity"] = {"tokens": tokens}
        return 12.345

    def windowed_perplexity(
        self, model: Any, stream: torch.Tensor, *, context: int, stride: int, progress: Any
    ) -> Windowed:
        self.calls["windowed_perplexity"] = {"stream": stream}
        return Windowed(12.345, stream.numel() - 1, context, stride)

    def fidelity(self, reference: Any, model: Any, tokens: torch.Tensor, *, progress: Any) -> Fidelity:
        return Fidelity(0.25, 0.75, tokens.numel())

    def layer_errors(self, reference: Any, model: Any, tokens: torch.Tensor, *, progress: Any) -> dict[str, float]:
        return {"model.layers.0": 0.125}

    def run_tasks(self, model: Any, tokenizer: Any, tasks: list[str], *, limit: int | None) -> dict[str, Any]:
        self.calls["run_tasks"] = {"tasks": tasks, "limit": limit}
        return {task: {"acc": 0.625} for task in tasks}

    def export(self, model: Any, path: Path, *, to: str, tokenizer: Any = None) -> None:
        self.calls["export"] = {"path": path, "to": to, "tokenizer": tokenizer}

    def generate(self, model: Any, tokenizer: Any, prompt: str, *, on_text: Any = None, **options: Any) -> str:
        self.calls["generate"] = {"prompt": prompt, **options}
        on_text(" a ")
        on_text("[continuation]")
        return " a [continuation]"

    def run_demo(self, *, json_path: Any, html_path: Any, quick: bool, progress: Any) -> dict[str, Any]:
        self.calls["run_demo"] = {"json_path": json_path, "html_path": html_path, "quick": quick}
        recipes = {"bwla": {"true_bits": 1.2, "a16": 20.5, "a8": 20.6, "a6": 20.7, "a4": 22.0}}
        return {"models": {"demo:": {"fp": {"perplexity": 20.0}, "recipes": recipes}}, "speed": {"bwla": 3.0}}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """Put the fake in the api's place."""
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "bwla_compiler.api", fake)
    monkeypatch.setattr(inspection, "inspect", fake.inspect)
    monkeypatch.setattr(inspection, "compare", fake.compare)
    monkeypatch.setattr(inspection, "inspect_module", fake.inspect_module)
    monkeypatch.setattr(bwla_compiler, "api", fake, raising=False)
    main_job = ModuleType("bwla_compiler.main_job")
    main_job.run_demo = fake.run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bwla_compiler.main_job", main_job)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("BWLA_DEBUG", raising=False)
    return fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line and returns exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, run: Run, api: FakeApi) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"bwla-compile {command}" in out


def test_help_lists_every_command(run: Run, api: FakeApi) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("quantise",), "quantise"),
        (("quantize", "demo:"), "--out"),
        (("verify", "demo:", "--sed", "3"), "--sed"),
        (("verify", "demo:", "--seed", "three"), "--seed"),
        (("generate", "demo:", "--tokens", "0"), "--tokens"),
        (("inspect",), "MODEL"),
        (("inspect", "demo:", "--diff", "rtn", "gptq", "--verify", "-o", "page.html"), "go with --out, --verify"),
        (("inspect", "packed", "--bits", "--why", "lm_head"), "--bits does not go with --why"),
        (("inspect", "demo:", "--why", "lm_head", "--json"), "--why does not go with --json"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments: tuple[str, ...], words: str, run: Run, api: FakeApi) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert api.calls == {}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("quantize", "demo:", "-o", "{new}", "--recipe", "bwla-w1a66"), "Did you mean 'bwla-w1a6'"),
        (("quantize", "demo:", "-o", "{new}", "--set", "activations.bit=8"), "did you mean 'bits'"),
        (("quantize", "demo:", "-o", "{new}", "--set", "activations.bits"), "section.field=value"),
        (("quantize", "demo:", "-o", "{new}", "--set", "activations.bits=1"), "must be 16, or 2 to 8"),
        (("quantize", "demo:", "-o", "{new}", "--override", "psp.rank=8"), "PATTERN:section.field=value"),
        (("quantize", "demo:", "-o", "{full}"), "exists and is not an empty folder"),
        (("recipes", "rtm"), "Did you mean 'rtn'"),
        (("eval", "some/folder"), "--text FILE"),
        (("eval", "demo:", "--text", "{new}"), "there is no such file"),
        (("inspect", "demo:", "-o", "{new}/deep/report.html"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_code_1(
    arguments: tuple[str, ...], words: str, run: Run, api: FakeApi, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, _, err = run(*(a.format(new=tmp_path / "new", full=tmp_path / "full") for a in arguments))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err
    assert "Traceback" not in err
    assert "quantize" not in api.calls
    assert not (tmp_path / "new").exists()


def test_an_error_of_the_api_is_one_line_unless_debugging(
    run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> Plan:
        raise WeightError("layers.0.q_proj.weight: 3 values\nare NaN")

    monkeypatch.setattr(api, "plan", refuse)
    code, _, err = run("inspect", "x")
    assert code == 1
    assert err.splitlines()[-1] == "error: layers.0.q_proj.weight: 3 values are NaN"
    monkeypatch.setenv("BWLA_DEBUG", "1")
    with pytest.raises(WeightError):
        cli.main(["inspect", "x"])


def test_what_the_system_refuses_is_one_line(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> Plan:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api, "plan", refuse)
    assert run("inspect", "x")[::2] == (1, "error: [Errno 28] No space left on device\n")


def test_an_interrupt_is_code_130(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: Any) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan", interrupt)
    code, _, err = run("inspect", "x")
    assert code == 130
    assert "interrupted" in err


def test_quantize_passes_the_recipe_and_saves(run: Run, api: FakeApi, tmp_path: Path) -> None:
    out, page, data = tmp_path / "packed", tmp_path / "page.html", tmp_path / "report.json"
    code, text, err = run(
        "quantize", "demo:", "-o", str(out), "--recipe", "rtn", "--set", "activations.bits=8", "--set",
        "residual=online", "--calibration", "random", "--seed", "7", "--json", str(data), "--html", str(page),
        "--keep", "*.0.*", "--override", "*.o_proj:psp.rank=8",
    )  # fmt: skip
    assert code == 0
    options = api.calls["quantize"]
    recipe = options["recipe"]
    assert isinstance(recipe, Recipe)
    assert (recipe.name, recipe.activations.bits, recipe.residual) == ("rtn", 8, "online")
    assert recipe.overrides == (Override("*.0.*", keep=True), Override("*.o_proj", set={"psp.rank": 8}))
    assert (options["source"], options["out"]) == ("demo:", out)
    assert (options["calibration"], options["seed"], options["spill"]) == ("random", 7, False)
    assert json.loads(data.read_text())["seconds"] == {"fit": 2.0}
    assert json.loads((out / "inspector.json").read_text())["source"] == "demo:"
    assert page.read_text().startswith("<!doctype html>")
    assert "model.layers.0: done" in err
    assert "1.25 linears" in text
    assert f"wrote {out} in 2.0 s" in text


def test_inspect_prints_or_writes(run: Run, api: FakeApi, tmp_path: Path) -> None:
    code, text, _ = run("inspect", "some/model", "--recipe", "rtn")
    assert code == 0
    assert "F lm_head  4 -> 8  residual" in text
    code, text, _ = run("inspect", "some/model", "--json")
    assert json.loads(text)["source"] == "some/model"
    page = tmp_path / "report.html"
    assert run("inspect", "some/model", "-o", str(page))[0] == 0
    assert "some/model" in page.read_text()


def test_inspect_prints_modelled_costs(run: Run, api: FakeApi, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, text, _ = run("inspect", "some/config.json", "--context", "512", "-o", str(page))
    assert code == 0
    assert api.calls["inspect"]["source"] == "some/config.json"
    assert api.calls["inspect"]["context"] == 512
    assert "M*, modelled" in text
    assert "One sequence of 512 tokens" in text
    assert "h100-sxm" in text
    assert "One decoded token" in page.read_text()


def test_inspect_runs_the_passes_and_names_the_one_that_breaks(
    run: Run, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Stage("untie", 1, 0, 0.0), Stage("fold-norms", 3, 0, 0.5)]
    loaded = SimpleNamespace(model=torch.nn.Linear(2, 2))
    monkeypatch.setattr(api, "load", lambda source, progress: loaded)
    monkeypatch.setattr(stages, "check_passes", lambda *args, **options: tuple(found))
    monkeypatch.setattr(dumping, "dump_passes", lambda model, folder, recipe, progress: (folder / "00-capture.txt",))
    code, _, err = run("inspect", "some/model", "--dump", str(tmp_path), "--verify")
    assert code == 1
    assert "wrote 1 files" in err
    assert "error: fold-norms changes what the model computes: relative logit error 5.0e-01" in err
    found.pop()
    code, text, _ = run("inspect", "some/model", "--verify", "--json")
    assert code == 0
    assert json.loads(text)["source"] == "some/model"


def test_plan_writes_data_and_graph(run: Run, api: FakeApi, tmp_path: Path) -> None:
    data, graph = tmp_path / "plan.json", tmp_path / "plan.graphml"
    code, text, _ = run("plan", "some/model", "--json", str(data), "--graphml", str(graph))
    assert code == 0
    assert "1 linears in 0 blocks: 1 folded" in text
    assert "1 free bases in 1 chains" in text
    assert "5 of 64 blocks were captured" in text
    assert Plan.from_json(data.read_text()) == PLAN
    assert graph.read_text().startswith("<?xml")
    code, _, err = run("plan", "some/model", "--json", str(tmp_path / "no" / "plan.json"))
    assert code == 1
    assert "cannot be written" in err


def test_inspect_explains_and_compares(run: Run, api: FakeApi) -> None:
    code, text, _ = run("inspect", "some/model", "--why", "lm_head")
    assert code == 0
    assert text.startswith("lm_head takes 4 channels to 8. It is folded")
    code, _, err = run("inspect", "some/model", "--why", "lm_haed")
    assert (code, "did you mean 'lm_head'" in err) == (1, True)
    assert run("inspect", "some/model", "--diff", "rtn", "bwla-w1a6")[0] == 0
    assert api.calls["compare"] == {"model": "some/model", "a": "rtn", "b": "bwla-w1a6"}
    code, text, _ = run("inspect", "--diff", "one", "two", "--json")
    assert (code, json.loads(text)["a"], api.calls["compare"]["model"]) == (0, "one", "")
    code, _, err = run("inspect", "some/model", "--on", "abacus")
    assert (code, "choose one of h100-sxm" in err) == (1, True)


def test_eval_reads_a_file_of_ids(run: Run, api: FakeApi, tmp_path: Path) -> None:
    ids = tmp_path / "ids.pt"
    torch.save(torch.arange(40).view(4, 10), ids)
    code, text, _ = run("eval", "some/model", "--text", str(ids), "--sequences", "3")
    assert code == 0
    assert "12.35" in text or "12.34" in text
    assert api.calls["perplexity"]["tokens"].tolist() == torch.arange(30).view(3, 10).tolist()
    code, text, _ = run("eval", "some/model", "--text", str(ids), "--json")
    assert json.loads(text)["perplexity"] == 12.345


def test_eval_by_windows_and_against_the_original(run: Run, api: FakeApi, tmp_path: Path) -> None:
    ids = tmp_path / "ids.pt"
    torch.save(torch.arange(30), ids)
    options = ("--data", str(ids), "--context", "9", "--stride", "3", "--against", "original")
    code, text, _ = run("eval", "some/model", *options, "--json")
    found = json.loads(text)
    assert code == 0
    assert (found["context"], found["stride"], found["n_tokens"]) == (9, 3, 29)
    assert (found["kl"], found["top1_agreement"]) == (0.25, 0.75)
    assert found["layer_errors"] == {"model.layers.0": 0.125}
    assert api.calls["windowed_perplexity"]["stream"].tolist() == list(range(30))
    assert api.calls["load"]["source"] == "original"
    code, text, _ = run("eval", "some/model", *options)
    assert "context 9, stride 3" in text
    assert "75.0%" in text
    assert "0.1250" in text
    code, _, err = run("eval", "demo:", "--stride", "3")
    assert (code, "is no one stream" in err) == (1, True)


def test_eval_runs_tasks_without_a_text(run: Run, api: FakeApi) -> None:
    code, text, _ = run("eval", "some/model", "--tasks", "piqa,own.yaml", "--limit", "5", "--json")
    assert code == 0
    assert json.loads(text)["tasks"] == {"piqa": {"acc": 0.625}, "own.yaml": {"acc": 0.625}}
    assert api.calls["run_tasks"] == {"tasks": ["piqa", "own.yaml"], "limit": 5}
    assert "perplexity" not in api.calls
    assert "0.6250" in run("eval", "demo:", "--tasks", "piqa")[1]
    code, _, err = run("eval", "some/model", "--tasks", "piqa", "--against", "original")
    assert (code, "on which text?" in err) == (1, True)


def test_export_passes_the_form(run: Run, api: FakeApi, tmp_path: Path) -> None:
    assert run("export", "packed", "-o", str(tmp_path / "dense"))[0] == 0
    assert api.calls["export"] == {"path": tmp_path / "dense", "to": "dense", "tokenizer": "tokenizer"}


def test_generate_prints_the_text_as_it_is(run: Run, api: FakeApi) -> None:
    code, text, _ = run("generate", "demo:", "--prompt", "Once", "--tokens", "5", "--temperature", "0", "--seed", "2")
    assert (code, text) == (0, " a [continuation]\n")
    assert api.calls["generate"] == {"prompt": "Once", "tokens": 5, "temperature": 0, "seed": 2}


def test_verify_says_how_many_spaces_were_free(run: Run, api: FakeApi) -> None:
    code, text, _ = run("verify", "demo:", "--seed", "5")
    assert code == 0
    assert "3 free spaces rotated: relative logit error 2.00e-15" in text
    assert api.calls["verify"] == {"seed": 5}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_free": 0, "passed": False}, "nothing was verified"),
        ({"error": 1e-3, "passed": False}, "differs"),
        ({"error": float("nan"), "passed": False}, "differs"),
    ],
)
def test_verify_fails(change: dict[str, Any], words: str, run: Run, api: FakeApi) -> None:
    api.verification.__dict__.update(change)
    code, text, err = run("verify", "demo:")
    assert code == 1
    assert words in err
    assert "verified" not in text.splitlines()


def test_demo_prints_its_tables(run: Run, api: FakeApi, tmp_path: Path) -> None:
    code, text, _ = run("demo", "--quick", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert code == 0
    assert api.calls["run_demo"] == {
        "json_path": tmp_path / "r.json",
        "html_path": tmp_path / "r.html",
        "quick": True,
    }
    assert "20.70" in text
    assert "tokens/s" in text


def test_recipes_lists_and_shows(run: Run, api: FakeApi) -> None:
    code, text, _ = run("recipes")
    assert code == 0
    assert "bwla-w1a6" in text
    assert "hadamard-rtn" in text
    assert "3.00" in text  # what ARB-like weights take by formula
    code, text, _ = run("recipes", "rtn")
    assert ["activations.bits", "6"] in [line.split() for line in text.splitlines()]


def test_doctor_says_what_follows(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path))
    code, text, _ = run("doctor")
    assert code == 0
    for name in ("Python", "torch", "transformers", "triton", "processor", "C++ compiler", "GPU", "cache"):
        assert name in text
    monkeypatch.setenv("BWLA_CXX", "")
    code, text, _ = run("doctor")
    assert code == 0
    assert "kernels run on the portable path: correct, much slower" in text


def test_doctor_tells_a_compiler_that_does_not_work(
    run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo broken 1.0; exit 0; }\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BWLA_CXX", str(broken))
    code, text, _ = run("doctor")
    assert code == 0
    assert "it does not work" in text


def test_the_fake_answers_as_the_api_does() -> None:
    """Every function of the fake exists in its place, and takes the options that the cli gives."""
    real = importlib.import_module("bwla_compiler.main_job")
    assert set(inspect.signature(FakeApi.run_demo).parameters) - {"self"} <= set(
        inspect.signature(real.run_demo).parameters
    )
    real = importlib.import_module("bwla_compiler.api")
    for name, fake in vars(FakeApi).items():
        if name.startswith("_") or name == "run_demo":
            continue
        home = inspection if hasattr(inspection, name) else real
        parameters = inspect.signature(getattr(home, name)).parameters
        wanted = [p for p in inspect.signature(fake).parameters if p not in ("self", "options")]
        assert set(wanted) <= set(parameters), name


def zoo_of(monkeypatch: pytest.MonkeyPatch, *, status: str) -> None:
    """Put fixed rows in the place of the zoo's workers."""
    from bwla_compiler.zoo import workers
    from bwla_compiler.zoo.run import Kind, ZooRow

    def run_zoo(names: Any, *, progress: Any, **options: Any) -> tuple[ZooRow, ...]:
        progress(names[0], 1, 1)
        kinds = (Kind("lm_head", "folded", "", 3),)
        return tuple(ZooRow(n, status, "X", "said", 3, 2e-15, kinds, 0.5, {}, 1.0, True) for n in names)

    monkeypatch.setattr(workers, "run_zoo", run_zoo)


def test_zoo_prints_counts_and_writes_files(
    run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zoo_of(monkeypatch, status="exact")
    page, data = tmp_path / "page.md", tmp_path / "rows.json"
    code, out, _ = run("zoo", "llama", "gpt2", "--markdown", str(page), "--json", str(data))
    assert code == 0
    assert "2 architectures: 2 built, 2 captured; 2 exact, 0 wrong, 0 refused" in out
    assert "50%" in out
    assert "`bwla-compile zoo llama gpt2 --seed 0 --compile sample`" in page.read_text("utf-8")
    assert [r["name"] for r in json.loads(data.read_text("utf-8"))["rows"]] == ["llama", "gpt2"]


def test_zoo_fails_where_one_is_wrong_or_unknown(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo_of(monkeypatch, status="wrong")
    code, _, err = run("zoo", "llama")
    assert code == 1
    assert "llama: folding changes" in err
    code, _, err = run("zoo", "lama")
    assert code == 1
    assert "did you mean llama" in err
