"""Reference quantisers: float weights -> the stored layout of every quant scheme. Offline only, plain torch.

For tests, the benchmark and for trying a mode; released checkpoints come with better scales (calibrated, searched).
Nothing that runs under traffic uses this file: activations are quantised by runtime/quantise.py.

Every scale multiplies, real = (stored - zero) * scale, and values are rounded with the scale as it is stored. What is
not divisible is padded with zeros while maxima are taken, and cut off again. A group of zeros has the scale 1.

    fp8_w8a8, mxfp8      scale = max|w| / 448 (240 for e4m3fnuz), value to nearest even; with e8m0 scales the scale is
                         rounded up to a power of two, so that nothing saturates (as DeepGEMM and NVIDIA's MXFP8 recipe
                         do; the floor rule of the OCP MX specification would clip by up to 12 %)
    int8_w8a8, and       scale = max|w| / 127, value in -127..127 (vLLM's per-channel int8)
    int8_w8a16:channel
    int8_w8a16, int4     scale = max(max w / (m - 1), -min w / m), value = round(w / scale) + m, m = 8 or 128
    the same with z      scale = (max w - min w) / (2m - 1) over a range that contains 0, zero = round(-min w / scale),
                         value = round(w / scale) + zero (the ranges of vLLM's quantize_weights; GPTQ's are alike)
    mxfp4                scale = 2 ** (floor(log2 max|w|) - 2), value e2m1 to nearest even, saturated at 6 (OCP
                         Microscaling Formats specification 1.0, 6.3)
    nvfp4                global = max|w| of the expert / (6 * 448), scale = max|w| of the group / 6 / global in e4m3
                         (NVIDIA ModelOpt; its weight_scale_2 is the global scale)
"""

import math
from collections.abc import Iterable

import torch
from torch.nn import functional

from moegen.runtime.quant import E8M0, Scheme
from moegen.runtime.weight import FP8_MAX, INT8_MAX, Weight, ceil_log2
from moegen.runtime.weight import named_tensors as named_tensors  # part of this module's interface

CHUNK = 2**24  # values that are quantised at once: the work takes up to 28 bytes of memory for each
E2M1_MAX, E2M1_MAX_EXPONENT = 6.0, 2
# Between the e2m1 magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6. A tie goes to the even code: down, up, down, up, …
_E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize(
    weight: torch.Tensor,
    scheme: Scheme | str,
    *,
    dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Weight:
    """Quantise a weight [E, rows, K] as `scheme` stores it; formulas at the head of this file.

    dtype        of the stored values where the scheme allows several: float8_e4m3fn (default) or float8_e4m3fnuz
    scale_dtype  of the scales where the scheme allows several. Default: the weight's own for int4_w4a16 and
                 int8_w8a16 (a layer takes float32 or its activations' dtype), uint8 for mx modes, else float32

    TypeError for a dtype, ValueError for a shape or scheme that is not allowed.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not weight.numel():
        given = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"weight: {given} is not allowed; allowed: a tensor [E, rows, K] that is not empty")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"weight: dtype {weight.dtype} is not allowed; allowed: bfloat16, float16, float32 or float64")
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if not scheme.kind:
        return Weight(weight)
    dtypes = stored_dtypes(scheme, weight.dtype, dtype, scale_dtype)
    parts = weight.split(experts_at_once(weight.shape[1] * weight.shape[2]))
    return quantize_parts(parts, weight.shape[0], scheme, *dtypes)


def layer_tensors(
    scheme: Scheme | str,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The keyword arguments of fused_experts that belong to the weights: w13, w2, w13_scale, …

    w13 [E, 2I or I, H] and w2 [E, H, I] are float weights; further arguments as in `quantize`.
    """
    first = quantize(w13, scheme, dtype=dtype, scale_dtype=scale_dtype)
    second = quantize(w2, scheme, dtype=dtype, scale_dtype=scale_dtype)
    return named_tensors("w13", first) | named_tensors("w2", second)


def stored_dtypes(
    scheme: Scheme,
    weight_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the stored values, dtype of the scales) of a quantised weight; None = the default of `quantize`."""
    own = torch.float32 if weight_dtype == torch.float64 else weight_dtype
    values = [getattr(torch, name) for name in scheme.weight_dtypes]
    scales = [getattr(torch, name) for name in scheme.scale_dtypes if name != "activation"]
    default = scales[0]
    if "activation" in scheme.scale_dtypes:
        scales += [torch.bfloat16, torch.float16]
        default = own
    for name, given, allowed in (("dtype", dtype, values), ("scale_dtype", scale_dtype, scales)):
        if given is not None and given not in allowed:
            raise TypeError(
                f"{name}: {given} is not allowed for {scheme.name}; allowed: {', '.join(map(str, allowed))}"
            )
    return dtype or values[0], scale_dtype or default


def experts_at_once(size: int) -> int:
    """How many experts of `size` values each make up one part."""
    return max(1, CHUNK // size)


def quantize_parts(
    parts: Iterable[torch.Tensor], experts: int, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype
) -> Weight:
    """Quantise consecutive experts part by part ([e, rows, K] each, `experts` in all) into one Weight.

    Only one part exists as floats at a time if `parts` is a generator. Dtypes: see `stored_dtypes`.
    """
    whole: dict[str, torch.Tensor] = {}
    done = 0
    for part in parts:
        weight = _quantize_part(part.float(), scheme, dtype, scale_dtype)
        for name, tensor in named_tensors("values", weight).items():
            if name not in whole:
                whole[name] = tensor.new_empty((experts, *tensor.shape[1:]))
            whole[name][done : done + part.shape[0]].copy_(tensor)
        done += part.shape[0]
    return Weight.of("values", whole["values"], whole)


def _quantize_part(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype) -> Weight:
    """Quantise float32 [E, rows, K] at once."""
    if scheme.mode in ("mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16"):
        return _e2m1(weight, scheme, scale_dtype)
    if dtype == torch.uint8:
        return _offset_integers(weight, scheme, scale_dtype)
    return _symmetric(weight, scheme, dtype, scale_dtype)


def _symmetric(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, scale_dtype: torch.dtype) -> Weight:
    """Signed values without a zero point: fp8 and int8."""
    largest = FP8_MAX.get(dtype, INT8_MAX)
    groups = _grouped(weight, scheme)
    step = groups.abs().amax((2, 4)) / largest
    if scheme.ue8m0 or scheme.mode == "mxfp8":
        stored, step = _power_of_two(torch.where(step == 0, 0, ceil_log2(step)), scale_dtype)
    else:
        stored, step = _rounded_scale(step, scale_dtype)
    scaled = (groups / _spread(step)).clamp_(-largest, largest)
    values = _ungrouped(scaled.round_() if dtype == torch.int8 else scaled, weight).to(dtype)
    return Weight(values, stored.reshape(_scale_shape(weight, scheme)))


def _offset_integers(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Weight:
    """Unsigned integers with a zero point, packed by two if they have four bits."""
    packed = scheme.row.values_per_byte == 2
    top = 15 if packed else 255
    middle = (top + 1) // 2
    groups = _grouped(weight, scheme)
    low, high = groups.amin((2, 4)).clamp_(max=0), groups.amax((2, 4)).clamp_(min=0)
    step = (high - low) / top if scheme.zero_points else torch.maximum(high / (middle - 1), -low / middle)
    stored, step = _rounded_scale(step, scale_dtype)
    zero = (-low / step).round_().clamp_(0, top) if scheme.zero_points else torch.full_like(step, middle)
    scaled = (groups / _spread(step)).round_().add_(_spread(zero)).clamp_(0, top)
    values, zeros = _ungrouped(scaled, weight).to(torch.uint8), zero.to(torch.uint8)
    if packed:
        values, zeros = pack_nibbles(values, -1), pack_nibbles(zeros, 1)
    return Weight(values, stored, zeros if scheme.zero_points else None)


def _e2m1(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Weight:
    """Four-bit floats: mxfp4 and nvfp4."""
    groups = _grouped(weight, scheme)
    amax = groups.abs().amax((2, 4))
    whole = None
    if scheme.has_global_scale:
        whole = _ones_for_zeros(amax.amax((1, 2)) / (E2M1_MAX * FP8_MAX[torch.float8_e4m3fn]))
        stored, step = _rounded_scale(amax / E2M1_MAX / whole[:, None, None], scale_dtype)
        step = step * whole[:, None, None]
    else:
        exponent = torch.frexp(amax).exponent - 1  # floor(log2 amax)
        stored, step = _power_of_two(torch.where(amax == 0, 0, exponent - E2M1_MAX_EXPONENT), scale_dtype)
    codes = _to_e2m1(_ungrouped(groups / _spread(step), weight))
    return Weight(pack_nibbles(codes, -1), stored, global_scale=whole)


def _to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Float32 -> e2m1 codes in uint8: sign in bit 3, magnitude to the nearest, ties to the even code, at most 6."""
    ties = torch.tensor(_E2M1_TIES, device=values.device)
    ties[1::2] = torch.nextafter(ties[1::2], torch.zeros_like(ties[1::2]))  # a tie itself lies above: it goes up
    magnitude = torch.bucketize(values.abs(), ties, out_int32=True)
    return torch.where(values < 0, magnitude + 8, magnitude).to(torch.uint8)


def pack_nibbles(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """uint8 below 16 -> two a byte along `dim`, the even index in the low nibble; a missing last one is 0."""
    codes = codes.movedim(dim, -1)
    codes = functional.pad(codes, (0, codes.shape[-1] % 2))
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).movedim(-1, dim).contiguous()


def _grouped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[E, rows, K] -> [E, row groups, rows of a group, K groups, values of a group], padded with zeros."""
    experts, rows, depth = weight.shape
    group_n, group_k = scheme.group_n or rows, scheme.group_k or depth
    padded = functional.pad(weight, (0, -depth % group_k, 0, -rows % group_n))
    return padded.reshape(experts, math.ceil(rows / group_n), group_n, math.ceil(depth / group_k), group_k)


def _ungrouped(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Undo `_grouped`: the shape of `weight`, contiguous."""
    experts, rows, depth = weight.shape
    return groups.flatten(3, 4).flatten(1, 2)[:experts, :rows, :depth].contiguous()


def _spread(scale: torch.Tensor) -> torch.Tensor:
    """[E, row groups, K groups], to broadcast against `_grouped`."""
    return scale[:, :, None, :, None]


def _scale_shape(weight: torch.Tensor, scheme: Scheme) -> tuple[int, ...]:
    shape = scheme.scale_shape(weight.shape[0], weight.shape[1], weight.shape[2])
    assert shape is not None  # noqa: S101 - only quantised schemes come here
    return shape


def _ones_for_zeros(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _rounded_scale(step: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(the scale as stored in a floating `dtype`, what it is worth in float32); never zero, never infinite."""
    worth = _ones_for_zeros(step.clamp(max=torch.finfo(dtype).max).to(dtype).float())
    return worth.to(dtype), worth


def _power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 ** exponent as stored, the same in float32); stored as the byte exponent + 127 or as a float."""
    biased = exponent.clamp(-126, 127) + 127
    worth = (biased << 23).to(torch.int32).view(torch.float32)
    if str(dtype).removeprefix("torch.") in E8M0:
        return biased.to(torch.uint8).view(dtype), worth
    return worth.to(dtype), worth
