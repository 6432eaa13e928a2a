"""MoESpec and its parts: what is accepted, what is refused and with which words, and what is derived."""

from pathlib import Path
from typing import Any

import pytest

from moegen.runtime.activations import Activation
from moegen.spec import MoESpec, Parallel, Shape, SpecError, VariantSpec, load_spec

SHAPE: dict[str, Any] = {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
SPEC: dict[str, Any] = {"name": "qwen3-30b-a3b", "shapes": [SHAPE]}
VARIANT: dict[str, Any] = {**SHAPE, "local_experts": 128, "dtype": "bfloat16"}
SWIGLUOAI = Activation.of("swigluoai")


def test_defaults() -> None:
    spec = MoESpec.from_dict(SPEC)
    assert spec == MoESpec(name="qwen3-30b-a3b", shapes=(Shape(**SHAPE),))
    assert (spec.dtypes, spec.quant, spec.bias) == (("bfloat16",), ("none",), False)
    assert spec.activation == Activation.of("silu")
    assert spec.parallel == (Parallel(tp=1, ep=1),)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu_tanh", "dtypes": ["float16", "float32"]},
        {"activation": {"name": "swigluoai", "limit": 9}, "bias": True},
        {"activation": {"name": "situ", "beta": 4.0, "limit": 25.0}},
        {"shapes": [SHAPE, {**SHAPE, "top_k": 4}], "parallel": [{"tp": 1, "ep": 1}, {"tp": 4}, {"ep": 8}]},
    ],
)
def test_round_trip(changes: dict[str, Any]) -> None:
    spec = MoESpec.from_dict({**SPEC, **changes})
    assert MoESpec.from_dict(spec.to_dict()) == spec
    assert set(spec.to_dict()) == {"name", "shapes", "dtypes", "quant", "activation", "bias", "parallel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Qwen3"}, "name: 'Qwen3' is not allowed; allowed: lower-case letters, digits, dashes"),
        ({"name": ""}, "name: '' is not allowed"),
        ({"name": "-a"}, "name: '-a' is not allowed"),
        ({"name": "a\n"}, "name: 'a\\n' is not allowed"),
        ({"name": 3}, "name: 3 is not allowed"),
        ({"shapes": []}, "shapes: () is not allowed; allowed: one item or more"),
        ({"shapes": SHAPE}, "is not allowed; allowed: a list"),
        ({"shapes": [7]}, "shapes[0]: 7 is not allowed; allowed: a mapping with num_experts, top_k"),
        ({"shapes": [SHAPE, SHAPE]}, "allowed: each item once; this one repeats shapes[0]"),
        (
            {"shapes": [{**SHAPE, "top_k": 129}]},
            "shapes[0].top_k: 129 is not allowed; allowed: an integer from 1 to 32",
        ),
        ({"shapes": [{**SHAPE, "top_k": 33}]}, "shapes[0].top_k: 33 is not allowed; allowed: an integer from 1 to 32"),
        (
            {"shapes": [{**SHAPE, "num_experts": 16, "top_k": 17}]},
            "shapes[0].top_k: 17 is not allowed; allowed: an integer from 1 to 16 (num_experts)",
        ),
        ({"shapes": [{**SHAPE, "top_k": 0}]}, "shapes[0].top_k: 0 is not allowed"),
        ({"shapes": [{**SHAPE, "top_k": True}]}, "shapes[0].top_k: True is not allowed"),
        (
            {"shapes": [{**SHAPE, "num_experts": 1025}]},
            "shapes[0].num_experts: 1025 is not allowed; allowed: an integer",
        ),
        ({"shapes": [{**SHAPE, "hidden_size": 2048.0}]}, "shapes[0].hidden_size: 2048.0 is not allowed; allowed: an"),
        ({"shapes": [SHAPE, {**SHAPE, "intermediate_size": "1k"}]}, "shapes[1].intermediate_size: '1k' is not allowed"),
        ({"shapes": [{**SHAPE, "topk": 8}]}, "shapes[0].topk: unknown key (value 8); allowed: num_experts, top_k, "),
        ({"shapes": [{"num_experts": 4}]}, "shapes[0].top_k: missing; given: num_experts"),
        ({"dtypes": ["fp8"]}, "dtypes[0]: 'fp8' is not allowed; allowed: bfloat16, float16, float32"),
        ({"dtypes": "bfloat16"}, "dtypes: 'bfloat16' is not allowed; allowed: a list"),
        ({"dtypes": ["float16", "float16"]}, "dtypes[1]: 'float16' is not allowed; allowed: each item once"),
        ({"dtypes": [["float16"]]}, "dtypes[0]: ['float16'] is not allowed"),
        ({"quant": ["int3"]}, "quant[0]: 'int3' is not supported; allowed: none, fp8_w8a8, "),
        ({"quant": []}, "quant: () is not allowed"),
        ({"quant": ["none", 8]}, "quant[1]: 8 is not allowed; allowed: the name of a quant mode"),
        ({"quant": ["int4_w4a16:g48"]}, "quant[0]: 'int4_w4a16:g48' is not supported; int4_w4a16 has K groups of 32, "),
        ({"bias": 1}, "bias: 1 is not allowed; allowed: true or false"),
        ({"activation": "silux"}, "activation: 'silux' is unknown; allowed: silu, gelu"),
        ({"activation": 5}, "activation: 5 is not allowed; allowed: a name, or a mapping with name"),
        ({"activation": {"limit": 5}}, "activation: {'limit': 5} is not allowed"),
        ({"activation": {"name": "gelu", "limit": 5}}, "activation.limit: 5 is not a parameter of gelu"),
        ({"activation": "situ"}, "activation.beta: missing"),
        ({"parallel": [{"tp": 0}]}, "parallel[0].tp: 0 is not allowed; allowed: an integer of at least 1"),
        ({"parallel": [{"ep": None}]}, "parallel[0].ep: None is not allowed"),
        (
            {"parallel": [{}, {"tp": 5}]},
            "parallel[1].tp: 5 is not allowed; allowed: a divisor of shapes[0].intermediate",
        ),
        (
            {"parallel": [{"ep": 3}]},
            "parallel[0].ep: 3 is not allowed; allowed: a divisor of shapes[0].num_experts = 128",
        ),
        ({"parallel": [{}, {"tp": 1}]}, "allowed: each item once; this one repeats parallel[0]"),
        ({"paralel": []}, "paralel: unknown key (value []); allowed: name, shapes, dtypes"),
    ],
)
def test_refused_from_dict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        MoESpec.from_dict({**SPEC, **changes}, "moe.yaml")
    assert str(caught.value).startswith("moe.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "spec: None is not allowed; allowed: a mapping with name, shapes"),
        ([SPEC], "allowed: a mapping with name, shapes"),
        ({}, "spec: name: missing; given: nothing"),
        ({"name": "a"}, "spec: shapes: missing; given: name"),
        ({1: 2}, "spec: 1: unknown key"),
    ],
)
def test_refused_top_level(data: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        MoESpec.from_dict(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_experts": 129}, "local_experts: 129 is not allowed; allowed: an integer from 1 to 128 (num_experts)"),
        ({"dtype": "half"}, "dtype: 'half' is not allowed; allowed: bfloat16"),
        ({"quant": "int3"}, "quant: 'int3' is not supported"),
        ({"quant": ("none",)}, "quant: ('none',) is not allowed; allowed: the name of a quant mode"),
        ({"quant": "fp8_w8a8:128x0"}, "quant: 'fp8_w8a8:128x0' is not supported; allowed: a K group that is a power"),
        ({"activation": "silu"}, "activation: 'silu' is not allowed; allowed: an Activation"),
        ({"activation": Activation("swigluoai")}, "allowed: the result of Activation.of('swigluoai', ...)"),
        ({"activation": Activation("nope")}, "activation: 'nope' is unknown"),
        ({"bias": None}, "bias: None is not allowed"),
    ],
)
def test_refused_variant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        VariantSpec(**{**VARIANT, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({}, "e128_k8_h2048_i768_bf16_silu"),
        ({"dtype": "float16", "bias": True}, "e128_k8_h2048_i768_fp16_silu_bias"),
        ({"dtype": "float32", "local_experts": 32}, "e32of128_k8_h2048_i768_fp32_silu"),
        ({"activation": Activation.of("silu", limit=10)}, "e128_k8_h2048_i768_bf16_silu_limit10"),
        ({"quant": "fp8_w8a8:128x64"}, "e128_k8_h2048_i768_bf16_fp8_w8a8_128x64_silu"),
        ({"quant": "int4_w4a16", "bias": True}, "e128_k8_h2048_i768_bf16_int4_w4a16_g128_silu_bias"),
    ],
)
def test_variant_slug(changes: dict[str, Any], slug: str) -> None:
    assert VariantSpec(**{**VARIANT, **changes}).slug == slug


@pytest.mark.parametrize(("name", "gated", "rows"), [("silu", True, 1536), ("relu2_no_mul", False, 768)])
def test_weight_shapes(name: str, gated: bool, rows: int) -> None:
    variant = VariantSpec(**{**VARIANT, "local_experts": 16, "activation": Activation.of(name)})
    assert variant.gated is gated
    assert variant.w13_shape == (16, rows, 2048)
    assert variant.w2_shape == (16, 2048, 768)


def test_variants_are_the_product_in_order() -> None:
    spec = MoESpec(
        name="a.b-c_d",
        shapes=(Shape(**SHAPE), Shape(**{**SHAPE, "top_k": 4})),
        dtypes=("bfloat16", "float16"),
        parallel=(Parallel(), Parallel(tp=4), Parallel(ep=4)),
        activation=SWIGLUOAI,
        bias=True,
    )
    variants = spec.variants()
    assert spec.slug == "a_b_c_d"
    seen = [(v.top_k, v.local_experts, v.intermediate_size, v.dtype) for v in variants]
    assert seen == [
        (top_k, local, size, dtype)
        for top_k in (8, 4)
        for local, size in ((128, 768), (128, 192), (32, 768))
        for dtype in ("bfloat16", "float16")
    ]
    assert all(v.bias and v.activation == SWIGLUOAI and v.num_experts == 128 for v in variants)


def test_equal_shards_appear_once() -> None:
    half = Shape(**{**SHAPE, "intermediate_size": 384})
    spec = MoESpec(name="a", shapes=(Shape(**SHAPE), half), parallel=(Parallel(), Parallel(tp=2)))
    assert [variant.intermediate_size for variant in spec.variants()] == [768, 384, 192]


def test_load_spec(tmp_path: Path) -> None:
    path = tmp_path / "moe.yaml"
    path.write_text(
        "name: gpt-oss\n"
        "shapes: [{num_experts: 32, top_k: 4, hidden_size: 2880, intermediate_size: 2880}]\n"
        "activation: {name: swigluoai, alpha: 1.702, limit: 7.0}\n"
        "bias: true\n"
        "parallel: [{tp: 1, ep: 1}, {tp: 4}]\n",
        encoding="utf-8",
    )
    spec = load_spec(path)
    assert spec.activation == SWIGLUOAI
    assert spec.bias is True
    assert spec.parallel == (Parallel(), Parallel(tp=4))
    assert load_spec(str(path)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: a\nshapes: [\n", "moe.yaml:3: not valid YAML"),
        (b"name: a\n\tshapes: 1\n", "moe.yaml:2: not valid YAML"),
        (b"", "moe.yaml: None is not allowed; allowed: a mapping"),
        (b"- 1\n", "moe.yaml: [1] is not allowed; allowed: a mapping"),
        (b"name: a\nshapes: []\n", "moe.yaml: shapes: ()"),
        (b"\xff\xfe\x00", "moe.yaml: cannot be read"),
        (None, "moe.yaml: no such file"),
    ],
)
def test_load_spec_refuses(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "moe.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(tmp_path))
    assert message in str(caught.value)
