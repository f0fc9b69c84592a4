"""Deep models planned by a few blocks: the same plan as that of the whole capture, or no shortcut at all."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from bwla_compiler.graph.planner import make_plan
from bwla_compiler.graph.repetition import alike_blocks, plan_deep
from tests.wider import wider

GROUPED = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS: dict[str, Callable[[int], PretrainedConfig]] = {
    "qwen3": lambda n: transformers.Qwen3Config(**GROUPED, num_hidden_layers=n, head_dim=8),
    "gpt2": lambda n: transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=n, n_head=4, n_positions=64),
    "mixtral": lambda n: transformers.MixtralConfig(
        **GROUPED, num_hidden_layers=n, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama": lambda n: transformers.LlamaConfig(**GROUPED, num_hidden_layers=n, tie_word_embeddings=True),
    "gemma2": lambda n: transformers.Gemma2Config(
        **GROUPED, num_hidden_layers=n, head_dim=8, layer_types=["full_attention"] * n
    ),
    "opt": lambda n: transformers.OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=n, num_attention_heads=4, word_embed_proj_dim=32
    ),
}


def bare(config: PretrainedConfig) -> nn.Module:
    """Return a model without weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


# each captures 15 blocks: Deep, below, does the same in a tenth of the time
@pytest.mark.parametrize(
    "name, depth",
    wider(*((name, 6) for name in ("qwen3", "gpt2", "mixtral", "llama", "gemma2", "opt")), ("qwen3", 13), ("gpt2", 13)),
)
def test_the_repeated_plan_is_the_whole_plan(name: str, depth: int) -> None:
    model = bare(CONFIGS[name](depth))
    found, repeated = plan_deep(model, worthwhile=0)
    assert repeated is not None
    assert (repeated.total, repeated.captured) == (depth, 5)
    assert found.to_json() == make_plan(model).to_json()


def test_a_shallow_model_is_captured_whole() -> None:
    assert plan_deep(bare(CONFIGS["qwen3"](2)))[1] is None


@pytest.mark.parametrize("name, at", [("qwen3", "model.layers"), ("gpt2", "transformer.h")])
def test_the_blocks_are_found(name: str, at: str) -> None:
    assert alike_blocks(bare(CONFIGS[name](9)), at_least=6) == (at, 9)


def one_wider(model: nn.Module) -> None:
    """Give one block another width."""
    model.model.layers[4].mlp.up_proj = nn.Linear(32, 49, bias=False)  # type: ignore[index, union-attr]


def one_scaled(model: nn.Module) -> None:
    """Give one block another number that its code may look at."""
    model.model.layers[4].self_attn.scaling = 0.5  # type: ignore[index, union-attr]


def one_other_class(model: nn.Module) -> None:
    """Give one block another activation."""
    model.model.layers[4].mlp.act_fn = nn.GELU()  # type: ignore[index, union-attr]


def one_hooked(model: nn.Module) -> None:
    """Change what one block computes by a hook."""
    model.model.layers[4].register_forward_hook(lambda module, args, out: out)  # type: ignore[index, union-attr]


def one_shared(model: nn.Module) -> None:
    """Have two blocks share a weight."""
    layers = model.model.layers  # type: ignore[union-attr]
    layers[4].mlp.up_proj.weight = layers[3].mlp.up_proj.weight  # type: ignore[index, union-attr]


def one_configured(model: nn.Module) -> None:
    """Have the config tell that one block is of another kind."""
    model.config.layer_types = [*["full_attention"] * 8, "sliding_attention"]  # type: ignore[union-attr]


@pytest.mark.parametrize("edit", [one_wider, one_scaled, one_other_class, one_hooked, one_shared, one_configured])
def test_blocks_that_differ_are_never_taken_for_alike(edit: Callable[[nn.Module], None]) -> None:
    model = bare(CONFIGS["qwen3"](9))
    edit(model)
    assert alike_blocks(model, at_least=6) is None


class Block(nn.Module):
    """Its code, not its attributes, looks at its number: the activation comes in some blocks alone."""

    def __init__(self, number: int, bent: Callable[[int], bool]) -> None:
        super().__init__()
        self.layer_idx, self.bent = number, bent
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return x + self.down(torch.relu(inner) if self.bent(self.layer_idx) else inner)


class Deep(nn.Module):
    """An embedding, blocks, a head."""

    def __init__(self, depth: int, bent: Callable[[int], bool]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(i, bent) for i in range(depth))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    "bent, repeats",
    [
        (lambda n: True, True),
        (lambda n: n < 8, False),  # a list of the plan leaves out the last block, and so does not count on
        *wider(
            (lambda n: n > 0, False),  # relu, relu_1, ...: the first has no number to count on, and so is not trusted
            (lambda n: n % 2 == 1, False),
            (lambda n: n == 4, False),  # the one in the middle is among those that are captured
        ),
    ],
)
def test_code_that_looks_at_its_number_is_seen_by_its_plan(bent: Callable[[int], bool], repeats: bool) -> None:
    model = Deep(9, bent)
    assert alike_blocks(model, at_least=6) == ("blocks", 9)  # nothing that can be seen from outside differs
    found, repeated = plan_deep(model, worthwhile=0)
    assert (repeated is not None) is repeats
    assert found.to_json() == make_plan(model).to_json()
