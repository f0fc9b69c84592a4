"""torch.compile(model, backend="bwla") of packed models."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from transformers import StaticCache

from bwla_compiler.backend import compile_backend, lower
from bwla_compiler.backend.compiled import TOLERANCE
from bwla_compiler.backend.lower import inductor_passes
from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.evaluate.verification import verify_rotations
from bwla_compiler.passes import inductor_pass
from bwla_compiler.passes.bind_calls import BindCalls
from bwla_compiler.passes.expand_anchors import CollapseAnchors
from bwla_compiler.passes.fuse_kernels import FuseKernels
from bwla_compiler.passes.shared_attention import share_attention
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime import compiled
from bwla_compiler.runtime.modules import PackedLinear
from tests import tiny
from tests.backend import small
from tests.packed import packed
from tests.wider import wider


@pytest.mark.parametrize("name", ["gpt2", *wider("llama-tied", "llama", "qwen2", "qwen3", "mistral", "phi3", "opt")])
def test_compiled_logits_are_those_of_the_packed_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = inductor_passes()
    monkeypatch.setattr(lower, "inductor_passes", lambda *_: passes)
    model = packed(name)
    torch._dynamo.reset()
    uncached = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with torch.no_grad(), uncached[0], uncached[1]:  # a cached graph is not fused again
        expected = model(tiny.ids(), use_cache=False).logits
        found = torch.compile(model, backend=compile_backend, fullgraph=True)(tiny.ids(), use_cache=False).logits
    # norms, activation functions and sines have the same code on both sides; with another order of sums some
    # activation at the edge of two codes would round the other way, and move logits by a hundredth
    assert torch.equal(found, expected)
    reports = {report.name: report for report in passes["post_grad_custom_pre_pass"].reports}
    fused, bound = reports[FuseKernels.name], reports[BindCalls.name]
    alone = [call for call, _ in reports[CollapseAnchors.name].changed]
    assert len(alone) == (1 if name == "opt" else 0), alone  # the norm behind its last routine
    assert len(fused.changed) == 8  # two blocks of four calls
    # before, between and behind the two attentions; of gpt2 and opt also the transform behind the embedding, which
    # positions are added to; opt's putting sequences one behind another ends a routine too
    assert len(bound.changed) == {"gpt2": 4, "opt": 8}.get(name, 3)
    assert fused.skipped == bound.skipped == []


class Attended(CustomGraphPass):
    """Keeps the shapes of keys, of values, and of all tensors of five dimensions, of graphs as Inductor lowers them."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, torch.Size]] = []
        self.wide: list[torch.Size] = []

    def __call__(self, graph: Graph) -> None:
        """Look; change nothing."""
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        for node in graph.find_nodes(op="call_function", target=attention):
            key, value = (operand.meta["val"].shape for operand in node.args[1:3])
            self.shapes.append((key, value))
        shapes = (getattr(node.meta.get("val"), "shape", ()) for node in graph.nodes)
        self.wide += [shape for shape in shapes if len(shape) == 5]

    def uuid(self) -> None:
        """Keep out of Inductor's cache."""


def test_steps_read_the_heads_of_a_cache_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {**inductor_passes(), "post_grad_custom_post_pass": (seen := Attended())}
    monkeypatch.setattr(lower, "inductor_passes", lambda *_: passes)
    model, ids = packed("llama", layers=1), tiny.ids()
    torch._dynamo.reset()
    logits = []
    uncached = (inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False))
    with torch.no_grad(), uncached[0], uncached[1]:
        for run in (model, torch.compile(model, backend=compile_backend, fullgraph=True)):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(ids[:, :9], past_key_values=cache)
            logits.append(run(ids[:, 9:], past_key_values=cache).logits)
    (changed,) = passes["post_grad_custom_pre_pass"].reports[1].changed
    assert changed[1] == "each head of keys and values is read by 2 of queries"
    assert seen.shapes == [((3, 2, 16, 16), (3, 2, 16, 16))]  # of four heads when transformers is done
    assert seen.wide == []
    # two tokens: of one alone, transformers' eager attention multiplies a group's queries at once, in another order
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", ["llama", *wider("qwen3", "gpt2")])
def test_a_prompt_over_a_static_cache_has_the_bits_of_eager(name: str) -> None:
    if compiled.kernels() is None:
        pytest.skip("torch's kernel attends, in another order where there is a mask")
    model, ids = packed(name), tiny.ids()
    assert share_attention(model)
    torch._dynamo.reset()
    logits = []
    with torch.no_grad():
        for run in (model, torch.compile(model, backend=compile_backend)):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model(ids[:, :1], past_key_values=cache)  # makes its tensors
            cache.reset()
            logits.append(run(ids, past_key_values=cache).logits)
        assert torch.equal(model(ids).logits, logits[0])
    assert torch.equal(logits[0], logits[1])


def test_the_pass_is_known_to_inductors_cache_by_its_source() -> None:
    (first,), (second,) = (inductor_passes().values() for _ in range(2))
    assert first.uuid() == second.uuid()
    (other,) = inductor_passes(("b", "a")).values()  # routines name the tensors of a raw model's copy
    assert other.uuid() != inductor_passes(("a", "b"))["post_grad_custom_pre_pass"].uuid() != first.uuid()
    sources = {Path(inductor_pass.__file__).with_name(f"{name}.py") for name in inductor_pass._SOURCES}
    imported = {
        Path(module.__file__ or "")
        for name, module in sys.modules.items()
        if name.startswith(("bwla_compiler.passes.match", "bwla_compiler.passes.graph", "bwla_compiler.passes.packed"))
    }
    assert imported <= sources


def test_the_entry_point_names_the_backend() -> None:
    points = {p.name: p.value for p in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "bwla" not in points:
        pytest.skip("the package is not installed")
    assert points["bwla"] == "bwla_compiler.backend:compile_backend"


@pytest.mark.parametrize("name", ["opt", *wider("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2")])
def test_four_lengths_are_two_graphs(name: str, graphs: list[torch.fx.GraphModule]) -> None:
    model = small.architecture(name)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    fast = small.compiled(model)
    with torch.no_grad():
        for length, most in ((11, 1), (5, 2), (17, 2), (24, 2)):
            found = fast(tiny.ids(length=length)).logits
            # the same kernels; room for masks built by other operations
            assert small.error(found, model(tiny.ids(length=length)).logits) < 1e-5
            assert len(graphs) <= most
    assert any(str(node.target).startswith("bwla.linear") for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("tied", [True, *wider(False)])
def test_ends_of_4_bits_compiled(tied: bool, graphs: list[torch.fx.GraphModule]) -> None:
    model = small.llama(tied=tied).requires_grad_(False)
    quantize_model(model, load_recipe("hadamard-rtn", {"head.bits": 4}), None)
    fast = small.compiled(model)
    with torch.no_grad():
        found, expected = (m(tiny.ids(length=7)).logits for m in (fast, model))
        assert small.error(found, expected) < 1e-5  # the same kernels
        new = model.generate(tiny.ids(length=7), max_new_tokens=2, do_sample=False)[:, 7]
        assert torch.equal(new, expected[:, -1].argmax(-1))  # its prompt's, though the head saw one row and not seven
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert {"bwla.int4_linear.default", "bwla.int4_embedding.default"} <= called


def adapted(model: nn.Module) -> nn.Module:
    """Return the model with LoRA adapters that PEFT trained elsewhere, as far as one can tell."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    found: nn.Module = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:  # zero at the start
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found.eval()


def test_adapters_stay_in_floats_beside_packed_linears(graphs: list[torch.fx.GraphModule]) -> None:
    model = adapted(small.llama())
    with torch.no_grad():
        floats = model(input_ids=tiny.ids()).logits
        assert verify_rotations(model, seed=0).error < 1e-10  # float64: the adapters turn with the linears beside them
        quantize_model(model, load_recipe("hadamard-rtn", {"weights.planes": 4, "activations.bits": 16}), None)
        eager = model(input_ids=tiny.ids()).logits
        with model.disable_adapter():
            bare = model(input_ids=tiny.ids()).logits
        found = small.compiled(model)(input_ids=tiny.ids()).logits
    query = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(query.base_layer, PackedLinear)
    assert type(query.lora_A["default"]) is nn.Linear
    # four planes leave about a sixth; adapters lost or in a basis not theirs would be off by all they do, a half
    assert small.error(eager, floats) < 0.25 < 0.4 < small.error(bare, floats)
    assert small.error(found, eager) < 1e-5


@pytest.mark.exhaustive
def test_a_raw_model_with_adapters(graphs: list[torch.fx.GraphModule]) -> None:
    model = adapted(small.llama())
    with torch.no_grad():
        found = small.compiled(model, **small.PRECISE)(input_ids=tiny.ids()).logits
        assert small.error(found, small.only_variant(model).quantized(input_ids=tiny.ids()).logits) < 1e-5
        with model.disable_adapter():
            bare = small.compiled(model, **small.PRECISE)(input_ids=tiny.ids()).logits
        assert small.error(bare, found) > 0.1


def test_peft_refuses_to_add_adapters_to_folded_linears() -> None:
    model = small.llama()
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    # an adapter trained beside the float linear would read another basis here
    with pytest.raises(ValueError, match=r"PackedLinear.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


EXPORT = """
import sys, torch
import bwla_compiler.runtime.ops  # the operators that the package calls
ids, expected = torch.load(sys.argv[2])
found = torch._inductor.aoti_load_package(sys.argv[1])(ids)
print(float((found - expected).norm() / expected.norm()))
"""


@pytest.mark.exhaustive
def test_a_package_made_ahead_of_time_runs_in_a_new_process(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    model = small.llama().requires_grad_(False)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    ids, package, example = tiny.ids(), str(tmp_path / "model.pt2"), str(tmp_path / "example.pt")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), example)
        program = torch.export.export(Logits(model), (ids,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", EXPORT, package, example], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < TOLERANCE
