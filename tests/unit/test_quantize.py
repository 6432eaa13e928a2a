"""The reference quantisers: shapes of Scheme, error bounds of every mode, exact values worked out by hand."""

import math
from pathlib import Path

import pytest
import torch

from moegen.quantize import layer_tensors, named_tensors, pack_nibbles, quantize, quantize_parts, stored_dtypes
from moegen.runtime.activations import Activation
from moegen.runtime.quant import MODES, Scheme
from moegen.runtime.reference import moe_reference
from moegen.runtime.weight import E2M1, Weight, decode_e8m0, dequantise, unpack_nibbles
from tests.support.packages import build

SCHEMES = (
    "fp8_w8a8:tensor", "fp8_w8a8:tensor_token", "fp8_w8a8:channel", "fp8_w8a8:128x128", "fp8_w8a8:64x32",
    "fp8_w8a8:128x128ue8m0", "fp8_w8a8:1x32ue8m0",
    "int8_w8a8:channel", "int8_w8a8:tensor", "int8_w8a8:128x128", "int8_w8a8:32x64",
    "int8_w8a16:channel", "int8_w8a16:g32", "int8_w8a16:g128", "int8_w8a16:g64z",
    "int4_w4a16:g32", "int4_w4a16:g64", "int4_w4a16:g128", "int4_w4a16:g32z", "int4_w4a16:g128z",
    "mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16", "mxfp8",
)  # fmt: skip
SHAPES = ((2, 128, 256), (3, 37, 131), (1, 130, 33), (2, 1, 1))


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values whose size differs from row to row and along K, as that of weights does."""
    source = torch.Generator().manual_seed(seed)
    size = torch.rand(shape[0], shape[1], 1, generator=source) + 0.1
    size = size * (1 + torch.arange(shape[2]) / shape[2])
    return (torch.randn(shape, generator=source) * size).to(dtype)


def restored(weight: Weight, scheme: Scheme, depth: int) -> torch.Tensor:
    return torch.stack([dequantise(weight, scheme, expert, depth) for expert in range(weight.values.shape[0])])


def steps(weight: Weight, scheme: Scheme, like: torch.Tensor) -> torch.Tensor:
    """The scale of every value, with the global scale in it: [E, rows, K]."""
    experts, rows, depth = like.shape
    assert weight.scale is not None
    scale = decode_e8m0(weight.scale).reshape(experts, *(weight.scale.shape[1:] or (1,)))
    if scale.dim() == 2:
        return scale[:, :, None].expand_as(like)
    wide = scale.repeat_interleave(scheme.group_n, 1)[:, :rows].repeat_interleave(scheme.group_k, 2)[..., :depth]
    return wide if weight.global_scale is None else wide * weight.global_scale.double()[:, None, None]


def bound(values: torch.Tensor, step: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> torch.Tensor:
    """The largest error that rounding may make of each value."""
    if scheme.mode in ("mxfp4_w4a16", "mxfp4_w4a8"):
        return torch.where(values.abs() > 6 * step, 2 * step, step)  # 6..8 saturates, else half the widest spacing
    if scheme.mode == "nvfp4_w4a16":
        whole = step.amax((1, 2), keepdim=True) / 448
        return step + 6 / 512 * whole  # groups too small for an e4m3 scale become zeros
    if scheme.mode.startswith("fp8") or scheme.mode == "mxfp8":
        return values.abs() / 16 + step / 1024  # half a step of three mantissa bits, or of the subnormals (2 ** -9)
    if scheme.zero_points:  # a rounded scale moves the far end of the range by at most this
        top = 15 if scheme.mode == "int4_w4a16" else 255
        return step * (0.5 + top * torch.finfo(scale_dtype).eps)
    return step * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_round_trip(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    scheme, values = Scheme.parse(name), draw(*shape, dtype=dtype)
    weight = quantize(values, name)
    assert str(weight.values.dtype).removeprefix("torch.") in scheme.weight_dtypes
    assert weight.values.shape == scheme.weight_shape(*shape)
    assert weight.scale is not None
    assert weight.scale.shape == scheme.scale_shape(*shape)
    assert (weight.zeros if weight.zeros is None else weight.zeros.shape) == scheme.zeros_shape(*shape)
    assert (weight.global_scale is not None) == scheme.has_global_scale
    assert all(tensor.is_contiguous() for tensor in named_tensors("w", weight).values())
    expected = values.double()
    error = (restored(weight, scheme, shape[2]) - expected).abs()
    allowed = bound(expected, steps(weight, scheme, values), scheme, weight.scale.dtype)
    assert (error <= allowed * (1 + 1e-4) + 1e-12).all(), (error / allowed).max()


@pytest.mark.parametrize("name", SCHEMES)
def test_every_error_is_as_small_as_the_format_allows(name: str) -> None:
    """Relative error over a normal weight: catches what bounds of single values let through."""
    values = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(1))
    scheme = Scheme.parse(name)
    error = (restored(quantize(values, name), scheme, 256) - values.double()).norm() / values.double().norm()
    limits = {"fp8": 0.03, "mxfp8": 0.03, "int8": 0.012, "int4": 0.12, "mxfp4": 0.13, "nvfp4": 0.11}
    assert error < limits[name.split("_")[0].split(":")[0]]


def test_every_mode_is_tested() -> None:
    assert {name.partition(":")[0] for name in SCHEMES} == set(MODES) - {"none"}


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_without_nan(name: str) -> None:
    scheme = Scheme.parse(name)
    for values in (torch.zeros(2, 35, 70), torch.cat([torch.zeros(1, 35, 70), draw(1, 35, 70)])):
        real = restored(quantize(values, name), scheme, 70)
        assert real.isfinite().all()
        assert (real[0] == 0).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_sizes_far_from_one(name: str, size: float) -> None:
    scheme, values = Scheme.parse(name), draw(2, 33, 70).sign() * size
    real = restored(quantize(values, name), scheme, 70)
    torch.testing.assert_close(real, values.double(), rtol=0.34 if "mxfp4" in name else 0.07, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_float16_scales_that_underflow_make_zeros(name: str) -> None:
    values = torch.full((1, 4, 64), 6e-8, dtype=torch.float16)
    assert restored(quantize(values, name), Scheme.parse(name), 64).isfinite().all()


def test_fp8_uses_the_whole_range_and_holds_no_nan() -> None:
    for dtype, largest in ((torch.float8_e4m3fn, 448), (torch.float8_e4m3fnuz, 240)):
        weight = quantize(draw(2, 64, 64), "fp8_w8a8:32x32", dtype=dtype)
        assert weight.values.dtype == dtype
        assert weight.values.float().abs().amax() == largest
        assert weight.values.float().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
def test_ue8m0_scales_are_the_next_power_of_two(dtype: torch.dtype) -> None:
    values = torch.zeros(1, 4, 32)
    values[0, :, 0] = torch.tensor([448.0, 449.0, 447.0, 448 * 2.0**-9])
    weight = quantize(values, "fp8_w8a8:1x32ue8m0", scale_dtype=dtype)
    assert weight.scale is not None
    assert weight.scale.dtype == dtype
    assert decode_e8m0(weight.scale).flatten().tolist() == [1.0, 2.0, 1.0, 2.0**-9]


def test_integers_by_hand() -> None:
    values = torch.zeros(1, 2, 32)
    values[0, 0, :4] = torch.tensor([-8.0, 7.0, 1.4, -0.6])
    values[0, 1, :4] = torch.tensor([14.0, 3.0, -1.0, 0.4])
    plain = quantize(values, "int4_w4a16:g32")
    assert plain.scale is not None
    assert plain.scale.flatten().tolist() == [1.0, 2.0]
    assert plain.values[0, 0, :3].tolist() == [0xF0, 0x79, 0x88]
    zeros = quantize(values, "int4_w4a16:g32z")
    assert zeros.scale is not None
    assert zeros.zeros is not None
    assert zeros.scale.flatten().tolist() == [1.0, 1.0]
    assert zeros.zeros.flatten().tolist() == [0x18]  # row 0 has 8, row 1 has 1
    assert zeros.values[0, 1, :3].tolist() == [0x4F, 0x10, 0x11]
    wide = quantize(values, "int8_w8a16:g32z")
    assert wide.zeros is not None
    assert wide.zeros.flatten().tolist() == [136, 17]
    assert quantize(values, "int8_w8a16:channel").values[0, 0, :2].tolist() == [-127, 111]


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_rounds_ties_to_even(sign: int) -> None:
    given = [0, 0.25, 0.26, 0.5, 0.74, 0.75, 1.25, 1.26, 1.75, 2.5, 2.51, 3.5, 4.9, 5.0, 5.1, 6.0, 7.9]
    wanted = [0, 0, 0.5, 0.5, 0.5, 1, 1, 1.5, 2, 2, 3, 4, 4, 4, 6, 6, 6]
    values = torch.zeros(1, 1, 32)
    values[0, 0, : len(given)] = sign * torch.tensor(given)
    weight = quantize(values, "mxfp4_w4a16")
    assert weight.scale is not None
    assert weight.scale.flatten().tolist() == [127]
    real = restored(weight, Scheme.parse("mxfp4_w4a16"), 32)
    assert real.flatten().tolist()[: len(given)] == [sign * value for value in wanted]


def test_mxfp4_values_are_kept_exactly() -> None:
    """What is representable comes back bit for bit, at every scale."""
    for exponent in (-100, -3, 0, 5, 100):
        values = torch.tensor(E2M1).repeat(2)[None, None] * 2.0**exponent
        weight = quantize(values, "mxfp4_w4a16")
        assert weight.scale is not None
        assert weight.scale.item() == exponent + 127
        assert restored(weight, Scheme.parse("mxfp4_w4a16"), 32).equal(values.double())


def test_nvfp4_scales() -> None:
    values = torch.ones(2, 1, 32)
    values[0, 0, 16:] = 4.0
    values[1] = 0
    weight = quantize(values, "nvfp4_w4a16")
    assert weight.scale is not None
    assert weight.global_scale is not None
    torch.testing.assert_close(weight.global_scale, torch.tensor([4 / (6 * 448), 1.0]))
    assert weight.scale.float().tolist() == [[[112.0, 448.0]], [[1.0, 1.0]]]


def test_odd_sizes_are_padded_with_a_zero_nibble() -> None:
    weight = quantize(draw(2, 3, 5), "int4_w4a16:g32z")
    assert weight.zeros is not None
    assert (weight.values[..., -1] >> 4 == 0).all()
    assert (weight.zeros[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_nibbles(dim: int, size: int) -> None:
    shape = [3, 5]
    shape[dim] = size
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_nibbles(codes, dim)
    assert packed.shape[dim] == math.ceil(size / 2)
    assert packed.is_contiguous()
    assert unpack_nibbles(packed, size, dim).equal(codes.long())


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_do_not_depend_on_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(5, 34, 66)
    whole = named_tensors("w", quantize(values, name))
    monkeypatch.setattr("moegen.quantize.CHUNK", 2 * 34 * 66)
    for key, tensor in named_tensors("w", quantize(values, name)).items():
        assert tensor.view(torch.uint8).equal(whole[key].view(torch.uint8))
    scheme = Scheme.parse(name)
    single = quantize_parts((expert[None] for expert in values), 5, scheme, *stored_dtypes(scheme, values.dtype))
    assert single.values.view(torch.uint8).equal(whole["w"].view(torch.uint8))


def test_scale_dtypes() -> None:
    values = draw(1, 4, 64, dtype=torch.bfloat16)
    for name, given, expected in (
        ("int4_w4a16:g32", None, torch.bfloat16),
        ("int8_w8a16:channel", None, torch.bfloat16),
        ("int4_w4a16:g32", torch.float32, torch.float32),
        ("int8_w8a16:g32z", torch.float16, torch.float16),
        ("fp8_w8a8:channel", None, torch.float32),
        ("fp8_w8a8:1x32ue8m0", None, torch.float32),
        ("mxfp8", None, torch.uint8),
        ("mxfp4_w4a16", torch.float8_e8m0fnu, torch.float8_e8m0fnu),
        ("nvfp4_w4a16", None, torch.float8_e4m3fn),
    ):
        scale = quantize(values, name, scale_dtype=given).scale
        assert scale is not None
        assert scale.dtype == expected, name
    weight = quantize(values.double(), "int4_w4a16:g32")
    assert weight.scale is not None
    assert weight.scale.dtype == torch.float32


def test_refusals() -> None:
    values = draw(1, 4, 64)
    with pytest.raises(TypeError, match=r"scale_dtype: torch.bfloat16 .* fp8_w8a8:channel; allowed: torch.float32"):
        quantize(values, "fp8_w8a8:channel", scale_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"dtype: torch.int8 is not allowed for mxfp8"):
        quantize(values, "mxfp8", dtype=torch.int8)
    with pytest.raises(TypeError, match=r"weight: dtype torch.int32"):
        quantize(values.int(), "mxfp8")
    with pytest.raises(ValueError, match=r"weight: \[4, 64\] is not allowed; allowed: a tensor \[E, rows, K\]"):
        quantize(values[0], "mxfp8")
    with pytest.raises(ValueError, match=r"weight: \[1, 4, 0\]"):
        quantize(values[..., :0], "mxfp8")
    with pytest.raises(ValueError, match="'fp9' is not supported"):
        quantize(values, "fp9")


def test_layer_tensors_are_the_arguments_of_fused_experts() -> None:
    w13, w2 = draw(2, 64, 48, dtype=torch.bfloat16), draw(2, 48, 32, dtype=torch.bfloat16)
    assert set(layer_tensors("none", w13, w2)) == {"w13", "w2"}
    assert set(layer_tensors("fp8_w8a8", w13, w2)) == {"w13", "w13_scale", "w2", "w2_scale"}
    named = layer_tensors(Scheme.parse("int4_w4a16:g32z"), w13, w2, scale_dtype=torch.float32)
    assert {key: list(tensor.shape) for key, tensor in named.items()} == {
        "w13": [2, 64, 24], "w13_scale": [2, 64, 2], "w13_zeros": [2, 32, 2],
        "w2": [2, 48, 16], "w2_scale": [2, 48, 1], "w2_zeros": [2, 24, 1],
    }  # fmt: skip
    assert named["w2_scale"].dtype == torch.float32
    assert "w13_global_scale" in layer_tensors("nvfp4_w4a16", w13, w2)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_package_takes_the_tensors(name: str, tmp_path: Path) -> None:
    """Argument checks included; the result is that of the float layer but for the quantisation."""
    package = build(tmp_path, quant=(name,), dtypes=("bfloat16",), hidden_size=96, intermediate_size=40)
    source = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(torch.bfloat16)

    w13, w2, hidden = random(8, 80, 96) / 10, random(8, 96, 40) / 6, random(7, 96)
    weights, ids = random(7, 2).float().softmax(-1), torch.rand(7, 8, generator=source).topk(2).indices.int()
    out = package.fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer_tensors(name, w13, w2))
    expected = moe_reference(hidden, w13, w2, weights, ids, Activation.of("silu"))
    limit = 0.3 if "fp4" in name or "int4" in name else 0.1
    assert (out.double() - expected).norm() / expected.norm() < limit
