"""Models of random weights for benchmarks on a GPU, floats and packed, and the time of their steps."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Qwen3Config, StaticCache

from bwla_compiler.backend import compile_backend
from bwla_compiler.graph.planner import make_plan
from bwla_compiler.passes.group_specs import planned_specs
from bwla_compiler.passes.quantize_ends import head_names
from bwla_compiler.recipe import load_recipe
from bwla_compiler.runtime.kv_cache import int8_cache
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear
from bwla_compiler.spec import FLOAT_BITS

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "num_hidden_layers": 36, "tie_word_embeddings": False,
    },
    "Qwen3-32B": {
        "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "num_hidden_layers": 64, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "vocab_size": 100, "num_hidden_layers": 1, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Sizes of the published configs; "tiny" is what a dry run takes."""


def config_of(name: str, *, layers: int | None = None) -> Qwen3Config:
    """Return the config of a name, with fewer layers where that is asked for."""
    sizes = dict(CONFIGS[name])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return Qwen3Config(**sizes, max_position_embeddings=4096)


def float_model(config: Any, device: torch.device) -> nn.Module:
    """Return the model in bfloat16 with the random weights that transformers gives it."""
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def packed_model(config: Any, device: torch.device, *, recipe: str = "bwla-w1a6") -> nn.Module:
    """Return the packed model that a recipe would give, with random signs, scales and factors: no floats are packed."""
    model = empty_packed_model(config, recipe=recipe).to_empty(device=device)
    _fill(model, device)
    # buffers that are computed, and not stored, were lost with meta
    body: Any = model.model
    body.rotary_emb = type(body.rotary_emb)(config=config).to(device)
    return model.to(torch.bfloat16)


def empty_packed_model(config: Any, *, recipe: str = "bwla-w1a6") -> nn.Module:
    """Return the packed model that a recipe would give, on meta."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    chosen = load_recipe(recipe)
    plan = make_plan(model)
    for names, spec in planned_specs(model, plan, chosen):
        for name in names:
            linear: Any = model.get_submodule(name)
            own = dataclasses.replace(spec, out_features=(linear.out_features,))
            _set(model, name, PackedLinear(own, device="meta"))
    for name in head_names(model, plan):
        head: Any = model.get_submodule(name)
        _set(model, name, EndLinear(head.in_features, head.out_features, device="meta"))
    table: Any = cast(Any, model).get_input_embeddings()
    for name, module in list(model.named_modules()):
        if module is table:
            _set(model, name, EndEmbedding(*table.weight.shape, device="meta", dtype=torch.bfloat16))
    return model.requires_grad_(False)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give every tensor values of the size that a quantized model's have."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        last = name.rpartition(".")[2]
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif tensor.dtype == torch.int32:  # signs as the kernels read them
            tensor.random_(-(2**31), 2**31, generator=generator)
        elif last.endswith("_exponent"):
            tensor.zero_()
        elif tensor.dtype == torch.int16:
            tensor.copy_(_halves(last, tensor, generator))
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        elif tensor.is_floating_point() and tensor.numel():
            tensor.fill_(1.0)


def _halves(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return bits of float16 for a scale, or for a factor whose rows have length 1."""
    if name in ("left", "right"):
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device) / tensor.shape[0] ** 0.5
    elif name in ("scale", "column_scale"):
        values = torch.ones(tensor.shape, device=tensor.device)
    else:
        values = torch.full(tensor.shape, 1e-5 if name == "low_rank_scale" else 0.01, device=tensor.device)
    bits: Tensor = values.half().view(torch.int16)
    return bits


def compiled(model: nn.Module, way: str, *, dry: bool) -> Callable[..., Any]:
    """Return a model compiled by one way, "bf16" or "bwla", CUDA graphs on both sides; in a dry run as it is."""
    if dry:
        return model
    backend = compile_backend if way == "bwla" else "inductor"
    return torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Seconds of a step, the median of many; of the first call, which compiles; bytes of the model's tensors.

    graph_skips: how often Inductor refused to record a CUDA graph, which it only logs: a step is then no fair one.
    """

    seconds: float
    first_seconds: float
    n_bytes: int
    graph_skips: int


@torch.no_grad()
def time_decode(
    model: nn.Module, way: str, *, batch: int, context: int, rounds: int, dry: bool, cache_bits: int = FLOAT_BITS
) -> Steps:
    """Return the time of a step of one token a sequence, after `context` tokens that are read eagerly."""
    device = next(model.buffers()).device
    cache: Any = StaticCache(config=model.config, max_cache_len=context + 2 * rounds + 16)
    if cache_bits < FLOAT_BITS:
        int8_cache(cache)
    ids = torch.zeros(batch, context, dtype=torch.long, device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].contiguous()
    run = compiled(model, way, dry=dry)
    model(input_ids=token, past_key_values=cache, use_cache=True)  # tiles are chosen outside any graph
    return _timed(lambda: run(input_ids=token, past_key_values=cache, use_cache=True), model, rounds)


@torch.no_grad()
def time_prefill(model: nn.Module, way: str, *, tokens: int, rounds: int, dry: bool) -> Steps:
    """Return the time of reading a prompt without a cache."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.buffers()).device)
    run = compiled(model, way, dry=dry)
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return _timed(lambda: run(input_ids=ids, use_cache=False, logits_to_keep=1), model, rounds)


def _timed(step: Callable[[], object], model: nn.Module, rounds: int) -> Steps:
    skips = counters["inductor"]["cudagraph_skips"]
    start = time.perf_counter()
    step()
    _wait(model)
    first = time.perf_counter() - start
    for _ in range(min(3, rounds - 1)):  # the second call records the graph, the third is the first that replays it
        step()
    seconds = []
    for _ in range(rounds):
        _wait(model)
        start = time.perf_counter()
        step()
        _wait(model)
        seconds.append(time.perf_counter() - start)
    n_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    skips = counters["inductor"]["cudagraph_skips"] - skips
    return Steps(statistics.median(seconds), first, n_bytes, skips)


def _wait(model: nn.Module) -> None:
    if next(model.buffers()).is_cuda:
        torch.cuda.synchronize()
