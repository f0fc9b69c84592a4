"""Forward hooks of the modules that quantizing replaces: the packed modules get them."""

from torch import nn

_KINDS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Hooks:
    """The forward hooks of a model's modules by name; their handles go on to serve."""

    def __init__(self, model: nn.Module) -> None:
        self._of = {name: [vars(module)[kind] for kind in _KINDS] for name, module in model.named_modules()}

    def put_back(self, model: nn.Module) -> None:
        """Give the hooks to the modules that have these names now.

        While the streams run the captured graph does what they do; so this comes after.
        """
        for name, tables in self._of.items():
            if any(tables):
                vars(model.get_submodule(name)).update(zip(_KINDS, tables, strict=True))


def drop_hooks(model: nn.Module) -> None:
    """Remove the forward hooks of all modules."""
    for module in model.modules():
        for kind in _KINDS:
            vars(module)[kind].clear()
