"""The whole layer on a GPU: the reference's own grid, graphs, edges; oracle in float64, outputs poisoned with NaN."""

from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.reference import moe_reference
from moegen.spec import MoESpec, Parallel, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DTYPES = ("bfloat16", "float16", "float32")
SEEDS = (0, 1, 2)
# Absolute tolerance of the reference's own tests on inputs of randn / 10; float32 has no rounding to bf16 to allow for.
ATOL = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 2e-4}
RELATIVE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}  # of the norm of the whole output

# (tokens, intermediate size, hidden size), experts, top_k: vLLM's test_moe.py
GRID_SIZES = ((1, 128, 128), (1, 2048, 128), (33, 2048, 128), (32768, 2048, 511), (40000, 1024, 1024))
GRID = [(*size, e, k) for size, e, k in product(GRID_SIZES, (8, 64, 192), (2, 6))]
LOW_LATENCY_SIZES = ((1, 128, 128), (1, 2048, 128), (2, 2048, 128), (2, 2048, 511))
LOW_LATENCY = [(*size, e, k) for size, e, k in product(LOW_LATENCY_SIZES, (128, 256), (1, 2))]
TAILS = [(t, i, h, 16, 4) for t, (i, h) in product((3, 70), ((2880, 2880), (1856, 2688), (1408, 704), (511, 1408)))]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built: dict[MoESpec, ModuleType] = {}

    def make(e: int, k: int, h: int, i: int, dtype: str, ep: int = 1, **fields: Any) -> ModuleType:
        activation = fields.get("activation", Activation.of("silu"))
        name = f"t{e}-{k}-{h}-{i}-{dtype}-{ep}-{activation.slug.replace('_', '-')}-{fields.get('bias', False)}".lower()
        spec = MoESpec(
            name=name,
            shapes=(Shape(num_experts=e, top_k=k, hidden_size=h, intermediate_size=i),),
            dtypes=(dtype,),
            parallel=(Parallel(ep=ep),),
            **fields,
        )
        if spec not in built:
            built[spec] = import_package(emit(make_plan(spec), Path(tmp_path_factory.mktemp("package"))))
        return built[spec]

    return make


def inputs(layer: Any, tokens: int, seed: int, padded: bool = False, skew: str = "uniform") -> dict[str, Any]:
    """Fresh random arguments; `padded` weights have rows that are longer than their last dimension."""
    torch.manual_seed(seed)
    pad = 128 if padded else 0

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(*shape[:-1], shape[-1] + pad, device="cuda") / 10).to(layer.dtype)[..., : shape[-1]]

    scores = torch.randn(tokens, layer.num_experts, device="cuda")
    if skew == "one hot expert" and layer.top_k == 1:
        scores[:, layer.num_experts // 2] = 100.0
    values, ids = scores.softmax(-1).topk(layer.top_k, dim=-1)
    if skew == "padding":
        ids[torch.rand_like(values) < 0.3] = -1
    if skew == "repeats":
        ids = torch.randint(0, 2, ids.shape, device="cuda") * (layer.num_experts - 1)
    arguments = {
        "hidden_states": (torch.randn(tokens, layer.hidden_size, device="cuda") / 10).to(layer.dtype),
        "w13": weight(layer.w13_shape),
        "w2": weight(layer.w2_shape),
        "topk_weights": values,
        "topk_ids": ids.int(),
    }
    if layer.bias:
        arguments["w13_bias"] = torch.randn(layer.w13_shape[:2], device="cuda").to(layer.dtype)
        arguments["w2_bias"] = torch.randn(layer.w2_shape[:2], device="cuda").to(layer.dtype)
    if layer.local_experts < layer.num_experts:
        expert_map = torch.full((layer.num_experts,), -1, dtype=torch.int32)
        local = torch.randperm(layer.num_experts)[: layer.local_experts]
        expert_map[local] = torch.arange(layer.local_experts, dtype=torch.int32)
        arguments["expert_map"] = expert_map.cuda()
    return arguments


def check(package: ModuleType, arguments: dict[str, Any], graph: bool = False, **extra: Any) -> None:
    """One call against the float64 oracle, and the same call again under a CUDA graph, bit for bit."""
    layer = package.LAYERS[0]
    dtype = str(layer.dtype).removeprefix("torch.")
    expected = moe_reference(activation=layer.activation, **arguments, **extra)
    out = package.fused_experts(**arguments, **extra)
    assert out.dtype == layer.dtype
    assert not out.isnan().any()
    error = (out.double() - expected).abs().max().item() if out.numel() else 0.0
    scale = max(1.0, expected.abs().max().item() if out.numel() else 1.0)
    assert error <= ATOL[dtype] * scale
    relative = ((out.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    assert relative <= RELATIVE[dtype], relative
    if graph:
        static = torch.full_like(out, float("nan"))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            package.fused_experts(**arguments, **extra, out=static)
        static.fill_(float("nan"))
        captured.replay()
        torch.cuda.synchronize()
        assert torch.equal(static, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize(("t", "i", "h", "e", "k"), GRID)
def test_reference_grid(build: Any, t: int, i: int, h: int, e: int, k: int, ep: int, dtype: str) -> None:
    package = build(e, k, h, i, dtype, ep)
    for seed in SEEDS:
        arguments = inputs(package.LAYERS[0], t, seed, padded=seed == 1)
        check(package, arguments, graph=(i >= 1024 and h >= 1024) or seed == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "i", "h", "e", "k"), LOW_LATENCY)
def test_low_latency_grid(build: Any, t: int, i: int, h: int, e: int, k: int, dtype: str) -> None:
    package = build(e, k, h, i, dtype)
    for seed in SEEDS:
        check(package, inputs(package.LAYERS[0], t, seed), graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "i", "h", "e", "k"), TAILS)
def test_sizes_that_no_tile_divides(build: Any, t: int, i: int, h: int, e: int, k: int, dtype: str) -> None:
    package = build(e, k, h, i, dtype)
    check(package, inputs(package.LAYERS[0], t, t))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_and_bias(build: Any, name: str, bias: bool) -> None:
    needed = {key: 3.0 for key, value in ACTIVATIONS[name].parameters if value is None or value != value}
    activation = Activation.of(name, **needed)
    for dtype, t in product(DTYPES, (1, 50)):
        package = build(32, 4, 256, 192, dtype, activation=activation, bias=bias)
        check(package, inputs(package.LAYERS[0], t, seed=t))


@pytest.mark.parametrize("skew", ["padding", "repeats"])
@pytest.mark.parametrize(("t", "ep"), [(0, 1), (1, 1), (1, 4), (2, 1), (7, 4), (333, 1), (333, 4)])
def test_uneven_routing(build: Any, t: int, ep: int, skew: str) -> None:
    package = build(64, 6, 512, 256, "bfloat16", ep)
    check(package, inputs(package.LAYERS[0], t, seed=t, skew=skew), graph=t > 0)


def test_all_tokens_on_one_expert(build: Any) -> None:
    package = build(64, 1, 512, 256, "bfloat16")
    for t in (1, 17, 5000):
        check(package, inputs(package.LAYERS[0], t, seed=t, skew="one hot expert"))


@pytest.mark.parametrize("bias", [False, True])
def test_router_weight_on_input(build: Any, bias: bool) -> None:
    package = build(16, 1, 512, 256, "bfloat16", bias=bias)
    for t in (1, 4, 100):
        check(package, inputs(package.LAYERS[0], t, seed=t), apply_router_weight_on_input=True)


def test_offsets_beyond_32_bits(build: Any) -> None:
    """100 000 tokens x 6 slots x 4096 values exceed 2^31; also vLLM's int64 test."""
    package = build(8, 6, 4096, 1024, "bfloat16")
    check(package, inputs(package.LAYERS[0], 100_000, seed=0))
    package = build(8, 6, 1024, 4096, "bfloat16")
    check(package, inputs(package.LAYERS[0], 100_000, seed=1))


def test_aligned_and_low_latency_agree_bit_for_bit(build: Any) -> None:
    package = build(128, 2, 2048, 512, "bfloat16")
    layer = package.LAYERS[0]
    everyone = torch.arange(layer.num_experts, dtype=torch.int32, device="cuda")
    for t in (1, 3, 16):
        arguments = inputs(layer, t, seed=t)
        low_latency = package.fused_experts(**arguments)
        aligned = package.fused_experts(**arguments, expert_map=everyone)  # an expert_map rules the shortcut out
        assert torch.equal(low_latency, aligned)


def test_runs_repeat_bit_for_bit(build: Any) -> None:
    package = build(64, 6, 512, 256, "bfloat16")
    for t in (1, 200, 3000):
        arguments = inputs(package.LAYERS[0], t, seed=t)
        first = package.fused_experts(**arguments)
        for _ in range(50):
            assert torch.equal(first, package.fused_experts(**arguments))


def test_warmup_lets_every_size_be_captured(tmp_path: Path) -> None:
    spec = MoESpec(
        name="warm",
        shapes=(Shape(num_experts=64, top_k=4, hidden_size=256, intermediate_size=128),),
        parallel=(Parallel(), Parallel(ep=2)),
    )
    package = import_package(emit(make_plan(spec), tmp_path))
    cold = inputs(package.LAYERS[0], 3, seed=0)
    with pytest.raises(RuntimeError, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        package.fused_experts(**cold)
    package.warmup(5000)
    for layer, t in product(package.LAYERS, (1, 2, 5, 100, 700, 3000, 5000)):
        arguments = inputs(layer, t, seed=t)
        out = torch.empty_like(arguments["hidden_states"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            package.fused_experts(**arguments, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, package.fused_experts(**arguments))


def test_torch_compile_without_graph_breaks(build: Any) -> None:
    package = build(64, 4, 256, 128, "bfloat16")
    arguments = inputs(package.LAYERS[0], 20, seed=0)
    compiled = torch.compile(lambda **kw: package.fused_experts(**kw) * 2, fullgraph=True)
    assert torch.equal(compiled(**arguments), package.fused_experts(**arguments) * 2)
