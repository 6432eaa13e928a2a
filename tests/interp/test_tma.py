"""The family "tma" in the interpreter, which interprets descriptors too; memory holds NaN, the oracle is in float64."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.device import target_facts
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal
from moegen.spec import Parallel
from tests.support.packages import make_inputs, oracle, poisoned, relative_error, unnamed

Build = Callable[..., ModuleType]

# 8 of 16 experts are local. No tile of 32 divides 80 or 48, nor do groups of 32; TMA wants rows of 16 bytes.
SIZES: dict[str, int] = {"num_experts": 16, "top_k": 2, "hidden_size": 80, "intermediate_size": 48}
DIVISIBLE: dict[str, int] = {"num_experts": 8, "top_k": 2, "hidden_size": 128, "intermediate_size": 64}
SHARD = (Parallel(ep=2),)
ROUNDED_TWICE = 2e-2  # see test_layer.py
TENSOR_WIDE = ("fp8_w8a8:tensor", "int8_w8a8:tensor")
BY_ROW = ("fp8_w8a8:tensor_token", "fp8_w8a8:channel", "int8_w8a8:channel")
BLOCKS = ("fp8_w8a8:32x32", "fp8_w8a8:32x32ue8m0", "int8_w8a8:32x32")
TILE = TileConfig(16, 64, 32, 2, num_warps=4, num_stages=2, family="tma")
PORTABLE = replace(TILE, family="portable", BLOCK_SIZE_N=32)


def run(package: ModuleType, arguments: dict[str, Any], tiles: LayerTiles, on_input: bool = False) -> torch.Tensor:
    """One call of the package's own `run`, past its checks; `out` and everything between starts as NaN."""
    layer, x = package.LAYERS[0], arguments["hidden_states"]
    for op in ("gemm1", "gemm2"):
        assert why_illegal(getattr(tiles, op), layer.gemm(op), target_facts("cuda:90")) is None
    out = torch.full_like(x, float("nan"))
    weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
    routing = (arguments["topk_weights"], arguments["topk_ids"], arguments.get("expert_map"), on_input)
    package.runtime.quantise._TENSOR_PROGRAMS = 4  # of 512, which the interpreter would run one after another
    with poisoned():
        package.runtime.layer.run(layer, package.runtime.layer.Call(x, *weights, *routing, out), tiles)
    return out


def check(
    package: ModuleType,
    arguments: dict[str, Any],
    tile: TileConfig = TILE,
    second: TileConfig | None = None,
    **on: bool,
) -> torch.Tensor:
    result = run(package, arguments, LayerTiles(tile, second or tile), **on)
    expected = oracle(package.LAYERS[0], arguments, apply_router_weight_on_input=on.get("on_input", False))
    assert relative_error(result, expected) < ROUNDED_TWICE
    return result


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("quant", [*TENSOR_WIDE, *BY_ROW])
def test_scaled_after_the_loop(quant: str, activation: str, build: Build) -> None:
    """Packed, interleaved and un-gated rows, with tails, padding slots, an expert_map, padded weight rows, biases."""
    package = build(quant=(quant,), activation=activation, bias=activation != "silu", parallel=SHARD, **SIZES)
    layer = package.LAYERS[0]
    check(package, make_inputs(layer, 21, padding=0.2))
    arguments = make_inputs(layer, 40, 1, padding=0.2, mapped=True, padded_rows=16)
    check(package, arguments, replace(TILE, BLOCK_SIZE_N=32), replace(TILE, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64))


@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
@pytest.mark.parametrize("quant", BLOCKS)
def test_block_scales(quant: str, activation: str, build: Build) -> None:
    """gemm1 writes quantised values; gemm2 with one and with two products a step."""
    package = build(quant=(quant,), activation=activation, **{**SIZES, "intermediate_size": 96})
    layer = package.LAYERS[0]
    first = check(package, make_inputs(layer, 30, 2, padding=0.2))
    second = check(package, make_inputs(layer, 30, 2, padding=0.2), second=replace(TILE, BLOCK_SIZE_N=32))
    assert torch.equal(first, second)


@pytest.mark.parametrize("quant", ["fp8_w8a8:channel", "fp8_w8a8:32x32"])
def test_sizes_that_divide_and_one_hot_expert(quant: str, build: Build) -> None:
    package = build(quant=(quant,), **DIVISIBLE)
    layer = package.LAYERS[0]
    check(package, make_inputs(layer, 33, hot_expert=3))
    check(package, make_inputs(layer, 33, empty_experts=(0, 1, 2, 4, 7)))
    assert not run(package, make_inputs(layer, 9, padding=1.0), LayerTiles(TILE, TILE)).any()


@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "fp8_w8a8:channel", "fp8_w8a8:32x32ue8m0", "int8_w8a8:32x32"])
def test_same_bits_as_the_portable_family(quant: str, build: Build) -> None:
    """The products are the same, and gemm1 quantises the intermediate to the bits that a kernel of its own makes."""
    package = build(quant=(quant,), **DIVISIBLE)
    arguments = make_inputs(package.LAYERS[0], 25, 3, padding=0.2)
    by_tma = run(package, arguments, LayerTiles(TILE, TILE))
    assert torch.equal(by_tma, run(package, arguments, LayerTiles(PORTABLE, PORTABLE)))


@pytest.mark.parametrize("quant", ["int8_w8a8:channel", "fp8_w8a8:32x32"])
def test_weight_on_input(quant: str, build: Build) -> None:
    package = build(quant=(quant,), bias=True, **{**DIVISIBLE, "top_k": 1})
    arguments = make_inputs(package.LAYERS[0], 20, 4)
    arguments["topk_weights"] = arguments["topk_weights"] * 0.3
    check(package, arguments, on_input=True)


def test_expert_map_beyond_the_local_experts(build: Build) -> None:
    package = build(quant=("fp8_w8a8:32x32",), parallel=SHARD, **{**DIVISIBLE, "num_experts": 16})
    arguments = make_inputs(package.LAYERS[0], 30, 5, mapped=True)
    arguments["expert_map"][arguments["expert_map"] < 0] = 9
    check(package, arguments)


def test_other_types_of_a_layer(build: Build) -> None:
    for dtype in ("float16", "float32"):
        package = build(quant=("fp8_w8a8:32x32",), dtypes=(dtype,), **DIVISIBLE)
        check(package, make_inputs(package.LAYERS[0], 12, 6))
