"""The whole layer in the interpreter, on memory that holds NaN, against the float64 oracle that reads the same bits."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.device import target_facts
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal
from moegen.spec import Parallel
from tests.support.packages import TOLERANCE, make_inputs, oracle, poisoned, relative_error, unnamed
from tests.support.staged import quantisations, staged_oracle
from tests.support.weights import SMALL_SCHEMES

Build = Callable[..., ModuleType]

# 8 of 16 experts are local: with top_k 2, one token takes the low-latency assignment and two do not. No tile of 32
# divides 40 or 72, nor do groups of 32 or 64.
SIZES: dict[str, int] = {"num_experts": 16, "top_k": 2, "hidden_size": 72, "intermediate_size": 40}
SHARD = (Parallel(ep=2),)
LONE, SOME = 1, 9
# Kernel against oracle, both with rounded activations: a sum that float32 and float64 round to different bf16 values
# may then land one 8-bit step apart.
ROUNDED_TWICE = 2e-2


def tiles_of(layer: Any, swap_ab: bool, block_k: int = 32, block_m: int = 16) -> LayerTiles:
    tile = TileConfig(block_m, 32, block_k, 2, swap_ab, num_warps=4, num_stages=2)
    for op in ("gemm1", "gemm2"):
        assert why_illegal(tile, layer.gemm(op), target_facts("cuda:90")) is None
    return LayerTiles(tile, tile)


def run(
    package: ModuleType,
    arguments: dict[str, Any],
    swap_ab: bool = False,
    block_k: int = 32,
    on_input: bool = False,
    block_m: int = 16,
    low_latency: bool | None = None,
) -> torch.Tensor:
    """One call of the package's own `run`, past its checks; `out` and everything between starts as NaN."""
    layer, x = package.LAYERS[0], arguments["hidden_states"]
    out = torch.full_like(x, float("nan"))
    weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
    routing = (arguments["topk_weights"], arguments["topk_ids"], arguments.get("expert_map"), on_input)
    package.runtime.quantise._TENSOR_PROGRAMS = 4  # of 512, which the interpreter would run one after another
    with poisoned():
        call = package.runtime.layer.Call(x, *weights, *routing, out)
        tiles = replace(tiles_of(layer, swap_ab, block_k, block_m), low_latency=low_latency)
        package.runtime.layer.run(layer, call, tiles)
    return out


def check(package: ModuleType, arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    layer = package.LAYERS[0]
    on_input = options.get("on_input", False)
    with quantisations(package) as seen:
        result = run(package, arguments, **options)
    if layer.scheme.row.activation is not None and not on_input:
        hidden, wanted, staged = staged_oracle(package, arguments, seen)
        for found, exact in ((hidden, wanted), (result, staged)):
            assert relative_error(found, exact) < TOLERANCE[layer.dtype]
    expected = oracle(layer, arguments, apply_router_weight_on_input=on_input)
    limit = TOLERANCE[layer.dtype] if layer.scheme.row.activation is None else ROUNDED_TWICE
    error = relative_error(result, expected)
    assert error < limit, f"{layer.slug} {list(arguments['hidden_states'].shape)} {options}: {error:.5f}"
    return result


# -------------------------------------------------------------------------------------------------------- unquantised


@pytest.mark.parametrize("swap_ab", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_tails_and_tiles(dtype: str, swap_ab: bool, build: Build) -> None:
    package = build(dtypes=(dtype,), parallel=SHARD, **SIZES)
    layer = package.LAYERS[0]
    assert package.runtime.layer.is_low_latency(layer, LONE, None)
    check(package, make_inputs(layer, LONE), swap_ab=swap_ab)
    check(package, make_inputs(layer, SOME, 1, padding=0.2), swap_ab=swap_ab, block_k=64)
    check(package, make_inputs(layer, SOME, 2, padding=0.2, mapped=True, padded_rows=5), swap_ab=swap_ab, block_k=16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tiles_that_divide_everything(dtype: str, build: Build) -> None:
    """Other branches of the kernels: no masks along K, no rows that wrap around."""
    package = build(dtypes=(dtype,), num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
    for tokens, swap_ab in ((LONE, False), (LONE, True), (SOME, False)):
        check(package, make_inputs(package.LAYERS[0], tokens), swap_ab=swap_ab)


@pytest.mark.parametrize("tokens", [LONE, SOME])
def test_the_tiles_choose_the_assignment(tokens: int, build: Build) -> None:
    """Whatever the rule says, but never against an expert_map."""
    package = build(parallel=SHARD, **SIZES)
    arguments = make_inputs(package.LAYERS[0], tokens, padding=0.2)
    aligned, low_latency = (check(package, arguments, low_latency=choice) for choice in (False, True))
    assert torch.equal(aligned, low_latency)
    key = package.runtime.layer.launch_key
    tiles = replace(tiles_of(package.LAYERS[0], False), low_latency=True)
    everyone = torch.arange(16, dtype=torch.int32)
    assert key(package.LAYERS[0], tokens, tiles, None)[-1] is None
    assert key(package.LAYERS[0], tokens, tiles, everyone)[-1] is not None
    check(package, make_inputs(package.LAYERS[0], tokens, mapped=True), low_latency=True)


# Every name, and those with a parameter that is off by default with it on, at values that the inputs reach.
KINDS: dict[str, str | Activation] = {name: name for name in ACTIVATIONS} | {
    "silu with limit": Activation.of("silu", limit=0.4),
    "situ with limit": Activation.of("situ", beta=0.5, limit=0.4),
    "swigluoai with parameters": Activation.of("swigluoai_uninterleave", alpha=1.702, beta=1.0, limit=0.4),
}


@pytest.mark.parametrize(
    ("kind", "bias"), [*((kind, number % 2 == 1) for number, kind in enumerate(KINDS)), ("silu", True)]
)
def test_activations(kind: str, bias: bool, build: Build) -> None:
    package = build(activation=KINDS[kind], bias=bias, **SIZES)
    layer = package.LAYERS[0]
    check(package, make_inputs(layer, LONE), swap_ab=True)
    check(package, make_inputs(layer, 5, 1, padding=0.2), swap_ab=False)


@pytest.mark.parametrize("bias", [False, True])
def test_weight_on_input(bias: bool, build: Build) -> None:
    package = build(**{**SIZES, "top_k": 1}, bias=bias)
    for tokens, swap_ab in ((LONE, False), (SOME, True)):
        arguments = make_inputs(package.LAYERS[0], tokens, 3)
        arguments["topk_weights"] = arguments["topk_weights"] * 0.3
        check(package, arguments, on_input=True, swap_ab=swap_ab)


def test_only_padding_and_remote_slots_give_zero(build: Build) -> None:
    package = build(parallel=SHARD, bias=True, **SIZES)
    layer = package.LAYERS[0]
    for tokens in (LONE, SOME):
        assert not run(package, make_inputs(layer, tokens, padding=1.0)).any()
        arguments = make_inputs(layer, tokens, mapped=True)
        arguments["expert_map"].fill_(-1)
        assert not run(package, arguments).any()


@pytest.mark.parametrize("skew", [{"hot_expert": 3}, {"empty_experts": (0, 1, 2, 3, 4, 7)}])
def test_uneven_routing(skew: dict[str, Any], build: Build) -> None:
    package = build(**{**SIZES, "num_experts": 8}, bias=True)
    check(package, make_inputs(package.LAYERS[0], 21, **skew))


@pytest.mark.parametrize(
    ("quant", "swap_ab"), [(quant, number % 2 == 1) for number, quant in enumerate(("none", *SMALL_SCHEMES))]
)
def test_low_latency_and_aligned_agree_bit_for_bit(quant: str, swap_ab: bool, build: Build) -> None:
    package = build(parallel=(Parallel(),), quant=(quant,), **SIZES)
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, 2, 4, padding=0.2)
    everyone = torch.arange(layer.num_experts, dtype=torch.int32)
    is_low_latency = package.runtime.layer.is_low_latency
    assert is_low_latency(layer, 2, None)
    assert not is_low_latency(layer, 2, everyone)
    low_latency = run(package, arguments, swap_ab)
    aligned = run(package, {**arguments, "expert_map": everyone}, swap_ab)
    assert torch.equal(low_latency, aligned)


# ---------------------------------------------------------------------------------------------------------- quantised

FORMS: dict[str, dict[str, Any]] = {
    "gated": {},
    "un-gated": {"activation": "relu2_no_mul"},
    "gpt-oss": {"activation": "swigluoai", "bias": True},
}


def deepest(quant: str) -> int:
    """A BLOCK_SIZE_K of several groups where weights are decoded in registers; block schemes scale at every step."""
    return 32 if "x32" in quant else 64


# Each scheme gated, and in one of the other two forms.
OTHER_FORMS = [(quant, list(FORMS)[1 + number % 2]) for number, quant in enumerate(SMALL_SCHEMES)]


@pytest.mark.parametrize(("quant", "form"), [*((quant, "gated") for quant in SMALL_SCHEMES), *OTHER_FORMS])
def test_quantised(quant: str, form: str, build: Build) -> None:
    """One token, then several with padding slots on a shard with an expert_map, each with and without SWAP_AB."""
    package = build(parallel=SHARD, quant=(quant,), **FORMS[form], **SIZES)
    layer = package.LAYERS[0]
    for swap_ab in (False, True):
        check(package, make_inputs(layer, LONE, 5), swap_ab=swap_ab)
        options = {"padding": 0.2, "mapped": True, "padded_rows": 16 * swap_ab}
        arguments = make_inputs(layer, SOME, 6 + swap_ab, float32_scale=swap_ab, **options)
        check(package, arguments, swap_ab=swap_ab, block_k=deepest(quant) if swap_ab else 32)


OTHER_TYPES = ("int4_w4a16:g32z", "int8_w8a16:channel", "nvfp4_w4a16", "fp8_w8a8:32x32", "mxfp4_w4a8")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("quant", OTHER_TYPES)
def test_quantised_with_other_types(quant: str, dtype: str, build: Build) -> None:
    package = build(quant=(quant,), dtypes=(dtype,), **SIZES)
    check(package, make_inputs(package.LAYERS[0], 4, 7, padding=0.2))


@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "int8_w8a8:tensor"])
@pytest.mark.parametrize("tokens", [LONE, SOME])
def test_static_scales(quant: str, tokens: int, build: Build) -> None:
    package = build(quant=(quant,), parallel=SHARD, **SIZES)
    layer = package.LAYERS[0]
    largest = 127 if quant.startswith("int8") else 448
    arguments = make_inputs(layer, tokens, 8, padding=0.2)
    arguments |= {"w13_input_scale": torch.tensor([1.2 / largest]), "w2_input_scale": torch.tensor([2.5 / largest])}
    check(package, arguments)


@pytest.mark.parametrize("quant", ["fp8_w8a8:32x32", "int4_w4a16:g64z", "mxfp4_w4a16"])
def test_sizes_that_divide(quant: str, build: Build) -> None:
    package = build(quant=(quant,), num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)
    for tokens in (LONE, SOME):
        check(package, make_inputs(package.LAYERS[0], tokens))


@pytest.mark.parametrize("quant", ["none", "fp8_w8a8:32x32", "int4_w4a16:g32z"])
def test_blocks_of_eight_tokens(quant: str, build: Build) -> None:
    package = build(parallel=SHARD, quant=(quant,), **SIZES)
    for tokens in (LONE, SOME):
        check(package, make_inputs(package.LAYERS[0], tokens, 11, padding=0.2), swap_ab=True, block_m=8)


@pytest.mark.parametrize("quant", ["int8_w8a8:channel", "int4_w4a16:g32z"])
def test_quantised_weight_on_input(quant: str, build: Build) -> None:
    package = build(**{**SIZES, "top_k": 1}, quant=(quant,), bias=True)
    arguments = make_inputs(package.LAYERS[0], SOME, 9)
    arguments["topk_weights"] = arguments["topk_weights"] * 0.3
    check(package, arguments, on_input=True)


@pytest.mark.parametrize("quant", ["int4_w4a16:g32z", "mxfp4_w4a16", "nvfp4_w4a16", "int8_w8a16:g32"])
def test_odd_sizes(quant: str, build: Build) -> None:
    """An odd number of values along K and of rows: half a byte is left over in both packings."""
    sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 71, "intermediate_size": 37}
    package = build(quant=(quant,), activation="relu2_no_mul", **sizes)
    for swap_ab in (False, True):
        check(package, make_inputs(package.LAYERS[0], 3, 10), swap_ab=swap_ab)
