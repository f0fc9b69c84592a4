"""SimulatedLinear: a linear whose quantized weight no packed format holds, computed in floats, its bits counted."""

from torch import Tensor, nn

from bwla_compiler.numerics.activations import fake_quantize
from bwla_compiler.numerics.planes import SimulatedWeight
from bwla_compiler.runtime.online import OnlineTransform


class SimulatedLinear(nn.Module):
    """y = W q(x') + bias in float32, x' the transformed input, q its rounding per token; for comparisons alone.

    n_bits: what the weight would take where it were packed. A model that holds one cannot be saved (`checkpoint.hf`).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: SimulatedWeight,
        *,
        activation_bits: int,
        transform: OnlineTransform | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.dense_weight.shape
        self.activation_bits, self.n_bits = activation_bits, weight.n_bits
        self.transform = transform
        self.register_buffer("weight", weight.dense())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x."""
        inner = x.float() if self.transform is None else self.transform(x.float())
        inner = fake_quantize(inner, bits=self.activation_bits)
        return nn.functional.linear(inner, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        bits = self.n_bits / max(1, self.in_features * self.out_features)
        return f"in={self.in_features}, out={self.out_features}, {bits:.3f} bits if packed, A{self.activation_bits}"
