import pytest
import torch

from bwla_compiler.errors import ModelError
from bwla_compiler.evaluate.verification import verify_rotations
from bwla_compiler.graph.plan import Expression, Linear
from bwla_compiler.zoo.models import MAX_PARAMETERS, architectures, known, tiny_model
from bwla_compiler.zoo.run import ZooRow, plain_reason, zoo_row
from bwla_compiler.zoo.table import summary
from bwla_compiler.zoo.values import FAMILIES, OMITTED
from bwla_compiler.zoo.workers import run_zoo

SMALL = ("llama", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def rows() -> dict[str, ZooRow]:
    return {name: zoo_row(name) for name in SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_a_small_class_is_exact_and_says_what_it_decided(name: str, rows: dict[str, ZooRow]) -> None:
    row = rows[name]
    assert row.status == "exact", row.reason
    assert row.captured
    assert row.n_free >= 3
    assert row.error is not None
    assert row.error <= 1e-10  # float64 leaves 1e-15 a layer, a wrong fold 1e-2 or more
    assert row.decisions["folded"] >= 5
    assert row.decisions["partial"] == 2


def test_the_share_counts_what_is_left_alone(rows: dict[str, ZooRow]) -> None:
    assert rows["llama"].share == 1.0
    assert rows["gpt2"].share == 1.0
    model = tiny_model("mixtral")
    held = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]  # the routers
    all_products = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    left = sum(p.numel() for p in held) / sum(p.numel() for p in all_products)
    assert rows["mixtral"].share == pytest.approx(1 - left)
    assert 0 < left < 1


def test_linears_of_one_role_are_one_kind(rows: dict[str, ZooRow]) -> None:
    kinds = {kind.name: kind for kind in rows["mixtral"].kinds}
    router = kinds["model.layers.N.mlp.gate"]
    assert (router.decision, router.count) == ("alone", 2)
    assert "a router" in router.reason
    assert kinds["model.layers.N.mlp.experts.gate_up_proj"].decision == "folded"
    assert kinds["model.layers.N.self_attn.q_proj"].decision == "folded"


def test_reasons_lose_the_numbers_of_nodes() -> None:
    leaf = Expression("leaf", 4)
    linear = Linear("a", "a.weight", None, 1, 0, 4, 4, "online", "pinned by silu_3_1: acts", "a", "", leaf, leaf)
    assert plain_reason(linear) == "pinned by silu: acts"


def test_an_architecture_that_cannot_be_built_is_a_row() -> None:
    row = zoo_row("emu-of-tomorrow")
    assert row.status == "not built"
    assert "emu-of-tomorrow" in row.reason
    assert not row.captured


def test_a_wrong_fold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a rotation that is not orthogonal must not pass."""
    from bwla_compiler.passes import fold_rotations

    def stretched(n: int, **kwargs: object) -> torch.Tensor:
        return 1.01 * torch.eye(n, dtype=torch.float64)

    monkeypatch.setattr(fold_rotations, "haar", stretched)
    row = zoo_row("llama")
    assert row.status == "wrong"
    assert row.error is not None
    assert row.error > 1e-4
    assert "spaces" in row.reason


def test_a_model_whose_logits_are_not_finite_is_no_evidence() -> None:
    double = tiny_model("llama", dtype=torch.float64)
    double.get_parameter("model.norm.weight").fill_(1e300)
    double.get_parameter("lm_head.weight").fill_(1e300)
    with pytest.raises(ModelError, match="not finite"):
        verify_rotations(double)


def test_tiny_models_are_seeded_and_small() -> None:
    first, again, other = (tiny_model("llama", seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert float(first["model.norm.weight"].std()) > 0.1
    assert sum(v.numel() for v in first.values()) < MAX_PARAMETERS


def test_making_one_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    tiny_model("gpt2")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_names() -> None:
    assert known([]) == architectures()
    assert known(["gpt2", "llama", "gpt2"]) == ("gpt2", "llama")
    with pytest.raises(ModelError, match="did you mean"):
        known(["lama"])


def test_every_architecture_with_values_of_its_own_has_a_name() -> None:
    spelled = {*FAMILIES, *OMITTED}
    assert all(name == name.lower() and values is not None for name, values in FAMILIES.items())
    assert len(spelled & set(architectures())) >= 0.8 * len(spelled)  # older transformers know fewer


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_architecture_is_wrong_in_a_sample_of_the_zoo() -> None:
    sample = architectures()[::12]  # the whole of it: bwla-compile zoo
    rows = run_zoo(sample, limit_seconds=300)
    assert [row.name for row in rows] == list(sample)
    assert [row.name for row in rows if row.status == "wrong"] == [], summary(rows)
    assert sum(row.status == "exact" for row in rows) >= 0.6 * len(rows), summary(rows)
