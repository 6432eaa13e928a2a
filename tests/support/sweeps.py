"""Synthetic sweeps: the whole space of a small layer with made-up times, for the tuner without a GPU."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from moegen.device import TARGETS
from moegen.runtime.layer import is_low_latency
from moegen.runtime.tile import TileConfig
from moegen.spec import VariantSpec
from moegen.tune.record import layer_of
from moegen.tune.replay import Sweep, write_sweep
from moegen.tune.space import layer_space
from moegen.tune.trial import Measurement

H200 = TARGETS["cuda:90"]


def made_up(tile: TileConfig, wanted: TileConfig) -> Measurement:
    """A time that grows with each field's distance from `wanted`; one config in 23 fails."""
    digest = hashlib.sha256(repr(tile).encode()).digest()
    if digest[0] % 23 == 0 and tile != wanted:
        return Measurement("compile", message="made up")
    distance = sum(
        abs(int(getattr(tile, field)).bit_length() - int(getattr(wanted, field)).bit_length())
        for field in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "SWAP_AB", "num_warps", "num_stages")
    )
    return Measurement("ok", 50.0 + 4 * distance + digest[1] / 256, 0.002)


def write_sweeps(folder: Path, variant: VariantSpec, tokens: Sequence[int], triton: str = "3.6.0") -> None:
    """One sweep a token count, whose best config is not the heuristic's."""
    layer = layer_of(variant)
    gemm1, gemm2 = layer.gemm("gemm1"), layer.gemm("gemm2")
    folder.mkdir(parents=True, exist_ok=True)
    for count in tokens:
        low_latency = is_low_latency(layer, count, None)
        space = layer_space(gemm1, gemm2, count, H200, low_latency)
        results = {}
        for op in ("gemm1", "gemm2"):
            tiles = list(space.tiles(op))
            results[op] = {tile: made_up(tile, tiles[len(tiles) // 3]) for tile in tiles}
            for kind in space.kinds:  # a sweep varies one GEMM beside the other one's start, which has to run
                if op in space.ops(kind):
                    results[op][getattr(space.start(kind), op)] = Measurement("ok", 80.0, 0.002)
        write_sweep(folder, Sweep(variant.slug, H200, gemm1, gemm2, count, low_latency, triton, results))
