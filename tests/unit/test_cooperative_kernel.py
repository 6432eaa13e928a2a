"""What the kernel of the family "cooperative" computes, as Python (tests/support/gluon_gemm.py), against the oracle."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from moegen.runtime import cooperative
from moegen.runtime.layer import Call
from moegen.runtime.quantise import Activations, Slots
from moegen.runtime.reference import apply_activation
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal_pair
from moegen.runtime.weight import Weight
from moegen.spec import Parallel
from tests.support.align_model import align_vectorised, first_rows_of
from tests.support.gluon_gemm import PROGRAMS, PythonKernels
from tests.support.packages import TOLERANCE, make_inputs, oracle, relative_error

WIDE = TileConfig(128, 256, 128, 2, PDL=True, num_warps=8, num_stages=4, family="cooperative")
NARROW = replace(WIDE, BLOCK_SIZE_N=128, num_stages=5)
SHORT = replace(WIDE, num_stages=3)
LOW = replace(WIDE, BLOCK_SIZE_M=64, num_stages=5)
FLAT = replace(LOW, num_stages=4)
SWAPPED = replace(WIDE, BLOCK_SIZE_M=16, SWAP_AB=True, num_stages=5)
PAIRS = {
    "low": LayerTiles(LOW, FLAT),
    "wide": LayerTiles(WIDE, WIDE),
    "narrow": LayerTiles(NARROW, NARROW),
    "both": LayerTiles(NARROW, WIDE),
    "short": LayerTiles(SHORT, SHORT),
    "flat": LayerTiles(FLAT, FLAT),
    "low, narrow": LayerTiles(replace(LOW, BLOCK_SIZE_N=128), FLAT),
    "swapped": LayerTiles(SWAPPED, SWAPPED),
    "swapped, 32": LayerTiles(*[replace(SWAPPED, BLOCK_SIZE_M=32, num_stages=4)] * 2),
    "swapped, narrow": LayerTiles(replace(SWAPPED, BLOCK_SIZE_N=128), SWAPPED),
}
QUANTS = BLOCKS, _, _ = ("fp8_w8a8:128x128", "fp8_w8a8:channel", "none")
FP8 = {"quant": (BLOCKS,)}


def deep(pair: LayerTiles) -> LayerTiles:
    """The same for 16-bit values."""
    return LayerTiles(replace(pair.gemm1, BLOCK_SIZE_K=64), replace(pair.gemm2, BLOCK_SIZE_K=64))


SIZES = {"num_experts": 5, "top_k": 2, "hidden_size": 400, "intermediate_size": 384}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "wide": (FP8, "wide"),
    "narrow": (FP8, "narrow"),
    "short": (FP8, "short"),
    "low, joined": (FP8, "flat"),
    "both": (FP8, "both"),
    "one step": ({**FP8, "hidden_size": 48, "intermediate_size": 128}, "wide"),
    "bias": ({**FP8, "bias": True, "dtypes": ("float16",)}, "wide"),
    "narrow, bias": ({**FP8, "bias": True}, "narrow"),
    "not gated": ({**FP8, "activation": "relu2_no_mul", "bias": True, "intermediate_size": 400}, "wide"),
    "narrow, not gated": ({**FP8, "activation": "relu2_no_mul", "intermediate_size": 400}, "narrow"),
    "low": (FP8, "low"),
    "low, bias": ({**FP8, "bias": True, "hidden_size": 720}, "low"),
    "low, not gated": ({**FP8, "activation": "relu2_no_mul", "bias": True, "intermediate_size": 400}, "low"),
    "low, int8, shard": ({"quant": ("int8_w8a8:128x128",), "num_experts": 6, "parallel": (Parallel(ep=2),)}, "low"),
    "swapped": (FP8, "swapped"),
    "swapped, 32, bias": ({**FP8, "bias": True, "hidden_size": 720}, "swapped, 32"),
    "swapped, not gated": ({**FP8, "activation": "relu2_no_mul", "bias": True, "intermediate_size": 400}, "swapped"),
    "swapped, narrow": (FP8, "swapped, narrow"),
    "swapped, int8, shard": (
        {"quant": ("int8_w8a8:128x128",), "num_experts": 6, "parallel": (Parallel(ep=2),)},
        "swapped",
    ),
    "ue8m0": ({"quant": ("fp8_w8a8:128x128ue8m0",)}, "wide"),
    "int8": ({"quant": ("int8_w8a8:128x128",)}, "wide"),
    "shard": ({**FP8, "num_experts": 6, "parallel": (Parallel(ep=2),)}, "wide"),
    "channel": ({"quant": ("fp8_w8a8:channel",), "intermediate_size": 336, "bias": True}, "wide"),
    "channel, low": ({"quant": ("fp8_w8a8:channel",)}, "low, narrow"),
    "channel, swapped": ({"quant": ("fp8_w8a8:channel",), "intermediate_size": 336, "bias": True}, "swapped, narrow"),
    "int8 channel, swapped": ({"quant": ("int8_w8a8:channel",), "activation": "relu2_no_mul"}, "swapped, 32"),
    "tensor": ({"quant": ("fp8_w8a8:tensor",), "dtypes": ("float16",)}, "both"),
    "tensor, token": ({"quant": ("fp8_w8a8:tensor_token",), "activation": "relu2_no_mul"}, "wide"),
    "int8 channel": ({"quant": ("int8_w8a8:channel",), "intermediate_size": 336}, "wide"),
    "int8 channel, not gated": ({"quant": ("int8_w8a8:channel",), "activation": "relu2_no_mul"}, "both"),
    "int8 tensor, shard": ({"quant": ("int8_w8a8:tensor",), "num_experts": 6, "parallel": (Parallel(ep=2),)}, "narrow"),
    **{f"16 bits, {pair}": ({"intermediate_size": 344}, pair) for pair in PAIRS if pair != "short"},
    "16 bits, bias": ({"dtypes": ("float16",), "bias": True, "hidden_size": 328}, "wide"),
    "16 bits, not gated": ({"activation": "relu2_no_mul", "bias": True, "intermediate_size": 88}, "wide"),
    "16 bits, low, not gated": ({"activation": "relu2_no_mul", "intermediate_size": 344}, "low, narrow"),
    "16 bits, one step": ({"hidden_size": 48, "intermediate_size": 8}, "both"),
    "16 bits, shard": ({"num_experts": 6, "parallel": (Parallel(ep=2),)}, "wide"),
}


def quantise(
    x: torch.Tensor,
    scheme: Any,
    dtype: torch.dtype,
    _static: object,
    live: Slots | None = None,
    *_: object,
    **__: object,
) -> Activations:
    """runtime/quantise.py in torch."""
    if not scheme.kind:
        return Activations(x, None)
    if live is not None:
        assert live.num_live is not None
        x = torch.where((torch.arange(x.shape[0]) < live.num_live)[:, None], x, 0.0)
    largest = 127.0 if dtype == torch.int8 else 448.0
    group = scheme.group_k or x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    step = groups.abs().amax(2).clamp_min(1e-10) / largest
    if scheme.kind == "tensor":
        step = step.max().view(1, 1)
    step = torch.exp2(torch.ceil(torch.log2(step))) if scheme.ue8m0 else step
    scaled = (groups / step[..., None]).flatten(1)[:, : x.shape[1]].clamp(-largest, largest)
    return Activations(((scaled + 0.5).floor() if dtype == torch.int8 else scaled).to(dtype).contiguous(), step)


def reduce(
    slots: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor, experts: int, expert_map: Any, *_: Any
) -> None:
    """runtime/reduce.py in torch."""
    known = (topk_ids >= 0) & (topk_ids < experts)
    live = known if expert_map is None else known & (expert_map[topk_ids.clamp(0, experts - 1).long()] >= 0)
    values = slots.float().view(*topk_ids.shape, -1)
    out.copy_(torch.where(live[..., None], values, 0.0).sum(1))


def run(
    package: ModuleType,
    arguments: dict[str, Any],
    tiles: LayerTiles,
    monkeypatch: pytest.MonkeyPatch,
    on_input: bool = False,
    at_once: int = PROGRAMS,
) -> torch.Tensor:
    layer, x = package.LAYERS[0], arguments["hidden_states"]
    if layer.gemm("gemm1").a_bits == 16:
        tiles = deep(tiles)
    assert why_illegal_pair(tiles, layer.gemm("gemm1"), layer.gemm("gemm2"), TARGETS["cuda:90"]) is None

    def activation(*sides: torch.Tensor) -> torch.Tensor:
        return apply_activation(torch.cat(sides, -1), layer.activation)

    monkeypatch.setattr(cooperative, "_kernel", PythonKernels(activation, at_once).kernel)
    monkeypatch.setattr(cooperative, "multiprocessors", lambda _: PROGRAMS)
    monkeypatch.setattr(cooperative, "quantise", quantise)
    monkeypatch.setattr(cooperative, "top_k_reduce", reduce)
    weights = [Weight.of(name, arguments[name], arguments) for name in ("w13", "w2")]
    expert_map = arguments.get("expert_map")
    call = Call(x, *weights, arguments["topk_weights"], arguments["topk_ids"], expert_map, on_input,
                torch.full_like(x, float("nan")))  # fmt: skip
    experts = layer.local_experts if expert_map is None else layer.num_experts
    block = tiles.gemm1.BLOCK_SIZE_M
    assignment = align_vectorised(call.topk_ids, block, experts, expert_map, True, True)
    counters = torch.zeros(2 + assignment.expert_ids.numel(), dtype=torch.int32)
    first_rows = first_rows_of(assignment, block, call.topk_ids.numel())
    cooperative.run_cooperative(layer, call, tiles, (*assignment, first_rows), counters, experts, room=None)
    return call.out


@pytest.mark.parametrize("case", CASES)
def test_layers(case: str, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    fields, pair = CASES[case]
    package = build(**{**SIZES, **fields})
    options = {"mapped": True, "padding": 0.1} if "shard" in case else {"padding": 0.1, "padded_rows": 16}
    arguments = make_inputs(package.LAYERS[0], 50 if "swapped" in pair else 150, **options)
    error = relative_error(run(package, arguments, PAIRS[pair], monkeypatch), oracle(package.LAYERS[0], arguments))
    # Both round `hidden` to 8 bits, where sums that differ in their order may part.
    assert error < (2e-2 if "quant" in fields else TOLERANCE[package.LAYERS[0].dtype]), error


@pytest.mark.parametrize(
    ("quant", "pair"),
    [(quant, pair) for quant in QUANTS for pair in ("low", "wide", "narrow", "both", "flat", "swapped")],
)
def test_weight_on_input(
    quant: str, pair: str, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = build(**{**SIZES, "quant": (quant,), "top_k": 1, "bias": True})
    arguments = make_inputs(package.LAYERS[0], 60, 1)
    arguments["topk_weights"] = arguments["topk_weights"] * 0.3
    wanted = oracle(package.LAYERS[0], arguments, apply_router_weight_on_input=True)
    assert relative_error(run(package, arguments, PAIRS[pair], monkeypatch, on_input=True), wanted) < 2e-2


@pytest.mark.parametrize("quant", [BLOCKS, "none"])
def test_no_program_needs_another_one_to_run(
    quant: str, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of two streams may share the GPU: what waits for gemm1's rows may not wait for a program to begin."""
    package = build(**{**SIZES, "quant": (quant,)})
    arguments = make_inputs(package.LAYERS[0], 150)
    assert torch.equal(*(run(package, arguments, PAIRS["wide"], monkeypatch, at_once=count) for count in (1, PROGRAMS)))


def test_nothing_to_compute(build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    package = build(**SIZES, **FP8)
    arguments = make_inputs(package.LAYERS[0], 20, padding=1.0)
    assert not run(package, arguments, PAIRS["wide"], monkeypatch).any()


def test_quantised_in_the_kernel_or_by_a_launch(
    build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide tiles quantise `hidden` themselves, to the same values."""
    package = build(**SIZES, **FP8)
    arguments = make_inputs(package.LAYERS[0], 100, 2)
    wide, *others = (run(package, arguments, PAIRS[pair], monkeypatch) for pair in ("wide", "narrow", "low", "swapped"))
    assert all(torch.equal(other, wide) for other in others)
