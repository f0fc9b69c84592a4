"""Which kernels run a group of linears, in words: what the runtime chooses by device, format and number of tokens."""

from bwla_compiler.codegen.triton_spec import GEMV_TOKENS, PrologueKernel
from bwla_compiler.cost.devices import Device
from bwla_compiler.spec import FLOAT_BITS, LinearSpec


def kernel_names(spec: LinearSpec, device: Device) -> str:
    """Return what runs a group on a device of the cost model: what comes before, one token, and more of them."""
    if device.name.startswith("cpu-"):
        return _on_processor(spec, device.name.removeprefix("cpu-"))
    return _on_gpu(spec, cuda=not device.name.startswith("mi"))


def _on_processor(spec: LinearSpec, isa: str) -> str:
    before = "transform, " if spec.transform.online else ""
    if spec.activation_bits >= FLOAT_BITS:
        return f"C++ {isa}: {before}float product on packed signs"
    return f"C++ {isa}: {before}rounding, int8 product on packed signs"


def _on_gpu(spec: LinearSpec, *, cuda: bool) -> str:
    rounds = spec.activation_bits < FLOAT_BITS
    whole = PrologueKernel(
        columns=spec.in_features,
        transform=spec.transform,
        column_scaled=spec.scale_kind == "row+column",
        activation_bits=spec.activation_bits,
    ).fits
    before = "prologue" if whole else "prologue in stages"
    tokens = "1 token" if GEMV_TOKENS == 1 else f"up to {GEMV_TOKENS} tokens"
    return f"Triton: {before}, {f'gemv for {tokens}, else ' if cuda and rounds else ''}dot"
