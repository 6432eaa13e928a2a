"""The family "cooperative" without a GPU: what is refused and why, and where the heuristic takes it."""

from dataclasses import replace

import pytest

from moegen.device import TARGETS
from moegen.runtime.cooperative_sizes import joins, quantises_hidden
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, shared_memory, why_illegal

H200 = TARGETS["cuda:90"]
FIRST = Gemm("gemm1", 128, 8, 1536, 2048, True, a_bits=8, w_bits=8, group_k=128, group_n=128)
SECOND = replace(FIRST, op="gemm2", rows=2048, depth=768, gated=False)
WIDE = TileConfig(128, 256, 128, 4, num_warps=8, num_stages=4, family="cooperative")
NARROW = replace(WIDE, BLOCK_SIZE_N=128, num_stages=6)
LOW = replace(WIDE, BLOCK_SIZE_M=64)
SWAPPED = replace(WIDE, BLOCK_SIZE_M=16, SWAP_AB=True)
PLAIN = replace(FIRST, group_k=0, group_n=0)
DEEP = replace(WIDE, BLOCK_SIZE_K=64)
SIXTEEN = replace(PLAIN, a_bits=16, w_bits=16)
OTHER_BITS = "family=cooperative is for weights and activations of 8 bits or of 16, not"

ILLEGAL: list[tuple[TileConfig, Gemm, str]] = [
    (WIDE, replace(FIRST, a_bits=16), f"{OTHER_BITS} 8 and 16"),
    (WIDE, replace(SIXTEEN, a_bits=32, w_bits=32), f"{OTHER_BITS} 32 and 32"),
    (WIDE, replace(FIRST, group_n=64), "family=cooperative knows block scales of 128x128, not 64x128"),
    (WIDE, SIXTEEN, "BLOCK_SIZE_K=128 is not the 64 of family=cooperative"),
    (DEEP, PLAIN, "BLOCK_SIZE_K=64 is not the 128 of family=cooperative"),
    (DEEP, replace(SIXTEEN, depth=2044), "rows of 4088 bytes are not the multiple of 16 that TMA needs"),
    (WIDE, replace(FIRST, interleaved=True), "family=cooperative has no interleaved gate and up rows"),
    (WIDE, replace(FIRST, rows=2 * 192), "gate and up rows share weight scales of 128 rows"),
    (WIDE, replace(FIRST, depth=2040), "rows of 2040 bytes are not the multiple of 16 that TMA needs"),
    (replace(WIDE, SWAP_AB=True), FIRST, "SWAP_AB=True is not for BLOCK_SIZE_M=128 of family=cooperative"),
    (replace(SWAPPED, SWAP_AB=False), FIRST, "SWAP_AB=False is not for BLOCK_SIZE_M=16 of family=cooperative"),
    (
        replace(WIDE, BLOCK_SIZE_M=256),
        SECOND,
        "BLOCK_SIZE_M=256 is not the 16 or 32 or 64 or 128 of family=cooperative",
    ),
    (replace(WIDE, BLOCK_SIZE_N=64), SECOND, "BLOCK_SIZE_N=64 is not the 128 or 256 of family=cooperative"),
    (replace(WIDE, BLOCK_SIZE_K=64), SECOND, "BLOCK_SIZE_K=64 is not the 128 of family=cooperative"),
    (replace(WIDE, num_warps=4), SECOND, "num_warps=4 is not the 8 of family=cooperative"),
    (replace(DEEP, num_stages=3), SIXTEEN, "num_stages=3 is below the 4 of family=cooperative"),
    (replace(WIDE, num_stages=2), SECOND, "num_stages=2 is below the 3 of family=cooperative"),
    (replace(WIDE, num_stages=5), FIRST, "262404 bytes of shared memory exceed the 232448 of NVIDIA H200"),
]


@pytest.mark.parametrize(("tile", "gemm", "reason"), ILLEGAL)
def test_illegal(tile: TileConfig, gemm: Gemm, reason: str) -> None:
    assert why_illegal(tile, gemm, H200) == reason


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "cuda:90"])
def test_no_other_target_runs_it(target: str) -> None:
    device = TARGETS[target]
    reason = f"family=cooperative needs compute capability 9.0, not {device.backend} {device.arch}"
    assert why_illegal(WIDE, FIRST, device) == reason


@pytest.mark.parametrize("tile", [WIDE, NARROW, LOW, SWAPPED, replace(WIDE, num_stages=3)])
@pytest.mark.parametrize(
    "gemm", [FIRST, SECOND, replace(SECOND, rows=720, depth=400), replace(FIRST, rows=400, gated=False)]
)
def test_legal(tile: TileConfig, gemm: Gemm) -> None:
    assert why_illegal(tile, gemm, H200) is None


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tile", [WIDE, NARROW, LOW, replace(LOW, BLOCK_SIZE_N=128), SWAPPED])
def test_legal_without_block_scales(tile: TileConfig, gated: bool) -> None:
    assert why_illegal(tile, replace(PLAIN, gated=gated, rows=400), H200) is None
    assert why_illegal(replace(tile, BLOCK_SIZE_K=64), replace(SIXTEEN, gated=gated, rows=400, depth=88), H200) is None


def test_shared_memory() -> None:
    """The compiler's own figures; tests/compile compares them for more forms."""
    assert (shared_memory(WIDE, FIRST), shared_memory(WIDE, SECOND)) == (213252, 229636)
    assert (shared_memory(NARROW, FIRST), shared_memory(NARROW, SECOND)) == (213252, 229636)
    short = replace(WIDE, num_stages=3)
    assert (shared_memory(short, FIRST), shared_memory(short, SECOND)) == (164100, 180484)
    assert (shared_memory(LOW, FIRST), shared_memory(LOW, SECOND)) == (181508, 181508)
    assert shared_memory(replace(LOW, num_stages=5), FIRST) == 222724
    assert (shared_memory(SWAPPED, FIRST), shared_memory(SWAPPED, SECOND)) == (143876, 147972)


def test_which_tiles_quantise_the_intermediate() -> None:
    assert quantises_hidden(WIDE, FIRST)
    assert quantises_hidden(LOW, FIRST)
    assert quantises_hidden(SWAPPED, FIRST)
    assert not quantises_hidden(NARROW, FIRST)


@pytest.mark.parametrize(
    ("first", "second", "gemm1", "joined"),
    [
        (WIDE, replace(WIDE, GROUP_SIZE_M=16), FIRST, True),
        (WIDE, replace(WIDE, num_stages=3), FIRST, False),  # another ring
        (WIDE, NARROW, FIRST, False),
        (NARROW, NARROW, FIRST, False),  # `hidden` is quantised by a launch
        (WIDE, WIDE, PLAIN, False),
        (DEEP, DEEP, SIXTEEN, True),
        (replace(NARROW, BLOCK_SIZE_K=64), replace(NARROW, BLOCK_SIZE_K=64), SIXTEEN, True),
    ],
)
def test_which_tiles_run_both_gemms_in_one_launch(
    first: TileConfig, second: TileConfig, gemm1: Gemm, joined: bool
) -> None:
    assert joins(LayerTiles(first, second), gemm1) == joined


@pytest.mark.parametrize(
    ("tokens", "group_n", "family"),
    [
        (4, 128, "stream"),
        (4, 256, "stream"),
        (5, 128, "portable"),
        (1024, 128, "cooperative"),
        (16384, 128, "cooperative"),
        (16384, 256, "portable"),
        (16384, 64, "portable"),
    ],
)
def test_the_heuristic_takes_it_where_it_is_legal(tokens: int, group_n: int, family: str) -> None:
    tiles = default_tiles(*(replace(gemm, group_n=group_n) for gemm in (FIRST, SECOND)), tokens, H200, False)
    assert {tiles.gemm1.family, tiles.gemm2.family} == {family}
