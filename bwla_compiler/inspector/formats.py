"""How a linear is stored and run, as plain data."""

from dataclasses import dataclass

from bwla_compiler.spec import LinearSpec


@dataclass(frozen=True)
class Format:
    """The format of one linear. bits: by formula, of its group, a weight. transform: at run time, "" for none.

    reason: why there is no transform, or not the one that the recipe asks for; "" where there is nothing to explain.
    """

    planes: int
    scales: str
    rank: int
    activation_bits: int
    bits: float
    transform: str = ""
    reason: str = ""


def transform_text(spec: LinearSpec) -> str:
    """Return an online transform in words, "" for none: "scaling, kronecker 16 x 24", "hadamard 1[128] x 32"."""
    t = spec.transform
    factors = " x ".join(str(n) if there else f"1[{n}]" for n, there in ((t.n1, t.left), (t.n2, t.right)))
    factors = f"{t.n1} x H{t.n2}" if t.left and t.right and t.signed else factors
    turning = [f"{t.kind} {factors}"] if t.left or t.right else []
    return ", ".join([*(["scaling"] if t.scaled else []), *turning])
