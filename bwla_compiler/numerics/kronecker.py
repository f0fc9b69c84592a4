"""Orthogonal matrices and their Kronecker products: X (left (x) right), Haar, randomised Hadamard.

Hadamard matrices: Sylvester's doubling of Paley's constructions I (q + 1, q = 3 mod 4 prime) and
II (2 (q + 1), q = 1 mod 4 prime) (Paley, "On orthogonal matrices", 1933). Where neither fits, the odd rest of n
is a Haar-random orthogonal matrix, so that every size has one.
"""

import math

import torch
from torch import Tensor

from bwla_compiler.errors import ShapeError


def factor_pair(n: int) -> tuple[int, int]:
    """Return (n1, n2), n1 <= n2, n1 * n2 == n, with n1 the largest divisor up to sqrt(n).

    Raises ShapeError where n < 1.
    """
    if n < 1:
        raise ShapeError(f"cannot factor {n} channels: at least 1 is needed")
    n1 = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return n1, n // n1


def apply_kronecker(X: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return X (left (x) right): each X_[n1, n2] becomes left^T X_ right.

    X [..., n]; left [n1, n1] or None; right [n2, n2] or None (None is the identity) -> [..., n], dtype and device
    of X, to which the factors are cast. Raises ShapeError where n1 * n2 is not n or a factor is not square.
    """
    if left is None and right is None:
        return X
    n = X.shape[-1]
    for name, factor in (("left", left), ("right", right)):
        if factor is not None and (factor.dim() != 2 or factor.shape[0] != factor.shape[1]):
            raise ShapeError(f"{name} factor has shape {list(factor.shape)}: it must be square")
    n1 = left.shape[0] if left is not None else n // max(1, right.shape[0] if right is not None else 1)
    n2 = right.shape[0] if right is not None else n // max(1, n1)
    if n1 * n2 != n:
        raise ShapeError(f"factors of {n1} and {n2} channels do not multiply to the {n} channels of the input")
    Y = X.reshape(*X.shape[:-1], n1, n2)
    if right is not None:
        Y = Y @ right.to(X)
    if left is not None:
        Y = left.to(X).mT @ Y
    return Y.reshape(X.shape)


def haar(n: int, *, generator: torch.Generator, fixes_ones: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a Haar-random orthogonal matrix [n, n] (Mezzadri, math-ph/0609050), on the generator's device.

    fixes_ones: uniform among those with R @ ones == ones. Drawn in float64, cast to dtype at the end.
    """
    if fixes_ones:
        reflection = _ones_reflection(n, device=generator.device)
        inner = _direct_sum_one(haar(n - 1, generator=generator))
        return (reflection @ inner @ reflection).to(dtype)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device)
    Q, R = torch.linalg.qr(gaussian)
    # a positive diagonal makes the factorisation unique, and with it the law uniform
    uniform: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return uniform.to(dtype).contiguous()


def hadamard(
    n: int, *, generator: torch.Generator, fixes_ones: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return a randomised orthogonal Hadamard matrix [n, n], on the generator's device.

    diag(s) H diag(t) with random signs s, t. Where no Hadamard matrix of a size odd * 2^k is built here, H is
    Haar(odd) (x) Sylvester(2^k). fixes_ones: A (1 (+) P) A^T with P a random signed permutation and A orthogonal
    with a constant first column, so that R @ ones == ones.
    """
    if fixes_ones:
        A = _orthogonal(n, generator=generator, constant_column=True)
        return (_signed_permutation(A, generator=generator) @ A.mT).to(dtype)
    H = _orthogonal(n, generator=generator, constant_column=False)
    return (random_signs(n, generator=generator)[:, None] * H * random_signs(n, generator=generator)).to(dtype)


def is_signs(v: Tensor) -> bool:
    """Whether there is a Hadamard matrix that v [n] can stand before: n is a power of two."""
    n = v.numel()
    return v.dim() == 1 and n > 0 and n & (n - 1) == 0


def signed_hadamard(v: Tensor) -> Tensor:
    """Return diag(v) H [n, n] of v [n], n a power of two, with H Sylvester's Hadamard matrix of +-1; dtype of v.

    Orthogonal where the entries of v are +-1 / sqrt(n). Raises ShapeError for another n.
    """
    if not is_signs(v):
        raise ShapeError(f"the signs of a Hadamard factor have shape {list(v.shape)}: expected [a power of two]")
    return v[:, None] * _sylvester(len(v)).to(v)


def random_signs(n: int, *, generator: torch.Generator) -> Tensor:
    """Return n random signs, float64."""
    return torch.randint(0, 2, (n,), generator=generator, device=generator.device).double() * 2 - 1


def _signed_permutation(A: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return A (1 (+) P): the first column stays, the others are permuted and signed."""
    n = A.shape[0]
    order = torch.randperm(n - 1, generator=generator, device=generator.device) + 1
    signs = random_signs(n - 1, generator=generator)
    return torch.cat([A[:, :1], A[:, order] * signs], dim=1)


def _orthogonal(n: int, *, generator: torch.Generator, constant_column: bool) -> Tensor:
    """Return H / sqrt(n) for a Hadamard H, else (orthogonal of the odd rest) (x) Sylvester; see `hadamard`."""
    base = _hadamard_base(n)
    if base is not None:
        core = _paley(base).to(generator.device) / math.sqrt(base)
        # negating rows keeps a Hadamard matrix and makes its first column constant
        core = core * torch.where(core[:, :1] < 0, -1.0, 1.0)
    else:
        base = n // (n & -n)
        core = haar(base, generator=generator) if not constant_column else _constant_first(base, generator=generator)
    return torch.kron(core, _sylvester(n // base).to(generator.device) / math.sqrt(n // base))


def _constant_first(n: int, *, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix whose first column is ones / sqrt(n)."""
    inner = _direct_sum_one(haar(n - 1, generator=generator))
    return _ones_reflection(n, device=generator.device) @ inner


def _direct_sum_one(Q: Tensor) -> Tensor:
    """Return 1 (+) Q."""
    whole: Tensor = torch.block_diag(torch.ones(1, 1, dtype=Q.dtype, device=Q.device), Q)
    return whole


def _ones_reflection(n: int, *, device: torch.device) -> Tensor:
    """Return the Householder reflection that swaps e1 and ones / sqrt(n) [n, n]."""
    v = torch.full((n,), -1 / math.sqrt(n), dtype=torch.float64, device=device)
    v[0] += 1
    norm = v.dot(v)
    eye = torch.eye(n, dtype=torch.float64, device=device)
    return eye if n == 1 else eye - 2 * torch.outer(v, v) / norm


def _hadamard_base(n: int) -> int | None:
    """Return the smallest base with n = base * 2^k for which Paley's matrix (or [1]) exists, else None."""
    base = n // (n & -n)
    while base <= n:
        if base == 1 or _paley_kind(base):
            return base
        base *= 2
    return None


def _paley_kind(size: int) -> int:
    """Return 1 or 2 for the construction that gives this size, 0 for neither."""
    if size % 4 == 0 and _is_prime(size - 1):
        return 1
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return 2
    return 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _paley(size: int) -> Tensor:
    """Return a Hadamard matrix [size, size] of +-1, float64; size 1 or one that `_paley_kind` knows."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    first = _paley_kind(size) == 1
    q = size - 1 if first else size // 2 - 1
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1
    core[1:, 1:] = _jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return eye + core
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


def _jacobsthal(q: int) -> Tensor:
    """Return the quadratic characters chi(i - j) modulo a prime q [q, q]."""
    character = torch.full((q,), -1, dtype=torch.float64)
    residues = torch.arange(1, q)
    character[residues * residues % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index) % q]


def _sylvester(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix [size, size] of +-1 for a power of two, float64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)], 0)
    return H
