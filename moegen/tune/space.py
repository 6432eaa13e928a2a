"""Which tile configs are worth trying: one table of axes, cut down to what is legal, and plausible for the tokens."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from moegen.runtime.device import DeviceFacts
from moegen.runtime.heuristic import default_tiles, family_tiles, mean_slots
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, why_illegal, why_illegal_pair

# Axis -> values in order, for each kernel family. The heuristic's own value joins an axis that does not have it.
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "portable": {
        "BLOCK_SIZE_M": (8, 16, 32, 64, 128),
        "BLOCK_SIZE_N": (32, 64, 128, 256),
        "BLOCK_SIZE_K": (64, 128, 256),
        "GROUP_SIZE_M": (1, 8, 16, 64),
        "SWAP_AB": (False, True),
        "PDL": (False, True),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6, 8),
    },
    "cooperative": {
        "BLOCK_SIZE_M": (16, 32, 64, 128),
        "BLOCK_SIZE_N": (128, 256),
        "BLOCK_SIZE_K": (128,),
        "GROUP_SIZE_M": (1, 4, 16),  # each is a kernel that compiles slowly; 8 and 64 have hardly gained beside these
        "SWAP_AB": (False, True),
        "PDL": (False, True),
        "num_warps": (8,),
        "num_stages": (3, 4, 5, 6, 8),
    },
    "stream": {
        "BLOCK_SIZE_M": (1, 2, 4),
        "BLOCK_SIZE_N": (8, 16, 32, 64),
        "BLOCK_SIZE_K": (128, 256, 512, 1024),
        "PDL": (False, True),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6, 8, 12),
    },
}
OPS = ("gemm1", "gemm2")
# Families that have one config for both GEMMs: one launch runs them, in "cooperative" if both have the same.
ONE_CONFIG = ("cooperative", "stream")
COOPERATIVE_ROWS = 256  # a multiprocessor, of all slots' w13, from which the family cooperative is plausible
LONG_RUNS = 64  # mean slots per expert above which M blocks of one expert follow each other and GROUP_SIZE_M counts
NEAR_RULE = 4  # how far from the rule's limit, in tokens, the other assignment is plausible
SMALL_M, SWAPPED_M = 32, 64  # largest BLOCK_SIZE_M at which fewer warps than a warpgroup, and SWAP_AB, are plausible
ACCUMULATORS = 128  # a thread, of its 255 registers: more than these spill


@dataclass(frozen=True)
class Space:
    """The plausible legal tile configs of one GEMM of one kind.

    start  the heuristic's config there, one of `tiles`
    tiles  every config of the space, in the order of the axes
    axes   field -> values, for the fields that vary
    """

    start: TileConfig
    tiles: tuple[TileConfig, ...]

    @cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:  # noqa: D102 - above
        values = {
            field: tuple(sorted({getattr(tile, field) for tile in self.tiles})) for field in AXES[self.start.family]
        }
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


class Kind(NamedTuple):
    """What the two GEMMs of a layer have in common: launches and the assignment depend on it."""

    family: str
    block_m: int


def kind_of(tiles: LayerTiles) -> Kind:
    """The kind of a pair."""
    return Kind(tiles.gemm1.family, tiles.gemm1.BLOCK_SIZE_M)


def varied(pair: LayerTiles, op: str, tile: TileConfig) -> LayerTiles:
    """`pair` with another config for one GEMM; for both, where one launch is the layer."""
    changed: dict[str, Any] = dict.fromkeys(OPS, tile) if tile.family in ONE_CONFIG else {op: tile}
    return replace(pair, **changed)


@dataclass(frozen=True)
class LayerSpace:
    """What may be tried for one layer at one token count: kind -> one Space a GEMM.

    default  the heuristic's choice, which is in the space
    others   pairs with the assignment that the rule does not choose; measured as they are, never varied
    """

    tokens: int
    default: LayerTiles
    gemm1: Mapping[Kind, Space]
    gemm2: Mapping[Kind, Space]
    _: KW_ONLY
    others: tuple[LayerTiles, ...] = ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The plausible ones, by family and ascending."""
        return tuple(self.gemm1)

    @property
    def size(self) -> int:
        """Number of tile configs of both GEMMs: what measuring all of each, one at a time, would take."""
        return sum(1 for op in OPS for _ in self.tiles(op))

    def ops(self, kind: Kind) -> tuple[str, ...]:
        """The GEMMs that have a tile config of their own: where one launch is the layer, gemm1's is that of both."""
        return OPS[:1] if kind.family in ONE_CONFIG else OPS

    def tiles(self, op: str) -> Iterator[TileConfig]:
        """Every config of one GEMM, kind by kind."""
        for kind, own in getattr(self, op).items():
            if op in self.ops(kind):
                yield from own.tiles

    def start(self, kind: Kind) -> LayerTiles:
        """The heuristic's tile configs of this kind."""
        return LayerTiles(self.gemm1[kind].start, self.gemm2[kind].start)

    def __contains__(self, tiles: LayerTiles) -> bool:
        if tiles.low_latency is not None:
            return tiles in self.others
        kind = kind_of(tiles)
        if kind not in self.gemm1 or (len(self.ops(kind)) == 1 and tiles.gemm1 != tiles.gemm2):
            return False
        return tiles.gemm1 in self.gemm1[kind] and tiles.gemm2 in self.gemm2[kind]


def family_starts(family: str, gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts) -> dict[Kind, LayerTiles]:
    """The heuristic's pair at each BLOCK_SIZE_M of a family other than the portable one, where that serves.

    That of "stream" is the bucket's token count.
    """
    sizes = (size for size in AXES[family]["BLOCK_SIZE_M"] if family != "stream" or size == tokens)
    found = (family_tiles(family, gemm1, gemm2, size, device) for size in sizes)
    return {kind_of(pair): pair for pair in found if pair}


def layer_space(
    gemm1: Gemm,
    gemm2: Gemm,
    tokens: int,
    device: DeviceFacts,
    low_latency: bool,
    families: Collection[str] = tuple(AXES),
) -> LayerSpace:
    """The space of one layer for `tokens` tokens, within these families, among them the portable one.

    low_latency: whether calls take the low-latency assignment.
    """
    default = default_tiles(gemm1, gemm2, tokens, device, low_latency)
    if default.gemm1.family not in families:
        default = default_tiles(gemm1, gemm2, tokens, device, low_latency, portable=True)
    starts = _portable_starts(gemm1, gemm2, tokens, device, low_latency)
    if "cooperative" in families and tokens * gemm1.top_k * gemm1.rows >= COOPERATIVE_ROWS * device.num_sms:
        mean = mean_slots(gemm1, tokens)
        found = family_starts("cooperative", gemm1, gemm2, tokens, device)
        starts |= {kind: pair for kind, pair in found.items() if mean / 2 <= kind.block_m <= max(64, 8 * mean)}
    if "stream" in families:
        starts |= family_starts("stream", gemm1, gemm2, tokens, device)
    starts[kind_of(default)] = default

    def space(gemm: Gemm, pair: LayerTiles) -> Space:
        start: TileConfig = getattr(pair, gemm.op)
        tiles: Iterable[TileConfig] = _tiles(gemm, start, tokens, device, low_latency)
        if start.family in ONE_CONFIG:
            tiles = (tile for tile in tiles if not why_illegal_pair(LayerTiles(tile, tile), gemm1, gemm2, device))
        return Space(start, tuple(tiles))

    spaces = [{kind: space(gemm, pair) for kind, pair in starts.items()} for gemm in (gemm1, gemm2)]
    return LayerSpace(tokens, default, *spaces, others=_others(gemm1, gemm2, tokens, device, low_latency))


def _others(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool) -> tuple[LayerTiles, ...]:
    """The heuristic's pair for the assignment that the rule does not choose, and its neighbours in BLOCK_SIZE_N."""
    if not 1 / NEAR_RULE <= 4 * tokens * gemm1.top_k / gemm1.num_experts <= NEAR_RULE:
        return ()
    pair = default_tiles(gemm1, gemm2, tokens, device, not low_latency, portable=True)
    pair = replace(pair, low_latency=not low_latency)
    found = [pair, *(_both(pair, BLOCK_SIZE_N=n) for n in (32, 64, 128))]
    return tuple(one for one in dict.fromkeys(found) if not why_illegal_pair(one, gemm1, gemm2, device))


def _portable_starts(
    gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool
) -> dict[Kind, LayerTiles]:
    """The heuristic's pair at each plausible BLOCK_SIZE_M: its own choice, half and twice as much.

    Alone on its M block (low latency), a slot needs no other than the heuristic's.
    """
    best, mean = default_tiles(gemm1, gemm2, tokens, device, low_latency, portable=True), mean_slots(gemm1, tokens)
    # The heuristic never takes a smaller one.
    least = default_tiles(gemm1, gemm2, 1, device, True, portable=True).gemm1.BLOCK_SIZE_M
    preferred, found = best.gemm1.BLOCK_SIZE_M, {}
    for size in AXES["portable"]["BLOCK_SIZE_M"]:
        near = max(least, preferred // 2) <= size <= 2 * preferred and (2 * size >= mean or size >= 64)
        if size == preferred:
            found[Kind("portable", size)] = best
        elif near and not low_latency:
            at = max(1, size * gemm1.num_experts // (2 * gemm1.top_k))  # where the heuristic picks this size, if ever
            pair = default_tiles(gemm1, gemm2, at, device, low_latency, portable=True)
            pair = _both(pair, BLOCK_SIZE_M=size)
            if not why_illegal_pair(pair, gemm1, gemm2, device):
                found[Kind("portable", size)] = pair
    return found


def _both(pair: LayerTiles, **changes: Any) -> LayerTiles:  # noqa: ANN401 - fields of both types
    """`pair` with the same changes of both tile configs."""
    return replace(pair, gemm1=replace(pair.gemm1, **changes), gemm2=replace(pair.gemm2, **changes))


def _tiles(gemm: Gemm, start: TileConfig, tokens: int, device: DeviceFacts, low_latency: bool) -> Iterator[TileConfig]:
    """The legal configs of one GEMM of the kind of `start`; an axis without promise keeps its value there."""
    block_m = start.BLOCK_SIZE_M
    closed = {"BLOCK_SIZE_M"}
    if mean_slots(gemm, tokens) <= LONG_RUNS:
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
