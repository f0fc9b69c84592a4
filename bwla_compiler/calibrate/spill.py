"""Activations kept in files: mapped into memory, so that the system writes them out and drops them as it needs to."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bwla_compiler.errors import CalibrationError

LEAST = 1 << 16
"""Bytes below which a tensor stays in memory: it costs less than a file."""


class Spill:
    """A function that gives a tensor back in a file of its own under `folder`; tuples of tensors part by part.

    A file has no name once it is open, so that nothing is left behind however the process ends; its disk space is
    reserved before it is written, so that a full disk is an error and no crash. Views stay views of what they show.
    Raises CalibrationError where the disk is full or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_bytes = 0

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self(part) for part in value)
        if not isinstance(value, Tensor) or value._is_view() or value.numel() * value.element_size() < LEAST:
            return value
        return self._moved(value)

    def _moved(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise CalibrationError(
                f"{self.folder}: {size} bytes of activations cannot be kept there ({error.strerror}); free disk space, "
                "or calibrate on fewer sequences"
            ) from error
        self.n_bytes += size
        strides = torch.empty_like(tensor, device="meta").stride()  # a graph's views rely on them
        return torch.frombuffer(mapped, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
