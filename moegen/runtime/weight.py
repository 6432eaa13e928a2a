"""Weight: a stored weight with its scales, and what it is worth in real numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .quant import Scheme

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
INT8_MAX = 127.0
# What may belong to a weight besides its values, in the order of Weight's fields.
PARTS = ("scale", "zeros", "global_scale", "input_scale", "bias")
# OCP MX e2m1: sign, two exponent bits, one mantissa bit
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Weight:
    """One GEMM's weight with what belongs to it; shapes are those of `Scheme`.

    values        stored weights [E, rows, K or K / 2]
    scale         weight scales
    zeros         zero points, uint8
    global_scale  [E] float32
    input_scale   static scale of the GEMM's activations, one float32
    bias          [E, rows]
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, values: torch.Tensor, named: Mapping[str, torch.Tensor | None]) -> "Weight":
        """Collect `w13_scale`, `w13_bias` and so on for the name "w13"."""
        return cls(values, *(named.get(f"{name}_{part}") for part in PARTS))


def named_tensors(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    """What there is of a weight under the argument names of fused_experts: `w13`, `w13_scale`, `w13_zeros`, …"""
    found = {f"{name}_{part}": getattr(weight, part) for part in PARTS}
    return {name: weight.values} | {key: value for key, value in found.items() if value is not None}


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """2 ** (byte - 127) in float64; other dtypes are converted as they are."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(scale.view(torch.uint8).double() - 127)
    return scale.double()


def scale_bytes(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales as kernels take them: Triton has no e8m0 type, so they decode the byte."""
    return scale.view(torch.uint8) if scale is not None and scale.dtype == torch.float8_e8m0fnu else scale


def unpack_nibbles(packed: torch.Tensor, count: int, dim: int = -1) -> torch.Tensor:
    """uint8 [..., n] -> int64 [..., count] along `dim`, the low nibble first."""
    low, high = packed & 0xF, packed >> 4
    dim = dim % packed.dim()
    return torch.stack((low, high), dim + 1).flatten(dim, dim + 1).narrow(dim, 0, count).long()


def dequantise(weight: Weight, scheme: Scheme, expert: int, depth: int) -> torch.Tensor:
    """Real values [rows, depth] of one expert in float64 (unquantised weights keep their dtype)."""
    stored = weight.values[expert]
    if not scheme.kind:
        return stored
    rows = stored.shape[0]
    if scheme.row.values_per_byte == 2:
        nibbles = unpack_nibbles(stored, depth)
        table = torch.tensor(E2M1, dtype=torch.float64, device=stored.device)
        values = nibbles.double() if scheme.mode == "int4_w4a16" else table[nibbles]
    else:
        values = stored.double()
    if weight.scale is None:
        raise ValueError(f"scale: missing; {scheme.name} needs one")
    scale = decode_e8m0(weight.scale[expert])
    if scheme.group_n == 0:
        return values * scale
    if scheme.group_k == 0:
        return values * scale.reshape(rows, 1)

    def spread(groups: torch.Tensor, group_n: int) -> torch.Tensor:
        wide = groups.repeat_interleave(scheme.group_k, 1)[:, :depth]
        return wide.repeat_interleave(group_n, 0)[:rows]

    if scheme.zero_points and weight.zeros is not None:
        zeros = weight.zeros[expert]
        if scheme.row.values_per_byte == 2:
            zeros = unpack_nibbles(zeros, rows, 0)
        values = values - spread(zeros.double(), 1)
    elif scheme.mode in ("int4_w4a16", "int8_w8a16"):
        values = values - (8 if scheme.mode == "int4_w4a16" else 128)
    values = values * spread(scale, scheme.group_n)
    return values if weight.global_scale is None else values * weight.global_scale[expert].double()


def ceil_log2(step: torch.Tensor) -> torch.Tensor:
    """ceil(log2 step) in int32, exact for every positive float."""
    mantissa, exponent = torch.frexp(step)  # step = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
    return exponent - (mantissa == 0.5).int()


def round_activations(
    x: torch.Tensor, scheme: Scheme, stored: torch.dtype, static_scale: torch.Tensor | None
) -> torch.Tensor:
    """x [rows, K] as the GEMM sees it after quantisation: quantised and dequantised again, in x's dtype.

    Formulas: quantise.py, in float32 as there whatever x's dtype: quotients of 16-bit values often lie half-way between
    two 8-bit ones, so another precision would round them elsewhere. For a scale of the whole tensor, x must hold only
    the rows that count.
    """
    kind = scheme.row.activation
    if kind is None or x.numel() == 0:
        return x
    rows, depth = x.shape
    target = stored if kind == "fp8" else torch.float8_e4m3fn
    largest = INT8_MAX if kind == "int8" else FP8_MAX[target]
    group = 32 if kind == "mxfp8" else scheme.group_k or depth
    padded = torch.nn.functional.pad(x.float(), (0, -depth % group)).reshape(rows, -1, group)
    if static_scale is not None:
        step = static_scale.float().reshape(1, 1, 1)
    elif scheme.kind == "tensor":
        step = _divided(padded.abs().max().reshape(1, 1, 1), largest).clamp(min=1e-10)
    else:
        by_token = scheme.kind in ("channel", "tensor_token") and kind == "fp8"
        step = _divided(padded.abs().amax(-1, keepdim=True).clamp(min=1 / 512 if by_token else 1e-10), largest)
        if scheme.ue8m0 or kind == "mxfp8":
            step = torch.exp2(ceil_log2(step).float())
    scaled = (padded / step).clamp(-largest, largest)
    rounded = torch.floor(scaled + 0.5) if kind == "int8" else scaled.to(target)
    return (rounded.to(x.dtype) * step.to(x.dtype)).reshape(rows, -1)[:, :depth]


def _divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """Quotients, correctly rounded: by a number, torch multiplies with its reciprocal on a GPU."""
    return values / torch.full_like(values, number)
