"""Signs in one layout at a time: on a device that Triton serves in the kernels' own, elsewhere and in files canonical.

The dtype of the buffer tells which: uint8 [planes, out, ceil(in / 8)], canonical; int32 [planes, groups, out, 4],
layout P of `triton_layout`. What is moved is laid out anew; what is saved, or asked for, is canonical, the same bytes.
"""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from bwla_compiler.codegen import triton_module
from bwla_compiler.runtime import on_triton
from bwla_compiler.runtime.anchors import Anchored
from bwla_compiler.runtime.triton_layout import bytes_of, in_words, words_of
from bwla_compiler.settings import chosen_kernels


class DeviceSigns(Anchored):
    """A module with the buffer `signs` and in_features."""

    signs: Tensor
    in_features: int

    def canonical_signs(self) -> Tensor:
        """Return signs uint8 [planes, out, ceil(in / 8)]: the buffer, or a new tensor on its device."""
        return bytes_of(self.signs, self.in_features) if in_words(self.signs) else self.signs

    def settle(self) -> None:
        """Put the signs into the layout of the device that they are on."""
        wanted = _wants_words(self.signs)
        if wanted != in_words(self.signs):
            self.signs = words_of(self.signs, self.in_features) if wanted else self.canonical_signs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if in_words(self.signs):
            destination[f"{prefix}signs"] = self.canonical_signs()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}signs")
        if in_words(self.signs) and given is not None and given.shape == (*self.signs.shape[:3:2], self._n_bytes):
            state_dict[f"{prefix}signs"] = words_of(given, self.in_features)  # of the copy that load_state_dict makes
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.settle()  # assign=True takes the tensor as it is, wherever it is

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()  # pickled on one device, read on another

    @property
    def _n_bytes(self) -> int:
        return -(-self.in_features // 8)


def settle_signs(model: nn.Module) -> None:
    """Put the signs of all modules into the layout of the devices that they are on."""
    for module in model.modules():
        if isinstance(module, DeviceSigns):
            module.settle()


def _wants_words(signs: Tensor) -> bool:
    """Whether kernels of Triton will read these signs; in its interpreter those of the CPU too."""
    stand_in = chosen_kernels() == "triton" and triton_module.installed() and triton_module.interpreted()
    return (signs.is_cuda or stand_in) and on_triton.serves(signs)
