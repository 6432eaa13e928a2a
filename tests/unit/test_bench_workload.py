"""The benchmark's workload: counts against numbers worked out by hand, routings against their distributions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moegen.bench.measure import layer_reference
from moegen.bench.roofline import Ceilings, floor, matmul_call, operand_dtype
from moegen.bench.workload import (
    COLD_BYTES,
    MAX_CALLS,
    Layer,
    LayerCall,
    Workload,
    build_workload,
    calls_wanted,
    copies_allowed,
    copies_wanted,
    draw_log_popularity,
    draw_routing,
    draw_weights,
    expert_bytes,
    layer_bytes,
    layer_flops,
)
from moegen.runtime.activations import Activation
from tests.support.fake_layer import FakeLayer

CPU = torch.device("cpu")


SMALL = FakeLayer()
QWEN3_30B = FakeLayer("qwen3", 128, 128, 8, 2048, 768)
MIXTRAL = FakeLayer("mixtral", 8, 8, 2, 4096, 14336)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(layer: Layer, tokens: int, routing: str = "balanced", free_bytes: int = 10**12, seed: int = 0) -> Workload:
    return build_workload(layer, tokens, routing, device=CPU, seed=seed, free_bytes=free_bytes)


def test_counts_of_qwen3_30b_at_one_token() -> None:
    assert expert_bytes(QWEN3_30B) == (2 * 768 * 2048 + 2048 * 768) * 2
    assert 8 * expert_bytes(QWEN3_30B) == 75_497_472
    assert layer_bytes(QWEN3_30B, 1, 8) == 75_497_472 + 2 * 2048 * 2
    assert layer_flops(QWEN3_30B, 1) == 2 * 8 * 3 * 768 * 2048


def test_counts_of_an_ungated_layer_with_bias_in_float32() -> None:
    layer = replace(SMALL, activation=Activation.of("relu2_no_mul"), bias=True, dtype=torch.float32)
    assert expert_bytes(layer) == (32 * 64 + 64 * 32 + 32 + 64) * 4
    assert layer_flops(layer, 5) == 2 * 5 * 2 * (32 * 64 + 64 * 32)


@pytest.mark.parametrize(
    ("quant", "count"),
    [
        ("fp8_w8a8:tensor", 64 * 64 + 64 * 32 + 2 * 4),
        ("fp8_w8a8:128x128", 64 * 64 + 64 * 32 + 2 * 4),
        ("fp8_w8a8:16x32", 64 * 64 + 64 * 32 + (4 * 2 + 4 * 1) * 4),
        ("int8_w8a8", 64 * 64 + 64 * 32 + (64 + 64) * 4),
        ("int8_w8a16", 64 * 64 + 64 * 32 + (64 + 64) * 2),
        ("int4_w4a16:g32", 64 * 32 + 64 * 16 + (64 * 2 + 64) * 2),
        ("int4_w4a16:g32z", 64 * 32 + 64 * 16 + (64 * 2 + 64) * 2 + 32 * 2 + 32),
        ("mxfp4_w4a16", 64 * 32 + 64 * 16 + 64 * 2 + 64),
        ("nvfp4_w4a16", 64 * 32 + 64 * 16 + 64 * 4 + 64 * 2 + 2 * 4),
    ],
)
def test_counts_of_stored_weights(quant: str, count: int) -> None:
    assert expert_bytes(replace(SMALL, quant=quant)) == count
    assert expert_bytes(replace(SMALL, quant=quant, bias=True)) == count + (64 + 64) * 2


QUANTS = (
    "fp8_w8a8:tensor", "fp8_w8a8:tensor_token", "fp8_w8a8:channel", "fp8_w8a8", "fp8_w8a8:32x32ue8m0",
    "int8_w8a8", "int8_w8a8:tensor", "int8_w8a8:128x128", "int8_w8a16", "int8_w8a16:g32", "int8_w8a16:g16z",
    "int4_w4a16:g32", "int4_w4a16:g32z", "mxfp4_w4a16", "mxfp4_w4a8", "nvfp4_w4a16", "mxfp8",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_weights_are_counted_checked_and_of_size_one(
    quant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moegen.quantize.CHUNK", 3 * 64 * 64)
    layer = replace(SMALL, quant=quant, dtype=dtype, bias=True)
    weights = draw_weights(layer, seeded())
    tensors = [weights.w13, weights.w2, *weights.kwargs.values()]
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors) == 8 * expert_bytes(layer)
    hidden = torch.randn(40, 64, generator=seeded(1)).to(dtype)
    routing = draw_routing(40, 2, torch.zeros(8), seeded(2))
    out = LayerCall(hidden, weights, *routing).run(lambda *args, **kwargs: layer_reference(layer, *args, **kwargs))
    assert isinstance(out, torch.Tensor)
    assert 0.1 < out.std() < 2
    again = draw_weights(layer, seeded())
    assert again.w2.view(torch.uint8).equal(weights.w2.view(torch.uint8))
    assert not weights.w13[0].view(torch.uint8).equal(weights.w13[7].view(torch.uint8))


def test_quantised_copies_leave_room_to_quantise() -> None:
    layer = replace(MIXTRAL, quant="fp8_w8a8")
    one = 8 * expert_bytes(layer)
    assert one < 0.51 * 8 * expert_bytes(MIXTRAL)
    assert copies_allowed(layer, 1, 1, 100 * one) == 95


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        ("none", torch.float16),
        ("fp8_w8a8:tensor", torch.float8_e4m3fn),
        ("int8_w8a8", torch.int8),
        ("int4_w4a16", torch.float16),
        ("mxfp4_w4a8", torch.float16),
        ("mxfp8", torch.float16),
    ],
)
def test_the_ceiling_is_that_of_what_is_multiplied(quant: str, dtype: torch.dtype) -> None:
    assert operand_dtype(replace(SMALL, quant=quant, dtype=torch.float16), CPU) == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_products_of_every_operand_type(dtype: torch.dtype) -> None:
    """That the calls are valid and do not give zeros; rates need a device."""
    torch.manual_seed(0)
    out = matmul_call(dtype, CPU, 64)().float()
    scale = 8 * 40**2 if dtype == torch.int8 else 8
    assert out.shape == (64, 64)
    assert 0.8 < out.std() / scale < 1.2


def test_floor_names_the_larger_term() -> None:
    ceilings = Ceilings("bfloat16", 4.47e12, 800e12)
    decode = floor(QWEN3_30B, 1, 8, ceilings)
    assert decode.bound == "memory"
    assert decode.us == pytest.approx(75_505_664 / 4.47e6)
    prefill = floor(MIXTRAL, 16384, 8, ceilings)
    assert prefill.bound == "compute"
    assert prefill.us == pytest.approx(2 * 16384 * 2 * 3 * 14336 * 4096 / 8e8)


@pytest.mark.parametrize(("active_bytes", "copies"), [(75_497_472, 7), (512e6, 2), (256e6, 2), (255e6, 3), (10e9, 2)])
def test_copies_rule(active_bytes: float, copies: int) -> None:
    assert copies_wanted(active_bytes) == copies
    assert copies * active_bytes >= COLD_BYTES


@pytest.mark.parametrize("tokens", [1, 4, 64, 1024, 16384])
@pytest.mark.parametrize("copies", [2, 3, 7, 500, MAX_CALLS])
def test_calls_are_a_bounded_multiple_of_the_copies(tokens: int, copies: int) -> None:
    calls = calls_wanted(QWEN3_30B, tokens, 8, copies)
    assert calls % copies == 0
    assert 8 <= calls <= max(MAX_CALLS, copies)


def test_short_calls_are_repeated_until_the_graph_is_long() -> None:
    assert calls_wanted(QWEN3_30B, 1, 8, 7) * 18.9 >= 2000
    assert calls_wanted(MIXTRAL, 16384, 8, 2) == 4


def test_copies_are_bounded_by_memory() -> None:
    one = 8 * expert_bytes(MIXTRAL)
    assert copies_allowed(MIXTRAL, 1, 1, 100 * one) in (98, 99)
    assert copies_allowed(MIXTRAL, 16384, 2, 140 * 10**9) >= 2
    with pytest.raises(MemoryError, match="GB"):
        copies_allowed(MIXTRAL, 1, 1, one)


@pytest.mark.parametrize("routing", ["balanced", "power_law"])
def test_routing_is_distinct_local_and_normalised(routing: str) -> None:
    popularity = draw_log_popularity(16, routing, seeded())
    weights, ids = draw_routing(300, 4, popularity, seeded(1))
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert ids.shape == weights.shape == (300, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < 16
    torch.testing.assert_close(weights.sum(-1), torch.ones(300))
    assert (weights > 0).all()


def test_balanced_routing_is_uniform() -> None:
    _, ids = draw_routing(20000, 2, draw_log_popularity(10, "balanced", seeded()), seeded(1))
    share = ids.flatten().bincount(minlength=10) / ids.numel()
    assert (share - 0.1).abs().max() < 0.01


def test_power_law_routing_follows_its_exponent() -> None:
    popularity = draw_log_popularity(10, "power_law", seeded(), alpha=1.2)
    _, ids = draw_routing(50000, 1, popularity, seeded(1))
    share = (ids.flatten().bincount(minlength=10) / ids.numel()).sort(descending=True).values
    expected = torch.arange(1, 11).float() ** -1.2
    assert (share - expected / expected.sum()).abs().max() < 0.01


def test_power_law_ranks_are_permuted_by_the_generator() -> None:
    source = seeded()
    first, second = (draw_log_popularity(64, "power_law", source) for _ in range(2))
    assert not first.equal(second)
    assert first.sort().values.equal(second.sort().values)


def test_routing_errors() -> None:
    with pytest.raises(ValueError, match=r"routing: .*'zipf'"):
        draw_log_popularity(8, "zipf", seeded())
    with pytest.raises(ValueError, match=r"top_k: 9 .* 8 local"):
        draw_routing(1, 9, torch.zeros(8), seeded())


def test_workload_rotates_copies_and_holds_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegen.bench.workload.COLD_BYTES", 5 * 2 * expert_bytes(SMALL))
    monkeypatch.setattr("moegen.bench.workload.MIN_GRAPH_US", 0.0)
    workload = build(SMALL, 1)
    assert workload.sizes.copies == workload.sizes.copies_wanted == 5
    assert len(workload.calls) == workload.sizes.calls == 10
    assert not workload.sizes.bounded
    assert workload.sizes.active_experts == 2
    assert workload.sizes.reuse_bytes == 5 * 2 * expert_bytes(SMALL)
    for index, call in enumerate(workload.calls):
        assert call.weights is workload.calls[index % 5].weights
        assert call.hidden_states.shape == (1, 64)
        assert call.hidden_states.dtype == torch.bfloat16
        assert call.weights.kwargs == {}
        assert call.weights.w13.count_nonzero() > 0.99 * call.weights.w13.numel()
    assert not workload.calls[0].hidden_states.equal(workload.calls[5].hidden_states)
    assert len({id(call.weights) for call in workload.calls}) == 5


def test_workload_of_a_tiny_layer_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegen.bench.workload.MAX_CALLS", 16)
    sizes = build(SMALL, 4).sizes
    assert sizes.bounded
    assert sizes.copies == sizes.calls == 16


def test_workload_is_reproducible_and_takes_local_experts_and_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegen.bench.workload.MAX_CALLS", 8)
    layer = replace(SMALL, num_experts=32, bias=True)
    first, again, other = (build(layer, 16, "power_law", seed=seed) for seed in (3, 3, 4))
    call = first.calls[0]
    assert call.weights.w13.shape == (8, 64, 64)
    assert call.weights.kwargs["w13_bias"].shape == (8, 64)
    assert call.weights.kwargs["w2_bias"].shape == (8, 64)
    assert call.topk_ids.max() < 8
    assert call.topk_ids.equal(again.calls[0].topk_ids)
    assert call.weights.w2.equal(again.calls[0].weights.w2)
    assert not call.weights.w2.equal(other.calls[0].weights.w2)


def test_bind_calls_with_the_arguments_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegen.bench.workload.MAX_CALLS", 4)
    workload = build(replace(SMALL, bias=True), 3)
    seen: list[SimpleNamespace] = []
    for bound in workload.bind(lambda *args, **kwargs: seen.append(SimpleNamespace(args=args, kwargs=kwargs))):
        bound()
    assert [s.args[4] is c.topk_ids for s, c in zip(seen, workload.calls, strict=True)] == [True] * 4
    assert set(seen[0].kwargs) == {"w13_bias", "w2_bias"}
