"""Models of one layer, and what every test of the backend does with them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bwla_compiler.backend import compile_backend
from bwla_compiler.backend.raw import variants_of
from bwla_compiler.backend.variant import Variant
from tests import tiny

OPTIONS = {"recipe": "hadamard-rtn", "calibration": "none"}
"""The cache on disk stays on: tests that compile the same model plan it once."""
PRECISE = {**OPTIONS, "weights.planes": 4, "activation_bits": 16}
"""Four planes and float activations: near enough to the float model for a wrong basis to stand out."""


def architecture(name: str) -> nn.Module:
    """Return one of the tiny architectures, of one layer."""
    config = tiny.CONFIGS[name]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return _seeded(config)


def llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    """Return a Llama of one layer, 32 wide, whose parameters ask for gradients as a loaded model's do."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return _seeded(config, seed=seed, dtype=dtype).requires_grad_(True)


def _seeded(config: transformers.PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.requires_grad_(False)


def mlp(*, seed: int = 0) -> nn.Sequential:
    """Return a plain module with a norm and three linears, [.., 32] -> [.., 10]."""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.Linear(48, 10)]
    return nn.Sequential(*layers).eval()


def compiled(model: Any, *, fullgraph: bool = True, **options: Any) -> Any:
    """Return torch.compile's wrapper of a model or function."""
    return torch.compile(model, backend=compile_backend, fullgraph=fullgraph, options={**OPTIONS, **options})


def only_variant(model: nn.Module) -> Variant:
    """Return the one quantized copy that the backend made of a model."""
    (variant,) = variants_of(model)
    return variant


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
