"""A GPU that is not there: Triton translates for an H100, and Inductor writes code for one; nothing is launched."""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

PROPERTIES = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, gcnArchName="")


class _Driver:
    """What Triton asks a driver where nothing is launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def target() -> Iterator[None]:
    """Within, Triton's target is an H100: it can tell what a kernel edits."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", _Driver()):  # its own `reset_active` asks for a real one
        yield


class _Written(Exception):
    pass


def inductor_code(gm: GraphModule, inputs: Sequence[Tensor]) -> str:
    """Return the code that Inductor writes for a graph of fake CUDA tensors, whose output is a tuple."""
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    written: list[str] = []
    codegen = GraphLowering.codegen

    def record(self: Any) -> None:
        written.append(codegen(self)[0].value)
        raise _Written

    own = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9, warp_size=32)
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (DeviceProperties, "create", lambda device: own),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: PROPERTIES)),
        (CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
        (scheduler, "has_triton", lambda *_: True),
        (GraphLowering, "codegen", record),
        *((torch.cuda, name, value) for name, value in _OF_TORCH.items()),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False))
        try:
            compile_fx_inner(gm, list(inputs))
        except Exception:  # ours, wrapped by Inductor
            if not written:
                raise
    return written[0]


_OF_TORCH: dict[str, Any] = {
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda *_, **__: True,
    "current_device": lambda: 0,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "get_rng_state": lambda *_: torch.zeros(1),
    "set_rng_state": lambda *_: None,
}
