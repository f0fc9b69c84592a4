"""Tuning by distillation: what is stored beside the signs learns to give the float model's next-token chances.

After all linears are packed their signs stay, and row scales, low-rank pairs, the diagonals of online transforms and
norm gains go down the gradient of KL(float || quantized), activations rounded as they will be (straight through). No
bit is added. Scales alone were tuned so by EfficientQAT (2407.11062) and NanoQuant (2602.06694).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from bwla_compiler.errors import GradientError
from bwla_compiler.numerics.kronecker import apply_kronecker
from bwla_compiler.numerics.planes import BinaryWeight, unpack_signs
from bwla_compiler.passes.apply import replace_module
from bwla_compiler.recipe import Tuning
from bwla_compiler.runtime.halves import read_half, register_half
from bwla_compiler.runtime.modules import Int8Linear, OnlineTransform, PackedLinear, TiedHead
from bwla_compiler.runtime.portable import GROUP
from bwla_compiler.spec import FLOAT_BITS

Progress = Callable[[str, int, int], None]

WARMUP, LAST_RATE = 3, 0.05
"""Steps until the full rate, and the share of it that the cosine ends at."""


def tune(
    model: nn.Module,
    batches: Sequence[Tensor],
    teacher: Callable[[int], Tensor],
    *,
    tuning: Tuning,
    gains: Sequence[nn.Parameter],
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Tune a packed model in place; return the loss on the first batch before and after, in nats per token.

    batches: tokens int64 [sequences, length], visited in turn. teacher(i): logits [sequences, length, vocabulary] of
    the float model on batch i. gains: parameters of norms. Deterministic. Memory: the signs as floats, and one
    batch's activations. Raises GradientError where a packed module of another kind is on the way, or where the loss
    did not fall; the model is then as it was.
    """

    def loss_on(which: int) -> Tensor:
        with torch.no_grad():
            expected = teacher(which)
        return _divergence(expected, model(input_ids=batches[which]).logits)

    with _frozen(model), _kept(gains), _tunable(model) as students, torch.enable_grad():
        optimizer, first = _optimizer(students, gains, tuning), math.nan
        for step in range(tuning.steps):
            rate = min(1.0, (step + 1) / WARMUP) * _cosine(step / tuning.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["full_rate"]
            loss = loss_on(step % len(batches))
            first = loss.item() if step == 0 else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress:
                progress("tuning", step + 1, tuning.steps)
        with torch.no_grad():
            last = loss_on(0).item()
        if not last < first:
            raise GradientError(f"the loss went from {first:.4f} to {last:.4f} nats a token; lower the tuning's rates")
    return first, last


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


def _cosine(done: float) -> float:
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits [..., vocabulary], a mean over tokens."""
    expected, found = log_softmax(teacher.float(), -1), log_softmax(student.float(), -1)
    return (expected.exp() * (expected - found)).sum(-1).mean()


def _optimizer(students: Sequence["_Student"], gains: Sequence[nn.Parameter], tuning: Tuning) -> torch.optim.Adam:
    """Return Adam over all that is tuned; every parameter is relative to the size of what it stands for."""
    scales = [student.scale for student in students]
    diagonals = {id(d.change): d.change for student in students if (d := student.diagonal) is not None}
    pairs = [factor for student in students for factor in (student.onto, student.into) if factor is not None]
    tuned = [
        (parameters, rate)
        for parameters, rate in (
            (scales, tuning.scales),
            ([*diagonals.values()], tuning.diagonals),
            (pairs, tuning.pairs),
            ([*gains], tuning.gains),
        )
        if parameters and rate
    ]
    for parameters, _ in tuned:
        for parameter in parameters:
            parameter.requires_grad_(True)
    groups = [{"params": parameters, "full_rate": rate} for parameters, rate in tuned]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


@contextmanager
def _tunable(model: nn.Module) -> Iterator[list["_Student"]]:
    """Hold differentiable stand-ins in the model's place of packed modules; afterwards pack what they became."""
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, (PackedLinear, TiedHead, Int8Linear))]
    diagonals: dict[int, _Diagonal] = {}
    students: dict[str, _Student] = {}
    try:
        for name, module in packed:
            if isinstance(module, PackedLinear):
                students[name] = _Student(module, diagonals)
                replace_module(model, name, students[name])
            else:
                replace_module(model, name, _Head(module))
        yield [*students.values()]
    except BaseException:
        for name, module in packed:
            replace_module(model, name, module)
        raise
    with torch.no_grad():
        for diagonal in diagonals.values():
            diagonal.store()
        for name, module in packed:
            student = students.get(name)
            replace_module(model, name, module if student is None else student.packed())


class _Diagonal(nn.Module):
    """An online transform whose diagonal, where it has one, is tuned: scale * exp(change)."""

    def __init__(self, transform: OnlineTransform) -> None:
        super().__init__()
        self.source = (transform,)  # a tuple hides it from nn.Module's registration
        self.scale, self.left, self.right = transform.factors()
        size = 0 if self.scale is None else self.scale.numel()
        self.change = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x * (self.scale * self.change.exp())
        return apply_kronecker(x, self.left, self.right)

    def store(self) -> None:
        if self.scale is not None:
            register_half(self.source[0], "scale", self.scale * self.change.exp())


class _Student(nn.Module):
    """A packed linear in floats: y = sum_p a_p exp(scale_p) (B_p q(x)) + onto (into q(x)) + bias."""

    def __init__(self, linear: PackedLinear, diagonals: dict[int, _Diagonal]) -> None:
        super().__init__()
        self.source = (linear,)
        self.activation_bits = linear.activation_bits
        self.diagonal: _Diagonal | None = None
        if linear.transform is not None:
            self.diagonal = diagonals.setdefault(id(linear.transform), _Diagonal(linear.transform))
        self.signs = unpack_signs(linear.signs, linear.in_features).float()
        first, self.column_scale = read_half(linear, "row_scale"), read_half(linear, "column_scale")
        assert first is not None
        self.first = first
        self.scale = nn.Parameter(torch.zeros_like(first), requires_grad=False)
        self.pair_scale: Tensor | None
        self.onto, self.into, self.pair_scale = _pair(linear)

    @property
    def weight(self) -> Tensor:
        """What code that asks the linear for shape, dtype or device gets."""
        return self.source[0].weight

    def scales(self) -> Tensor:
        """Return the scales [planes, out, groups]."""
        return self.first * self.scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        inner = x.float() if self.diagonal is None else self.diagonal(x.float())
        inner = inner if self.column_scale is None else inner * self.column_scale
        inner = _rounded(inner, bits=self.activation_bits)
        scales = self.scales()
        if scales.shape[2] == 1:  # the scale on the output: no gradient of a whole weight is ever formed
            parts = (linear(inner, signs) * scale[:, 0] for signs, scale in zip(self.signs, scales, strict=True))
            y: Tensor = next(parts)
            for part in parts:
                y = y + part
        else:
            wide = scales.repeat_interleave(GROUP, 2)[..., : self.signs.shape[2]]
            y = linear(inner, (wide * self.signs).sum(0))
        pair = self.pair()
        if pair is not None:
            y = y + linear(linear(inner, pair[1]), pair[0])
        bias = self.source[0].bias
        y = y if bias is None else y + bias
        return y.to(x.dtype)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return the low-rank pair [out, rank] and [rank, in], which reads the scaled columns; None for none."""
        if self.onto is None or self.into is None or self.pair_scale is None:
            return None
        return self.onto * self.pair_scale, self.into

    def packed(self) -> PackedLinear:
        """Return the linear that is stored."""
        linear = self.source[0]
        onto, into = self.pair() or (None, None)
        if into is not None and self.column_scale is not None:
            into = into * self.column_scale  # as BinaryWeight has it: beside the planes, not behind their columns
        weight = BinaryWeight(
            self.signs.to(torch.int8),
            self.scales(),
            column_scale=self.column_scale,
            low_rank_out=onto,
            low_rank_in=into,
            group_size=GROUP if self.first.shape[2] > 1 else 0,
        )
        return PackedLinear.from_binary(
            weight,
            activation_bits=linear.activation_bits,
            transform=linear.transform,
            bias=linear.bias,
            dtype=linear.typed.dtype,
        )


class _Head(nn.Module):
    """A head in floats, not tuned, through which gradients flow."""

    def __init__(self, head: TiedHead | Int8Linear) -> None:
        super().__init__()
        table = head.embedding if isinstance(head, TiedHead) else head
        scale = read_half(table, "row_scale")
        assert scale is not None
        self.weight = table.codes.float() * scale[:, None]
        self.column_scale, self.bias = read_half(head, "column_scale"), head.bias
        self.transform = None if head.transform is None else head.transform.factors()

    def forward(self, x: Tensor) -> Tensor:
        inner = x.float()
        if self.transform is not None:
            scale, left, right = self.transform
            inner = apply_kronecker(inner if scale is None else inner * scale, left, right)
        inner = inner if self.column_scale is None else inner * self.column_scale
        return linear(inner, self.weight, self.bias).to(x.dtype)


def _pair(linear: PackedLinear) -> tuple[nn.Parameter | None, nn.Parameter | None, Tensor | None]:
    """Return the low-rank pair, each component of mean square 1, and the components' sizes [rank]."""
    scale = read_half(linear, "low_rank_scale")
    if linear.low_rank_out is None or linear.low_rank_in is None or scale is None:
        return None, None, None
    onto, into = linear.low_rank_out.float(), linear.low_rank_in.float()
    tiny = torch.finfo(torch.float32).tiny
    size_out, size_in = (f.square().mean(d).sqrt().clamp_min(tiny) for f, d in ((onto, 0), (into, 1)))
    pair = (
        nn.Parameter(onto / size_out, requires_grad=False),
        nn.Parameter(into / size_in[:, None], requires_grad=False),
    )
    return *pair, scale * size_out * size_in


def _rounded(x: Tensor, *, bits: int) -> Tensor:
    """Return x rounded per token, with the gradient of x itself."""
    if bits >= FLOAT_BITS:
        return x
    qmax = 2 ** (bits - 1) - 1
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / qmax
        scale = torch.where(scale > 0, scale, 1.0)
        error = (x / scale).round().clamp(-qmax, qmax) * scale - x
    return x + error
