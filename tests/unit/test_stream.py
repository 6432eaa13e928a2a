"""The family "stream" without a GPU: which tiles and calls it takes, how work is shared, what descriptors show."""

import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from moegen.runtime import stream
from moegen.runtime.configs import bucket_of
from moegen.runtime.descriptors import descriptor_base, readable_by_tma
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.layer import Call, launch_key
from moegen.runtime.stream import BarrierWords, stream_sizes
from moegen.runtime.stream_sizes import StreamSizes, most_tokens
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, shared_memory, why_illegal
from moegen.runtime.weight import Weight
from tests.unit.test_configs import LAYER

H200 = TARGETS["cuda:90"]
GEMM1 = Gemm("gemm1", 128, 8, 1536, 2048, True, a_bits=16, w_bits=16, group_k=0)
GEMM2 = Gemm("gemm2", 128, 8, 2048, 768, False, a_bits=16, w_bits=16, group_k=0)
TILE = TileConfig(1, 16, 512, PDL=True, num_warps=4, num_stages=5, family="stream")

ILLEGAL: list[tuple[dict[str, Any], str]] = [
    ({"BLOCK_SIZE_M": 8}, "BLOCK_SIZE_M=8 is not the 1, 2 or 4 tokens of family=stream"),
    ({"BLOCK_SIZE_N": 4}, "BLOCK_SIZE_N=4 is outside 8..64"),
    ({"BLOCK_SIZE_N": 128}, "BLOCK_SIZE_N=128 is outside 8..64"),
    ({"BLOCK_SIZE_K": 32, "BLOCK_SIZE_N": 64}, "BLOCK_SIZE_K=32 is not 1 to 8 times 128 bytes"),
    ({"BLOCK_SIZE_K": 1024}, "BLOCK_SIZE_K=1024 is not 1 to 8 times 128 bytes"),
    ({"BLOCK_SIZE_K": 128}, "16 rows of 2 times 128 bytes are not the 64 of a product"),
    ({"BLOCK_SIZE_K": 256, "BLOCK_SIZE_N": 8}, "8 rows of 4 times 128 bytes are not the 64 of a product"),
    ({"num_warps": 2}, "num_warps=2 is not 4 or 8"),
    ({"num_warps": 16}, "num_warps=16 is not 4 or 8"),
    ({"num_stages": 1}, "num_stages=1 is outside 2..32"),
    ({"num_stages": 33}, "num_stages=33 is outside 2..32"),
    ({"num_stages": 13}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
    ({"num_stages": 12, "BLOCK_SIZE_M": 4}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
    ({"SWAP_AB": True}, "SWAP_AB and GROUP_SIZE_M are not for family=stream"),
    ({"GROUP_SIZE_M": 2}, "SWAP_AB and GROUP_SIZE_M are not for family=stream"),
]


@pytest.mark.parametrize(("changes", "reason"), ILLEGAL)
def test_illegal(changes: dict[str, Any], reason: str) -> None:
    assert why_illegal(TILE, GEMM1, H200) is None
    assert why_illegal(TILE, GEMM2, H200) is None
    assert reason in (why_illegal(replace(TILE, **changes), GEMM1, H200) or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"BLOCK_SIZE_M": 2},
        {"BLOCK_SIZE_M": 4},
        {"BLOCK_SIZE_N": 8},
        {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64},
        {"BLOCK_SIZE_K": 256},
        {"num_warps": 8},
        {"num_stages": 2},
        {"num_stages": 12},
    ],
)
def test_legal(changes: dict[str, Any]) -> None:
    assert why_illegal(replace(TILE, **changes), GEMM1, H200) is None


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
TILE_8 = replace(TILE, BLOCK_SIZE_K=1024, num_warps=8)


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"num_warps": 4}, {}, None),
        ({"BLOCK_SIZE_K": 512}, {}, None),
        ({"BLOCK_SIZE_K": 128, "BLOCK_SIZE_N": 64}, {}, None),
        ({"BLOCK_SIZE_K": 256}, {}, "16 rows of 2 times 128 bytes are not the 64 of a product"),
        ({"BLOCK_SIZE_K": 64, "BLOCK_SIZE_N": 64}, {}, "BLOCK_SIZE_K=64 is not 1 to 8 times 128 bytes"),
        ({"BLOCK_SIZE_K": 2048}, {}, "BLOCK_SIZE_K=2048 is not 1 to 8 times 128 bytes"),
        ({}, {"depth": 2056}, "rows of 2056 values are not the multiple of 16 bytes"),
        ({}, {"rows": 1544}, "BLOCK_SIZE_N=16 does not divide 1544 rows and the 128 of a scale"),
        ({"BLOCK_SIZE_N": 8}, {"rows": 1544}, None),
        ({}, {"group_n": 8}, "BLOCK_SIZE_N=16 does not divide 1536 rows and the 8 of a scale"),
        ({"num_stages": 12}, {}, None),
        ({"num_stages": 13}, {}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
        ({"num_stages": 12, "BLOCK_SIZE_M": 4}, {}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
        ({"num_stages": 9}, {"rows": 65536}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
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
        ({"BLOCK_SIZE_K": 512}, {}, None),
        ({"BLOCK_SIZE_K": 256}, {}, "16 rows of 2 times 128 bytes are not the 64 of a product"),
        ({"BLOCK_SIZE_N": 64, "num_stages": 2}, {"rows": 1544}, None),
        ({}, {"depth": 2056}, "rows of 2056 values are not the multiple of 16 bytes"),
        ({"num_stages": 12}, {}, None),
        ({"num_stages": 13}, {}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
        ({"num_stages": 9}, {"depth": 65536}, "bytes of shared memory exceed the 232448 of NVIDIA H200"),
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


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_a_block_has_room_for_all_its_tiles(tokens: int, group: int) -> None:
    shapes: list[dict[str, int]] = [{}, {"top_k": 3, "hidden_size": 656, "intermediate_size": 272}]
    for fields, depth in product([*shapes, {"intermediate_size": 14336}], (512, 1024)):
        found = sizes(tokens, **{**EIGHT_BITS, "depth": depth, "group_k": group, **fields})
        for blocks in (64, 78, 132):
            assert -(-tokens * found.top_k * found.strips1 // blocks) <= found.most_units1
            assert -(-tokens * found.strips2 // blocks) <= found.most_units2
        assert found.entries1 >= (found.chunks1 if group else 1)
        assert found.entries2 >= (found.chunks2 if group else found.top_k)
        if group:  # all that is loaded for a strip has a place
            assert found.entries1 * found.entry >= -(-found.hidden_size // group)
            assert found.entries2 * found.entry >= found.top_k * found.hidden_parts
        for entries in (found.entries1, found.entries2):
            assert entries & (entries - 1) == 0, "no shape of a tensor"


@pytest.mark.parametrize(
    ("tile", "gemm"), [(TILE, GEMM1), (TILE_8, BLOCKS1), (TILE_8, BLOCKS2), (TILE_8, CHANNEL1), (TILE_8, CHANNEL2)]
)
def test_two_blocks_fit_a_multiprocessor(tile: TileConfig, gemm: Gemm) -> None:
    assert 2 * (shared_memory(tile, gemm) + 1024) <= 233_472
    assert 2 * 32 * (tile.num_warps + 4) * stream._REGISTERS[tile.num_warps] <= 65_536


@pytest.mark.parametrize(("block_m", "most"), [(1, 1), (2, 2), (4, 5)])
def test_room_is_for_the_most_tokens_that_a_tile_is_chosen_for(block_m: int, most: int) -> None:
    assert most_tokens(block_m) == most
    assert most == max(tokens for tokens in range(1, 9) if tokens / block_m <= math.sqrt(2))
    assert most == max(tokens for tokens in range(1, 9) if bucket_of(tokens) == block_m)
    tile = replace(TILE, BLOCK_SIZE_M=block_m)
    taken = [stream_sizes(LAYER, tile, tokens, False).memory for tokens in range(1, most + 2)]
    assert taken == sorted(taken)
    assert taken[most - 1] == shared_memory(tile, GEMM1) == shared_memory(tile, GEMM2) < taken[most]


# (top_k, hidden size, intermediate size, bits) of models, and the tile (rows, depth, warps, stages) that is
# measured best, with as many stages as leave room for the next launch;
# docs/results/experiments/h200-stream-on-tensor-cores.txt.
LOW, LOW_8 = (16, 512, 4, 5), (16, 1024, 8, 5)
MEASURED = {
    "Qwen3-30B-A3B": (8, 2048, 768, 16, LOW),
    "Qwen3-Next": (10, 2048, 512, 16, LOW),
    "Qwen3-235B TP4": (8, 4096, 384, 16, LOW),
    "DeepSeek-V3 TP8": (8, 7168, 256, 16, LOW),
    "gpt-oss-120b": (4, 2880, 2880, 16, (32, 256, 4, 4)),
    "Mixtral-8x7B": (2, 4096, 14336, 16, (32, 256, 4, 5)),
    "Qwen3-30B-A3B fp8": (8, 2048, 768, 8, LOW_8),
    "DeepSeek-V3 TP8 fp8": (8, 7168, 256, 8, LOW_8),
    "DeepSeek-V3 EP8 fp8": (8, 7168, 2048, 8, (32, 512, 4, 4)),
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
    ("model", "tokens", "tile", "most"),
    [
        ("Qwen3-30B-A3B", 2, (16, 512, 4, 4), 5),
        ("Qwen3-Next", 2, (16, 512, 4, 4), 5),
        ("DeepSeek-V3 TP8", 2, (16, 512, 4, 4), 5),
        ("Qwen3-30B-A3B fp8", 2, (16, 512, 4, 8), 8),
        ("Qwen3-30B-A3B fp8", 4, (32, 512, 4, 3), 5),
        ("DeepSeek-V3 TP8 fp8", 4, (32, 512, 4, 3), 5),
    ],
)
def test_some_tokens_take_it(model: str, tokens: int, tile: tuple[int, int, int, int], most: int) -> None:
    """With `most` stages, or as many as leave room for the next launch."""
    top_k, hidden, intermediate, bits, _ = MEASURED[model]
    pair = gemms(top_k, hidden, intermediate, bits, 128 if bits == 8 else 0)
    rows, depth, warps, stages = tile
    found = TileConfig(tokens, rows, depth, PDL=True, num_warps=warps, num_stages=stages, family="stream")
    assert default_tiles(*pair, tokens, H200, low_latency=True) == LayerTiles(found, found)
    assert 2 * (max(shared_memory(found, gemm) for gemm in pair) + 1024) <= 233_472
    more = replace(found, num_stages=stages + 1)
    assert stages == most or 2 * (max(shared_memory(more, gemm) for gemm in pair) + 1024) > 233_472


@pytest.mark.parametrize("bits", [8, 16])
def test_a_layer_without_gates_takes_higher_tiles(bits: int) -> None:
    gated, gemm2 = gemms(8, 2048, 768, bits)
    single = replace(gated, gated=False, rows=768)
    rows = [default_tiles(gemm1, gemm2, 1, H200, low_latency=True).gemm1.BLOCK_SIZE_N for gemm1 in (gated, single)]
    assert rows == [16, 32]


@pytest.mark.parametrize(
    ("fields", "tokens", "target"),
    [
        ({"top_k": 4, "hidden": 2880, "intermediate": 2880}, 2, "cuda:90"),  # two blocks do not fit
        ({}, 4, "cuda:90"),
        ({"bits": 8}, 4, "cuda:90"),
        ({"bits": 8, "group": 128, "top_k": 9}, 4, "cuda:90"),  # tokens share experts
        ({"bits": 8, "group": 128, "intermediate": 256}, 8, "cuda:90"),
        ({}, 2, "cuda:100"),
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


def sizes(tokens: int = 1, **fields: Any) -> StreamSizes:
    return replace(stream_sizes(LAYER, TILE, tokens, weight_on_input=False), **fields)


EIGHT_BITS: dict[str, Any] = {"value_bytes": 1, "quantised": True, "group_n": 128, "group_k": 128}
EIGHT_BITS |= {"depth": 1024, "warps": 8}


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
    found = sizes(3, **fields)
    assert (found.strips1, found.strips2) == strips
    assert (found.units1, found.units2) == (3 * 8 * strips[0], 3 * strips[1])
    halves = (found.intermediate_size // (1 if found.gated else 2), found.hidden_size // 2)
    for half, count in zip(halves, strips, strict=True):
        assert (count - 1) * found.columns < half <= count * found.columns


@pytest.mark.parametrize(
    ("fields", "parts", "steps"),
    [
        ({}, 12, (8, 4)),
        ({"depth": 256}, 12, (4, 4)),
        ({"intermediate_size": 256}, 4, (8, 4)),
        (EIGHT_BITS, 6, (8, 2)),
        ({**EIGHT_BITS, "group_k": 0, "group_n": 0}, 8, (8, 8)),  # scales of whole rows: a tile is one slot's
        ({**EIGHT_BITS, "intermediate_size": 384}, 3, (8, 1)),
        ({"hidden_size": 2880, "intermediate_size": 2880}, 48, (8, 8)),  # 45
        ({"hidden_size": 2880, "intermediate_size": 2880, "depth": 128}, 46, (2, 2)),
        ({"hidden_size": 656}, 12, (1, 1)),  # rows do not end with a part
        ({"intermediate_size": 720}, 12, (1, 1)),
        ({**EIGHT_BITS, "intermediate_size": 720}, 6, (1, 1)),
    ],
)
def test_a_load_is_of_one_slot(fields: dict[str, Any], parts: int, steps: tuple[int, int]) -> None:
    found = sizes(**fields)
    assert found.hidden_parts == parts
    assert (found.step1, found.step2) == steps
    assert found.loads == found.parts // min(steps)
    assert found.whole == (steps[0] > 1)
    assert parts * found.part >= found.intermediate_size
    # Parts of a token's slots follow each other, whatever the tiles: none of the loads goes on into the next slot.
    starts = range(0, found.chunks2 * found.parts, found.step2)
    assert all(start // parts == (start + found.step2 - 1) // parts for start in starts)
    assert (found.chunks2 - 1) * found.parts < found.top_k * parts <= found.chunks2 * found.parts
    assert (found.chunks1 - 1) * found.depth < found.hidden_size <= found.chunks1 * found.depth


@pytest.mark.parametrize(
    ("fields", "rows", "warps", "window"),
    [
        ({}, 128, 4, 8),
        ({"warps": 8}, 128, 8, 8),
        ({"columns": 4}, 64, 4, 8),
        ({"columns": 4, "warps": 8}, 64, 4, 16),
        (EIGHT_BITS, 128, 8, 8),
        ({**EIGHT_BITS, "depth": 512}, 64, 4, 16),
        ({"columns": 32, "warps": 8}, 512, 8, 8),
    ],
)
def test_warps_share_a_product(fields: dict[str, Any], rows: int, warps: int, window: int) -> None:
    """By rows, and where those are few by columns: then a tile's parts have their place in a wider window."""
    found = sizes(5, **fields)
    assert (found.rows, found.tensor_warps, found.window) == (rows, warps, window)
    assert found.window % found.parts == 0
    assert found.segment % found.window == 0
    assert found.segments1 * found.segment >= 5 * found.chunks1 * found.parts
    assert found.segments2 * found.segment >= 5 * found.chunks2 * found.parts


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
    from moegen.runtime.gluon_parts import next_stage as compiled

    next_stage = run_as_python(compiled, monkeypatch, where=where)
    place, places = (0, 0), []
    for _ in range(7):
        places.append(place)
        place = next_stage(*place, 3)
    assert places == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)]


@pytest.mark.parametrize("grids", [(132,), (2,), (132, 78, 1, 132)])
def test_arrivals_of_a_grid_flip_the_top_bit(grids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 32 bits, for launches of different grids that share a word."""
    from moegen.runtime.stream_parts import wait_for_grid as compiled

    now = SimpleNamespace(word=0, grid=0, block=0)

    def add(_: object, arrival: int, **__: object) -> None:
        now.word = (now.word + arrival + (1 << 31)) % (1 << 32) - (1 << 31)

    def looks() -> Iterator[int]:
        yield now.word
        raise BlockingIOError

    look = lambda _: next(now.looks)  # noqa: E731
    where = lambda condition, one, other: one if condition else other  # noqa: E731
    place = {"program_id": lambda _: now.block, "num_programs": lambda _: now.grid}
    wait_for_grid = run_as_python(compiled, monkeypatch, where=where, atomic_add=add, **place)
    monkeypatch.setitem(compiled.fn.__globals__, "load_acquire", look)
    for grid in grids * 3:
        before, now.grid = now.word, grid
        for block in range(grid):
            now.block, now.looks = block, looks()
            with nullcontext() if block == grid - 1 else pytest.raises(BlockingIOError):
                wait_for_grid(None, before)
        assert now.word % (1 << 31) == 0


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("depth", [192, 200])
@pytest.mark.parametrize("first_gemm", [False, True])
def test_descriptors_pair_the_rows(first_gemm: bool, depth: int, padding: int) -> None:
    experts, rows = 3, 12
    wide = torch.arange(experts * rows * (depth + padding), dtype=torch.int16).view(torch.float16)
    w = wide.view(experts, rows, depth + padding)[..., :depth]
    lengths = (depth, 128) if first_gemm else (128, depth)
    for interleaved in (False, True):
        shape = sizes(interleaved=interleaved, hidden_size=lengths[0], intermediate_size=lengths[1])
        found = stream._weight_descriptor(w, w, shape, first_gemm)
        seen = torch.as_strided(w, found.shape, found.strides).view(torch.int16)
        by_turns = interleaved and first_gemm
        first, second = (w[:, 0::2], w[:, 1::2]) if by_turns else (w[:, : rows // 2], w[:, rows // 2 :])
        whole = depth == 192
        assert seen.shape[3:] == ((3, 64) if whole else (200,))
        assert torch.equal(seen[:, 0].flatten(2), first.view(torch.int16))
        assert torch.equal(seen[:, 1].flatten(2), second.view(torch.int16))
        step = 8 if first_gemm else 1
        assert found.block_shape == [1, 2, 8, *([step, 64] if whole else [64])]
        assert found.layout.swizzle_byte_width == 128


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
    tile = replace(TILE, BLOCK_SIZE_M=4)
    others = [LayerTiles(one, one) for one in (tile, replace(tile, num_stages=4), replace(tile, BLOCK_SIZE_M=2))]
    keys = [launch_key(LAYER, tokens, tiles, None) for tiles in others for tokens in (3, 4, 5)]
    assert len(set(keys)) == len(keys)  # the number of tokens is one of the sizes that a kernel is compiled for
    assert launch_key(LAYER, 3, others[0], None) == keys[0]
