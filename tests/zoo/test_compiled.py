from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bwla_compiler.calibrate.quantize import quantize_model
from bwla_compiler.errors import PlanError
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.modules import EndLinear
from bwla_compiler.zoo import compiled
from bwla_compiler.zoo.compiled import compile_packed, compile_raw, pack, said
from bwla_compiler.zoo.extent import Extent
from bwla_compiler.zoo.models import architectures, tiny_model
from bwla_compiler.zoo.run import SAMPLE
from bwla_compiler.zoo.workers import run_zoo
from tests.wider import wider

VOCABULARY = 16


class Toy(nn.Module):
    """A table and a packed head: ids [n, length] -> logits."""

    def __init__(self, *, packed: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.register_buffer("table", torch.randn(VOCABULARY, 8, generator=generator))
        weight = torch.randn(VOCABULARY, 8, generator=generator)
        self.head: Any = EndLinear.from_weight(weight) if packed else (lambda x: x @ weight.T)

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        x = self.table[input_ids]
        logits: Tensor = self.head(self.between(x))
        return logits

    def between(self, x: Tensor) -> Tensor:
        return x.tanh()


class Broken(Toy):
    def between(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.tanh()


class Different(Toy):
    """Computes something else once it is compiled."""

    def between(self, x: Tensor) -> Tensor:
        return x.sin() if torch.compiler.is_compiling() else x.tanh()


class NearlyRight(Toy):
    """Computes half a percent more once it is compiled."""

    def between(self, x: Tensor) -> Tensor:
        return x.tanh() * (1.005 if torch.compiler.is_compiling() else 1.0)


class Cacheless(Toy):
    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        if use_cache:
            raise ValueError("this cache has no sequence length")
        return super().forward(input_ids)


class Failing(Toy):
    def between(self, x: Tensor) -> Tensor:
        raise PlanError("no such plan")


def test_one_graph_of_packed_operators_is_exact() -> None:
    found = compile_packed(Toy(), depth="door")
    assert (found.status, found.reason) == ("exact", "")
    assert (found.n_graphs, found.n_lengths) == (1, 2)  # the second serves every length
    assert found.error == 0.0  # the very same operators
    assert found.cached


def test_what_differs_without_rounding_too_is_wrong() -> None:
    found = compile_packed(NearlyRight(), depth="door")  # little enough to be a code or two, but nothing is rounded
    assert found.status == "wrong"
    assert found.error == pytest.approx(0.005, rel=0.01)


@pytest.mark.parametrize(("unrounded", "status"), [(1e-7, "exact"), (1e-3, "wrong"), (float("nan"), "wrong")])
def test_what_differs_by_rounding_alone_is_exact(unrounded: float, status: str) -> None:
    rounded = {"status": "wrong", "reason": "relative error", "error": 0.01, "breaks": ()}
    found = compiled._tried(lambda **_: dict(rounded), lambda: {"error": unrounded}, depth="door")
    assert found.status == status
    assert found.error == 0.01
    assert ("rounds the other way" in found.reason) == (status == "exact")


def test_breaks_are_counted_and_said() -> None:
    found = compile_packed(Broken(), depth="door")
    assert found.status == "broken"
    assert found.n_graphs > 1
    assert "graph_break" in found.reason


def test_different_logits_are_wrong() -> None:
    found = compile_packed(Different(), depth="door")
    assert found.status == "wrong"
    assert found.error is not None
    assert found.error > 0.01


def test_a_graph_without_packed_operators_is_no_success() -> None:
    assert compile_packed(Toy(packed=False), depth="door").status == "floats"


def test_a_cache_that_fails_in_the_model_itself_is_left_out() -> None:
    found = compile_packed(Cacheless(), depth="door")
    assert (found.status, found.cached) == ("exact", False)


def test_errors_are_rows() -> None:
    found = compile_packed(Failing(), depth="door")
    assert found.status == "refused"
    assert "no such plan" in found.reason


def test_the_backends_own_error_is_said() -> None:
    wrapped = RuntimeError("backend='bwla' raised:")
    wrapped.inner_exception = PlanError("several modules")  # type: ignore[attr-defined]
    assert said(wrapped) == "several modules"
    assert said(ValueError("")) == "ValueError: no message"


def quantized(name: str) -> nn.Module:
    model = tiny_model(name)
    quantize_model(model, load_recipe("hadamard-rtn"), None)
    return model


# tied without a basis that turns; the other asks its head for a dtype and keeps states in place of keys
@pytest.mark.parametrize("name", ["bloom", *wider("mamba")])
def test_packed_models_compile_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LENGTHS", (11,))
    found = compile_packed(quantized(name), depth="door")
    assert (found.status, found.reason, found.n_graphs) == ("exact", "", 1)


@pytest.mark.exhaustive
def test_a_float_model_is_quantized_on_the_way() -> None:
    found = compile_raw(tiny_model("llama"), depth="door")
    assert (found.status, found.reason, found.n_lengths) == ("exact", "", 2)


@pytest.mark.exhaustive
def test_packing_counts_what_is_packed() -> None:
    model = tiny_model("llama")
    named = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    found = pack(model, [*named, "model.norm.weight"])  # a norm's gain stays
    assert 0.99 < found.share < 1.0
    assert 1.0 < found.linear_bits < found.model_bits < 8.0


def test_the_sample_is_of_known_architectures() -> None:
    assert len(set(SAMPLE)) >= 20
    assert len(set(SAMPLE) & set(architectures())) >= 18  # older transformers know fewer


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_sample_of_the_zoo_compiles_up_to_the_door() -> None:
    rows = run_zoo(architectures()[5::17], extent=Extent.DOOR, limit_seconds=600)  # all of them: bwla-compile zoo
    tried = [row.compiled for row in rows if row.compiled is not None]
    assert len(tried) >= 6
    assert [x.reason for x in tried if x.status == "wrong"] == []
    assert sum(x.status == "exact" for x in tried) >= 0.9 * len(tried)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_the_whole_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LENGTHS", (11,))
    found = compile_packed(quantized(name), depth="whole")
    assert (found.status, found.reason) == ("exact", "")
