"""What torch.compile calls in place of a raw model's graph: the quantized graph, and the watch over the weights."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bwla_compiler.backend.progress import telling
from bwla_compiler.backend.variant import Variant
from bwla_compiler.errors import BwlaError, GradientError

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Relative error of compiled against eager results that `verify` allows: sums run in another order, so that an
activation at the edge of two codes may round the other way, which moves it by a whole step."""


class CompiledGraph:
    """One compiled graph of one model.

    run: takes the graph's inputs, the model's parameters among them. eager: the same graph, not compiled, to verify
    against; None otherwise. parameters: (position among the inputs, name) of those.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        variant: Variant,
        model: nn.Module,
        parameters: Sequence[tuple[int, str]],
        *,
        eager: Callable[..., Any] | None,
    ) -> None:
        self._run, self._variant, self._eager = run, variant, eager
        self._model = weakref.ref(model)
        self._parameters = parameters
        self._watched = [(position, variant.seen[name]) for position, name in parameters]

    def __call__(self, *inputs: Any) -> Any:
        """Compute the graph with the model's weights as they are now. Raises WeightError for edits of freed ones."""
        for position, seen in self._watched:
            if not seen.holds(inputs[position]):
                self._refresh()
                break
        if self._eager is not None:
            self._verify(inputs)
        results = self._run(*inputs)
        if torch.is_grad_enabled() and any(inputs[i].requires_grad for i, _ in self._parameters):
            return _refuse_gradients(results)
        return results

    def release(self, inputs: Sequence[Any]) -> None:
        """Free the float weights that this graph was given."""
        model = self._model()
        assert model is not None
        self._variant.free(model, ((name, inputs[i]) for i, name in self._parameters))
        self._variant.look(model)

    def _refresh(self) -> None:
        model = self._model()
        assert model is not None, "compiled code outlived its model"
        with telling() as progress:
            self._variant.refresh(model, progress=progress)

    def _verify(self, inputs: Sequence[Any]) -> None:
        """Compare the first results with those of the quantized model, run eagerly on copies of the inputs."""
        eager, self._eager = self._eager, None
        assert eager is not None
        watched = {i for i, _ in self._parameters}
        with torch.no_grad():
            expected = eager(*(_copied(x) if i not in watched else x for i, x in enumerate(inputs)))
            found = self._run(*(_copied(x) if i not in watched else x for i, x in enumerate(inputs)))
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
                log.info("verify: relative error %.1e of a result of shape %s", error, list(a.shape))
                if not error <= TOLERANCE:
                    raise BwlaError(
                        f"verify: a result of shape {list(a.shape)} is {error:.1e} off the eager model's (allowed: "
                        f"{TOLERANCE}); please report this, with the graphs that BWLA_DUMP=folder writes"
                    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Refusal(torch.autograd.Function):
    """Gives results as they are, and an error in place of their gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise GradientError(
            'a model compiled with backend="bwla" has no gradients: its weights are packed to one bit. Train the '
            "float model, and compile it afterwards; for inference use torch.no_grad()"
        )


def _refuse_gradients(results: Any) -> Any:
    """Return results that ask, as a float model's would, for a gradient, which is refused when it is computed."""
    anchor = torch.zeros((), requires_grad=True)

    def mark(result: Any) -> Any:
        tracked = isinstance(result, Tensor) and result.is_floating_point() and not result.requires_grad
        return _Refusal.apply(anchor, result) if tracked else result  # type: ignore[no-untyped-call]

    return pytree.tree_map(mark, results)
