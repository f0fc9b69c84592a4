"""A small plan made by hand: three blocks of which two are alike, a partial and an online linear, one left alone."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bwla_compiler.graph.plan import Axis, Basis, Decision, Expression, Group, Linear, Norm, Plan
from bwla_compiler.numerics.spread import Spread

RESIDUAL = Expression("leaf", 8, "residual")


def block(index: int) -> list[Linear]:
    """Return the linears of one block; the last block's down_proj is left alone."""
    name = f"model.layers.{index}"
    value = f"{name}.v_proj"
    heads = Expression("product", 8, "", (Expression("leaf", 2), Expression("leaf", 4, value)))
    wide = Expression("leaf", 12)
    last = index == 2
    end: Decision = "alone" if last else "online"
    why = "weight is not floating" if last else f"pinned by silu_{index}: acts on each channel by itself"

    def linear(
        short: str, out: int, decision: Decision, reason: str, group: str, source: Expression, into: Expression
    ) -> Linear:
        writes = into is RESIDUAL
        shape = (source.size, out)
        full = f"{name}.{short}"
        return Linear(
            full, f"{full}.weight", None, 1, 0, *shape, decision, reason, f"{name}.{group}", name, source, into, writes
        )

    return [
        linear("k_proj", 4, "folded", "all writers rotate", "k_proj", RESIDUAL, Expression("leaf", 4)),
        linear("v_proj", 4, "folded", "all writers rotate", "k_proj", RESIDUAL, Expression("leaf", 4, value)),
        linear("o_proj", 8, "partial", "the factor of 2 is pinned", "o_proj", heads, RESIDUAL),
        linear("mlp.up_proj", 12, "folded", "all writers rotate", "mlp.up_proj", RESIDUAL, wide),
        linear("mlp.down_proj", 8, end, why, "mlp.down_proj", wide, RESIDUAL),
    ]


@dataclass(frozen=True)
class Measured:
    """What a quantization says of one linear."""

    name: str
    true_bits: float | None = 1.25
    weight_error: float | None = 0.4
    output_error: float | None = 0.1
    seconds: float = 0.5
    tokens: object | None = None
    spread: Spread | None = None


@dataclass(frozen=True)
class Ran:
    """What a pass says."""

    name: str = "fold-norms"
    changed: tuple[tuple[str, str], ...] = (("a", "b"),)
    skipped: tuple[tuple[str, str], ...] = (("q_norm", "read by a transpose"),)
    seconds: float = 0.25


@dataclass(frozen=True)
class Counted:
    """True bits."""

    linears: float = 1.25
    model: float = 3.5
    n_bytes: int = 2048


@dataclass(frozen=True)
class Outcome:
    """A quantization's report."""

    linears: tuple[Measured, ...]
    passes: tuple[Ran, ...] = (Ran(),)
    bits: Counted = Counted()


@pytest.fixture
def quantized() -> Callable[[dict[str, float]], Outcome]:
    """Return a quantization's report from output errors by linear."""
    return lambda errors: Outcome(tuple(Measured(name, output_error=error) for name, error in errors.items()))


@pytest.fixture
def plan() -> Plan:
    """The plan described above."""
    linears = [linear for index in range(3) for linear in block(index)]
    head = Linear(
        "lm_head", "lm_head.weight", None, 1, 0, 8, 16, "folded", "all <writers> rotate", "lm_head", "", RESIDUAL,
        Expression("leaf", 16),
    )  # fmt: skip
    values = [Basis(f"model.layers.{i}.v_proj", 4, "free", "", (f"model.layers.{i}.v_proj",)) for i in range(3)]
    norms = [
        Norm(f"model.layers.{i}.norm.weight", None, tuple(f"model.layers.{i}.{k}_proj" for k in "kv")) for i in range(3)
    ]
    norms += [Norm("model.layers.0.q_norm.weight", None, (), "mul_3: also read by transpose_1")]
    groups = {x.group: Group(x.group, (x.name,), x.in_features, x.block) for x in linears}
    return Plan(
        "TinyForCausalLM",
        (Basis("residual", 8, "free", "", ("model.embed",), ("lm_head",)), *values),
        (*linears, head),
        tuple(groups.values()),
        tuple(norms),
        tuple(Axis(x.parameter, 0, x.output) for x in linears if x.output.basis),
        (("model.embed.weight", "lm_head"),),
        {"aten.erfinv.default": 2},
    )
