"""Sweeps that were never measured: a made-up cost for every config of a real space, for tests of search and journal."""

import hashlib
import math
from dataclasses import astuple

from moegen.device import target_facts
from moegen.runtime.tile import Gemm, TileConfig
from moegen.tune.replay import Sweep
from moegen.tune.space import OPS
from moegen.tune.trial import Measurement, Status

DEVICE = target_facts("cuda:90")
GEMMS = {
    "gemm1": Gemm("gemm1", 128, 8, 1536, 2048, True, 16, 16, 0),
    "gemm2": Gemm("gemm2", 128, 8, 2048, 768, False, 16, 16, 0),
}
BEST = {"BLOCK_SIZE_M": 5, "BLOCK_SIZE_N": 7, "BLOCK_SIZE_K": 7, "num_warps": 2, "num_stages": 2}  # log2 of the values


def made_up_sweep(tokens: int, failing: Status = "compile", low_latency: bool = False) -> Sweep:
    """A bowl around BEST with bumps; a tenth of the configs, never the heuristic's, fail in the way of `failing`."""
    sweep = Sweep("made_up", DEVICE, *GEMMS.values(), tokens, low_latency, "3.7.1", {op: {} for op in OPS})
    for op, other in zip(OPS, reversed(OPS), strict=True):
        for size, space in getattr(sweep.space, op).items():
            for tile in space.tiles:
                found = Measurement("ok", cost(op, tile) + cost(other, getattr(sweep.space, other)[size].start), 0.002)
                if _bump(op, tile, "fails") < 0.1 and tile != space.start:
                    found = Measurement(failing, message="made up")
                sweep.results[op][tile] = found
    return sweep


def cost(op: str, tile: TileConfig) -> float:
    """µs of one GEMM."""
    distance = sum((math.log2(getattr(tile, name)) - at) ** 2 for name, at in BEST.items())
    return 100 + 2 * distance + 3 * (not tile.PDL) + tile.SWAP_AB + 4 * _bump(op, tile, "us")


def _bump(op: str, tile: TileConfig, kind: str) -> float:
    digest = hashlib.sha256(repr((op, kind, astuple(tile))).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
