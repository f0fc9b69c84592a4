"""Every kernel of every instruction set against exact references, on odd shapes."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bwla_compiler.codegen.isa import ISAS, Isa
from bwla_compiler.codegen.library import GROUP, LEFT, RIGHT, SCALE, SIGNS, KernelLibrary, Member
from bwla_compiler.numerics.activations import fixed_point, quantize_activation
from bwla_compiler.numerics.kronecker import signed_hadamard
from bwla_compiler.numerics.planes import pack_signs
from bwla_compiler.runtime.reference import int4_weight
from tests.codegen.emulated import EmulatedLibrary, kernels

SHAPES = [(1, 1, 1), (3, 7, 5), (2, 130, 129), (65, 257, 1000), (5, 128, 2048), (7, 640, 520)]
"""(tokens, out, in): no tile, block, word or chunk divides them all; 65 tokens are more than one wave."""

LIMIT = {8: 127, 6: 31, 4: 7}


Library = KernelLibrary | EmulatedLibrary


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return kernels(request.param)


def random_signs(planes: int, out: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (planes, out, columns), generator=generator, dtype=torch.int8) * 2 - 1


def packed(library: Library, signs: Tensor) -> Tensor:
    return packed_words(library, pack_signs(signs), signs.shape[2])


def packed_words(library: Library, canonical: Tensor, columns: int) -> Tensor:
    planes, out, _ = canonical.shape
    result = torch.empty(library.packed_bytes(planes, out, columns), dtype=torch.uint8)
    library.pack(canonical.data_ptr(), result.data_ptr(), planes, out, columns, 2)
    return result


def packed_scale(library: Library, scale: Tensor) -> Tensor:
    """Return scale [planes, out, groups] as the kernels take it."""
    if scale.shape[2] == 1:
        return scale
    result = torch.empty(library.packed_scales(*scale.shape))
    library.pack_scale(scale.data_ptr(), result.data_ptr(), *scale.shape)
    return result


def packed_pair(
    library: Library, low_rank: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return a low-rank pair as the kernels take it."""
    if low_rank is None:
        return None
    into, onto, scale = low_rank
    result = torch.empty(library.packed_pair(*onto.shape), dtype=torch.int8)
    library.pack_pair(onto.data_ptr(), result.data_ptr(), *onto.shape)
    return into, result, scale


def packed_factor(library: Library, factor: Tensor, side: int) -> Tensor:
    """Return a factor of a transform as the kernels take it; torch's memory begins with a cache line."""
    n = len(factor)
    packed = torch.empty(library.packed_factor(n, side))
    library.pack_factor(factor.data_ptr(), packed.data_ptr(), n, side)
    return packed


def accumulate(library: Library, codes: Tensor, signs: Tensor, limit: int) -> Tensor:
    acc = torch.full((codes.shape[0], signs.shape[1]), -1, dtype=torch.int32)
    words = packed(library, signs)
    library.accumulate(codes.data_ptr(), words.data_ptr(), *acc.shape, codes.shape[1], limit, acc.data_ptr())
    return acc


@pytest.mark.parametrize("bits", LIMIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulators_are_exact(library: Library, shape: tuple[int, int, int], bits: int) -> None:
    tokens, out, columns = shape
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-LIMIT[bits], LIMIT[bits] + 1, (tokens, columns), generator=generator, dtype=torch.int8)
    signs = random_signs(1, out, columns, generator)
    exact = codes.long() @ signs[0].long().T
    assert torch.equal(accumulate(library, codes, signs, LIMIT[bits]).long(), exact)


@pytest.mark.parametrize("bits", LIMIT)
@pytest.mark.parametrize("sign", [-1, 1])
def test_saturation_extremes_are_exact(library: Library, bits: int, sign: int) -> None:
    """All codes at the limit and all signs alike, over a row longer than every flush and chunk."""
    columns = 9001
    codes = torch.full((3, columns), sign * LIMIT[bits], dtype=torch.int8)
    codes[1] = -codes[1]
    signs = torch.ones(1, 130, columns, dtype=torch.int8)
    signs[0, 1::2] = -1
    exact = codes.long() @ signs[0].long().T
    assert torch.equal(accumulate(library, codes, signs, LIMIT[bits]).long(), exact)


def run_linear(
    library: Library,
    x: Tensor,
    signs: Tensor,
    scale: Tensor,
    limit: int,
    *,
    column_scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    threads: int = 2,
) -> Tensor:
    planes, out, _ = signs.shape
    groups = scale.shape[2]
    words, scales = packed(library, signs), packed_scale(library, scale)
    y = torch.full((x.shape[0], out), float("nan"))
    taken = packed_pair(library, low_rank)
    pair = [t.data_ptr() for t in taken] if taken else [0, 0, 0]
    rank = low_rank[0].shape[0] if low_rank else 0
    member = Member(
        words.data_ptr(), scales.data_ptr(), *pair, bias.data_ptr() if bias is not None else 0, y.data_ptr(),
        out, planes, groups, rank,
    )  # fmt: skip
    columns_address = column_scale.data_ptr() if column_scale is not None else 0
    library.linear(x.data_ptr(), columns_address, *x.shape, limit, ctypes.byref(member), 1, threads)
    return y


def expected(x: Tensor, signs: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y in float64, rounded activations, a bound on the magnitude of the sums)."""
    if bits == 16:
        q, s = x.double(), torch.ones(x.shape[0], 1, dtype=torch.float64)
    else:
        codes, scales = quantize_activation(x, bits=bits)
        q, s = codes.double(), scales.double()
    wide = scale.double().repeat_interleave(GROUP, 2)[..., : signs.shape[2]] if scale.shape[2] > 1 else scale.double()
    weight = (wide * signs).sum(0)
    return q @ weight.T * s, q * s, (q * s).abs() @ (wide.abs() * torch.ones_like(signs)).sum(0).T


@pytest.mark.parametrize("bits", [16, *LIMIT])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("grouped", [False, True], ids=["row", "group"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(library: Library, shape: tuple[int, int, int], grouped: bool, planes: int, bits: int) -> None:
    tokens, out, columns = shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator)
    signs = random_signs(planes, out, columns, generator)
    scale = torch.rand(planes, out, -(-columns // GROUP) if grouped else 1, generator=generator) + 0.5
    y = run_linear(library, x, signs, scale, LIMIT.get(bits, 0))
    reference, _, size = expected(x, signs, scale, bits)
    # float32 sums of at most 2048 terms in two levels: well under 32 roundings of 2^-24 of the sum of magnitudes
    assert ((y - reference).abs() <= 32 * 2.0**-24 * size).all()


@pytest.mark.parametrize("bits", [16, 8, 6])
@pytest.mark.parametrize("tokens", [1, 6, 39])
def test_low_rank_column_scale_and_bias(library: Library, tokens: int, bits: int) -> None:
    out, columns, rank = 77, 205, 37
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, columns, generator=generator)
    signs = random_signs(1, out, columns, generator)
    scale = torch.rand(1, out, 1, generator=generator) + 0.5
    column_scale = torch.rand(columns, generator=generator) + 0.5
    into = torch.randint(-127, 128, (rank, columns), generator=generator, dtype=torch.int8)
    onto = torch.randint(-127, 128, (out, rank), generator=generator, dtype=torch.int8)
    rank_scale = torch.rand(rank, generator=generator) / 127**2
    bias = torch.randn(out, generator=generator)
    y = run_linear(
        library, x, signs, scale, LIMIT.get(bits, 0),
        column_scale=column_scale, low_rank=(into, onto, rank_scale), bias=bias,
    )  # fmt: skip
    base, q, size = expected(x * column_scale, signs, scale, bits)
    pair = onto.double() * rank_scale.double() @ into.double()
    size = size + q.abs() @ (onto.abs().double() * rank_scale.double() @ into.abs().double()).T
    # as above: float32 sums of 205 terms
    assert ((y - (base + q @ pair.T + bias)).abs() <= 32 * 2.0**-24 * size).all()


@pytest.mark.parametrize("columns", [1, 63, 1000])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_codes_equal_torch(library: Library, columns: int, bits: int) -> None:
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(5))
    x[1] = 0
    x[2] *= 1e-38
    x[3] *= 1e-45
    x[4] *= 1e37
    x[5] = torch.arange(columns) - columns // 2 + 0.5  # ties
    x[6], x[7] = (torch.nextafter(0.37 * x[5], torch.full((columns,), to)) for to in (-1e9, 1e9))
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(9, 1)
    library.quantize(x.data_ptr(), 0, 9, columns, 2 ** (bits - 1) - 1, codes.data_ptr(), scale.data_ptr())
    want_codes, want_scale = quantize_activation(x, bits=bits)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_sick_token_gives_nan_and_no_other_does(library: Library, bad: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 200, generator=generator)
    x[1, 150] = bad
    y = run_linear(library, x, random_signs(1, 10, 200, generator), torch.ones(1, 10, 1), 31)
    assert y[1].isnan().all()
    assert y[torch.arange(tokens) != 1].isfinite().all()


@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(library: Library, threads: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 700, generator=generator)
    signs, scale = random_signs(1, 1030, 700, generator), torch.rand(1, 1030, 6, generator=generator)
    alone = run_linear(library, x, signs, scale, 31, threads=1)
    assert torch.equal(run_linear(library, x, signs, scale, 31, threads=threads), alone)


@pytest.mark.parametrize("grouped", [False, True], ids=["row", "group"])
def test_tokens_beside_it_do_not_change_a_token(library: Library, grouped: bool) -> None:
    """Many tokens are multiplied in another way than one; sums are integers, and added up in the same order."""
    generator = torch.Generator().manual_seed(6)
    x, signs = torch.randn(37, 700, generator=generator), random_signs(2, 130, 700, generator)
    scale = torch.rand(2, 130, 6 if grouped else 1, generator=generator)
    one = run_linear(library, x[36:], signs, scale, 31)
    assert torch.equal(run_linear(library, x, signs, scale, 31)[36:], one)


@pytest.mark.parametrize("out", [8192, 8200])
def test_results_of_more_than_a_cache(library: Library, out: int) -> None:
    """They may be written past the caches, where rows are whole vectors; each has the bits that it has alone."""
    generator = torch.Generator().manual_seed(7)
    x, signs = torch.randn(70, 40, generator=generator), random_signs(1, out, 40, generator)
    scale, bias = torch.rand(1, out, 1, generator=generator) + 0.5, torch.randn(out, generator=generator)
    several = run_linear(library, x, signs, scale, 31, bias=bias)
    for token in (0, 37, 69):
        alone = run_linear(library, x[token : token + 1], signs, scale, 31, bias=bias)
        assert torch.equal(several[token], alone[0])


def test_tiles_of_others_on_the_same_thread(library: Library) -> None:
    """Products of bfloat16 in torch use the same registers where a processor has tiles, and remember their layout."""
    generator = torch.Generator().manual_seed(8)
    x, signs = torch.randn(40, 512, generator=generator), random_signs(1, 256, 512, generator)
    half, weight = x.bfloat16(), signs[0].bfloat16()
    theirs, ours = half @ weight.T, run_linear(library, x, signs, torch.ones(1, 256, 1), 31, threads=1)
    for _ in range(3):
        assert torch.equal(half @ weight.T, theirs)
        assert torch.equal(run_linear(library, x, signs, torch.ones(1, 256, 1), 31, threads=1), ours)


HEAD_LIMITS = {"amx": 32639, "avx512vbmi": 32639, "avx2": 32767}
"""What an int8 head's input is rounded to where it multiplies integers: two signed bytes, or 16 bits, a number."""


def as_int8_linear_reads(library: Library, x: Tensor) -> Tensor:
    """Return x in float64 as the int8 head takes it: rounded to 16 bits a token where it multiplies integers."""
    limit = HEAD_LIMITS.get(library.isa)
    if limit is None:
        return x.double()
    largest = x.abs().amax(1, keepdim=True)
    integers = (x / (largest / limit)).round() if limit == 32767 else (x * (limit / largest)).round()
    return integers.double() * (largest / limit).double()


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 300, 1000), (4, 6, 128), (7, 65, 33), (37, 300, 1000), (49, 1600, 192), (5, 7, 8200)],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_int8_linear(library: Library, shape: tuple[int, int, int], biased: bool) -> None:
    tokens, out, columns = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, columns, generator=generator)
    codes = torch.randint(-127, 128, (out, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, generator=generator)
    bias = torch.randn(out, generator=generator) if biased else None
    y = torch.empty(tokens, out)
    library.int8_linear(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), bias.data_ptr() if bias is not None else 0, y.data_ptr(),
        tokens, out, columns, 2,
    )  # fmt: skip
    seen = as_int8_linear_reads(library, x)
    reference = seen @ codes.double().T * scale + (bias if bias is not None else 0)
    size = seen.abs() @ codes.abs().double().T * scale + 1
    # float32 sums of some 1000 terms in 16 or 32 lanes
    assert ((y - reference).abs() <= 64 * 2.0**-24 * size).all()


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_int8_linear_of_extremes(library: Library, tokens: int) -> None:
    columns = 8195
    x, codes = torch.full((tokens, columns), 3.0), torch.full((5, columns), -128, dtype=torch.int8)
    y, scale = torch.empty(tokens, 5), torch.ones(5)
    library.int8_linear(x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, y.data_ptr(), tokens, 5, columns, 1)
    torch.testing.assert_close(y, torch.full_like(y, -384.0 * columns), rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", sorted(HEAD_LIMITS))
@pytest.mark.parametrize("shape", [(1, 1), (66, 33), (131, 1000), (9, 4100)], ids=str)
def test_int8_linear_gives_a_token_the_same_bits_beside_any_others(isa: Isa, shape: tuple[int, int]) -> None:
    library, (out, columns) = kernels(isa), shape
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(23, columns, generator=generator) * torch.logspace(-20, 20, 23)[:, None]
    codes = torch.randint(-128, 128, (out, columns), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(out, generator=generator), torch.randn(out, generator=generator)

    def product(x: Tensor) -> Tensor:
        y, places = torch.empty(len(x), out), (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), bias.data_ptr())
        library.int8_linear(*places, y.data_ptr(), len(x), out, columns, 2)
        return y

    alone = torch.cat([product(x[i : i + 1].clone()) for i in range(23)])
    for tokens in (2, 4, 7, 23):
        assert torch.equal(product(x[:tokens].clone()), alone[:tokens])


@pytest.mark.parametrize("tokens", [4, 19])
def test_int8_linear_of_sick_and_small_tokens(library: Library, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 100, generator=generator)
    x[0], x[1], x[2, 7], x[3, 99] = 0, x[1] * 1e-30, float("nan"), -float("inf")
    codes, scale = torch.ones(5, 100, dtype=torch.int8), torch.ones(5)
    y = torch.empty(tokens, 5)
    library.int8_linear(x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, y.data_ptr(), tokens, 5, 100, 1)
    assert torch.equal(y[0], torch.zeros(5))
    small = as_int8_linear_reads(library, x[1:2]).sum().float()
    torch.testing.assert_close(y[1], small.expand(5), rtol=1e-4, atol=0)
    assert not y[2:4].isfinite().any()
    assert y[4:].isfinite().all()


def nibbles(out: int, columns: int, group: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, bits of float16 scales of either sign, one of them subnormal, the weight in float64)."""
    codes = torch.randint(0, 256, (out, -(-columns // 2)), generator=generator, dtype=torch.uint8)
    scale = torch.randn(out, -(-columns // group), generator=generator).half()
    scale[0, 0] = -3e-7
    return codes, scale.view(torch.int16), int4_weight(codes, scale, columns, group)


INT4_SHAPES = [
    (1, 1, 1, 32), (1, 300, 1000, 64), (7, 65, 33, 128), (2, 3, 129, 32), (5, 17, 1024, 128), (1, 9, 2080, 32),
    (33, 130, 576, 64),
]  # fmt: skip
"""(tokens, out, in, group): ends within a byte, a group, a vector of codes and one of scales."""


@pytest.mark.parametrize("shape", INT4_SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_int4_linear(library: Library, shape: tuple[int, int, int, int], biased: bool) -> None:
    tokens, out, columns, group = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, columns, generator=generator)
    codes, scale, weight = nibbles(out, columns, group, generator)
    bias = torch.randn(out, generator=generator) if biased else None
    y = torch.empty(tokens, out)
    library.int4_linear(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), bias.data_ptr() if bias is not None else 0, y.data_ptr(),
        tokens, out, columns, group, -3, 2,
    )  # fmt: skip
    integers, step = fixed_point(x)
    rounded = integers.double() * step.double()
    reference = rounded @ weight.T / 8 + (bias if bias is not None else 0)
    size = rounded.abs() @ weight.abs().T / 8 + 1
    # sums of words are exact; then float32 sums of at most 65 vectors, and a few products
    assert ((y - reference).abs() <= 64 * 2.0**-24 * size).all()
    # half a step of the largest value, for each weight
    assert ((y - x.double() @ weight.T / 8 - (bias if bias is not None else 0)).abs() <= 2.0**-15 * size * 4).all()


def test_int4_linear_of_the_largest_sums_and_sick_tokens(library: Library) -> None:
    """All codes -8 and all inputs at the limit: the sums of a word's eight columns are far from 2^31."""
    x, codes = torch.full((3, 2000), -2.0), torch.zeros(3, 1000, dtype=torch.uint8)
    x[1, 7], x[2, 1999] = float("inf"), float("nan")
    scale, y = torch.ones(3, 63, dtype=torch.half).view(torch.int16), torch.empty(3, 3)
    library.int4_linear(x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, y.data_ptr(), 3, 3, 2000, 32, 0, 1)
    # 2 / 32767 * 32767 is 2 but for one rounding
    torch.testing.assert_close(y[0], torch.full((3,), 32000.0), rtol=2.0**-22, atol=0)
    assert y[1:].isnan().all()


def test_int4_linear_reads_no_more_than_its_table(library: Library) -> None:
    """What lies behind the table, NaN in float16, leaves the results as they are."""
    generator = torch.Generator().manual_seed(4)
    x, results = torch.randn(2, 200, generator=generator), []
    codes, scale, _ = nibbles(5, 200, 64, generator)
    for fill in (0, -1):
        behind, above = torch.full((1000,), fill % 256, dtype=torch.uint8), torch.full((50,), fill, dtype=torch.int16)
        table, scales = torch.cat([codes.flatten(), behind]), torch.cat([scale.flatten(), above])
        y = torch.empty(2, 5)
        library.int4_linear(x.data_ptr(), table.data_ptr(), scales.data_ptr(), 0, y.data_ptr(), 2, 5, 200, 64, 0, 1)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("columns", [1, 37, 128, 200])
def test_int4_embedding(library: Library, columns: int) -> None:
    codes, scale, weight = nibbles(11, columns, 64, torch.Generator().manual_seed(7))
    ids, y = torch.tensor([10, 0, 3]), torch.empty(3, columns)
    library.int4_embedding(ids.data_ptr(), codes.data_ptr(), scale.data_ptr(), y.data_ptr(), 3, columns, 64, 2)
    # a code has 4 bits and a scale 11: the product is exact in float32
    assert torch.equal(y.double(), weight[ids] * 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 24, 32), (2, 33, 50), (9, 33, 50), (11, 48, 80)], ids=str)
@pytest.mark.parametrize("parts", ["scale left right", "half scale left right", "left", "right", "scale", ""])
def test_transform(library: Library, shape: tuple[int, int, int], parts: str) -> None:
    tokens, n1, n2 = shape
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(tokens, n1, n2, generator=generator)
    scale, left, right = (torch.randn(*s, generator=generator) for s in ((n1, n2), (n1, n1), (n2, n2)))
    scale = scale.half().float() if "half" in parts else scale
    y, want = torch.full_like(x, float("nan")), x.double()
    want = want * scale if "scale" in parts else want
    want = want @ right.double() if "right" in parts else want
    want = left.double().T @ want if "left" in parts else want
    packed = [packed_factor(library, *f) for f in ((scale.flatten(), SCALE), (left, LEFT), (right, RIGHT))]
    addresses = [t.data_ptr() if n in parts else 0 for n, t in zip(("scale", "left", "right"), packed, strict=True)]
    library.transform(x.data_ptr(), *addresses, y.data_ptr(), tokens, n1, n2, 2)
    # two float32 sums of up to 80 terms of order one; tiles take 16 bits of each number
    atol = 1e-4 if library.isa != "amx" else 2.0**-13 * (n1 * n2) ** 0.5
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=atol)
    library.transform(x.data_ptr(), *addresses, x.data_ptr(), tokens, n1, n2, 2)
    assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(1, 3, 1), (2, 5, 4), (1, 1, 32), (3, 5, 64), (2, 33, 256), (9, 48, 512)], ids=str)
@pytest.mark.parametrize("parts", ["scale left right", "half scale left right", "left right", "right"])
def test_hadamard_factors_are_applied_by_additions(library: Library, shape: tuple[int, int, int], parts: str) -> None:
    tokens, n1, n2 = shape
    generator = torch.Generator().manual_seed(6)
    x, scale, left = (torch.randn(*s, generator=generator) for s in (shape, (n1, n2), (n1, n1)))
    scale = scale.half().float() if "half" in parts else scale
    v = torch.randn(n2, generator=generator).sign() / n2**0.5
    y, want = torch.full_like(x, float("nan")), x.double()
    want = (want * scale if "scale" in parts else want) @ signed_hadamard(v.double())
    want = left.double().T @ want if "left" in parts else want
    packed = [packed_factor(library, *f) for f in ((scale.flatten(), SCALE), (left, LEFT), (v, SIGNS))]
    addresses = [t.data_ptr() if n in parts else 0 for n, t in zip(("scale", "left", "right"), packed, strict=True)]
    library.transform(x.data_ptr(), *addresses, y.data_ptr(), tokens, n1, n2, 2)
    atol = 1e-4 if library.isa != "amx" else 2.0**-13 * n1**0.5
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=atol)
    library.transform(x.data_ptr(), *addresses, x.data_ptr(), tokens, n1, n2, 2)
    assert torch.equal(x, y)


@pytest.mark.parametrize("power", [-9, 0, 7, 40])
def test_scales_are_packed_as_halves_where_nothing_is_lost(library: Library, power: int) -> None:
    """Normal and subnormal halves, zeros, any power of two; where one is no half, or no number at all, floats stay."""
    x, scale = torch.ones(1, 45), torch.randn(45, generator=torch.Generator().manual_seed(9)).half().float()
    scale[3], scale[7] = 0, 2.0**-20
    scale *= 2.0**power

    def applied(scale: Tensor) -> tuple[Tensor, bool]:
        packed, y = packed_factor(library, scale, SCALE), torch.empty_like(x)
        library.transform(x.data_ptr(), packed.data_ptr(), 0, 0, y.data_ptr(), 1, 1, 45, 1)
        return y[0], bool(packed[0] != 0)

    for own, halved in ((scale, power < 16), (torch.cat((scale[1:], scale[:1] * 1.0001)), False)):
        y, is_half = applied(own)
        assert torch.equal(y, own)
        assert is_half == halved
    y, is_half = applied(torch.full_like(scale, float("nan")))
    assert y.isnan().all()
    assert not is_half


def test_a_token_is_transformed_alike_alone_and_beside_others(library: Library) -> None:
    n1, n2, generator = 48, 64, torch.Generator().manual_seed(8)
    x, left, right = (torch.randn(*s, generator=generator) for s in ((9, n1, n2), (n1, n1), (n2, n2)))
    factors = packed_factor(library, left, LEFT), packed_factor(library, right, RIGHT)

    def transformed(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        library.transform(x.data_ptr(), 0, *(f.data_ptr() for f in factors), y.data_ptr(), len(x), n1, n2, 2)
        return y

    assert torch.equal(transformed(x)[4:5], transformed(x[4:5].clone()))


def test_int8_embedding(library: Library) -> None:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(-127, 128, (11, 37), generator=generator, dtype=torch.int8)
    scale, ids = torch.rand(11, generator=generator), torch.tensor([10, 0, 3])
    y = torch.empty(3, 37)
    library.int8_embedding(ids.data_ptr(), codes.data_ptr(), scale.data_ptr(), y.data_ptr(), 3, 37)
    assert torch.equal(y, codes[ids].float() * scale[ids][:, None])


def test_calls_from_several_threads(library: Library) -> None:
    """The pool serves one caller; the others run alone, and all are right."""
    from concurrent.futures import ThreadPoolExecutor

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 512, generator=generator)
    signs, scale = random_signs(1, 2048, 512, generator), torch.rand(1, 2048, 1, generator=generator)
    run: Callable[[int], Tensor] = lambda _: run_linear(library, x, signs, scale, 127, threads=2)  # noqa: E731
    want = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, want) for y in pool.map(run, range(24)))
