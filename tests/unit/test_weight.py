"""dequantise and round_activations against loops over single values in plain Python, on sizes that no group divides."""

import math
from bisect import bisect_left

import pytest
import torch

from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight, decode_e8m0, dequantise, round_activations, unpack_nibbles
from tests.support.weights import SMALL_SCHEMES, random_weight

EXPERTS, ROWS, DEPTH = 3, 37, 75
SCHEMES = ("none", *SMALL_SCHEMES, "int4_w4a16:g128z", "fp8_w8a8:100x64", "fp8_w8a8:1x32")
FP8_BIAS = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 8}


def e4m3(byte: int, bias: int) -> float:
    """Sign, four exponent bits, three mantissa bits."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = (mantissa / 8) * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - bias)
    return -value if byte >> 7 else value


def e2m1(nibble: int) -> float:
    """Sign, two exponent bits, one mantissa bit."""
    exponent, mantissa = (nibble >> 1) & 3, nibble & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if nibble >> 3 else value


def nibble(row: list[int], index: int) -> int:
    return (row[index // 2] >> (4 * (index % 2))) & 15


def plain_scale(scale: torch.Tensor) -> list[object]:
    """Nested lists of real scales."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return [2.0 ** (byte - 127) for byte in scale.view(torch.uint8).flatten().tolist()]
    if scale.dtype == torch.float8_e4m3fn:
        return [e4m3(byte, 7) for byte in scale.view(torch.uint8).flatten().tolist()]
    return list(scale.flatten().tolist())


def naive_weight(weight: Weight, scheme: Scheme, expert: int, rows: int, depth: int) -> list[list[float]]:
    """Every real value of one expert, by the layouts of the issue and not by those of the code."""
    values = weight.values
    if values.dtype in FP8_BIAS:
        bias = FP8_BIAS[values.dtype]
        stored = [[e4m3(byte, bias) for byte in row] for row in values[expert].view(torch.uint8).tolist()]
    else:
        stored = values[expert].tolist()
    groups = math.ceil(depth / scheme.group_k) if scheme.group_k else 1
    assert weight.scale is not None
    scales = plain_scale(weight.scale[expert] if weight.scale.dim() > 1 else weight.scale[expert : expert + 1])

    def real(r: int, k: int) -> float:
        group = k // scheme.group_k if scheme.group_k else 0
        if scheme.mode in ("mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16"):
            value = e2m1(nibble(stored[r], k))
        elif scheme.mode == "int4_w4a16":
            value = float(nibble(stored[r], k))
        else:
            value = float(stored[r][k])
        if weight.zeros is not None and scheme.mode == "int4_w4a16":  # packed along the rows
            value -= nibble([line[group] for line in weight.zeros[expert].tolist()], r)
        elif weight.zeros is not None:
            value -= weight.zeros[expert].tolist()[r][group]
        elif scheme.mode == "int4_w4a16":
            value -= 8
        elif scheme.name.startswith("int8_w8a16:g"):
            value -= 128
        if scheme.kind in ("tensor", "tensor_token"):
            index = 0
        elif scheme.kind == "NxK":
            index = (r // scheme.group_n) * groups + group
        else:
            index = r * groups + group
        scale = scales[index]
        assert isinstance(scale, float)
        value *= scale
        return value if weight.global_scale is None else value * weight.global_scale[expert].item()

    return [[real(r, k) for k in range(depth)] for r in range(rows)]


@pytest.mark.parametrize(("rows", "depth"), [(ROWS, DEPTH), (1, 1), (2, 64)])
@pytest.mark.parametrize("quant", SCHEMES)
def test_dequantise(quant: str, rows: int, depth: int) -> None:
    scheme, shape = Scheme.parse(quant), (EXPERTS, rows, depth)
    weight = random_weight(torch.Generator().manual_seed(rows), scheme, shape, torch.bfloat16)
    assert weight.values.shape == scheme.weight_shape(*shape)
    for expert in range(EXPERTS):
        found = dequantise(weight, scheme, expert, depth)
        if not scheme.kind:
            assert torch.equal(found, weight.values[expert])
            continue
        expected = torch.tensor(naive_weight(weight, scheme, expert, rows, depth), dtype=torch.float64)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("quant", ["fp8_w8a8:channel", "fp8_w8a8:32x32"])
def test_dequantise_fnuz(quant: str) -> None:
    scheme, g = Scheme.parse(quant), torch.Generator().manual_seed(0)
    weight = random_weight(g, scheme, (EXPERTS, ROWS, DEPTH), torch.bfloat16, fp8=torch.float8_e4m3fnuz)
    expected = torch.tensor(naive_weight(weight, scheme, 1, ROWS, DEPTH), dtype=torch.float64)
    torch.testing.assert_close(dequantise(weight, scheme, 1, DEPTH), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("quant", ["mxfp4_w4a16", "mxfp4_w4a8"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_every_e2m1_code_at_the_ends_of_e8m0(quant: str, dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).expand(1, 3, 8).contiguous()  # three rows of the 16 codes in order
    scale = torch.tensor([0, 127, 254], dtype=torch.uint8).view(dtype).view(1, 3, 1)
    found = dequantise(Weight(packed, scale), Scheme.parse(quant), 0, 16)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.float64)
    for row, exponent in enumerate((-127, 0, 127)):
        assert torch.equal(found[row], values * 2.0**exponent)
    assert bool(torch.signbit(found[1, 8]))
    assert [e2m1(code) for code in range(16)] == values.tolist()


def test_decode_e8m0() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64)
    assert torch.equal(decode_e8m0(every), expected)
    assert torch.equal(decode_e8m0(every.view(torch.float8_e8m0fnu)), expected)
    assert torch.equal(decode_e8m0(torch.tensor([0.25, 3.0])), torch.tensor([0.25, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("odd", [0, 1])
def test_unpack_nibbles(dim: int, odd: int) -> None:
    packed = torch.tensor([[0x21, 0x43], [0xFE, 0x0D], [0x98, 0x76]], dtype=torch.uint8)
    count = 2 * packed.shape[dim] - odd
    found = unpack_nibbles(packed, count, dim)
    assert found.dtype == torch.int64
    lines = packed.tolist() if dim else packed.T.tolist()
    expected = torch.tensor([[nibble(line, i) for i in range(count)] for line in lines])
    assert torch.equal(found, expected if dim else expected.T)


def test_a_missing_scale_is_named() -> None:
    with pytest.raises(ValueError, match="scale: missing; int8_w8a8:channel needs one"):
        dequantise(Weight(torch.zeros(1, 2, 3, dtype=torch.int8)), Scheme.parse("int8_w8a8"), 0, 3)


def test_parts_by_name() -> None:
    values, scale, bias = torch.zeros(1), torch.ones(2), torch.ones(3)
    weight = Weight.of("w2", values, {"w13_scale": values, "w2_scale": scale, "w2_bias": bias})
    assert (weight.values, weight.scale, weight.bias) == (values, scale, bias)
    assert (weight.zeros, weight.global_scale, weight.input_scale) == (None, None, None)


# ---------------------------------------------------------------------------------------------- rounded activations

CODES = {
    dtype: sorted({e4m3(byte, bias) for byte in range(128) if e4m3(byte, bias) <= largest})
    for (dtype, bias), largest in zip(FP8_BIAS.items(), (448.0, 240.0), strict=True)
}


def nearest_fp8(x: float, dtype: torch.dtype) -> float:
    """To the nearest code, the even mantissa on a tie, saturated."""
    codes, size = CODES[dtype], abs(x)
    above = min(bisect_left(codes, size), len(codes) - 1)
    below = max(above - 1, 0)
    low, high = codes[below], codes[above]
    if size - low == high - size:
        found = low if below % 2 == 0 else high
    else:
        found = low if size - low < high - size else high
    return math.copysign(found, x)


def naive_rounded(x: list[list[float]], scheme: Scheme, stored: torch.dtype, static: float | None) -> list[list[float]]:
    kind = scheme.row.activation
    if kind is None:
        return x
    depth = len(x[0])
    group = 32 if kind == "mxfp8" else scheme.group_k or depth
    target = torch.float8_e4m3fn if kind == "mxfp8" else stored
    largest = 127.0 if kind == "int8" else CODES[target][-1]
    whole = max(abs(v) for row in x for v in row)
    out = []
    for row in x:
        line: list[float] = []
        for start in range(0, depth, group):
            part = row[start : start + group]
            amax = whole if scheme.kind == "tensor" else max(abs(v) for v in part)
            least = 1 / 512 if kind == "fp8" and scheme.kind in ("channel", "tensor_token") else 1e-10
            step = max(amax, least) / largest
            if scheme.ue8m0 or kind == "mxfp8":
                step = 2.0 ** math.ceil(math.log2(step))
            step = step if static is None else static
            scaled = [max(-largest, min(largest, v / step)) for v in part]
            line += [step * (math.floor(v + 0.5) if kind == "int8" else nearest_fp8(v, target)) for v in scaled]
        out.append(line)
    return out


QUANTISED = tuple(quant for quant in SCHEMES if Scheme.parse(quant).row.activation)
STORED = {"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fnuz), "mxfp8": (torch.uint8,)}


@pytest.mark.parametrize("static", [None, 0.003, 0.02])
@pytest.mark.parametrize("quant", [*QUANTISED, "int4_w4a16:g32", "none"])
def test_round_activations(quant: str, static: float | None) -> None:
    scheme = Scheme.parse(quant)
    if static is not None and scheme.kind != "tensor":
        pytest.skip("only a scale of the whole tensor can be static")
    x = torch.randn(5, DEPTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x *= torch.tensor([1.0, 1e-3, 0.0, 100.0, 1e-12])[:, None]  # a row of zeros, and one below every least maximum
    x = x.bfloat16().double()
    for stored in STORED.get(scheme.row.activation or "", (torch.bfloat16,)):
        given = None if static is None else torch.tensor([static], dtype=torch.float64)
        found = round_activations(x, scheme, stored, given)
        expected = torch.tensor(naive_rounded(x.tolist(), scheme, stored, static), dtype=torch.float64)
        assert found.dtype == torch.float64
        assert bool((found[2] == 0).all())
        if scheme.row.activation is None:
            assert found is x
        # the seed has no value so near a tie that float32 rounds it to the other side
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quant", ["fp8_w8a8:32x32ue8m0", "mxfp4_w4a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_rounded_up_to_a_power_of_two(quant: str, dtype: torch.dtype) -> None:
    """At a power of two the scale stays, just above it doubles: in the float32 of the CPU path too."""
    scheme = Scheme.parse(quant)
    largest = torch.full((1, 32), 448.0 * 2.0**-9, dtype=dtype)
    largest[0, 1] = 2.0**-18  # the smallest code of the smaller scale, half of that of the larger one
    above = largest.clone()
    above[0, 0] = torch.nextafter(above[0, 0].float(), torch.tensor(1e9))
    at = round_activations(largest, scheme, torch.float8_e4m3fn, None)
    over = round_activations(above, scheme, torch.float8_e4m3fn, None)
    assert (at[0, 1].item(), over[0, 1].item()) == (2.0**-18, 0.0)
    assert at[0, 0].item() == 448.0 * 2.0**-9
    assert over[0, 0].item() == 224.0 * 2.0**-8


def test_int8_ties() -> None:
    """Halves go up."""
    scheme = Scheme.parse("int8_w8a8:channel")
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, -126.5, 126.5]], dtype=torch.float64)
    assert round_activations(x, scheme, torch.int8, None).tolist() == [[127.0, 1.0, 2.0, 0.0, -1.0, -126.0, 127.0]]


def test_no_rows() -> None:
    x = torch.empty(0, 64, dtype=torch.float64)
    assert round_activations(x, Scheme.parse("fp8_w8a8:tensor"), torch.float8_e4m3fn, None).shape == (0, 64)
