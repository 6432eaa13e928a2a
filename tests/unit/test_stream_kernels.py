"""What the kernels of the family "stream" compute, run as Python (tests/support/gluon.py), against the reference."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from moegen.runtime.layer import Call
from moegen.runtime.quant import Scheme
from moegen.runtime.reference import apply_activation
from moegen.runtime.stream import stream_sizes
from moegen.runtime.stream_sizes import StreamSizes
from moegen.runtime.tile import TileConfig, why_illegal
from moegen.runtime.weight import Weight, round_activations
from moegen.spec import Parallel
from tests.support.gluon import quantise_as_python, run_as_python
from tests.support.packages import make_inputs, oracle, relative_error

H200 = TARGETS["cuda:90"]
SHARD = (Parallel(ep=2),)
SMALL = {"num_experts": 6, "top_k": 3, "hidden_size": 640, "intermediate_size": 272}
LOW = TileConfig(1, 16, 512, PDL=True, num_warps=4, num_stages=6, family="stream")
HIGH = TileConfig(1, 32, 256, PDL=True, num_warps=8, num_stages=6, family="stream")
DEEP = TileConfig(1, 16, 1024, PDL=True, num_warps=8, num_stages=4, family="stream")
CASES: dict[str, tuple[dict[str, Any], TileConfig]] = {
    "16 bit, low": ({}, LOW),
    "16 bit, high, bias": ({"bias": True}, HIGH),
    "16 bit, interleaved": ({"activation": "swigluoai", "bias": True, "dtypes": ("float16",)}, LOW),
    "16 bit, not gated": ({"activation": "relu2_no_mul"}, LOW),
    "16 bit, tails": ({"hidden_size": 328, "intermediate_size": 136}, LOW),
    "16 bit, shard": ({"parallel": SHARD}, LOW),
    "fp8, low": ({"quant": ("fp8_w8a8:128x128",)}, LOW),
    "fp8, high, bias": ({"quant": ("fp8_w8a8:128x128",), "intermediate_size": 320, "bias": True}, HIGH),
    "fp8, deep": ({"quant": ("fp8_w8a8:128x128",)}, DEEP),
    "fp8, ue8m0": ({"quant": ("fp8_w8a8:128x128ue8m0",)}, LOW),
    "fp8, interleaved": ({"quant": ("fp8_w8a8:128x128",), "activation": "swigluoai", "bias": True}, LOW),
    "fp8, not gated": ({"quant": ("fp8_w8a8:128x128",), "activation": "relu2_no_mul"}, DEEP),
    "fp8, many tiles": ({"quant": ("fp8_w8a8:128x128",), "hidden_size": 2304, "intermediate_size": 1152}, LOW),
    "fp8, shard": ({"quant": ("fp8_w8a8:128x128",), "parallel": SHARD}, LOW),
    "int8": ({"quant": ("int8_w8a8:128x128",), "bias": True}, LOW),
    "fp8 channel, low": ({"quant": ("fp8_w8a8:channel",), "bias": True}, LOW),
    "fp8 channel, high": ({"quant": ("fp8_w8a8:channel",)}, HIGH),
    "fp8 channel, tails, interleaved": (
        {"quant": ("fp8_w8a8:channel",), "hidden_size": 592, "intermediate_size": 144, "activation": "swigluoai"},
        HIGH,
    ),
    "fp8 channel, segments of x": (
        {"quant": ("fp8_w8a8:channel",), "hidden_size": 4736, "intermediate_size": 144},
        LOW,
    ),
    "fp8 channel, segments of hidden": (
        {"quant": ("fp8_w8a8:channel",), "hidden_size": 144, "intermediate_size": 1680},
        LOW,
    ),
    "fp8 channel, shard": ({"quant": ("fp8_w8a8:channel",), "parallel": SHARD}, LOW),
    "fp8 tensor": ({"quant": ("fp8_w8a8:tensor",), "activation": "relu2_no_mul"}, LOW),
    "fp8 tensor, segments of hidden": (
        {"quant": ("fp8_w8a8:tensor",), "hidden_size": 144, "intermediate_size": 1680},
        LOW,
    ),
    "fp8 tensor, shard": ({"quant": ("fp8_w8a8:tensor",), "parallel": SHARD}, HIGH),
    "fp8 tensor_token": ({"quant": ("fp8_w8a8:tensor_token",), "bias": True}, DEEP),
    "int8 channel": ({"quant": ("int8_w8a8:channel",), "bias": True}, LOW),
    "int8 tensor": ({"quant": ("int8_w8a8:tensor",)}, HIGH),
}


def run(
    package: ModuleType, arguments: dict[str, Any], tile: TileConfig, on_input: bool = False
) -> tuple[torch.Tensor, StreamSizes]:
    layer, x = package.LAYERS[0], arguments["hidden_states"]
    for op in ("gemm1", "gemm2"):
        assert why_illegal(tile, layer.gemm(op), H200) is None
    weights = [Weight.of(name, arguments[name], arguments) for name in ("w13", "w2")]
    routing = (arguments["topk_weights"], arguments["topk_ids"], arguments.get("expert_map"), on_input)
    sizes = stream_sizes(layer, tile, x.shape[0], on_input)

    def activation(*sides: torch.Tensor) -> torch.Tensor:
        together = torch.stack(sides, -1).flatten(-2) if layer.activation.interleaved else torch.cat(sides, -1)
        return apply_activation(together, layer.activation)

    return run_as_python(sizes, Call(x, *weights, *routing, torch.full_like(x, float("nan"))), activation), sizes


def check(
    package: ModuleType,
    arguments: dict[str, Any],
    tile: TileConfig,
    on_input: bool = False,
    weights: torch.Tensor | None = None,
) -> None:
    """weights: of the router, as the kernel gets them."""
    layer = package.LAYERS[0]
    own = arguments if weights is None else {**arguments, "topk_weights": weights}
    got, _ = run(package, own, tile, on_input)
    want = oracle(layer, arguments, apply_router_weight_on_input=on_input)
    # Both round `hidden` to 8 bits, where sums that differ in their order may fall to either side.
    assert relative_error(got, want) < (5e-3 if layer.quant == "none" else 2e-2)


@pytest.mark.parametrize("case", CASES)
def test_one_token(case: str, build: Callable[..., ModuleType]) -> None:
    fields, tile = CASES[case]
    package = build(**{**SMALL, **fields})
    layer = package.LAYERS[0]
    check(package, make_inputs(layer, 1), tile)
    if "shard" in case:
        check(package, make_inputs(layer, 1, 1, mapped=True), tile)
        check(package, make_inputs(layer, 1, 2, mapped=True, padding=0.3), tile)


@pytest.mark.parametrize(
    ("tokens", "case"),
    [
        (2, "16 bit, tails"),
        (3, "16 bit, shard"),
        (5, "16 bit, high, bias"),
        (2, "fp8, low"),
        (3, "fp8, deep"),
        (4, "fp8, shard"),
        (5, "fp8, high, bias"),
        (2, "fp8 channel, tails, interleaved"),
        (3, "fp8 tensor"),
        (5, "int8 channel"),
    ],
)
def test_tokens(tokens: int, case: str, build: Callable[..., ModuleType]) -> None:
    fields, tile = CASES[case]
    package = build(**{**SMALL, **fields})
    layer = package.LAYERS[0]
    tile = replace(tile, BLOCK_SIZE_M=4 if tokens > 2 else 2)
    for mapped in (False, True) if "shard" in case else (False,):
        arguments = make_inputs(layer, tokens, 6, mapped=mapped, padding=0.2)
        wide = torch.full((tokens, layer.hidden_size + 24), float("nan"), dtype=layer.dtype)
        wide[:, :-24] = arguments["hidden_states"]  # rows apart, as the dispatcher may get them
        check(package, {**arguments, "hidden_states": wide[:, :-24]}, tile)


@pytest.mark.parametrize("quant", ["none", "fp8_w8a8:128x128", "fp8_w8a8:channel", "int8_w8a8:tensor"])
def test_padding_and_repeats(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(**SMALL, quant=(quant,), bias=True)
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, 1, 3, padded_rows=16)
    for ids in ([[-1, 2, 4]], [[5, -1, 5]], [[6, 100, 3]]):
        weights = torch.where(torch.tensor(ids) < 0, torch.nan, arguments["topk_weights"])  # of padding do not count
        check(package, {**arguments, "topk_ids": torch.tensor(ids)}, LOW, weights=weights)
    got, _ = run(package, {**arguments, "topk_ids": torch.full((1, 3), -1)}, LOW)
    assert not got.any()
    unread = {name: value[:0] for name, value in arguments.items() if name.endswith(("_scale", "_bias"))}
    got, _ = run(package, {**arguments, **unread, "topk_ids": torch.full((1, 3), -1)}, LOW)
    assert not got.any()  # as warm-up does it, whose weights have no memory


@pytest.mark.parametrize("static", [("w13_input_scale",), ("w2_input_scale",), ("w13_input_scale", "w2_input_scale")])
@pytest.mark.parametrize("quant", ["fp8_w8a8:tensor", "int8_w8a8:tensor"])
def test_static_scales(quant: str, static: tuple[str, ...], build: Callable[..., ModuleType]) -> None:
    package = build(**SMALL, quant=(quant,))
    scale = torch.tensor([1.5 / (127 if "int8" in quant else 448)])  # smaller than the dynamic one: some are clamped
    check(package, make_inputs(package.LAYERS[0], 1, 5) | dict.fromkeys(static, scale), LOW)


def rounded(x: torch.Tensor, scheme: Scheme, dtype: torch.dtype, static: torch.Tensor | None) -> torch.Tensor:
    if scheme.kind == "tensor" and static is None:  # docs/modes.md
        static = (x.abs().max() / (127 if dtype == torch.int8 else 448)).clamp(min=1e-10)
    return round_activations(x, scheme, dtype, static)


@pytest.mark.parametrize("intermediate_size", [272, 6160])  # all slots in one segment, and in several
@pytest.mark.parametrize(
    ("quant", "static"),
    [
        *[(f"fp8_w8a8:{kind}", None) for kind in ("128x128", "128x128ue8m0", "channel", "tensor", "tensor_token")],
        *[(f"int8_w8a8:{kind}", None) for kind in ("128x128", "channel", "tensor")],
        *[(f"{mode}:tensor", torch.tensor([0.03])) for mode in ("fp8_w8a8", "int8_w8a8")],
    ],
)
def test_activations_are_those_of_the_quantiser(
    quant: str, static: torch.Tensor | None, intermediate_size: int, build: Callable[..., ModuleType]
) -> None:
    package = build(**{**SMALL, "intermediate_size": intermediate_size}, quant=(quant,))
    sizes, scheme = stream_sizes(package.LAYERS[0], LOW, 1, False), Scheme.parse(quant)
    dtype, g = torch.int8 if "int8" in quant else torch.float8_e4m3fn, torch.Generator().manual_seed(1)
    ids, live = torch.tensor([4, -1, 1]), [0, 2]
    for size in (1.0, 1e-9):  # the latter is below the least steps
        x = torch.randn(1, sizes.hidden_size, generator=g) * size
        assert torch.equal(quantise_as_python(sizes, dtype, x, static), rounded(x, scheme, dtype, static))
        hidden = torch.randn(3, intermediate_size, generator=g) * torch.tensor([[0.1], [1e30], [3.0]]) * size
        got = quantise_as_python(sizes, dtype, hidden, static, ids)
        assert torch.equal(got[live], rounded(hidden[live], scheme, dtype, static))


@pytest.mark.parametrize("quant", ["none", "fp8_w8a8:128x128", "int8_w8a8:channel"])
def test_weight_on_input(quant: str, build: Callable[..., ModuleType]) -> None:
    package = build(**{**SMALL, "top_k": 1}, quant=(quant,), bias=True)
    arguments = make_inputs(package.LAYERS[0], 1, 4)
    arguments["topk_weights"] = arguments["topk_weights"] * 0.3
    check(package, arguments, LOW, on_input=True)
