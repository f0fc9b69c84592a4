"""The true-bits meter: every stored byte that stands for a weight, over all weights, replaced or not."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bwla_compiler.numerics.bits import Bits
from bwla_compiler.runtime.experts import PackedExperts
from bwla_compiler.runtime.modules import EndEmbedding, EndLinear, PackedLinear, SimulatedLinear, TiedHead

BIAS = "bias"


def measure_bits(model: nn.Module) -> Bits:
    """Return true bits per weight of the block linears and of the whole model, and the model's bytes.

    Counted from the buffers and parameters that are saved; a tensor that several modules share counts once.
    Linears left in floating point, routers and float experts included, count with their dtype, simulated ones with
    the bytes that they would take. Biases count in the model, not among the linears.
    """
    seen: dict[int, Tensor] = {}
    n_bytes, n_weights = 0, 0
    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output()
    for module in _linears(model):
        logical = _n_weights(module)
        if module is head or isinstance(module, (EndLinear, TiedHead)):
            continue
        n_weights += logical
        n_bytes += _bytes(module, seen, skip=BIAS)
    for weight in _own_weights(model):
        if weight.data_ptr() not in seen:
            n_weights += weight.numel()
            n_bytes += weight.numel() * weight.element_size()
    total_bytes = _bytes(model, {})
    total_weights = sum(_logical_weights(m) for m in model.modules())
    linears = 8 * n_bytes / n_weights if n_weights else 0.0
    return Bits(linears=linears, model=8 * total_bytes / max(1, total_weights), n_bytes=total_bytes)


def _linears(model: nn.Module) -> Iterator[nn.Module]:
    kinds = (nn.Linear, PackedLinear, SimulatedLinear, PackedExperts, EndLinear, TiedHead)
    for module in model.modules():
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D":
            yield module


def _own_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the float weights that modules of a family's own multiply by: routers' matrices, experts' of three axes."""
    foreign = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, PackedLinear, PackedExperts, EndLinear, EndEmbedding)
    for module in model.modules():
        if isinstance(module, foreign) or type(module).__name__ == "Conv1D":
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 or (parameter.ndim == 2 and name == "weight"):
                yield parameter


def _n_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return module.get_parameter("weight").numel()
    n_experts = module.n_experts if isinstance(module, PackedExperts) else 1
    return n_experts * int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]


def _logical_weights(module: nn.Module) -> int:
    """Weights that a module stands for by itself, its children left out; a tied head has none of its own."""
    if isinstance(module, (PackedLinear, SimulatedLinear, EndLinear)):
        bias = module.bias
        return int(module.in_features) * int(module.out_features) + (0 if bias is None else bias.numel())
    if isinstance(module, PackedExperts):
        return _n_weights(module)
    if isinstance(module, EndEmbedding):
        return int(module.num_embeddings) * int(module.embedding_dim)
    return sum(p.numel() for p in module.parameters(recurse=False))


def _bytes(module: nn.Module, seen: dict[int, Tensor], *, skip: str = "") -> int:
    """Return the bytes of a module's state that is not in `seen`, which it is added to.

    seen: by address; the tensors are kept, for signs on a GPU are made for the asking and their memory used again.
    """
    simulated = {
        f"{name}.weight".lstrip("."): m for name, m in module.named_modules() if isinstance(m, SimulatedLinear)
    }
    total = sum(-(-m.n_bits // 8) for m in simulated.values())
    for name, tensor in module.state_dict(keep_vars=True).items():
        skipped = name in simulated or (skip and name.rpartition(".")[2] == skip)
        if skipped or not isinstance(tensor, Tensor):
            continue
        key = id(tensor) if tensor.device.type == "meta" else tensor.data_ptr()
        if tensor.numel() == 0 or key in seen:
            continue
        seen[key] = tensor
        total += tensor.numel() * tensor.element_size()
    return total
