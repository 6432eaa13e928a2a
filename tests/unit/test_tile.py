"""TileConfig: what is refused and why, and that the heuristic's answers are legal for every known model and target."""

import functools
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from moegen.device import TARGETS
from moegen.models import load_models
from moegen.runtime.configs import BUCKETS
from moegen.runtime.device import DeviceFacts
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.tile import FAMILIES, Gemm, TileConfig, shared_memory, why_illegal
from moegen.spec import Parallel

H200 = TARGETS["cuda:90"]
GEMM = Gemm("gemm1", 128, 8, 1536, 2048, True, a_bits=16, w_bits=16, group_k=0)
TILE = TileConfig(64, 128, 64, GROUP_SIZE_M=8, num_warps=4, num_stages=3)

ILLEGAL: list[tuple[dict[str, Any], str]] = [
    ({"BLOCK_SIZE_M": 0}, "BLOCK_SIZE_M=0 is not a power of two"),
    ({"BLOCK_SIZE_M": -16}, "BLOCK_SIZE_M=-16 is not a power of two"),
    ({"BLOCK_SIZE_M": 48}, "BLOCK_SIZE_M=48 is not a power of two"),
    ({"BLOCK_SIZE_N": 96}, "BLOCK_SIZE_N=96 is not a power of two"),
    ({"BLOCK_SIZE_K": 3}, "BLOCK_SIZE_K=3 is not a power of two"),
    ({"num_warps": 3}, "num_warps=3 is not a power of two"),
    ({"num_warps": 0}, "num_warps=0 is not a power of two"),
    ({"num_warps": 32}, "num_warps=32 is outside 1..16"),
    ({"num_stages": 0}, "num_stages=0 is outside 1..8"),
    ({"num_stages": 9}, "num_stages=9 is outside 1..8"),
    ({"GROUP_SIZE_M": 0}, "GROUP_SIZE_M=0 is outside 1..1024"),
    ({"GROUP_SIZE_M": 1 << 40}, "is outside 1..1024"),
    ({"BLOCK_SIZE_M": 1 << 60}, "BLOCK_SIZE_M=1152921504606846976 is outside"),
    ({"BLOCK_SIZE_K": 1024}, "BLOCK_SIZE_K=1024 is outside"),
    ({"BLOCK_SIZE_N": 1}, "BLOCK_SIZE_N=1 is outside"),
    ({"BLOCK_SIZE_M": 4}, "BLOCK_SIZE_M=4 is outside 8..512"),
    ({"BLOCK_SIZE_M": 8}, "BLOCK_SIZE_M=8 needs SWAP_AB and a CUDA GPU"),
    ({"family": "warp"}, "family=warp is unknown; known: portable, cooperative, stream"),
    ({"BLOCK_SIZE_M": 256, "BLOCK_SIZE_N": 256}, "512 accumulators per thread"),
    ({"BLOCK_SIZE_K": 256, "num_stages": 4}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
]


@pytest.mark.parametrize(("changes", "reason"), ILLEGAL)
def test_illegal(changes: dict[str, Any], reason: str) -> None:
    assert why_illegal(TILE, GEMM, H200) is None
    found = why_illegal(replace(TILE, **changes), GEMM, H200)
    assert found is not None
    assert reason in found


def test_legality_depends_on_device_and_element_size() -> None:
    tile = replace(TILE, BLOCK_SIZE_K=128, num_stages=4)
    assert shared_memory(tile, GEMM) == (64 + 128) * 128 * 2 * 4
    assert why_illegal(tile, GEMM, H200) is None
    assert why_illegal(tile, GEMM, TARGETS["cuda:120"]) is not None
    assert why_illegal(tile, replace(GEMM, a_bits=32, w_bits=32), H200) is not None
    assert shared_memory(tile, replace(GEMM, w_bits=8)) == (64 * 2 + 128) * 128 * 4 + 128 * 128 * 2
    assert why_illegal(tile, replace(GEMM, a_bits=8, w_bits=8), TARGETS["cuda:120"]) is None


def test_eight_tokens_need_swapped_operands_and_cuda() -> None:
    tile = replace(TILE, BLOCK_SIZE_M=8, SWAP_AB=True)
    assert why_illegal(tile, GEMM, H200) is None
    found = why_illegal(tile, GEMM, TARGETS["hip:gfx942"])
    assert found is not None
    assert found.startswith("BLOCK_SIZE_M=8 needs SWAP_AB and a CUDA GPU")


def test_shared_memory_holds_at_least_the_epilogue() -> None:
    tile = TileConfig(128, 256, 16, num_warps=8, num_stages=1)
    assert shared_memory(tile, replace(GEMM, gated=False)) >= 128 * 256 * 4


PLAIN = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64}
REFUSED: list[tuple[object, str]] = [
    (None, "here: None is not a mapping"),
    ([1], r"here: \[1\] is not a mapping"),
    ({}, "here.BLOCK_SIZE_M: missing"),
    ({"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 64}, "here.BLOCK_SIZE_N: missing"),
    ({**PLAIN, "SPLIT_K": 1}, "here.SPLIT_K: unknown key; allowed: BLOCK_SIZE_M, "),
    ({**PLAIN, "BLOCK_SIZE_M": True}, "here.BLOCK_SIZE_M: True is not allowed; allowed: int"),
    ({**PLAIN, "BLOCK_SIZE_M": 16.0}, "here.BLOCK_SIZE_M: 16.0 is not allowed; allowed: int"),
    ({**PLAIN, "BLOCK_SIZE_N": "64"}, "here.BLOCK_SIZE_N: '64' is not allowed; allowed: int"),
    ({**PLAIN, "BLOCK_SIZE_K": None}, "here.BLOCK_SIZE_K: None is not allowed; allowed: int"),
    ({**PLAIN, "BLOCK_SIZE_K": float("nan")}, "here.BLOCK_SIZE_K: nan is not allowed; allowed: int"),
    ({**PLAIN, "num_warps": [4]}, r"here.num_warps: \[4\] is not allowed; allowed: int"),
    ({**PLAIN, "num_stages": {"a": 1}}, "here.num_stages: .* is not allowed; allowed: int"),
    ({**PLAIN, "SWAP_AB": 1}, "here.SWAP_AB: 1 is not allowed; allowed: bool"),
    (
        {**PLAIN, "family": "warp"},
        "here.family: 'warp' is not allowed; allowed: portable or cooperative or stream",
    ),
    ({**PLAIN, "family": ["portable"]}, "here.family: .* is not allowed; allowed: portable"),
    ({**PLAIN, "family": 1}, "here.family: 1 is not allowed; allowed: portable"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_from_dict_refuses(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileConfig.from_dict(data, "here")


def test_from_dict_round_trip() -> None:
    tile = TileConfig(16, 64, 128, GROUP_SIZE_M=4, SWAP_AB=True, num_warps=8, num_stages=5)
    assert_round_trip(tile)
    assert TileConfig.from_dict(PLAIN) == TileConfig(16, 64, 64)


def gemms(model: Any, stored: dict[str, int], split: Parallel) -> tuple[Gemm, Gemm]:
    """Both GEMMs of a known model, written out without the package's own code."""
    s = model.shape
    experts, inner = s.num_experts // split.ep, s.intermediate_size // split.tp
    gated = model.activation.gated
    return (
        Gemm("gemm1", experts, s.top_k, inner * (2 if gated else 1), s.hidden_size, gated, **stored),
        Gemm("gemm2", experts, s.top_k, s.hidden_size, inner, False, **stored),
    )


# How activations and weights are stored: bits of a value, K group, and of block scales the rows that share one.
STORED: dict[str, tuple[int, ...]] = {
    "16 bit": (16, 16, 0),
    "float32": (32, 32, 0),
    "w8a8": (8, 8, 0),
    "w8a8, groups of 128": (8, 8, 128, 128),
    "w8a8, groups of 32": (8, 8, 32, 32),
    "w8a16": (16, 8, 0),
    "w8a16, groups of 64": (16, 8, 64),
    "w4a16, groups of 16": (16, 4, 16),
    "w4a16, groups of 128": (16, 4, 128),
    "w4 with float32": (32, 4, 32),
}


def stored_as(name: str) -> dict[str, int]:
    return dict(zip(("a_bits", "w_bits", "group_k", "group_n"), STORED[name], strict=False))


def splits(model: Any) -> list[Parallel]:
    s = model.shape
    wanted = [Parallel(), Parallel(tp=8), Parallel(ep=8)]
    return [p for p in wanted if s.intermediate_size % p.tp == 0 and s.num_experts % p.ep == 0]


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("stored", STORED)
def test_default_tiles_are_legal(target: str, stored: str) -> None:
    device = TARGETS[target]
    layers = {gemms(model, stored_as(stored), split): model.name
              for model in load_models().values() for split in splits(model)}  # fmt: skip
    some = BUCKETS[list(TARGETS).index(target) % 2 :: 2]  # the others on the next target
    for (pair, name), tokens, low_latency in product(layers.items(), some, (False, True)):
        assert_legal(*pair, tokens, device, low_latency, name)


def assert_legal(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool, name: str) -> None:
    tiles = default_tiles(gemm1, gemm2, tokens, device, low_latency)
    assert tiles.gemm1.BLOCK_SIZE_M == tiles.gemm2.BLOCK_SIZE_M, (name, tokens)
    for tile, gemm in ((tiles.gemm1, gemm1), (tiles.gemm2, gemm2)):
        assert why_illegal(tile, gemm, device) is None, (name, tokens, tile)
        assert tile.family in FAMILIES
        assert_round_trip(tile)


@functools.cache  # many layers have the same tiles
def assert_round_trip(tile: TileConfig) -> None:
    assert TileConfig.from_dict(tile.to_dict()) == tile


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("stored", STORED)
def test_default_tiles_of_tiny_layers_are_legal(target: str, stored: str) -> None:
    how = stored_as(stored)
    for experts, top_k, rows, depth in product((1, 8, 1024), (1, 8), (2, 30, 511), (1, 7, 511)):
        gemm1 = Gemm("gemm1", experts, min(top_k, experts), rows, depth, True, **how)
        gemm2 = Gemm("gemm2", experts, min(top_k, experts), depth, rows // 2, False, **how)
        for tokens in (1, 3, 65536):
            assert_legal(gemm1, gemm2, tokens, TARGETS[target], False, "tiny")


W8A8 = replace(GEMM, a_bits=8, w_bits=8)


@pytest.mark.parametrize(
    ("gemm", "block_k", "reason"),
    [
        (W8A8, 16, "BLOCK_SIZE_K=16 is below the 32 steps of an 8-bit tensor-core product"),
        (replace(W8A8, group_k=64), 128, "BLOCK_SIZE_K=128 does not divide the quant group of 64"),
        (replace(W8A8, group_k=16), 32, "BLOCK_SIZE_K=32 does not divide the quant group of 16"),
        (replace(W8A8, group_k=64), 32, None),
        (W8A8, 256, None),
        (replace(GEMM, w_bits=4, group_k=64), 128, None),  # weights are scaled in registers, group by group
        (replace(GEMM, w_bits=4, group_k=64), 32, None),
    ],
)
def test_legality_of_quant_groups(gemm: Gemm, block_k: int, reason: str | None) -> None:
    assert why_illegal(replace(TILE, BLOCK_SIZE_K=block_k), gemm, H200) == reason


QWEN3, DEEPSEEK = (2048, 768, 128), (7168, 256, 256)  # hidden size, intermediate size, experts
BLOCKS, CHANNEL, PLAIN_BITS = "w8a8, groups of 128", "w8a8", "16 bit"


@pytest.mark.parametrize(
    ("stored", "sizes", "tokens", "target", "family", "block_m"),
    [
        (PLAIN_BITS, QWEN3, 1, "cuda:90", "stream", 1),
        (PLAIN_BITS, QWEN3, 1, "cuda:100", "portable", 16),
        (PLAIN_BITS, QWEN3, 2, "cuda:90", "stream", 2),
        (PLAIN_BITS, QWEN3, 2, "cuda:100", "portable", 16),
        (PLAIN_BITS, QWEN3, 4, "cuda:90", "portable", 16),
        (BLOCKS, QWEN3, 1, "cuda:90", "stream", 1),
        (CHANNEL, QWEN3, 1, "cuda:90", "stream", 1),
        (BLOCKS, QWEN3, 4, "cuda:90", "stream", 4),
        (BLOCKS, (2048, 768, 64), 4, "cuda:90", "portable", 8),
        (CHANNEL, QWEN3, 2, "cuda:90", "stream", 2),
        (CHANNEL, QWEN3, 4, "cuda:90", "portable", 8),
        (BLOCKS, QWEN3, 16, "cuda:90", "cooperative", 16),
        (BLOCKS, QWEN3, 64, "cuda:90", "cooperative", 16),
        (BLOCKS, DEEPSEEK, 8, "cuda:90", "portable", 8),
        (BLOCKS, DEEPSEEK, 64, "cuda:90", "cooperative", 16),
        (BLOCKS, (7168, 2048, 32), 4, "cuda:90", "cooperative", 16),
        (BLOCKS, (7168, 2048, 32), 16, "cuda:90", "cooperative", 16),
        (BLOCKS, (7168, 2048, 32), 64, "cuda:90", "cooperative", 32),
        (CHANNEL, (4096, 14336, 8), 4, "cuda:90", "portable", 16),
        (CHANNEL, (4096, 14336, 8), 64, "cuda:90", "cooperative", 128),
        (BLOCKS, QWEN3, 512, "cuda:90", "cooperative", 64),
        (BLOCKS, QWEN3, 2048, "cuda:90", "cooperative", 128),
        (BLOCKS, (2048, 720, 128), 2048, "cuda:90", "portable", 64),
        (BLOCKS, DEEPSEEK, 512, "cuda:90", "cooperative", 32),
        (BLOCKS, DEEPSEEK, 4096, "cuda:90", "cooperative", 128),
        (BLOCKS, DEEPSEEK, 16384, "cuda:90", "cooperative", 128),
        (BLOCKS, DEEPSEEK, 16384, "cuda:100", "portable", 64),
        (BLOCKS, (256, 256, 256), 16384, "cuda:90", "cooperative", 128),
        (CHANNEL, QWEN3, 256, "cuda:90", "cooperative", 32),
        (CHANNEL, QWEN3, 1024, "cuda:90", "cooperative", 64),
        (CHANNEL, QWEN3, 16384, "cuda:90", "cooperative", 128),
        (PLAIN_BITS, QWEN3, 64, "cuda:90", "cooperative", 16),
        (PLAIN_BITS, QWEN3, 128, "cuda:90", "cooperative", 64),
        (PLAIN_BITS, (2048, 512, 512), 256, "cuda:90", "cooperative", 16),
        (PLAIN_BITS, QWEN3, 512, "cuda:90", "cooperative", 64),
        (PLAIN_BITS, QWEN3, 4096, "cuda:90", "cooperative", 128),
        (PLAIN_BITS, QWEN3, 4096, "cuda:80", "portable", 128),
        (PLAIN_BITS, DEEPSEEK, 16, "cuda:90", "cooperative", 16),
        (PLAIN_BITS, (2880, 2880, 128), 2, "cuda:90", "cooperative", 16),
        (PLAIN_BITS, (2880, 2880, 128), 16, "cuda:90", "cooperative", 16),
        (PLAIN_BITS, (2880, 2880, 128), 256, "cuda:90", "portable", 32),
        (PLAIN_BITS, (4096, 1408, 128), 256, "cuda:90", "cooperative", 64),
        (PLAIN_BITS, (4096, 14336, 8), 256, "cuda:90", "portable", 128),
        (PLAIN_BITS, (4096, 14336, 8), 1024, "cuda:90", "cooperative", 128),
        (PLAIN_BITS, (4096, 14336, 8), 4096, "cuda:90", "portable", 128),
        (PLAIN_BITS, (2880, 2880, 128), 512, "cuda:90", "cooperative", 64),
        (PLAIN_BITS, (2048, 512, 512), 16384, "cuda:90", "cooperative", 128),
    ],
)
def test_the_default_is_of_the_family_that_measured_faster(
    stored: str, sizes: tuple[int, int, int], tokens: int, target: str, family: str, block_m: int
) -> None:
    hidden, inter, experts = sizes
    common: dict[str, Any] = {"num_experts": experts, "top_k": 8, **stored_as(stored)}
    gemm1 = Gemm(op="gemm1", rows=2 * inter, depth=hidden, gated=True, **common)
    gemm2 = Gemm(op="gemm2", rows=hidden, depth=inter, gated=False, **common)
    low_latency = tokens * 8 * 4 <= experts
    tiles = default_tiles(gemm1, gemm2, tokens, TARGETS[target], low_latency)
    assert (tiles.gemm1.family, tiles.gemm1.BLOCK_SIZE_M) == (family, block_m)
    portable = default_tiles(gemm1, gemm2, tokens, TARGETS[target], low_latency, portable=True)
    assert {portable.gemm1.family, portable.gemm2.family} == {"portable"}
