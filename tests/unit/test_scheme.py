"""Scheme: names and what they mean, stored shapes, what is refused, and which schemes may share a package."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.runtime.assignment import _prepare_expert_assignment, low_latency_applies
from moegen.runtime.quant import MODES, Scheme
from moegen.spec import MoESpec, Shape, SpecError
from tests.support.packages import make_inputs, oracle, relative_error

# text -> full name, kind, group_n, group_k, zero points, ue8m0, block_shape
PARSED: dict[str, tuple[str, str, int, int, bool, bool, tuple[int, int] | None]] = {
    "none": ("none", "", 0, 0, False, False, None),
    "fp8_w8a8": ("fp8_w8a8:128x128", "NxK", 128, 128, False, False, (128, 128)),
    "fp8_w8a8:tensor": ("fp8_w8a8:tensor", "tensor", 0, 0, False, False, None),
    "fp8_w8a8:tensor_token": ("fp8_w8a8:tensor_token", "tensor_token", 0, 0, False, False, None),
    "fp8_w8a8:channel": ("fp8_w8a8:channel", "channel", 1, 0, False, False, None),
    "fp8_w8a8:64x32": ("fp8_w8a8:64x32", "NxK", 64, 32, False, False, (64, 32)),
    "fp8_w8a8:1x128": ("fp8_w8a8:1x128", "NxK", 1, 128, False, False, (1, 128)),
    "fp8_w8a8:100x64": ("fp8_w8a8:100x64", "NxK", 100, 64, False, False, (100, 64)),
    "fp8_w8a8:128x128ue8m0": ("fp8_w8a8:128x128ue8m0", "NxK", 128, 128, False, True, (128, 128)),
    "int8_w8a8": ("int8_w8a8:channel", "channel", 1, 0, False, False, None),
    "int8_w8a8:tensor": ("int8_w8a8:tensor", "tensor", 0, 0, False, False, None),
    "int8_w8a8:128x128": ("int8_w8a8:128x128", "NxK", 128, 128, False, False, (128, 128)),
    "int8_w8a16": ("int8_w8a16:channel", "channel", 1, 0, False, False, None),
    "int8_w8a16:g64": ("int8_w8a16:g64", "gK", 1, 64, False, False, (0, 64)),
    "int8_w8a16:g128z": ("int8_w8a16:g128z", "gK", 1, 128, True, False, (0, 128)),
    "int4_w4a16": ("int4_w4a16:g128", "gK", 1, 128, False, False, (0, 128)),
    "int4_w4a16:g32": ("int4_w4a16:g32", "gK", 1, 32, False, False, (0, 32)),
    "int4_w4a16:g64z": ("int4_w4a16:g64z", "gK", 1, 64, True, False, (0, 64)),
    "mxfp4_w4a16": ("mxfp4_w4a16:g32", "gK", 1, 32, False, False, (0, 32)),
    "mxfp4_w4a8": ("mxfp4_w4a8:g32", "gK", 1, 32, False, False, (0, 32)),
    "nvfp4_w4a16": ("nvfp4_w4a16:g16", "gK", 1, 16, False, False, (0, 16)),
    "mxfp8": ("mxfp8:g32", "gK", 1, 32, False, False, (0, 32)),
}


@pytest.mark.parametrize("text", PARSED)
def test_parse(text: str) -> None:
    name, kind, group_n, group_k, zeros, ue8m0, block_shape = PARSED[text]
    scheme = Scheme.parse(text)
    assert scheme == Scheme(name.partition(":")[0], kind, group_n, group_k, zeros, ue8m0)
    assert (scheme.name, scheme.block_shape) == (name, block_shape)
    assert Scheme.parse(scheme.name) == scheme
    assert scheme.slug == name.replace(":", "_")
    assert re.fullmatch(r"[a-z0-9_]+", scheme.slug)


def test_every_mode_is_parsed() -> None:
    assert {text.partition(":")[0] for text in PARSED} == set(MODES)


def test_slugs_differ() -> None:
    schemes = {Scheme.parse(text) for text in PARSED}
    assert len({scheme.slug for scheme in schemes}) == len(schemes)


@pytest.mark.parametrize(
    ("text", "supported"),
    [
        ("", "allowed: none, fp8_w8a8, int8_w8a8, int8_w8a16, int4_w4a16, mxfp4_w4a16, mxfp4_w4a8, nvfp4_w4a16, mxfp8"),
        ("fp8", "allowed: none, fp8_w8a8"),
        ("FP8_W8A8", "allowed: none, fp8_w8a8"),
        (" fp8_w8a8", "allowed: none, fp8_w8a8"),
        ("none:tensor", "none has: none"),
        ("none:g32", "none has: none"),
        ("fp8_w8a8:token", "fp8_w8a8 has: tensor, tensor_token, channel, NxK"),
        ("fp8_w8a8:g32", "fp8_w8a8 has: tensor, tensor_token, channel, NxK"),
        ("fp8_w8a8:128", "fp8_w8a8 has: tensor, tensor_token, channel, NxK"),
        ("fp8_w8a8:128x128 ", "fp8_w8a8 has: "),
        ("fp8_w8a8:128x128\n", "fp8_w8a8 has: "),
        ("fp8_w8a8:-1x128", "fp8_w8a8 has: "),
        ("fp8_w8a8:0x128", "allowed: a K group that is a power of two from 32"),
        ("fp8_w8a8:128x0", "allowed: a K group that is a power of two from 32"),
        ("fp8_w8a8:128x96", "allowed: a K group that is a power of two from 32"),
        ("fp8_w8a8:128x16", "allowed: a K group that is a power of two from 32"),
        ("fp8_w8a8:channelue8m0", "fp8_w8a8 has: "),
        ("int8_w8a8:tensor_token", "int8_w8a8 has: channel, tensor, NxK"),
        ("int8_w8a8:128x128ue8m0", "ue8m0 scales are for fp8_w8a8"),
        ("int8_w8a16:tensor", "int8_w8a16 has: channel, gK"),
        ("int8_w8a16:g48", "allowed: a K group that is a power of two from 16"),
        ("int4_w4a16:channel", "int4_w4a16 has: gK"),
        ("int4_w4a16:g16", "int4_w4a16 has K groups of 32, 64, 128"),
        ("int4_w4a16:g256", "int4_w4a16 has K groups of 32, 64, 128"),
        ("int4_w4a16:gz", "int4_w4a16 has: gK"),
        ("mxfp4_w4a16:g64", "mxfp4_w4a16 has K groups of 32"),
        ("mxfp4_w4a16:g32z", "mxfp4_w4a16 has no zero points"),
        ("nvfp4_w4a16:g32", "nvfp4_w4a16 has K groups of 16"),
        ("mxfp8:128x128", "mxfp8 has: gK"),
        ("mxfp8:g32z", "mxfp8 has no zero points"),
    ],
)
def test_refused(text: str, supported: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is not supported; ")) as caught:
        Scheme.parse(text)
    assert supported in str(caught.value)


# scheme -> stored weight, scale and zero points of 3 experts of 130 x 97 values, which no group divides
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "none": ((3, 130, 97), None, None),
    "fp8_w8a8:tensor": ((3, 130, 97), (3,), None),
    "fp8_w8a8:tensor_token": ((3, 130, 97), (3,), None),
    "fp8_w8a8:channel": ((3, 130, 97), (3, 130), None),
    "fp8_w8a8:128x128": ((3, 130, 97), (3, 2, 1), None),
    "fp8_w8a8:64x32": ((3, 130, 97), (3, 3, 4), None),
    "fp8_w8a8:16x32ue8m0": ((3, 130, 97), (3, 9, 4), None),
    "int8_w8a8:128x128": ((3, 130, 97), (3, 2, 1), None),
    "int8_w8a16:channel": ((3, 130, 97), (3, 130), None),
    "int8_w8a16:g32z": ((3, 130, 97), (3, 130, 4), (3, 130, 4)),
    "int4_w4a16:g32": ((3, 130, 49), (3, 130, 4), None),
    "int4_w4a16:g64z": ((3, 130, 49), (3, 130, 2), (3, 65, 2)),
    "mxfp4_w4a16": ((3, 130, 49), (3, 130, 4), None),
    "nvfp4_w4a16": ((3, 130, 49), (3, 130, 7), None),
    "mxfp8": ((3, 130, 97), (3, 130, 4), None),
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes(text: str) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.weight_shape(3, 130, 97), scheme.scale_shape(3, 130, 97), scheme.zeros_shape(3, 130, 97)) == (
        SHAPES[text]
    )


def test_zero_points_of_an_odd_number_of_rows() -> None:
    assert Scheme.parse("int4_w4a16:g32z").zeros_shape(2, 7, 64) == (2, 4, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp8_w8a8:tensor", "[E]"),
        ("fp8_w8a8:channel", "[E, 2I]"),
        ("fp8_w8a8:128x64", "[E, ceil(2I/128), ceil(H/64)]"),
        ("int4_w4a16:g32", "[E, 2I, ceil(H/32)]"),
    ],
)
def test_words(text: str, words: str) -> None:
    assert Scheme.parse(text).words(("2I", "H")) == words


def test_words_of_zero_points() -> None:
    assert Scheme.parse("int4_w4a16:g64z").zeros_words(("2I", "H")) == "[E, ceil(2I/2), ceil(H/64)]"
    assert Scheme.parse("int8_w8a16:g64z").zeros_words(("H", "I")) == "[E, H, ceil(I/64)]"


# scheme -> stored types, scale types
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "fp8_w8a8:tensor": (("float8_e4m3fn", "float8_e4m3fnuz"), ("float32",)),
    "fp8_w8a8:128x128": (("float8_e4m3fn", "float8_e4m3fnuz"), ("float32",)),
    "fp8_w8a8:128x128ue8m0": (("float8_e4m3fn", "float8_e4m3fnuz"), ("float32", "uint8", "float8_e8m0fnu")),
    "int8_w8a8": (("int8",), ("float32",)),
    "int8_w8a16:channel": (("int8",), ("float32", "activation")),
    "int8_w8a16:g32": (("uint8",), ("float32", "activation")),
    "int4_w4a16": (("uint8",), ("float32", "activation")),
    "mxfp4_w4a16": (("uint8",), ("uint8", "float8_e8m0fnu")),
    "nvfp4_w4a16": (("uint8",), ("float8_e4m3fn",)),
    "mxfp8": (("float8_e4m3fn",), ("uint8", "float8_e8m0fnu")),
}


@pytest.mark.parametrize("text", TYPES)
def test_types(text: str) -> None:
    scheme = Scheme.parse(text)
    weights, scales = TYPES[text]
    assert (scheme.weight_dtypes, set(scheme.scale_dtypes)) == (weights, set(scales))
    assert scheme.has_global_scale is text.startswith("nvfp4")


# --------------------------------------------------------------------------------------------- low-latency assignment

INCLUDED = ("none", "fp8_w8a8", "fp8_w8a8:channel", "int8_w8a8", "int8_w8a8:128x128", "int8_w8a16:channel",
            "mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16", "mxfp8")  # fmt: skip
EXCLUDED = ("int8_w8a16:g32", "int8_w8a16:g128z", "int4_w4a16:g32", "int4_w4a16:g64z", "int4_w4a16:g128")
NEAR = (1, 3, 4, 5, 64)  # 32 experts with top_k 2: 4 tokens are at the limit of T * k * 4 <= E
TAKEN = [True, True, True, False, False]


@pytest.mark.parametrize("quant", [*INCLUDED, *EXCLUDED])
def test_compatible_rule_of_a_scheme(quant: str) -> None:
    """`_prepare_expert_assignment` keeps vLLM's rule: int8_w8a16 and int4_w4a16 with groups along K are left out."""
    scheme = Scheme.parse(quant)
    flags = {f"use_{mode}": scheme.mode == mode for mode in ("int8_w8a16", "int4_w4a16")}
    block_shape = scheme.block_shape
    answers = [low_latency_applies(t, 2, 32, None, **flags, block_shape=block_shape) for t in NEAR]
    assert answers == (TAKEN if quant in INCLUDED else [False] * 5)
    for tokens, expected in zip(NEAR, answers, strict=True):
        ids = torch.zeros((tokens, 2), dtype=torch.int32)
        if expected:  # the other branch launches a kernel
            found = _prepare_expert_assignment(
                ids, {"BLOCK_SIZE_M": 16}, tokens, 2, 32, None, **flags, block_shape=block_shape
            )
            assert found[0] is None


@pytest.mark.parametrize("quant", [*INCLUDED, *EXCLUDED])
def test_rule_of_a_layer(quant: str, build: Callable[..., ModuleType]) -> None:
    """The kernels of this house take the shortcut with K groups too: a choice, held here so that it stays one."""
    package = build(num_experts=32, top_k=2, quant=(quant,))
    is_low_latency, layer = package.runtime.layer.is_low_latency, package.LAYERS[0]
    assert [is_low_latency(layer, tokens, None) for tokens in NEAR] == TAKEN
    assert not any(is_low_latency(layer, tokens, object()) for tokens in NEAR)


# --------------------------------------------------------------------------------------- several schemes in a package

BIG: dict[str, int] = {"num_experts": 8, "top_k": 2, "hidden_size": 512, "intermediate_size": 256}


def spec(*quant: str, **size: int) -> MoESpec:
    return MoESpec(name="several", shapes=(Shape(**{**BIG, **size}),), quant=quant)


@pytest.mark.parametrize(
    "pair",
    [
        ("mxfp4_w4a16", "mxfp4_w4a8"),
        ("fp8_w8a8:tensor", "fp8_w8a8:tensor_token"),
        ("fp8_w8a8:128x128", "fp8_w8a8:128x128ue8m0"),  # both take float32 scales
        ("mxfp8", "fp8_w8a8:1x32ue8m0"),
        ("int8_w8a8:channel", "int8_w8a16:channel"),
        ("int4_w4a16", "int4_w4a16:g128"),
        ("none", "none"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_schemes_that_a_call_cannot_tell_apart(pair: tuple[str, str], swapped: bool) -> None:
    one, other = pair[::-1] if swapped else pair
    with pytest.raises(SpecError) as caught:
        spec("nvfp4_w4a16", one, other)
    assert str(caught.value).startswith(f"quant[2]: {other!r} is not allowed; allowed: ")
    assert one in str(caught.value) or one == other
    with pytest.raises(SpecError, match=re.escape(f"moe.yaml: quant[2]: {other!r} is not allowed")):
        MoESpec.from_dict({"name": "a", "shapes": [BIG], "quant": ["nvfp4_w4a16", one, other]}, "moe.yaml")


def test_groups_that_give_one_shape_on_a_small_layer() -> None:
    assert spec("fp8_w8a8:128x128", "fp8_w8a8:128x256").quant
    with pytest.raises(SpecError, match=r"e8_k2_h128_i64_bf16_fp8_w8a8_128x128_silu both store"):
        spec("fp8_w8a8:128x128", "fp8_w8a8:128x256", hidden_size=128, intermediate_size=64)


TOGETHER = ("none", "fp8_w8a8:tensor", "fp8_w8a8:channel", "fp8_w8a8:128x128", "int8_w8a8:channel", "int8_w8a8:tensor",
            "int8_w8a16:g64", "int8_w8a16:g64z", "int4_w4a16:g64", "int4_w4a16:g64z", "int4_w4a16:g128",
            "mxfp4_w4a16", "nvfp4_w4a16", "mxfp8")  # fmt: skip


def test_a_call_finds_the_scheme_of_its_weights(build: Callable[..., ModuleType]) -> None:
    package = build(quant=TOGETHER, hidden_size=256, intermediate_size=128)
    assert [layer.quant for layer in package.LAYERS] == [Scheme.parse(text).name for text in TOGETHER]
    index = package._dispatch._PACKAGE._index
    for layer in package.LAYERS:
        arguments: dict[str, Any] = make_inputs(layer, 3)
        weight = package.runtime.weight.Weight
        w13, w2 = (weight.of(name, arguments[name], arguments) for name in ("w13", "w2"))
        x = arguments["hidden_states"]
        assert index.find(x, w13, w2, arguments["topk_ids"], None) is layer
        assert relative_error(package.fused_experts(**arguments), oracle(layer, arguments)) < 1e-2
