"""Random stored weights of every quant scheme, drawn as bits and scales of a sensible size, without a quantiser."""

import math

import torch

from moegen.runtime.quant import Scheme
from moegen.runtime.weight import Weight

# One name a scheme that differs in how it stores or computes; groups of 32 so that tiny layers have several.
SMALL_SCHEMES = (
    "fp8_w8a8:tensor",
    "fp8_w8a8:tensor_token",
    "fp8_w8a8:channel",
    "fp8_w8a8:32x32",
    "fp8_w8a8:32x32ue8m0",
    "int8_w8a8:channel",
    "int8_w8a8:tensor",
    "int8_w8a8:32x32",
    "int8_w8a16:channel",
    "int8_w8a16:g32",
    "int8_w8a16:g32z",
    "int4_w4a16:g32",
    "int4_w4a16:g32z",
    "int4_w4a16:g64",
    "mxfp4_w4a16",
    "mxfp4_w4a8",
    "nvfp4_w4a16",
    "mxfp8",
)
# Standard deviation of the stored values that `random_weight` draws, less their zero point.
_SPREAD = {"fp8": 60.0, "int8": 74.0, "biased int8": 74.0, "int4": 4.6, "e2m1": 3.0}


def random_weight(
    g: torch.Generator,
    scheme: Scheme,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    gain: float = 3.0,
    padded: int = 0,
    fp8: torch.dtype = torch.float8_e4m3fn,
    float32_scale: bool = False,
) -> Weight:
    """A weight of `shape` values whose real values have a deviation of about gain / sqrt(depth), on the device of g.

    dtype          that of unquantised weights, and of scales that follow the activations
    padded         so many stored values lie between the rows
    fp8            stored type of fp8_w8a8 weights
    float32_scale  scales in float32 where the scheme leaves the choice
    """
    experts, _, depth = shape
    target = gain / depth**0.5
    stored_shape = scheme.weight_shape(*shape)
    wide = (*stored_shape[:-1], stored_shape[-1] + padded)
    if not scheme.kind:
        return Weight((torch.randn(wide, generator=g, device=g.device) * target).to(dtype)[..., :depth])
    values, spread = _stored(g, scheme, wide, fp8)
    step = target / spread
    per_expert = None
    if scheme.has_global_scale:
        per_expert = (torch.rand(experts, generator=g, device=g.device) + 0.5) * step
        step = 1.0
    scale_shape, zeros_shape = scheme.scale_shape(*shape), scheme.zeros_shape(*shape)
    assert scale_shape is not None
    scale = _scale(g, scheme, scale_shape, step, torch.float32 if float32_scale else dtype)
    zeros = None
    if zeros_shape is not None:  # near the middle, as those of a checkpoint
        zeros = _bytes(g, 0x60, 0xA0, zeros_shape)
        if scheme.row.values_per_byte == 2:
            zeros = (zeros >> 4) | _bytes(g, 6, 10, zeros_shape) << 4
    return Weight(values[..., : stored_shape[-1]], scale, zeros, per_expert)


def _bytes(g: torch.Generator, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g, device=g.device, dtype=torch.uint8)


def _stored(g: torch.Generator, scheme: Scheme, shape: tuple[int, ...], fp8: torch.dtype) -> tuple[torch.Tensor, float]:
    """Stored values and the deviation of what they stand for before the scale."""
    if scheme.mode in ("fp8_w8a8", "mxfp8"):
        kind = fp8 if scheme.mode == "fp8_w8a8" else torch.float8_e4m3fn
        values = torch.empty(shape, dtype=kind, device=g.device)
        for expert in values:  # one by one: the float32 numbers take four times the memory
            expert.copy_(torch.randn(expert.shape, generator=g, device=g.device).mul_(60).clamp_(-240, 240))
        return values, _SPREAD["fp8"]
    if scheme.weight_dtypes == ("int8",):
        return torch.randint(-127, 128, shape, generator=g, device=g.device, dtype=torch.int8), _SPREAD["int8"]
    kind_name = {"int8_w8a16": "biased int8", "int4_w4a16": "int4"}.get(scheme.mode, "e2m1")
    return _bytes(g, 0, 256, shape), _SPREAD[kind_name]


def _scale(
    g: torch.Generator, scheme: Scheme, shape: tuple[int, ...], step: float, follows: torch.dtype
) -> torch.Tensor:
    if "uint8" in scheme.scale_dtypes:
        middle = round(math.log2(step)) + 127
        return _bytes(g, middle - 1, middle + 2, shape)
    scale = (torch.rand(shape, generator=g, device=g.device) + 0.5) * step
    if scheme.scale_dtypes == ("float8_e4m3fn",):
        return scale.to(torch.float8_e4m3fn)
    return scale.to(follows if "activation" in scheme.scale_dtypes else torch.float32)
