"""Which tile configs are worth trying: one table of axes, cut down to what is legal, and plausible for the tokens."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, default_tiles, why_illegal

# Axis -> values in order, for each kernel family. The heuristic's own value joins an axis that does not have it.
FAMILY = "portable"
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    FAMILY: {
        "BLOCK_SIZE_M": (8, 16, 32, 64, 128),
        "BLOCK_SIZE_N": (32, 64, 128, 256),
        "BLOCK_SIZE_K": (64, 128, 256),
        "GROUP_SIZE_M": (1, 8, 16, 64),
        "SWAP_AB": (False, True),
        "PDL": (False, True),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6, 8),
    }
}
LONG_RUNS = 64  # mean slots per expert above which M blocks of one expert follow each other and GROUP_SIZE_M counts
SMALL_M, SWAPPED_M = 32, 64  # largest BLOCK_SIZE_M at which fewer warps than a warpgroup, and SWAP_AB, are plausible
ACCUMULATORS = 128  # a thread, of its 255 registers: more than these spill


@dataclass(frozen=True)
class Space:
    """The plausible legal tile configs of one GEMM at one BLOCK_SIZE_M.

    start  the heuristic's config there, one of `tiles`
    tiles  every config of the space, in the order of the axes
    axes   field -> values, for the fields that vary
    """

    start: TileConfig
    tiles: tuple[TileConfig, ...]

    @cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:  # noqa: D102 - above
        values = {field: tuple(sorted({getattr(tile, field) for tile in self.tiles})) for field in AXES[FAMILY]}
        return {field: found for field, found in values.items() if len(found) > 1}

    @cached_property
    def _known(self) -> frozenset[TileConfig]:
        return frozenset(self.tiles)

    def __contains__(self, tile: object) -> bool:
        return tile in self._known

    def indices(self, tile: TileConfig) -> dict[str, int]:
        """Position of each field of `tile`, which is in the space, on its axis."""
        return {field: values.index(getattr(tile, field)) for field, values in self.axes.items()}

    def tile(self, indices: Mapping[str, int]) -> TileConfig | None:
        """The config at these positions, or None if it is not in the space."""
        found = replace(self.start, **{field: self.axes[field][index] for field, index in indices.items()})
        return found if found in self else None

    def neighbours(self, tile: TileConfig) -> Iterator[TileConfig]:
        """Configs of the space that differ from `tile` in one field, by one step on its axis, and then by two."""
        indices = self.indices(tile)
        for step in (1, 2):
            for field, index in indices.items():
                for other in (index - step, index + step):
                    if 0 <= other < len(self.axes[field]):
                        found = self.tile({**indices, field: other})
                        if found is not None:
                            yield found


@dataclass(frozen=True)
class LayerSpace:
    """What may be tried for one layer at one token count: BLOCK_SIZE_M -> one Space a GEMM.

    default  the heuristic's choice, which is in the space
    """

    tokens: int
    default: LayerTiles
    gemm1: Mapping[int, Space]
    gemm2: Mapping[int, Space]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The plausible values of BLOCK_SIZE_M, ascending."""
        return tuple(self.gemm1)

    @property
    def size(self) -> int:
        """Number of tile configs of both GEMMs: what measuring all of each, one at a time, would take."""
        return sum(len(space.tiles) for spaces in (self.gemm1, self.gemm2) for space in spaces.values())

    def start(self, block_m: int) -> LayerTiles:
        """The heuristic's tile configs at this BLOCK_SIZE_M."""
        return LayerTiles(self.gemm1[block_m].start, self.gemm2[block_m].start)

    def __contains__(self, tiles: LayerTiles) -> bool:
        size = tiles.gemm1.BLOCK_SIZE_M
        return size in self.gemm1 and tiles.gemm1 in self.gemm1[size] and tiles.gemm2 in self.gemm2[size]


def layer_space(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool) -> LayerSpace:
    """The space of one layer for `tokens` tokens; low_latency: whether calls take the low-latency assignment."""
    default = default_tiles(gemm1, gemm2, tokens, device, low_latency, portable=True)
    starts = _starts(gemm1, gemm2, tokens, device, default, low_latency)
    spaces: list[dict[int, Space]] = [
        {
            size: Space(
                getattr(pair, gemm.op), tuple(_tiles(gemm, getattr(pair, gemm.op), tokens, device, low_latency))
            )
            for size, pair in starts.items()
        }
        for gemm in (gemm1, gemm2)
    ]
    return LayerSpace(tokens, default, *spaces)


def _starts(
    gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, default: LayerTiles, low_latency: bool
) -> dict[int, LayerTiles]:
    """Plausible BLOCK_SIZE_M -> the heuristic's pair there: the default's, half and twice as much.

    Alone on its M block (low latency), a slot needs no other than the default's.
    """
    preferred, mean = default.gemm1.BLOCK_SIZE_M, _mean_slots(gemm1, tokens)
    # The heuristic never takes a smaller one.
    least = default_tiles(gemm1, gemm2, 1, device, True, portable=True).gemm1.BLOCK_SIZE_M
    found = {}
    for size in AXES[FAMILY]["BLOCK_SIZE_M"]:
        near = max(least, preferred // 2) <= size <= 2 * preferred and (2 * size >= mean or size >= 64)
        if size == preferred:
            found[size] = default
        elif near and not low_latency:
            at = max(1, size * gemm1.num_experts // (2 * gemm1.top_k))  # where the heuristic picks this size, if ever
            pair = default_tiles(gemm1, gemm2, at, device, low_latency, portable=True)
            tiles = [replace(tile, BLOCK_SIZE_M=size) for tile in (pair.gemm1, pair.gemm2)]
            if not any(why_illegal(tile, gemm, device) for tile, gemm in zip(tiles, (gemm1, gemm2), strict=True)):
                found[size] = LayerTiles(*tiles)
    return found


def _tiles(gemm: Gemm, start: TileConfig, tokens: int, device: DeviceFacts, low_latency: bool) -> Iterator[TileConfig]:
    """The legal configs of one GEMM at the BLOCK_SIZE_M of `start`; an axis without promise keeps its value there."""
    block_m = start.BLOCK_SIZE_M
    closed = {"BLOCK_SIZE_M", "family"}
    if _mean_slots(gemm, tokens) <= LONG_RUNS:
        closed.add("GROUP_SIZE_M")
    if block_m > SWAPPED_M:
        closed.add("SWAP_AB")
    if not low_latency:
        closed.add("PDL")  # a launch is a visible part of the call only there, and PDL has lost nowhere else
    axes = {}
    for field, values in AXES[start.family].items():
        own = getattr(start, field)
        axes[field] = (own,) if field in closed else tuple(sorted({own, *values}))
    if block_m > SMALL_M:
        axes["num_warps"] = tuple(warps for warps in axes["num_warps"] if warps >= 4)
    for values in itertools.product(*axes.values()):
        tile = TileConfig(**dict(zip(axes, values, strict=True)), family=start.family)
        accumulators = block_m * tile.BLOCK_SIZE_N // (32 * tile.num_warps)
        if tile == start or (accumulators <= ACCUMULATORS and why_illegal(tile, gemm, device) is None):
            yield tile


def _mean_slots(gemm: Gemm, tokens: int) -> float:
    """Mean slots per expert that has any, under balanced routing."""
    slots = tokens * gemm.top_k
    return slots / min(slots, gemm.num_experts)
