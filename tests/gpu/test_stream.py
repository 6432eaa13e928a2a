"""The family "stream" on a GPU of compute capability 9.0: numerics, repeated and concurrent runs, graphs, fallbacks."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.device import device_facts
from moegen.runtime.reference import moe_reference
from moegen.runtime.tile import TileConfig
from moegen.spec import Parallel
from tests.compile.stream_sweep import (
    BLOCK,
    CHANNEL,
    DEEP_8,
    HIGH,
    HIGH_8,
    LOW,
    LOW_8,
    LOWEST,
    WIDE_8,
    package_with_record,
)
from tests.support.packages import TOLERANCE, by_portable, make_inputs, oracle, relative_error, spec_of

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]

CASES: dict[str, tuple[dict[str, Any], TileConfig]] = {
    "plain": ({"num_experts": 32, "hidden_size": 2048, "intermediate_size": 768}, LOW),
    "many slots": ({"num_experts": 64, "top_k": 10, "hidden_size": 2048, "intermediate_size": 512}, LOW),
    "flat": ({"hidden_size": 7168, "intermediate_size": 256}, HIGH),
    "tails": ({"hidden_size": 2880, "intermediate_size": 2880, "activation": "swigluoai", "bias": True}, LOW),
    "smaller than a tile": ({"hidden_size": 136, "intermediate_size": 24, "bias": True}, HIGH),
    "not gated": ({"hidden_size": 1408, "intermediate_size": 360, "activation": "relu2_no_mul"}, LOW),
    "float16": ({"hidden_size": 512, "intermediate_size": 704, "dtypes": ("float16",)}, HIGH),
    "8 warps": ({"hidden_size": 1024, "intermediate_size": 512}, replace(LOW, num_warps=8)),
    "lowest": ({"hidden_size": 2048, "intermediate_size": 256, "top_k": 8}, LOWEST),
    "2 stages": ({"hidden_size": 1024, "intermediate_size": 512}, replace(HIGH, num_stages=2)),
    "no PDL": ({"hidden_size": 1024, "intermediate_size": 512}, replace(LOW, PDL=False)),
    "bias, high": ({"hidden_size": 512, "intermediate_size": 256, "activation": "swigluoai", "bias": True}, HIGH),
    "one slot": ({"top_k": 1, "hidden_size": 1024, "intermediate_size": 512}, LOW),
    "one slot, bias": ({"top_k": 1, "hidden_size": 512, "intermediate_size": 256, "bias": True}, HIGH),
    "shard": ({"hidden_size": 1024, "intermediate_size": 512, "parallel": (Parallel(ep=2),)}, LOW),
}

QUANTISED: dict[str, tuple[dict[str, Any], TileConfig]] = {
    "fp8": ({**BLOCK, "num_experts": 32, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}, LOW_8),
    "fp8, 8 warps": ({**BLOCK, "hidden_size": 2048, "intermediate_size": 768}, replace(LOW_8, num_warps=8)),
    "fp8, high": ({**BLOCK, "top_k": 8, "hidden_size": 7168, "intermediate_size": 256}, HIGH_8),
    "fp8, high, 4 warps": ({**BLOCK, "hidden_size": 1024, "intermediate_size": 512}, replace(HIGH_8, num_warps=4)),
    "fp8, deep": ({**BLOCK, "top_k": 10, "hidden_size": 2048, "intermediate_size": 768}, DEEP_8),
    "fp8, many tiles": ({**BLOCK, "hidden_size": 4096, "intermediate_size": 4096, "top_k": 2}, LOW_8),
    "fp8, tails": ({**BLOCK, "hidden_size": 592, "intermediate_size": 272, "bias": True}, LOW_8),
    "fp8, interleaved": ({**BLOCK, "hidden_size": 640, "activation": "swigluoai", "bias": True}, LOW_8),
    "fp8, not gated": ({**BLOCK, "hidden_size": 1024, "activation": "relu2_no_mul"}, LOW_8),
    "fp8, float16": ({**BLOCK, "hidden_size": 1024, "dtypes": ("float16",)}, LOW_8),
    "fp8, ue8m0": ({"quant": ("fp8_w8a8:128x128ue8m0",), "hidden_size": 1024}, LOW_8),
    "fp8, shard": ({**BLOCK, "hidden_size": 1024, "parallel": (Parallel(ep=2),)}, LOW_8),
    "int8": ({"quant": ("int8_w8a8:128x128",), "hidden_size": 1024, "bias": True}, LOW_8),
    "channel": ({**CHANNEL, "num_experts": 32, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}, WIDE_8),
    "channel, high": ({**CHANNEL, "top_k": 8, "hidden_size": 7168, "intermediate_size": 256}, HIGH_8),
    "channel, many segments": ({**CHANNEL, "hidden_size": 5120, "intermediate_size": 6144}, LOW_8),
    "channel, tails": ({**CHANNEL, "hidden_size": 592, "intermediate_size": 144, "bias": True}, HIGH_8),
    "channel, interleaved": ({**CHANNEL, "hidden_size": 640, "activation": "swigluoai", "bias": True}, LOW_8),
    "channel, float16": ({**CHANNEL, "hidden_size": 1024, "dtypes": ("float16",)}, LOW_8),
    "channel, shard": ({**CHANNEL, "hidden_size": 1024, "parallel": (Parallel(ep=2),)}, LOW_8),
    "int8, channel": ({"quant": ("int8_w8a8:channel",), "top_k": 8, "hidden_size": 2048, "bias": True}, WIDE_8),
    "tensor and token": ({"quant": ("fp8_w8a8:tensor_token",), "hidden_size": 1024, "bias": True}, LOW_8),
    "tensor": ({"quant": ("fp8_w8a8:tensor",), "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}, WIDE_8),
    "tensor, many segments": ({"quant": ("fp8_w8a8:tensor",), "intermediate_size": 6144}, LOW_8),
    "tensor, shard": ({"quant": ("fp8_w8a8:tensor",), "hidden_size": 1024, "parallel": (Parallel(ep=2),)}, HIGH_8),
    "int8, tensor": ({"quant": ("int8_w8a8:tensor",), "hidden_size": 1024, "activation": "relu2_no_mul"}, LOW_8),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built: dict[str, ModuleType] = {}

    def make(case: str) -> ModuleType:
        if case not in built:
            fields, tile = {**CASES, **QUANTISED}[case]
            folder = tmp_path_factory.mktemp("package")
            built[case] = import_package(package_with_record(folder, fields, tile, device_facts(0)))
        return built[case]

    return make


def inputs(layer: Any, seed: int, tokens: int = 1) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, device="cuda").normal_(0, std, generator=generator).to(layer.dtype)

    scores = torch.rand(tokens, layer.num_experts, device="cuda", generator=generator)
    found = {
        "hidden_states": normal(tokens, layer.hidden_size),
        "w13": normal(*layer.w13_shape, std=layer.hidden_size**-0.5),
        "w2": normal(*layer.w2_shape, std=layer.intermediate_size**-0.5),
        "topk_weights": torch.rand(tokens, layer.top_k, device="cuda", generator=generator),
        "topk_ids": scores.topk(layer.top_k).indices.to(torch.int32),
    }
    if layer.bias:
        found |= {"w13_bias": normal(*layer.w13_shape[:2]), "w2_bias": normal(*layer.w2_shape[:2])}
    if layer.local_experts < layer.num_experts:
        expert_map = torch.full((layer.num_experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[1::2] = torch.arange(layer.local_experts, dtype=torch.int32, device="cuda")
        found["expert_map"] = expert_map
    return found


def launches(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the families that the calls from here on launch."""
    seen: list[str] = []
    module = sys.modules[f"{package.__name__}.runtime.package"]
    real = module.run

    def run(layer: Any, call: Any, tiles: Any) -> None:
        seen.append(tiles.gemm1.family)
        real(layer, call, tiles)

    monkeypatch.setattr(module, "run", run)
    return seen


def check(layer: Any, arguments: dict[str, Any], got: torch.Tensor, **more: Any) -> None:
    want = moe_reference(**arguments, activation=layer.activation, **more)
    assert torch.isfinite(got).all()
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30) if want.norm() > 0 else got.norm()
    assert error < TOLERANCE[layer.dtype]


@pytest.mark.parametrize("case", CASES)
def test_numerics(case: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build(case)
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    for seed, change in enumerate(("", "padding", "all padding", "foreign", "an expert twice", "int64", "here")):
        arguments = inputs(layer, seed)
        ids = arguments["topk_ids"]
        if change == "padding":
            ids[:, ::3] = -1
        if change == "all padding":
            ids[:] = -1
        if change == "foreign":
            ids[:, 0] = layer.num_experts
        if change == "an expert twice":
            ids[:, -1] = ids[:, 0]
        if change == "int64":
            arguments["topk_ids"] = ids.long()
        if change == "here":  # of a shard: the ids are those of its own experts
            arguments.pop("expert_map", None)
            ids.clamp_(max=layer.local_experts - 1)
        got = package.fused_experts(**arguments)
        again = package.fused_experts(**arguments)
        check(layer, arguments, got)
        assert torch.equal(got.view(torch.int16), again.view(torch.int16)), change
        if change == "all padding":
            assert not got.any()
    assert set(seen) == {"stream"}


TOKENS = [
    ("plain", (1, 2, 4)),
    ("many slots", (2, 3)),
    ("tails", (2,)),
    ("smaller than a tile", (2, 5)),
    ("not gated", (3, 5)),
    ("bias, high", (2, 4)),
    ("shard", (2, 3, 5)),
    ("fp8", (2, 3, 5)),
    ("fp8, deep", (2, 4)),
    ("fp8, tails", (2, 5)),
    ("fp8, shard", (2, 4)),
    ("int8", (3,)),
    ("channel", (2, 4)),
    ("channel, tails", (5,)),
    ("tensor", (2, 3)),
    ("tensor, shard", (4,)),
]


@pytest.mark.parametrize(("case", "counts"), TOKENS)
def test_some_tokens(case: str, counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, tile = {**CASES, **QUANTISED}[case]
    for tokens in counts:
        size = 4 if tokens > 2 else tokens
        record = replace(tile, BLOCK_SIZE_M=size, num_stages=max(2, tile.num_stages // 2))
        package = import_package(package_with_record(tmp_path / str(tokens), fields, record, device_facts(0)))
        seen = launches(package, monkeypatch)
        layer = package.LAYERS[0]
        mapped = layer.local_experts < layer.num_experts
        for seed, padding in enumerate((0.0, 0.3)):
            arguments = make_inputs(layer, tokens, seed, "cuda", padding=padding, mapped=mapped)
            arguments["topk_ids"][-1, -1] = arguments["topk_ids"][0, 0]  # an expert of two tokens
            wide = torch.full((tokens, layer.hidden_size + 64), float("nan"), dtype=layer.dtype, device="cuda")
            wide[:, :-64] = arguments["hidden_states"]
            out = torch.full_like(wide, float("nan"))
            want = oracle(layer, arguments)
            arguments["hidden_states"] = wide[:, :-64]
            first = package.fused_experts(**arguments)
            assert relative_error(first, want) < (1e-2 if layer.quant == "none" else 2e-2)
            for _ in range(20):
                assert torch.equal(package.fused_experts(**arguments, out=out[:, :-64]), first)
            assert out[:, -64:].isnan().all()
        assert set(seen) == {"stream"}


@pytest.mark.parametrize("case", ["one slot", "one slot, bias"])
def test_weight_on_input(case: str, build: Any) -> None:
    package = build(case)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 1)
    got = package.fused_experts(**arguments, apply_router_weight_on_input=True)
    check(layer, arguments, got, apply_router_weight_on_input=True)


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised(case: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the oracle, and against the portable family, which rounds to the same 8 bits."""
    package = build(case)
    layer = package.LAYERS[0]
    seen = launches(package, monkeypatch)
    mapped = layer.local_experts < layer.num_experts
    for seed, padding in enumerate((0.0, 0.0, 0.4, 1.0)):
        arguments = make_inputs(layer, 1, seed, "cuda", padding=padding, mapped=mapped, padded_rows=16 * seed)
        got = package.fused_experts(**arguments)
        assert torch.equal(got, package.fused_experts(**arguments))
        assert relative_error(got, oracle(layer, arguments)) < 2e-2
        # Sums of e4m3 on the tensor cores are less exact than its own, and `hidden` falls to the other side of 8 bits.
        assert relative_error(got, by_portable(package, arguments)) < 2e-2
        assert seen[-3:] == ["stream", "stream", "portable"]
    assert not got.any()


@pytest.mark.parametrize("case", ["tensor", "tensor, many segments", "tensor, shard", "int8, tensor"])
def test_static_scales(case: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build(case)
    layer = package.LAYERS[0]
    seen = launches(package, monkeypatch)
    # The second one lies at an address that is no multiple of 16 bytes, as one of several layers' scales may.
    scales = torch.full((2,), 0.35 / (127 if "int8" in case else 448), device="cuda")
    static = {"w13_input_scale": scales[:1], "w2_input_scale": scales[1:]}
    for seed, names in enumerate(([], ["w13_input_scale"], ["w2_input_scale"], [*static])):
        arguments = make_inputs(layer, 1, seed, "cuda", padding=0.3, mapped=layer.local_experts < layer.num_experts)
        arguments |= {name: static[name] for name in names}
        got = package.fused_experts(**arguments)
        assert relative_error(got, oracle(layer, arguments)) < 2e-2
        assert relative_error(got, by_portable(package, arguments)) < 2e-2
        assert seen[-2:] == ["stream", "portable"]


def test_what_nobody_wrote_changes_no_common_scale(build: Any) -> None:
    """One step for all slots: `hidden` holds NaN, or large values of the call before, where a slot has no expert."""
    package = build("tensor")
    layer = package.LAYERS[0]
    arguments = make_inputs(layer, 1, 0, "cuda")
    arguments["topk_ids"][:, ::2] = -1
    first = package.fused_experts(**arguments)
    torch.utils.deterministic.fill_uninitialized_memory = False
    large = {**arguments, "hidden_states": arguments["hidden_states"] * 1000, "topk_ids": arguments["topk_ids"].abs()}
    for _ in range(3):
        package.fused_experts(**large)
        assert torch.equal(package.fused_experts(**arguments), first)


def test_an_expert_map_to_oneself_changes_no_bit(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build("plain")
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 0)
    everyone = torch.arange(layer.num_experts, dtype=torch.int32, device="cuda")
    mapped = package.fused_experts(**arguments, expert_map=everyone)
    assert torch.equal(package.fused_experts(**arguments), mapped)
    everyone[::2] = layer.num_experts  # none of its experts
    arguments["expert_map"] = everyone
    kept = torch.where(arguments["topk_ids"] % 2 == 0, -1, arguments["topk_ids"])
    got = package.fused_experts(**arguments)
    del arguments["expert_map"]
    assert torch.equal(got, package.fused_experts(**{**arguments, "topk_ids": kept}))
    assert set(seen) == {"stream"}


def test_rows_apart_and_given_out(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build("plain")
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 0)
    for name in ("hidden_states", "w13", "w2"):
        tensor = arguments[name]
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 64), float("nan"), dtype=tensor.dtype, device="cuda")
        wide[..., : tensor.shape[-1]] = tensor
        arguments[name] = wide[..., : tensor.shape[-1]]
    wide = torch.full((1, layer.hidden_size + 24), float("nan"), dtype=layer.dtype, device="cuda")
    got = package.fused_experts(**arguments, out=wide[:, : layer.hidden_size])
    check(layer, arguments, got)
    assert wide[:, layer.hidden_size :].isnan().all()
    assert seen == ["stream"]


def test_an_unaligned_token_takes_the_portable_family(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build("plain")
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 0)
    aligned = arguments["hidden_states"]
    flat = torch.zeros(aligned.numel() + 1, dtype=layer.dtype, device="cuda")
    flat[1:] = aligned.flatten()
    for x in (flat[1:].view(1, layer.hidden_size), aligned, flat[1:].view(1, layer.hidden_size)):
        arguments["hidden_states"] = x
        check(layer, arguments, package.fused_experts(**arguments))
    assert seen == ["portable", "stream", "portable"]


@pytest.mark.parametrize("quant", ["none", "fp8_w8a8:128x128", "fp8_w8a8:channel", "fp8_w8a8:tensor"])
def test_a_warm_up_lets_it_be_captured(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier's words, too: a package that was just imported has none."""
    fields = {
        "quant": (quant,),
        "hidden_size": 1024,
        "intermediate_size": 512,
        "bias": True,
        "parallel": (Parallel(), Parallel(ep=2)),
    }
    package = import_package(emit(make_plan(spec_of(**fields)), tmp_path))
    seen = launches(package, monkeypatch)
    cold = make_inputs(package.LAYERS[0], 1, 0, "cuda")
    with pytest.raises(RuntimeError, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        package.fused_experts(**cold)
    package.warmup(1)
    for layer in package.LAYERS:
        arguments = make_inputs(layer, 1, 1, "cuda", mapped=layer.local_experts < layer.num_experts)
        out = torch.empty_like(arguments["hidden_states"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            package.fused_experts(**arguments, out=out)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert relative_error(out, oracle(layer, arguments)) < (1e-2 if quant == "none" else 2e-2)
    assert set(seen) == {"stream"}


@pytest.mark.parametrize("case", ["plain", "fp8", "channel", "tensor"])
def test_thousand_replays_give_one_result(case: str, build: Any) -> None:
    package = build(case)
    arguments = make_inputs(package.LAYERS[0], 1, 0, "cuda")
    first = package.fused_experts(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [package.fused_experts(**arguments) for _ in range(10)]
    for _ in range(1000):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        for output in outputs:
            assert torch.equal(output.view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("case", ["plain", "fp8", "channel", "tensor"])
def test_streams_and_graphs_at_once(case: str, build: Any) -> None:
    package = build(case)
    arguments = make_inputs(package.LAYERS[0], 1, 0, "cuda")
    first = package.fused_experts(**arguments)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = package.fused_experts(**arguments)
        graphs.append((graph, output))
    outputs = []
    for _ in range(200):
        for (graph, _), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            outputs.append(package.fused_experts(**arguments))
    torch.cuda.synchronize()
    for output in [*outputs, *(output for _, output in graphs)]:
        assert torch.equal(output.view(torch.int16), first.view(torch.int16))
