"""Tuning by distillation: packed weights learn to give the float model's next-token chances.

After all linears are packed, row scales, low-rank pairs, the diagonals of online transforms, norm gains and biases go
down the gradient of KL(float || quantized), activations rounded as they will be (straight through), and signs flip
where the gradient keeps asking for it. No bit is added. Scales alone were tuned so by EfficientQAT (2407.11062) and
NanoQuant (2602.06694).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bwla_compiler.calibrate.student import Student, students
from bwla_compiler.errors import GradientError
from bwla_compiler.numerics.products import bfloat16_products
from bwla_compiler.recipe import Tuning

Progress = Callable[[str, int, int], None]

WARMUP, LAST_RATE = 3, 0.05
"""Steps until the full rate, and the share of it that the cosine ends at."""
ROWS = 256
"""Tokens whose chances are compared at a time."""
KEPT_BYTES = 1 << 30
"""Of activations, up to which a step keeps them all; above, each block is computed again on the way back."""


def tune(
    model: nn.Module,
    batches: Sequence[Tensor],
    teacher: Callable[[int], Tensor],
    *,
    tuning: Tuning,
    gains: Sequence[nn.Parameter],
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Tune a packed model in place; return the loss on the first tokens before and after, in nats per token.

    batches: tokens int64 [sequences, length], visited in turn, tuning.sequences at a time. teacher(i): logits
    [sequences, length, vocabulary] of the float model on batch i. gains: parameters of norms. Deterministic. Memory:
    see `calibrate.student`; and one step's activations, or where these are many those of one block. Raises
    GradientError where a packed module of another kind is on the way, or where the loss did not fall; the model is
    then as it was.
    """

    def loss_on(tokens: Tensor, expected: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        loss: Tensor = _Divergence.apply(logits, expected)  # type: ignore[no-untyped-call]
        return loss

    with ExitStack() as scope:
        scope.enter_context(_frozen(model))
        scope.enter_context(_kept(gains))
        found = scope.enter_context(students(model))
        learning = _Learning(found, tuning)
        scope.enter_context(_recomputed(model, found, n_tokens=batches[0][: tuning.sequences].numel()))
        scope.enter_context(torch.enable_grad())
        scope.enter_context(bfloat16_products(wanted=tuning.products == "fastest"))
        optimizer, first = _optimizer(found, gains, tuning), math.nan
        for step, lesson in zip(range(tuning.steps), _lessons(batches, teacher, tuning.sequences), strict=False):
            _set_rates(optimizer, tuning, step)
            learning.turn(step)
            loss = loss_on(*lesson)
            first = loss.item() if step == 0 else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress:
                progress("tuning", step + 1, tuning.steps)
        learning.end()
        with torch.no_grad():
            last = loss_on(*next(_lessons(batches, teacher, tuning.sequences))).item()
        if not last < first:
            raise GradientError(f"the loss went from {first:.4f} to {last:.4f} nats a token; lower the tuning's rates")
    return first, last


def _lessons(
    batches: Sequence[Tensor], teacher: Callable[[int], Tensor], sequences: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give tokens and the float model's logits, so many sequences at a time, round and round."""
    for which in itertools.cycle(range(len(batches))):
        with torch.no_grad():
            expected = teacher(which)
        yield from zip(batches[which].split(sequences), expected.split(sequences), strict=True)


@contextmanager
def _recomputed(model: nn.Module, found: Sequence[Student], *, n_tokens: int) -> Iterator[None]:
    """Keep of each block's forward pass the input alone where what its linears read and write is too much to keep."""
    n_bytes = 4 * n_tokens * sum(sum(student.weight.shape) for student in found)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)] if n_bytes > KEPT_BYTES else []
    stacks = [m for m in lists if any(isinstance(part, Student) for part in m.modules())]
    blocks = [*max(stacks, key=lambda m: len([*m.modules()]))] if stacks else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's own: the class has the real one


@contextmanager
def _kept(gains: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give norm gains their values back where tuning fails."""
    before = [gain.detach().clone() for gain in gains]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for gain, values in zip(gains, before, strict=True):
                gain.copy_(values)
        raise


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Hold all parameters without gradients; afterwards each has what it wanted before, and no gradient is left."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
            parameter.grad = None


class _Learning:
    """The signs' turns: those of all students learn through all steps, or those of one block after those of another."""

    def __init__(self, found: Sequence[Student], tuning: Tuning) -> None:
        together = tuning.signs_at_once == "model"
        parts: dict[str, list[Student]] = {}
        for student in found if tuning.signs > 0 else ():
            parts.setdefault("" if together else student.block, []).append(student)
        self.parts, self.tuning = [*parts.values()], tuning
        self.awake: list[Student] = []

    def turn(self, step: int) -> None:
        """Have the signs whose turn it is learn at this step, each part's rates as if its steps were all."""
        n_parts, n_steps = len(self.parts), self.tuning.steps
        for i, part in enumerate(self.parts):
            first, end = i * n_steps // n_parts, (i + 1) * n_steps // n_parts
            if not first <= step < end:
                continue
            if step == first:
                self.end()
                self.awake = part
                for student in part:
                    student.planes.wake()
            rates = _schedule(end - first)
            for student in part:
                student.planes.rate = self.tuning.signs * rates[step - first] / math.hypot(*rates)

    def end(self) -> None:
        """Put the latents of the last turn away."""
        for student in self.awake:
            student.planes.sleep()
        self.awake = []


def _set_rates(optimizer: torch.optim.Optimizer, tuning: Tuning, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = _schedule(tuning.steps)[step] * group["full_rate"]


def _schedule(steps: int) -> list[float]:
    """Return the share of the full rate at each step."""
    return [min(1.0, (i + 1) / WARMUP) * _cosine(i / steps) for i in range(steps)]


def _cosine(done: float) -> float:
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) of logits [..., vocabulary], a mean over tokens; its gradient, made beside it, by rows.

    The difference of two softmaxes is all that is kept: a vocabulary's logits are the largest tensors of a step.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
        gradient, total = torch.empty_like(ours), 0.0
        for low in range(0, len(ours), ROWS):
            rows = slice(low, low + ROWS)
            found, expected = ours[rows].float().log_softmax(-1), theirs[rows].float().log_softmax(-1)
            chances = expected.exp()
            total += float((chances * (expected - found)).sum(dtype=torch.float64))
            gradient[rows] = found.exp_().sub_(chances).div_(len(ours))
        ctx.save_for_backward(gradient.view_as(student))
        return student.new_tensor(total / len(ours), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (of_student,) = ctx.saved_tensors
        return of_student * gradient, None


def _optimizer(found: Sequence[Student], gains: Sequence[nn.Parameter], tuning: Tuning) -> torch.optim.Adam:
    """Return Adam over all that is tuned; every parameter is relative to the size of what it stands for."""
    scales = [student.scale for student in found]
    diagonals = {id(d.change): d.change for student in found if (d := student.diagonal) is not None}
    pairs = [factor for student in found for factor in (student.onto, student.into) if factor is not None]
    biases = [student.bias for student in found if student.bias is not None]
    tuned = [
        (parameters, rate)
        for parameters, rate in (
            (scales, tuning.scales),
            ([*diagonals.values()], tuning.diagonals),
            (pairs, tuning.pairs),
            ([*gains], tuning.gains),
            (biases, tuning.biases),
        )
        if parameters and (rate or parameters is scales)  # these also where they stay: gradients pass them to the signs
    ]
    for parameters, _ in tuned:
        for parameter in parameters:
            parameter.requires_grad_(True)
    groups = [{"params": parameters, "full_rate": rate} for parameters, rate in tuned]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))
