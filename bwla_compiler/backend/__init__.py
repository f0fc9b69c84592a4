"""torch.compile(model, backend="bwla"): raw models are quantized on the way, packed ones lowered as they are.

Found by torch through the entry point `torch_dynamo_backends`, so that no import is needed.
"""

from bwla_compiler.backend.entry import compile_backend, refresh

__all__ = ["compile_backend", "refresh"]
