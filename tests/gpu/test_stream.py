"""The family "stream" on a GPU of compute capability 9.0: numerics, repeated and concurrent runs, graphs, fallbacks."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.load import import_package
from moegen.runtime.device import device_facts
from moegen.runtime.reference import moe_reference
from moegen.spec import Parallel
from tests.compile.stream_sweep import package_with_record, stream_tile
from tests.support.packages import TOLERANCE

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]

DEEP, HIGH = stream_tile(BLOCK_SIZE_N=16, BLOCK_SIZE_K=512), stream_tile(BLOCK_SIZE_N=32, BLOCK_SIZE_K=256)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"num_experts": 32, "hidden_size": 2048, "intermediate_size": 768}, DEEP),
    "many slots": ({"num_experts": 64, "top_k": 10, "hidden_size": 2048, "intermediate_size": 512}, DEEP),
    "flat": ({"hidden_size": 7168, "intermediate_size": 256}, HIGH),
    "tails": ({"hidden_size": 2880, "intermediate_size": 2880, "activation": "swigluoai", "bias": True}, DEEP),
    "smaller than a tile": ({"hidden_size": 136, "intermediate_size": 24, "bias": True}, HIGH),
    "not gated": ({"hidden_size": 1408, "intermediate_size": 360, "activation": "relu2_no_mul"}, DEEP),
    "float16": ({"hidden_size": 512, "intermediate_size": 704, "dtypes": ("float16",)}, HIGH),
    "4 warps": ({"hidden_size": 1024, "intermediate_size": 512}, {**DEEP, "num_warps": 4}),
    "2 stages": ({"hidden_size": 1024, "intermediate_size": 512}, {**HIGH, "num_stages": 2}),
    "no PDL": ({"hidden_size": 1024, "intermediate_size": 512}, {**DEEP, "PDL": False}),
    "one slot": ({"top_k": 1, "hidden_size": 1024, "intermediate_size": 512}, DEEP),
    "shard": ({"hidden_size": 1024, "intermediate_size": 512, "parallel": (Parallel(ep=2),)}, DEEP),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty returns NaN: what a kernel does not write, or reads without right, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built: dict[str, ModuleType] = {}

    def make(case: str) -> ModuleType:
        if case not in built:
            fields, tile = CASES[case]
            folder = tmp_path_factory.mktemp("package")
            built[case] = import_package(package_with_record(folder, fields, tile, device_facts(0)))
        return built[case]

    return make


def inputs(layer: Any, tokens: int, seed: int) -> dict[str, Any]:
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
    for tokens in (1, 2, 3, 4, 5, 8):
        for seed, change in enumerate(("", "padding", "all padding", "same experts", "an expert twice", "int64")):
            arguments = inputs(layer, tokens, seed)
            ids = arguments["topk_ids"]
            if change == "padding":
                ids.view(-1)[::3] = -1
            if change == "all padding":
                ids[:] = -1
            if change == "same experts":
                ids[:] = ids[0].clone()
            if change == "an expert twice":
                ids[:, -1] = ids[:, 0]
            if change == "int64":
                arguments["topk_ids"] = ids.long()
            got = package.fused_experts(**arguments)
            again = package.fused_experts(**arguments)
            check(layer, arguments, got)
            assert torch.equal(got.view(torch.int16), again.view(torch.int16)), (tokens, change)
    assert set(seen) == {"stream"}


def test_weight_on_input(build: Any) -> None:
    package = build("one slot")
    layer = package.LAYERS[0]
    for tokens in (1, 3):
        arguments = inputs(layer, tokens, tokens)
        got = package.fused_experts(**arguments, apply_router_weight_on_input=True)
        check(layer, arguments, got, apply_router_weight_on_input=True)


def test_rows_apart_and_given_out(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build("plain")
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 4, 0)
    for name in ("hidden_states", "w13", "w2"):
        tensor = arguments[name]
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 64), float("nan"), dtype=tensor.dtype, device="cuda")
        wide[..., : tensor.shape[-1]] = tensor
        arguments[name] = wide[..., : tensor.shape[-1]]
    wide = torch.full((4, layer.hidden_size + 24), float("nan"), dtype=layer.dtype, device="cuda")
    got = package.fused_experts(**arguments, out=wide[:, : layer.hidden_size])
    check(layer, arguments, got)
    assert wide[:, layer.hidden_size :].isnan().all()
    assert seen == ["stream"]


def test_unaligned_tokens_take_the_portable_family(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build("plain")
    seen = launches(package, monkeypatch)
    layer = package.LAYERS[0]
    arguments = inputs(layer, 2, 0)
    flat = torch.zeros(arguments["hidden_states"].numel() + 1, dtype=layer.dtype, device="cuda")
    flat[1:] = arguments["hidden_states"].flatten()
    arguments["hidden_states"] = flat[1:].view(2, layer.hidden_size)
    check(layer, arguments, package.fused_experts(**arguments))
    assert seen == ["portable"]


@pytest.mark.parametrize("tokens", [1, 4])
def test_thousand_replays_give_one_result(tokens: int, build: Any) -> None:
    package = build("plain")
    arguments = inputs(package.LAYERS[0], tokens, 0)
    first = package.fused_experts(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [package.fused_experts(**arguments) for _ in range(10)]
    for _ in range(100):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        for output in outputs:
            assert torch.equal(output.view(torch.int16), first.view(torch.int16))


def test_streams_and_graphs_at_once(build: Any) -> None:
    package = build("plain")
    arguments = inputs(package.LAYERS[0], 1, 0)
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
