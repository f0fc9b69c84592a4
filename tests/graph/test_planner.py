import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwla_compiler.checkpoint.empty import meta_model
from bwla_compiler.errors import PlanError
from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.planner import block_of, make_plan
from bwla_compiler.zoo.models import tiny_model
from tests import planned, tiny
from tests.wider import wider

GATED = {"q_proj": "folded", "k_proj": "folded", "v_proj": "folded", "o_proj": "partial"} | {
    "gate_proj": "folded",
    "up_proj": "folded",
    "down_proj": "online",
    "lm_head": "folded",
}
GOLDEN = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "phi3": {
        "qkv_proj": "folded",
        "o_proj": "partial",
        "gate_up_proj": "folded",
        "down_proj": "online",
        "lm_head": "folded",
    },
    "gpt2": {
        "attn.c_attn": "folded",
        "attn.c_proj": "partial",
        "mlp.c_fc": "folded",
        "mlp.c_proj": "online",
        "lm_head": "folded",
    },
    "opt": {
        "q_proj": "folded",
        "k_proj": "folded",
        "v_proj": "folded",
        "out_proj": "partial",
        "fc1": "folded",
        "fc2": "online",
        "lm_head": "folded",
    },
}
"""What folds, is partial (the factor of a head folds, the one across heads is online) or online."""


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: planned.plan(name) for name in (*tiny.SEVEN, "llama-tied")}


@pytest.mark.parametrize("name", tiny.SEVEN)
def test_decisions_are_the_golden_ones(name: str, plans: dict[str, Plan]) -> None:
    expected = GOLDEN[name]
    plan = plans[name]
    assert len(plan.linears) == 2 * (len(expected) - 1) + 1
    for linear in plan.linears:
        suffix = next(s for s in expected if linear.name.endswith(s))
        assert linear.decision == expected[suffix], f"{linear.name}: {linear.reason}"
        assert linear.reason
    assert plan.unknown == {}


@pytest.mark.parametrize("name", tiny.SEVEN)
def test_the_residual_stream_is_one_free_basis(name: str, plans: dict[str, Plan]) -> None:
    residual = plans[name].basis("residual")
    assert residual.size == 64
    assert residual.freedom == ("fixes-ones" if name in ("gpt2", "opt") else "free")
    writers = [x.name for x in plans[name].linears if x.writes_residual]
    assert set(writers) < set(residual.writers)
    assert len(writers) == 4


def test_linears_that_read_one_input_form_a_group(plans: dict[str, Plan]) -> None:
    groups = {g.name: [n.rpartition(".")[2] for n in g.linears] for g in plans["llama"].groups}
    assert groups["model.layers.0.self_attn.q_proj"] == ["q_proj", "k_proj", "v_proj"]
    assert groups["model.layers.0.mlp.gate_proj"] == ["gate_proj", "up_proj"]
    assert groups["model.layers.1.mlp.down_proj"] == ["down_proj"]


def test_a_tied_head_is_planned_as_its_own_linear_and_named(plans: dict[str, Plan]) -> None:
    assert plans["llama-tied"].tied == (("model.embed_tokens.weight", "lm_head"),)
    assert plans["llama-tied"].linear("lm_head").parameter == "lm_head.weight"
    assert plans["llama"].tied == ()


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "phi3"])
def test_json_gives_the_plan_back(name: str, plans: dict[str, Plan]) -> None:
    assert Plan.from_json(plans[name].to_json()) == plans[name]


def test_reasons_name_the_operation(plans: dict[str, Plan]) -> None:
    assert "silu" in plans["llama"].linear("model.layers.0.mlp.down_proj").reason
    assert "relu" in plans["opt"].linear("model.decoder.layers.0.fc2").reason
    assert "attention" in plans["llama"].linear("model.layers.0.self_attn.o_proj").reason


class Toy(nn.Module):
    """ids -> embedding -> something -> two linears, for one rule at a time."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 12)
        self.first = nn.Linear(12, 12)
        self.last = nn.Linear(12, 32)
        self.middle = middle

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x + self.first(x)
        return self.last(self.middle(x) if self.middle is not None else x)


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "freedom"),
    [
        (lambda x: x, "free"),
        (lambda x: x * 2.0, "free"),
        (lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), "free"),
        (lambda x: x - x.mean(-1, keepdim=True), "fixes-ones"),
        (lambda x: x + 1.0, "fixes-ones"),
        (lambda x: F.layer_norm(x, (12,)), "fixes-ones"),
        (lambda x: F.silu(x), "pinned"),
        (lambda x: x.pow(3), "pinned"),
        (lambda x: x.pow(2), "pinned"),
        (lambda x: x * x, "pinned"),
        (lambda x: x.flip(-1), "pinned"),
        (lambda x: x[..., ::2].repeat(1, 1, 2), "pinned"),
        (lambda x: x.cumsum(-1), "pinned"),
        (lambda x: x.softmax(-1), "pinned"),
        (lambda x: 1.0 / x, "pinned"),
    ],
)
def test_one_operation_takes_just_its_freedom(function: object, freedom: str) -> None:
    plan = make_plan(Toy(Lambda(function)))
    last = plan.linear("last")
    found = {b.name: b.freedom for b in plan.bases}
    assert found.get("residual", "pinned") == freedom
    if freedom == "pinned":
        assert last.decision == "online"


def test_an_operation_without_a_rule_is_reported() -> None:
    plan = make_plan(Toy(Lambda(lambda x: x.cumprod(-1))))
    assert list(plan.unknown) == ["aten.cumprod.default"]
    assert "has no rule" in plan.linear("last").reason


def test_a_gain_read_by_something_else_stays_and_says_so() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.weight
            return y + F.silu(y)

    plan = make_plan(Toy(Gain()))
    (norm,) = plan.norms
    assert norm.absorbed_by == ()
    assert "read by" in norm.reason
    assert "residual" not in {b.name for b in plan.free}


class Twice(Toy):
    """One linear of two inputs, once beside another linear and once not."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.last(self.first(x) + self.middle(x) + self.first(F.silu(x)))  # type: ignore[misc]


def test_a_linear_that_is_called_twice_is_planned_once_and_a_group_of_its_own() -> None:
    plan = make_plan(Twice(nn.Linear(12, 12)))
    assert [x.name for x in plan.linears] == ["first", "middle", "last"]
    assert [(g.name, g.linears) for g in plan.groups] == [(n, (n,)) for n in ("first", "middle", "last")]
    assert plan.linear("first").decision == "online"  # its second input is pinned


def test_sizes_that_depend_on_data_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="depend on data"):
        make_plan(Toy(Lambda(lambda x: x + x[x[..., 0] > 0].sum())))


class TwoTables(Toy):
    """Two embeddings of different widths, joined: neither space may take the other's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(32, 4)
        self.joined = nn.Linear(16, 12)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.last(self.joined(torch.cat((self.embed(input_ids), self.other(input_ids)), -1)))


def test_every_basis_has_a_name_of_its_own() -> None:
    plan = make_plan(TwoTables())
    names = [basis.name for basis in plan.bases]
    assert len(names) == len(set(names))
    assert (plan.basis("residual").size, plan.basis("other").size) == (12, 4)
    assert str(plan.linear("joined").input) == "(residual + other)"


SUMMARY = {
    "gemma": ("q_proj k_proj v_proj gate_proj up_proj lm_head", "o_proj", "down_proj", ""),
    "gpt_neox": ("query_key_value dense_h_to_4h lm_head", "attention.dense", "dense_4h_to_h", ""),
    "stablelm": ("q_proj k_proj v_proj gate_proj up_proj lm_head", "o_proj", "down_proj", ""),
    "gptj": ("q_proj k_proj v_proj fc_in lm_head", "out_proj", "fc_out", ""),
    "mpt": ("Wqkv up_proj lm_head", "out_proj", "down_proj", ""),
    "granite": ("q_proj k_proj v_proj gate_proj up_proj lm_head", "o_proj", "down_proj", ""),
    "olmo": ("q_proj k_proj v_proj gate_proj up_proj lm_head", "o_proj", "down_proj", ""),
    "mixtral": ("q_proj k_proj v_proj gate_up_proj lm_head", "o_proj", "experts.down_proj", "mlp.gate"),
    "qwen3_moe": ("q_proj k_proj v_proj gate_up_proj lm_head", "o_proj", "experts.down_proj", "mlp.gate"),
}
"""Of more architectures: what folds, is partial, online, left alone."""


LANES = {
    "falcon": ("query_key_value dense_h_to_4h lm_head", "self_attention.dense", "dense_4h_to_h", ""),
    "persimmon": ("query_key_value dense_h_to_4h lm_head", "self_attn.dense", "dense_4h_to_h", ""),
    "deepseek_v3": ("a_proj b_proj kv_a_proj_with_mqa gate_proj up_proj lm_head", "o_proj", "down_proj", ""),
}
"""Queries, keys and values in lanes of one view, or put together slice by slice: values turn by themselves."""


@pytest.mark.parametrize("name", ["falcon", *wider(*list(LANES)[1:])])
def test_values_turn_where_heads_are_stored_in_lanes(name: str) -> None:
    check_summary(make_plan(tiny_model(name)), LANES[name])


@pytest.mark.parametrize(
    "name", ["gpt_neox", "mixtral", *wider(*(n for n in SUMMARY if n not in ("gpt_neox", "mixtral")))]
)
def test_readers_of_the_residual_fold_in_more_architectures(name: str) -> None:
    check_summary(make_plan(tiny_model(name)), SUMMARY[name])


def check_summary(plan: Plan, summary: tuple[str, str, str, str]) -> None:
    for decision, suffixes in zip(("folded", "partial", "online", "alone"), summary, strict=True):
        found = [x for x in plan.linears if x.decision == decision]
        for suffix in suffixes.split():
            assert any(x.name.endswith(suffix) for x in found), f"{suffix} is not {decision}"
        for x in found:
            assert x.name.endswith(tuple(suffixes.split())), f"{x.name}: {decision}, {x.reason}"
    assert plan.basis("residual").freedom != "pinned"


def test_a_model_without_linears_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 12)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            return self.embed(input_ids)

    with pytest.raises(PlanError, match="Bare has no linears"):
        make_plan(Bare())


def test_block_of_a_name() -> None:
    assert block_of("model.layers.3.mlp.up_proj") == "model.layers.3"
    assert block_of("lm_head") == ""


@pytest.mark.parametrize("name", ["falcon", *wider("gpt2", "gemma2", "mixtral", "gpt_oss", "qwen3_next", "bloom")])
def test_a_config_alone_gives_the_plan_of_the_model(name: str) -> None:
    model = tiny.make(name) if name in tiny.CONFIGS else tiny_model(name)
    # Falcon indexes by lists: on meta their numbers are read too
    assert make_plan(meta_model(model.config)).to_json() == planned.plan(name).to_json()
