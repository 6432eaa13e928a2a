"""The family "stream" without a GPU: which tiles and calls it takes, how work is shared, what descriptors show."""

import subprocess
import sys
import threading
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from moegen.runtime import stream
from moegen.runtime.descriptors import descriptor_base, readable_by_tma
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.layer import Call, launch_key
from moegen.runtime.stream import BarrierWords, StreamSizes, stream_sizes
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, shared_memory, why_illegal
from moegen.runtime.weight import Weight
from tests.unit.test_configs import LAYER

H200 = TARGETS["cuda:90"]
GEMM1 = Gemm("gemm1", 128, 8, 1536, 2048, True, a_bits=16, w_bits=16, group_k=0)
GEMM2 = Gemm("gemm2", 128, 8, 2048, 768, False, a_bits=16, w_bits=16, group_k=0)
TILE = TileConfig(1, 16, 512, PDL=True, num_warps=8, num_stages=6, family="stream")

ILLEGAL: list[tuple[dict[str, Any], str]] = [
    ({"BLOCK_SIZE_M": 2}, "BLOCK_SIZE_M=2 is not the 1 token of family=stream"),
    ({"BLOCK_SIZE_N": 8}, "BLOCK_SIZE_N=8 is outside 16..64"),
    ({"BLOCK_SIZE_N": 128}, "BLOCK_SIZE_N=128 is outside 16..64"),
    ({"BLOCK_SIZE_K": 128}, "BLOCK_SIZE_K=128 is not 256 or 512"),
    ({"BLOCK_SIZE_K": 1024}, "BLOCK_SIZE_K=1024 is not 256 or 512"),
    ({"num_warps": 2}, "num_warps=2 is not 4 or 8"),
    ({"num_stages": 1}, "num_stages=1 is outside 2..32"),
    ({"num_stages": 14}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
    ({"SWAP_AB": True}, "SWAP_AB and GROUP_SIZE_M are not for family=stream"),
    ({"GROUP_SIZE_M": 2}, "SWAP_AB and GROUP_SIZE_M are not for family=stream"),
]


@pytest.mark.parametrize(("changes", "reason"), ILLEGAL)
def test_illegal(changes: dict[str, Any], reason: str) -> None:
    assert why_illegal(TILE, GEMM1, H200) is None
    assert why_illegal(TILE, GEMM2, H200) is None
    assert reason in (why_illegal(replace(TILE, **changes), GEMM1, H200) or "")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cuda:90"])
def test_illegal_on_other_gpus(target: str) -> None:
    tile = replace(TILE, PDL=False)
    assert "family=stream needs compute capability 9.0" in (why_illegal(tile, GEMM1, TARGETS[target]) or "")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"w_bits": 8}, "not 8 and 16 bits with groups of 0"),
        ({"a_bits": 8, "w_bits": 8, "group_k": 32, "group_n": 32}, "not 8 and 8 bits with groups of 32"),
        ({"a_bits": 32, "w_bits": 32}, "not 32 and 32 bits"),
        ({"depth": 2044}, "rows of 2044 values are not the multiple of 16 bytes"),
    ],
)
def test_illegal_gemms(fields: dict[str, Any], reason: str) -> None:
    assert reason in (why_illegal(TILE, replace(GEMM1, **fields), H200) or "")


BLOCKS1, BLOCKS2 = (replace(gemm, a_bits=8, w_bits=8, group_k=128, group_n=128) for gemm in (GEMM1, GEMM2))
CHANNEL1, CHANNEL2 = (replace(gemm, a_bits=8, w_bits=8) for gemm in (GEMM1, GEMM2))
TILE_8 = replace(TILE, num_warps=4, num_stages=11)


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"BLOCK_SIZE_K": 256}, {}, None),
        ({"num_warps": 8}, {}, None),
        ({"num_warps": 8, "BLOCK_SIZE_K": 256}, {}, "BLOCK_SIZE_N=16 is outside 32..64"),
        ({"num_warps": 8, "BLOCK_SIZE_K": 256, "BLOCK_SIZE_N": 32}, {}, None),
        ({}, {"depth": 2056}, "rows of 2056 values are not the multiple of 16 bytes"),
        ({}, {"rows": 1544}, "BLOCK_SIZE_N=16 does not divide 1544 rows and the 128 of a scale"),
        ({}, {"group_n": 8}, "BLOCK_SIZE_N=16 does not divide 1536 rows and the 8 of a scale"),
        ({"num_stages": 28}, {}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
        ({"num_stages": 18}, {"rows": 65536}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
    ],
)
def test_legality_with_block_scales(changes: dict[str, Any], fields: dict[str, Any], reason: str | None) -> None:
    assert why_illegal(TILE_8, BLOCKS1, H200) is None
    assert why_illegal(TILE_8, BLOCKS2, H200) is None
    found = why_illegal(replace(TILE_8, **changes), replace(BLOCKS1, **fields), H200)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"BLOCK_SIZE_K": 256}, {}, None),
        ({"num_warps": 8, "BLOCK_SIZE_K": 256}, {}, "BLOCK_SIZE_N=16 is outside 32..64"),
        ({"BLOCK_SIZE_N": 64, "num_stages": 5}, {"rows": 1544}, None),
        ({}, {"depth": 2056}, "rows of 2056 values are not the multiple of 16 bytes"),
        ({"num_stages": 28}, {}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
        ({"num_stages": 26}, {"depth": 65536}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
    ],
)
def test_legality_without_groups(changes: dict[str, Any], fields: dict[str, Any], reason: str | None) -> None:
    assert why_illegal(TILE_8, CHANNEL1, H200) is None
    assert why_illegal(TILE_8, CHANNEL2, H200) is None
    found = why_illegal(replace(TILE_8, **changes), replace(CHANNEL1, **fields), H200)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("gemm", [BLOCKS1, CHANNEL1])
def test_scales_need_some_multiprocessors(gemm: Gemm) -> None:
    few = replace(H200, num_sms=16)
    assert why_illegal(TILE, GEMM1, few) is None
    assert "needs 64 multiprocessors, not 16" in (why_illegal(TILE_8, gemm, few) or "")


def test_a_block_has_room_for_all_its_tiles() -> None:
    for blocks in (64, 78, 132):
        shapes: list[dict[str, int]] = [{}, {"top_k": 3, "hidden_size": 656, "intermediate_size": 272}]
        for fields, group in product([*shapes, {"intermediate_size": 14336}], (0, 128)):
            found = sizes(columns=8, depth=256, group_k=group, **fields)
            assert -(-found.top_k * found.strips1 // blocks) * found.parts1 <= found.entries1
            assert -(-found.strips2 // blocks) * found.top_k * found.parts2 <= found.entries2


@pytest.mark.parametrize(
    ("tile", "gemm"), [(TILE, GEMM1), (TILE_8, BLOCKS1), (TILE_8, BLOCKS2), (TILE_8, CHANNEL1), (TILE_8, CHANNEL2)]
)
def test_two_blocks_fit_a_multiprocessor(tile: TileConfig, gemm: Gemm) -> None:
    assert 2 * (shared_memory(tile, gemm) + 1024) <= 233_472


# (top_k, hidden size, intermediate size, bits) of models, and the tile that is within 2 % of the fastest measured one
# (rows, depth, warps, stages); docs/results/experiments/h200-tiles-of-one-and-four-tokens.csv.
LOW, HIGH = (16, 512, 4, 6), (32, 256, 8, 6)
MEASURED = {
    "Qwen3-30B-A3B": (8, 2048, 768, 16, LOW),
    "Qwen3-Next": (10, 2048, 512, 16, LOW),
    "Qwen3-235B TP4": (8, 4096, 384, 16, LOW),
    "DeepSeek-V3 TP8": (8, 7168, 256, 16, HIGH),
    "gpt-oss-120b": (4, 2880, 2880, 16, HIGH),
    "Mixtral-8x7B": (2, 4096, 14336, 16, HIGH),
    "Qwen3-30B-A3B fp8": (8, 2048, 768, 8, (16, 512, 8, 11)),
    "DeepSeek-V3 TP8 fp8": (8, 7168, 256, 8, HIGH),
    "DeepSeek-V3 EP8 fp8": (8, 7168, 2048, 8, (32, 512, 8, 5)),
}


def gemms(top_k: int, hidden: int, intermediate: int, bits: int = 16, group: int = 0) -> tuple[Gemm, Gemm]:
    more = {"a_bits": bits, "w_bits": bits, "group_k": group, "group_n": group}
    return (
        Gemm("gemm1", 128, top_k, 2 * intermediate, hidden, True, **more),
        Gemm("gemm2", 128, top_k, hidden, intermediate, False, **more),
    )


@pytest.mark.parametrize("model", MEASURED)
@pytest.mark.parametrize("low_latency", [False, True])
def test_one_token_takes_it(model: str, low_latency: bool) -> None:
    top_k, hidden, intermediate, bits, (rows, depth, warps, stages) = MEASURED[model]
    pair = gemms(top_k, hidden, intermediate, bits, 128 if bits == 8 else 0)
    tiles = default_tiles(*pair, 1, H200, low_latency)
    expected = TileConfig(1, rows, depth, PDL=True, num_warps=warps, num_stages=stages, family="stream")
    assert tiles == LayerTiles(expected, expected)


def test_one_token_of_8_bit_weights_takes_the_same_tiles_whatever_the_scales() -> None:
    channel, block = (default_tiles(*gemms(8, 2048, 768, bits=8, group=g), 1, H200, True) for g in (0, 128))
    assert channel == block
    assert channel.gemm1.family == "stream"


@pytest.mark.parametrize(
    ("fields", "tokens", "target"),
    [
        ({}, 2, "cuda:90"),
        ({}, 1, "cuda:80"),
        ({}, 1, "cuda:100"),
        ({}, 1, "hip:gfx942"),
        ({"bits": 32}, 1, "cuda:90"),
        ({"hidden": 511}, 1, "cuda:90"),
        ({"intermediate": 511}, 1, "cuda:90"),
    ],
)
def test_others_do_not(fields: dict[str, int], tokens: int, target: str) -> None:
    pair = gemms(**{"top_k": 8, "hidden": 2048, "intermediate": 768, **fields})
    tiles = default_tiles(*pair, tokens, TARGETS[target], low_latency=True)
    assert (tiles.gemm1.family, tiles.gemm2.family) == ("portable", "portable")
    assert tiles == default_tiles(*pair, tokens, TARGETS[target], low_latency=True, portable=True)


def test_choosing_it_imports_nothing_of_gluon() -> None:
    code = (
        "import sys, tests.unit.test_stream as own, moegen.runtime.package;"
        "own.test_one_token_takes_it('Qwen3-Next', True);"
        "assert not [name for name in sys.modules if 'experimental.gluon' in name or name.endswith('stream_kernel')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


def sizes(**fields: Any) -> StreamSizes:
    return replace(stream_sizes(LAYER, TILE, weight_on_input=False), **fields)


@pytest.mark.parametrize(
    ("fields", "strips"),
    [
        ({}, (96, 128)),
        ({"columns": 16}, (48, 64)),
        ({"gated": False}, (48, 128)),
        ({"hidden_size": 2888, "intermediate_size": 708}, (89, 181)),
    ],
)
def test_strips_cover_all_rows(fields: dict[str, Any], strips: tuple[int, int]) -> None:
    found = sizes(**fields)
    assert (found.strips1, found.strips2) == strips
    halves = (found.intermediate_size // (1 if found.gated else 2), found.hidden_size // 2)
    for half, count in zip(halves, strips, strict=True):
        assert (count - 1) * found.columns < half <= count * found.columns


@pytest.mark.parametrize("length", [8, 256, 511, 512, 2880, 7168])
def test_outside_is_outside(length: int) -> None:
    found = sizes(hidden_size=length, intermediate_size=16)
    assert found.outside >= length
    assert found.outside % found.depth == 0


def run_as_python(function: Any, monkeypatch: pytest.MonkeyPatch, **language: Any) -> Any:
    """The source of a Gluon function as ordinary Python, with stand-ins for what it takes from the language."""
    monkeypatch.setitem(function.fn.__globals__, "gl", SimpleNamespace(constexpr=int, **language))
    return function.fn


@pytest.mark.parametrize("blocks", [1, 2, 132])
@pytest.mark.parametrize("units", [0, 1, 96, 128, 768, 6144, 92_160])
def test_every_unit_has_one_block(units: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moegen.runtime.stream_parts import share as compiled

    share = run_as_python(compiled, monkeypatch, num_programs=lambda _: blocks)
    shares = [share(units, block) for block in range(blocks)]
    assert [unit for first, last in shares for unit in range(first, last)] == list(range(units))
    counts = [last - first for first, last in shares]
    assert max(counts) - min(counts) <= 1


def test_stages_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    where = lambda condition, one, other: one if condition else other  # noqa: E731
    from moegen.runtime.stream_parts import next_stage as compiled

    next_stage = run_as_python(compiled, monkeypatch, where=where)
    place, places = (0, 0), []
    for _ in range(7):
        places.append(place)
        place = next_stage(*place, 3)
    assert places == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)]


@pytest.mark.parametrize("grids", [(132,), (2,), (132, 78, 1, 132)])
def test_arrivals_of_a_grid_flip_the_top_bit(grids: tuple[int, ...]) -> None:
    """What _stream_rows adds, in 32 bits, for launches of different grids that share a word."""
    word = 0
    for grid in grids * 3:
        before = word
        for block in range(grid):
            assert (word ^ before) < 1 << 31, "released before all have arrived"
            word = (word + (2147483647 - (grid - 2) if block == 0 else 1)) % (1 << 32)
        assert (word ^ before) >= 1 << 31
        assert word % (1 << 31) == 0


@pytest.mark.parametrize("padding", [0, 8])
def test_descriptors_pair_the_rows(padding: int) -> None:
    experts, rows, depth = 3, 12, 16
    wide = torch.arange(experts * rows * (depth + padding), dtype=torch.float16)
    w = wide.view(experts, rows, depth + padding)[..., :depth]
    for interleaved in (False, True):
        found = stream._weight_descriptor(w, w, sizes(), interleaved)
        seen = torch.as_strided(w, found.shape, found.strides)
        first, second = (w[:, 0::2], w[:, 1::2]) if interleaved else (w[:, : rows // 2], w[:, rows // 2 :])
        assert torch.equal(seen[:, 0], first)
        assert torch.equal(seen[:, 1], second)
        assert found.block_shape == [1, 2, 8, 512]


def call(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> Call:
    none = torch.empty(0)
    return Call(x, Weight(w13), Weight(w2), none, none, None, False, none)


def test_readable() -> None:
    def values(*shape: int, skip: int = 0) -> torch.Tensor:
        return torch.zeros(*shape[:-1], shape[-1] + skip, dtype=torch.bfloat16)[..., skip:]

    assert readable_by_tma(call(values(1, 64), values(4, 8, 64), values(4, 64, 8)))
    assert readable_by_tma(call(values(1, 64, skip=8), values(4, 8, 64, skip=8), values(4, 64, 8, skip=8)))
    for odd in range(3):  # an address that is no multiple of 16 bytes; rows of weights whose distance is none
        tensors = [values(1, 64), values(4, 8, 64), values(4, 64, 8)]
        tensors[odd] = values(*tensors[odd].shape, skip=4)
        assert not readable_by_tma(call(*tensors))


def test_launches_that_may_overlap_have_words_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words = BarrierWords(torch.device("cpu"))
    now = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(words, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=now.stream))
    first = words.word().data_ptr()
    assert words.word().data_ptr() == first
    now.stream = 2
    second = words.word().data_ptr()
    now.capturing = True
    captured = {words.word().data_ptr() for _ in range(100)}
    assert len(captured) == 100
    assert not captured & {first, second}
    assert first != second

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(words.word().data_ptr())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*found, *captured}) == 120
    assert all(word % 32 == found[0] % 32 for word in found)  # a sector of L2 each

    monkeypatch.setattr(words, "_used", stream._WORDS)
    with pytest.raises(RuntimeError, match="no more fit"):
        words.word()


def test_a_warm_up_shows_descriptors_of_some_memory() -> None:
    here, nowhere = torch.zeros(8), torch.empty(8, device="meta")
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    assert descriptor_base(here, on_gpu) is here
    assert descriptor_base(nowhere, nowhere) is nowhere  # only compiled
    assert not descriptor_base(nowhere, on_gpu).is_meta


def test_launch_key_tells_kernels_apart() -> None:
    tiles, others = LayerTiles(TILE, TILE), default_tiles(GEMM1, GEMM2, 1, H200, True)
    assert launch_key(LAYER, 1, tiles, None) != launch_key(LAYER, 1, others, None)
