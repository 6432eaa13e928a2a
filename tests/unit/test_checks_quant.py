"""Every scale, zero point, global and static scale that is wrong is refused by name, in words and numbers."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.packages import make_inputs, relative_error

TOKENS = 3
SIZES: dict[str, int] = {"num_experts": 8, "top_k": 2, "hidden_size": 80, "intermediate_size": 48}
FP8, E8M0 = "torch.float8_e4m3fn", "torch.uint8 or torch.float8_e8m0fnu"

# scheme -> for each part: shapes of w13's and w2's in words and numbers, types in words. H = 80, I = 48.
EXPECTED: dict[str, dict[str, tuple[str, str, str]]] = {
    "fp8_w8a8:tensor": {"scale": ("[E] = [8]", "[E] = [8]", "torch.float32")},
    "fp8_w8a8:channel": {"scale": ("[E, 2I] = [8, 96]", "[E, H] = [8, 80]", "torch.float32")},
    "fp8_w8a8:64x32": {
        "scale": (
            "[E, ceil(2I/64), ceil(H/32)] = [8, 2, 3]",
            "[E, ceil(H/64), ceil(I/32)] = [8, 2, 2]",
            "torch.float32",
        )
    },
    "int8_w8a8:32x32": {
        "scale": (
            "[E, ceil(2I/32), ceil(H/32)] = [8, 3, 3]",
            "[E, ceil(H/32), ceil(I/32)] = [8, 3, 2]",
            "torch.float32",
        )
    },
    "int4_w4a16:g32z": {
        "scale": (
            "[E, 2I, ceil(H/32)] = [8, 96, 3]",
            "[E, H, ceil(I/32)] = [8, 80, 2]",
            "torch.float32 or torch.bfloat16",
        ),
        "zeros": ("[E, ceil(2I/2), ceil(H/32)] = [8, 48, 3]", "[E, ceil(H/2), ceil(I/32)] = [8, 40, 2]", "torch.uint8"),
    },
    "int8_w8a16:g32z": {
        "scale": (
            "[E, 2I, ceil(H/32)] = [8, 96, 3]",
            "[E, H, ceil(I/32)] = [8, 80, 2]",
            "torch.float32 or torch.bfloat16",
        ),
        "zeros": ("[E, 2I, ceil(H/32)] = [8, 96, 3]", "[E, H, ceil(I/32)] = [8, 80, 2]", "torch.uint8"),
    },
    "mxfp4_w4a16": {"scale": ("[E, 2I, ceil(H/32)] = [8, 96, 3]", "[E, H, ceil(I/32)] = [8, 80, 2]", E8M0)},
    "nvfp4_w4a16": {
        "scale": ("[E, 2I, ceil(H/16)] = [8, 96, 5]", "[E, H, ceil(I/16)] = [8, 80, 3]", FP8),
        "global_scale": ("[E] = [8]", "[E] = [8]", "torch.float32"),
    },
}
PARTS = [
    (quant, f"{name}_{part}", words[index], words[2])
    for quant, parts in EXPECTED.items()
    for part, words in parts.items()
    for index, name in enumerate(("w13", "w2"))
]
Change = Callable[[torch.Tensor], Any]
MORE = lambda value: torch.cat([value, value], -1)  # noqa: E731


def refused(package: ModuleType, arguments: dict[str, Any], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        package.fused_experts(**arguments)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize(("quant", "name", "shape", "types"), PARTS)
def test_wrong_part(quant: str, name: str, shape: str, types: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    good = make_inputs(package.LAYERS[0], TOKENS)
    part = good[name]
    expected = f"expected {shape}, {types}, contiguous"

    def message(value: Any, error: type[Exception]) -> str:
        return refused(package, {**good, name: value}, error)

    assert message(None, ValueError) == f"{name}: missing; {expected}"
    wide = MORE(part)
    assert message(wide, ValueError) == f"{name}: shape {list(wide.shape)} is not allowed; {expected}"
    few = part[:7]
    assert message(few, ValueError) == f"{name}: shape {list(few.shape)} is not allowed; {expected}"
    assert message(part[None], ValueError).startswith(f"{name}: shape {[1, *part.shape]} is not allowed; ")
    text = message(part.to(torch.float64), TypeError)
    assert text == f"{name}: dtype torch.float64 is not allowed; allowed: {types}"
    assert message(part.to("meta"), ValueError).startswith(f"{name}: device meta is not allowed; allowed: cpu")
    assert message([1.0], TypeError) == f"{name}: list is not allowed; allowed: torch.Tensor"
    strided = wide[..., : part.shape[-1]] if part.dim() > 1 else torch.stack([part, part], 1)[:, 0]
    strides = re.escape(str(strided.stride()))
    assert re.fullmatch(f"{name}: strides {strides} are not allowed; allowed: .*", message(strided, ValueError))


@pytest.mark.parametrize("name", ["w13", "w2"])
@pytest.mark.parametrize(
    ("quant", "part"),
    [
        *[("none", part) for part in ("scale", "zeros", "global_scale", "input_scale")],
        *[("int4_w4a16:g32", part) for part in ("zeros", "global_scale", "input_scale")],
        *[("fp8_w8a8:tensor", part) for part in ("zeros", "global_scale")],
        *[(quant, "input_scale") for quant in ("fp8_w8a8:channel", "fp8_w8a8:tensor_token", "fp8_w8a8:64x32")],
        ("mxfp8", "zeros"),
        ("nvfp4_w4a16", "zeros"),
    ],
)
def test_unexpected_part(quant: str, part: str, name: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    arguments[f"{name}_{part}"] = torch.ones(8)
    message = refused(package, arguments, ValueError)
    assert message.startswith(f"{name}_{part}: given, but ")
    assert message.endswith("allowed: None")


@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "int8_w8a8:tensor"])
@pytest.mark.parametrize("name", ["w13_input_scale", "w2_input_scale"])
def test_static_scale(quant: str, name: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    good = make_inputs(package.LAYERS[0], TOKENS)
    wrong: tuple[tuple[Any, type[Exception], str], ...] = (
        (torch.ones(2), ValueError, "shape [2] is not allowed; allowed: [1]"),
        (torch.ones(8, 1), ValueError, "shape [8] is not allowed; allowed: [1]"),
        (torch.ones(0), ValueError, "shape [0] is not allowed; allowed: [1]"),
        (torch.ones(1).half(), TypeError, "dtype torch.float16 is not allowed; allowed: torch.float32"),
        (torch.ones(1, device="meta"), ValueError, "device meta is not allowed; allowed: cpu"),
        (0.5, TypeError, "float is not allowed; allowed: torch.Tensor"),
    )
    for value, error, text in wrong:
        assert refused(package, {**good, name: value}, error).startswith(f"{name}: {text}")
    results = [package.fused_experts(**good, **{name: torch.full(shape, 0.02)}) for shape in ((), (1,), (1, 1))]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    dynamic = package.fused_experts(**good)
    assert 0 < relative_error(results[0], dynamic) < 0.3


@pytest.mark.parametrize("quant", ["fp8_w8a8:channel", "int8_w8a8:channel", "int8_w8a16:channel", "fp8_w8a8:tensor"])
def test_trailing_dimension_of_one(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    expected = package.fused_experts(**arguments)
    arguments |= {name: arguments[name][..., None] for name in ("w13_scale", "w2_scale")}
    assert torch.equal(package.fused_experts(**arguments), expected)
    arguments["w2_scale"] = arguments["w2_scale"][..., None]
    assert refused(package, arguments, ValueError).startswith("w2_scale: shape ")


@pytest.mark.parametrize("quant", ["mxfp4_w4a16", "mxfp8", "fp8_w8a8:64x32ue8m0"])
def test_both_types_of_e8m0_scales(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    expected = package.fused_experts(**arguments)
    for name in ("w13_scale", "w2_scale"):
        assert arguments[name].dtype == torch.uint8
        arguments[name] = arguments[name].view(torch.float8_e8m0fnu)
    assert torch.equal(package.fused_experts(**arguments), expected)
    if "ue8m0" in quant:
        arguments |= {name: arguments[name].float() for name in ("w13_scale", "w2_scale")}
        assert torch.equal(package.fused_experts(**arguments), expected)


@pytest.mark.parametrize("quant", ["int4_w4a16:g32", "int8_w8a16:g32", "int8_w8a16:channel"])
def test_both_types_of_weight_only_scales(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(quant=(quant,), **SIZES)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    expected = package.fused_experts(**arguments)
    for name in ("w13_scale", "w2_scale"):
        assert arguments[name].dtype == torch.bfloat16
        arguments[name] = arguments[name].float()
    assert torch.equal(package.fused_experts(**arguments), expected)


@pytest.mark.parametrize(
    ("quant", "change", "error", "text"),
    [
        ("int4_w4a16:g32", lambda w: w.view(torch.int8), TypeError, "w13: dtype torch.int8 is not allowed; allowed: "),
        ("int4_w4a16:g32", MORE, ValueError, "w13: shape [8, 96, 80] is not allowed; allowed: [8, 96, 40]"),
        ("int8_w8a8:channel", lambda w: w.view(torch.uint8), TypeError, "w13: dtype torch.uint8 is not allowed; "),
        ("fp8_w8a8:channel", lambda w: w.view(torch.uint8), TypeError, "w13: dtype torch.uint8 is not allowed; "),
        ("fp8_w8a8:channel", lambda w: w.to(torch.float8_e5m2), TypeError, "w13: dtype torch.float8_e5m2 is not "),
        ("mxfp8", lambda w: w.view(torch.float8_e4m3fnuz), TypeError, "w13: dtype torch.float8_e4m3fnuz is not "),
    ],
)
def test_wrong_stored_weight(
    quant: str, change: Change, error: type[Exception], text: str, build: Callable[..., ModuleType]
) -> None:
    package = build(quant=(quant,), **SIZES)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    assert refused(package, {**arguments, "w13": change(arguments["w13"])}, error).startswith(text)


def test_expected_shape_in_words_and_numbers_of_a_real_layer(build: Callable[..., ModuleType]) -> None:
    package = build(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, quant=("fp8_w8a8:128x128",))
    scheme, shape = package.LAYERS[0].scheme, package.LAYERS[0].w13_shape
    given, like = torch.ones(256, 32, 57), torch.zeros(1, 7168, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"w13_scale: ") as caught:
        package.runtime.checks._check_extra(
            "w13_scale", given, (torch.float32,), scheme.scale_shape(*shape), lambda: scheme.words(("2I", "H")), like
        )
    assert str(caught.value) == (
        "w13_scale: shape [256, 32, 57] is not allowed; expected [E, ceil(2I/128), ceil(H/128)] = [256, 32, 56], "
        "torch.float32, contiguous"
    )
