"""Muon: momentum whose matrices are orthogonalised, W <- W - lr * polar(momentum), for the hidden layers' weights.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the polynomial of each
iteration is that of Polar Express (N. Amsel et al., arXiv 2505.16932).
torch.optim.Muon iterates in bfloat16, which most CPUs only emulate; this one is float32 and takes all matrices of
one shape as one batch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

POLYNOMIALS = (  # a, b, c of X <- a X + (b A + c A^2) X with A = X X^T
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.02  # keeps singular values below 1, where the polynomials converge


def polar(matrices: Tensor) -> Tensor:
    """Return U V^T of matrices U S V^T [n, rows, columns] float32, about: singular values come out near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x  # type: ignore[no-any-return]


class Muon:
    """The optimizer for a model's weight matrices [out, in]; their gradients must be set at every step."""

    def __init__(self, matrices: Iterable[Tensor], *, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move each matrix by learning_rate * sqrt(max(1, out / in)) in spectral norm, along Nesterov's momentum."""
        for group, momentum in self.groups:
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum.lerp_(gradients, 1 - self.momentum)
            updates = polar(gradients.lerp(momentum, self.momentum))
            scale = learning_rate * max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
            for matrix, update in zip(group, updates, strict=True):
                matrix.sub_(update, alpha=scale)
