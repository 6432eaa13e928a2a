"""Activation quantisers in the interpreter against round_activations; rows that do not count are left alone."""

from collections.abc import Iterator

import pytest
import torch

from moegen.runtime import quantise as module
from moegen.runtime.quant import Scheme
from moegen.runtime.quantise import Activations, Slots, quantise
from moegen.runtime.weight import round_activations
from tests.support.packages import poisoned

FP8, INT8 = torch.float8_e4m3fn, torch.int8
# scheme -> type of the stored weights
SCHEMES: dict[str, torch.dtype] = {
    "fp8_w8a8:tensor": FP8,
    "fp8_w8a8:tensor_token": FP8,
    "fp8_w8a8:channel": FP8,
    "fp8_w8a8:32x32": FP8,
    "fp8_w8a8:128x128": FP8,
    "fp8_w8a8:128x128ue8m0": FP8,
    "int8_w8a8:channel": INT8,
    "int8_w8a8:tensor": INT8,
    "int8_w8a8:64x64": INT8,
    "mxfp4_w4a8": torch.uint8,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXPERTS = 8


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_TENSOR_PROGRAMS", 4)  # of 512, which the interpreter would run one after another
    with poisoned():
        yield


def random(rows: int, depth: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, depth, generator=g) * torch.rand(rows, 1, generator=g) * 5).to(dtype)


def real(quantised: Activations, scheme: Scheme) -> torch.Tensor:
    """What the GEMM reads: values times scales, in float64."""
    values, depth = quantised.values.double(), quantised.values.shape[1]
    if quantised.scale is None:
        return values
    scale = quantised.scale.double()
    if scheme.kind == "tensor":
        return values * scale
    group = scheme.group_k or depth
    return values * scale.reshape(values.shape[0], -1).repeat_interleave(group, 1)[:, :depth]


def assert_like_reference(found: torch.Tensor, x: torch.Tensor, scheme: Scheme, static: torch.Tensor | None) -> None:
    """The same codes, ties between two of them included; dequantised values differ by their own rounding at most."""
    stored = SCHEMES[scheme.name if scheme.name in SCHEMES else scheme.mode]
    expected = round_activations(x.double(), scheme, stored, static)
    rounding = {torch.float32: 1e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
    torch.testing.assert_close(found, expected, rtol=rounding[x.dtype], atol=0)


@pytest.mark.parametrize(("rows", "depth"), [(1, 32), (3, 128), (5, 200), (2, 511), (2, 4097)])
@pytest.mark.parametrize("quant", SCHEMES)
def test_like_the_reference(quant: str, rows: int, depth: int) -> None:
    scheme, stored = Scheme.parse(quant), SCHEMES[quant]
    for dtype in DTYPES if depth == 200 else DTYPES[:1]:
        x = random(rows, depth, dtype, depth)
        before = x.clone()
        found = quantise(x, scheme, stored, None, None)
        assert torch.equal(x, before)
        assert found.values.shape == x.shape
        assert found.values.dtype == (dtype if quant == "mxfp4_w4a8" else stored)
        groups = {"NxK": -(-depth // (scheme.group_k or 1))}.get(scheme.kind, 1)
        if quant == "mxfp4_w4a8":
            assert found.scale is None
        else:
            assert found.scale is not None
            assert (found.scale.dtype, found.scale.numel()) == (
                torch.float32,
                1 if scheme.kind == "tensor" else rows * groups,
            )
        assert_like_reference(real(found, scheme), x, scheme, None)


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("largest", [0.0, 1e-12, 1e-9, 3e-8])
def test_values_below_the_least_scale(quant: str, largest: float) -> None:
    scheme = Scheme.parse(quant)
    x = random(3, 64, torch.float32)
    x *= largest / x.abs().max()
    assert_like_reference(real(quantise(x, scheme, SCHEMES[quant], None, None), scheme), x, scheme, None)


@pytest.mark.parametrize("quant", ["none", "int4_w4a16", "mxfp4_w4a16", "nvfp4_w4a16", "mxfp8", "int8_w8a16"])
def test_weight_only_schemes_pass_activations_on(quant: str) -> None:
    x = random(2, 40, torch.bfloat16)
    found = quantise(x, Scheme.parse(quant), torch.uint8, None, None)
    assert found.values is x
    assert found.scale is None


@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "int8_w8a8:tensor"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_static(quant: str, factor: float) -> None:
    """A static scale is used as it is: too small a one saturates."""
    scheme, stored = Scheme.parse(quant), SCHEMES[quant]
    x = random(4, 100, torch.bfloat16)
    scale = torch.tensor([factor * x.abs().max().item() / (127 if stored == INT8 else 448)])
    found = quantise(x, scheme, stored, scale, None)
    assert found.scale is not None
    assert torch.equal(found.scale, scale)
    values, largest = found.values.double(), 127 if stored == INT8 else 448
    assert values.abs().max() <= largest
    assert bool((values.abs() == largest).any()) is (factor <= 1)
    expected = round_activations(x.double(), scheme, stored, scale)
    assert (real(found, scheme) - expected).abs().max() <= 1e-2 * largest * scale.item()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("quant", SCHEMES)
def test_dead_rows(quant: str, id_dtype: torch.dtype, mapped: bool) -> None:
    """Padding, ids beyond the experts and remote slots: their NaN is not read, not even by the scale of the whole."""
    scheme, stored = Scheme.parse(quant), SCHEMES[quant]
    ids = torch.tensor([[0, -1], [8, 3], [7, 1000], [2, 5]], dtype=id_dtype)
    expert_map = torch.tensor([1, -1, 0, -1, -1, 5, 6, 2], dtype=torch.int32)  # 5 and 6 are beyond the local experts
    flat = ids.flatten().tolist()
    live = [0 <= e < EXPERTS and (not mapped or 0 <= expert_map[e].item() < 4) for e in flat]
    assert live == ([True, False, False, False, True, False, True, False] if mapped else
                    [True, False, False, True, True, False, True, True])  # fmt: skip
    x = random(8, 72, torch.bfloat16, 3)
    keep = torch.tensor(live)
    x[~keep] = float("nan")
    slots = Slots(ids, expert_map if mapped else None, EXPERTS, 4 if mapped else EXPERTS)
    found = quantise(x, scheme, stored, None, slots)
    alone = quantise(x[keep].contiguous(), scheme, stored, None, None)
    bits = torch.int16 if found.values.itemsize == 2 else torch.int8
    assert torch.equal(found.values[keep].view(bits), alone.values.view(bits))
    poison = torch.empty(8, 72, dtype=found.values.dtype)[~keep]
    assert torch.equal(found.values[~keep].view(bits), poison.view(bits))
    if found.scale is not None and scheme.kind != "tensor":
        scale = found.scale.reshape(8, -1)
        assert bool(scale[~keep].isnan().all())
        assert torch.equal(scale[keep].flatten(), alone.scale.flatten())  # type: ignore[union-attr]
    elif found.scale is not None:
        assert torch.equal(found.scale, alone.scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", SCHEMES)
def test_first_rows(quant: str) -> None:
    """Of sorted rows the first `num_live` are read and written."""
    scheme, stored = Scheme.parse(quant), SCHEMES[quant]
    x = random(8, 72, torch.bfloat16, 3)
    x[5:] = float("nan")
    found = quantise(x, scheme, stored, None, Slots(num_live=torch.tensor([5], dtype=torch.int32)))
    alone = quantise(x[:5].contiguous(), scheme, stored, None, None)
    bits = torch.int16 if found.values.itemsize == 2 else torch.int8
    poison = torch.empty(3, 72, dtype=found.values.dtype)
    assert torch.equal(found.values.view(bits), torch.cat([alone.values, poison]).view(bits))
    if found.scale is not None:
        assert alone.scale is not None
        assert torch.equal(found.scale.flatten()[: alone.scale.numel()], alone.scale.flatten())
        assert bool(found.scale.flatten()[alone.scale.numel() :].isnan().all())


@pytest.mark.parametrize("quant", SCHEMES)
def test_no_live_row(quant: str) -> None:
    scheme, stored = Scheme.parse(quant), SCHEMES[quant]
    x = torch.full((4, 40), float("nan"), dtype=torch.bfloat16)
    found = quantise(x, scheme, stored, None, Slots(torch.full((2, 2), -1), None, EXPERTS, EXPERTS))
    if scheme.kind == "tensor":
        assert found.scale is not None
        torch.testing.assert_close(found.scale, torch.tensor([1e-10]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("quant", SCHEMES)
def test_rows_of_zeros(quant: str) -> None:
    scheme = Scheme.parse(quant)
    x = random(3, 72, torch.bfloat16)
    x[1] = 0
    found = real(quantise(x, scheme, SCHEMES[quant], None, None), scheme)
    assert bool((found[1] == 0).all())
    assert bool(found.isfinite().all())
    zero = quantise(torch.zeros(2, 40, dtype=torch.bfloat16), scheme, SCHEMES[quant], None, None)
    assert bool((real(zero, scheme) == 0).all())


def test_known_scales() -> None:
    """Formulas of vLLM's quantisers, worked out by hand."""
    x = torch.zeros(2, 128)
    x[0, 5], x[1, 100] = -4.48, 1e-9

    def scale(quant: str) -> list[float]:
        found = quantise(x, Scheme.parse(quant), SCHEMES[quant], None, None).scale
        assert found is not None
        return [round(value, 12) for value in found.double().flatten().tolist()]

    def close(quant: str, expected: list[float]) -> None:
        assert scale(quant) == pytest.approx(expected, rel=1e-5)

    close("fp8_w8a8:channel", [0.01, 1 / (448 * 512)])
    close("fp8_w8a8:tensor_token", [0.01, 1 / (448 * 512)])
    close("fp8_w8a8:128x128", [0.01, 2e-12])  # 1e-9 / 448
    close("fp8_w8a8:128x128ue8m0", [2.0**-6, 4e-12])  # the next powers of two: 2 ** -38 = 3.6e-12
    close("fp8_w8a8:tensor", [0.01])
    close("int8_w8a8:channel", [4.48 / 127, 8e-12])
    close("int8_w8a8:tensor", [4.48 / 127])
    close("int8_w8a8:64x64", [4.48 / 127, 1e-12, 1e-12, 8e-12])  # the least maximum is 1e-10


def test_power_of_two_scales_are_exact() -> None:
    """At a power of two the scale stays, one float32 above it doubles."""
    x = torch.zeros(3, 128)
    x[0, 0] = 448 * 2.0**-9
    x[1, 0] = torch.nextafter(x[0, 0], torch.tensor(1.0))
    x[2, 0] = torch.nextafter(x[0, 0], torch.tensor(0.0))
    found = quantise(x, Scheme.parse("fp8_w8a8:128x128ue8m0"), FP8, None, None)
    assert found.scale is not None
    assert found.scale.flatten().tolist() == [2.0**-9, 2.0**-8, 2.0**-9]


def test_int8_rounds_halves_up() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, -126.5, 126.5, -127.0]])
    found = quantise(x, Scheme.parse("int8_w8a8"), INT8, None, None).values
    assert found.tolist() == [[127, 1, 2, 0, -1, -126, 127, -127]]


def test_strided_rows() -> None:
    """hidden_states may be a slice of wider rows."""
    wide = random(4, 200, torch.bfloat16)
    x = wide[:, 40:112]
    for quant, stored in SCHEMES.items():
        scheme = Scheme.parse(quant)
        found, packed = (quantise(value, scheme, stored, None, None) for value in (x, x.contiguous()))
        assert found.values.is_contiguous()
        assert torch.equal(found.values.double(), packed.values.double()), quant
