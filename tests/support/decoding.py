"""A kernel that decodes the same stored bytes in both forms of moegen/runtime/decode.py, and bytes to decode."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moegen.runtime import decode
from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight, dequantise, unpack_nibbles

ROWS, STORED, BLOCK = 256, 64, 32


class Case(NamedTuple):
    """A scheme, the name of its decode function, and how many times too small either form leaves the values."""

    scheme: str
    function: str
    packed_left: float
    portable_left: float = 1.0


CASES = (
    Case("int4_w4a16:g32", "real_int4", 2.0**17),
    Case("int4_w4a16:g32z", "real_int4", 2.0**17),
    Case("int8_w8a16:channel", "real_int8", 2.0**17),
    Case("int8_w8a16:g16", "real_uint8", 2.0**17),
    Case("int8_w8a16:g16z", "real_uint8", 2.0**17),
    Case("mxfp4_w4a16", "real_e2m1", 2.0**32, 2.0**32),
    Case("nvfp4_w4a16", "real_e2m1", 2.0**32, 2.0**32),
    Case("mxfp8", "real_float8", 2.0**32),
)


@triton.jit
def decode_kernel(
    tile, scale, zeros, out, FUNCTION: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * N + tl.arange(0, N))[:, None]
    stored = tl.load(tile + rows * STORED + tl.arange(0, STORED)[None, :])
    groups = rows * GROUPS + tl.arange(0, GROUPS)[None, :]
    if zeros is not None:
        zero = tl.load(zeros + groups).to(tl.int32)
    else:
        zero = None
    if FUNCTION == "real_int8":
        values = decode.real_int8(stored, tl.bfloat16, PACKED)
    elif FUNCTION == "real_int4":
        values = decode.real_int4(stored, tl.load(scale + groups), zero, tl.bfloat16, PACKED)
    elif FUNCTION == "real_uint8":
        values = decode.real_uint8(stored, tl.load(scale + groups), zero, tl.bfloat16, PACKED)
    elif FUNCTION == "real_float8":
        values = decode.real_float8(stored, tl.load(scale + groups), tl.bfloat16, PACKED)
    else:
        values = decode.real_e2m1(stored, tl.load(scale + groups), tl.bfloat16, PACKED)
    tl.store(out + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :], values)


def stored_weight(case: Case) -> Weight:
    """[1, ROWS, STORED] bytes, every byte four times in four rows, with scales and zero points from end to end."""
    scheme = Scheme.parse(case.scheme)
    g = torch.Generator().manual_seed(0)
    depth = STORED * scheme.row.values_per_byte
    shape = (1, ROWS, depth)
    values = (torch.arange(ROWS * STORED) * 37 % 256).to(torch.uint8).reshape(scheme.weight_shape(*shape))
    stored = getattr(torch, scheme.weight_dtypes[0])
    if stored.is_floating_point:
        values[values & 0x7F == 0x7F] = 0x7E  # NaN
    scale_shape, zeros_shape = scheme.scale_shape(*shape), scheme.zeros_shape(*shape)
    assert scale_shape is not None
    if scheme.kind == "channel":
        scale = torch.ones(scale_shape, dtype=torch.bfloat16)
    elif "uint8" in scheme.scale_dtypes:
        scale = torch.randint(40, 150, scale_shape, generator=g, dtype=torch.uint8)
    elif "float8_e4m3fn" in scheme.scale_dtypes:
        scale = (torch.arange(ROWS * depth // scheme.group_k) % 127).to(torch.uint8).reshape(scale_shape)
        scale = scale.view(torch.float8_e4m3fn)
    else:
        size = torch.exp2(torch.randint(-20, 11, scale_shape, generator=g).float())
        scale = ((torch.rand(scale_shape, generator=g) * 2 - 1) * size).to(torch.bfloat16)
        scale[:, ::16] = 0.0
    zeros = None if zeros_shape is None else torch.randint(0, 256, zeros_shape, generator=g).to(torch.uint8)
    unit = torch.ones(1) if scheme.has_global_scale else None
    return Weight(values.view(stored), scale, zeros, unit)


def expected(case: Case, weight: Weight) -> torch.Tensor:
    """[ROWS, K] what the weight is worth, rounded to bfloat16 once, in float64."""
    scheme = Scheme.parse(case.scheme)
    real = dequantise(weight, scheme, 0, STORED * scheme.row.values_per_byte)
    assert torch.equal(real.float().double(), real)
    return real.float().to(torch.bfloat16).double()


def decoded(case: Case, weight: Weight, packed: bool, device: str) -> torch.Tensor:
    """[ROWS, K] what the kernel makes of the weight, in float64 on the CPU."""
    scheme = Scheme.parse(case.scheme)
    columns = STORED * scheme.row.values_per_byte
    scale, zeros = weight.scale, weight.zeros
    assert scale is not None
    if zeros is not None and scheme.row.values_per_byte == 2:
        zeros = unpack_nibbles(zeros, ROWS, 1).to(torch.uint8)
    out = torch.full((ROWS, columns), float("nan"), dtype=torch.bfloat16, device=device)
    decode_kernel[(ROWS // BLOCK,)](
        weight.values.to(device), scale.to(device), None if zeros is None else zeros.to(device), out,
        FUNCTION=case.function, PACKED=packed, N=BLOCK, STORED=STORED,
        GROUPS=max(columns // (scheme.group_k or columns), 1), COLUMNS=columns,
    )  # fmt: skip
    return out.cpu().double() * (case.packed_left if packed else case.portable_left)
