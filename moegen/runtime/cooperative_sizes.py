"""The family "cooperative" in numbers: what its kernel is compiled for, its shared memory, which tiles are legal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import DeviceFacts
    from .tile import Gemm, TileConfig

GROUP = 128  # of the scales, both ways: the columns of a product and the depth of a step
_LEAST_STAGES = 3  # gathered tokens are announced two steps after they were asked for


@dataclass(frozen=True)
class CooperativeSizes:
    """What a compiled kernel is for; one constexpr instead of many.

    num_experts   whose weights are here
    rows, depth   of the weights
    gathers       gemm1: rows of `a` are tokens. gemm2 reads blocks of sorted rows
    gated         gate and up rows, one half of the weights each
    weighted      whether results are multiplied by the router's weights
    ue8m0         whether the scales that it makes are powers of two
    block_m, block_n, group_m, stages, pdl  as in TileConfig
    """

    num_experts: int
    top_k: int
    rows: int
    depth: int
    gathers: bool
    gated: bool
    weighted: bool
    ue8m0: bool
    block_m: int
    block_n: int
    group_m: int
    stages: int
    pdl: bool

    @property
    def sides(self) -> int:
        """2 where a tile has gate and up rows."""
        return 2 if self.gated else 1

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.rows // self.sides

    @property
    def tiles_n(self) -> int:
        """Tiles along the rows of the weights."""
        return -(-self.rows // self.block_n)

    @property
    def steps(self) -> int:
        """Of the reduction; each has scales of its own."""
        return -(-self.depth // GROUP)

    @property
    def row_groups(self) -> int:
        """Groups along the rows of the weights."""
        return -(-self.rows // GROUP)

    @property
    def halves(self) -> int:
        """Blocks of 128 weight rows of a tile."""
        return self.block_n // GROUP

    @property
    def parts_by_rows(self) -> bool:
        """Whether each consumer has half of a tile's rows and all columns, or all 64 rows and half of the columns."""
        return self.block_m == 128

    @property
    def products(self) -> int:
        """Of a consumer and step, 128 columns each."""
        return self.halves if self.parts_by_rows else 1

    @property
    def takes_turns(self) -> bool:
        """Whether the consumers issue their products in turn (cooperative_kernel._product)."""
        return self.gathers and self.parts_by_rows

    @property
    def splits(self) -> bool:
        """Whether one product has gate and up columns, which are scaled apart."""
        return self.gated and self.products == 1

    @property
    def has_high(self) -> bool:
        """Whether a consumer has two sums, of gate and up columns or of two products, and not `low` alone."""
        return self.gated or self.products == 2

    @property
    def width(self) -> int:
        """Columns of the result that share a scale in a consumer's registers."""
        return GROUP // 2 if self.splits else GROUP

    @property
    def shares_groups(self) -> bool:
        """Whether a group of `hidden` is half one consumer's and half the other's."""
        return self.splits and not self.parts_by_rows

    @property
    def weight_box(self) -> list[int]:
        """What one load brings of the weights [E, sides, rows / sides, depth]."""
        return [1, 2, GROUP // 2, GROUP] if self.splits else [1, 1, GROUP, GROUP]


def cooperative_memory(tile: "TileConfig", gemm: "Gemm") -> int:
    """Bytes of shared memory: ring, barriers, each consumer's result on its way to 16-byte stores, shared maxima."""
    ring = tile.num_stages * (tile.BLOCK_SIZE_M + tile.BLOCK_SIZE_N) * GROUP
    barriers = 8 * tile.num_stages  # twice
    aligned = -(-barriers // 16) * 16
    quantised = gemm.op == "gemm1" and tile.BLOCK_SIZE_N == 2 * GROUP
    splits = gemm.gated and (tile.BLOCK_SIZE_N == GROUP or tile.BLOCK_SIZE_M == 64)
    results = 2 * 64 * (GROUP // 2 if splits else GROUP) * (1 if quantised else 2)
    if splits and quantised:
        return ring + 2 * aligned + 8 + results + 4 * 64 * 4 + 8
    return ring + aligned + barriers + results + 8


def why_illegal_cooperative(tile: "TileConfig", gemm: "Gemm", device: "DeviceFacts") -> str | None:
    """What `why_illegal` adds for this family."""
    if not device.has_wgmma:
        return f"family=cooperative needs compute capability 9.0, not {device.backend} {device.arch}"
    if (gemm.a_bits, gemm.w_bits, gemm.group_n, gemm.group_k) != (8, 8, GROUP, GROUP):
        return (
            f"family=cooperative is for 8-bit weights and activations with scales of {GROUP}x{GROUP}, "
            f"not {gemm.w_bits} and {gemm.a_bits} bits with scales of {gemm.group_n}x{gemm.group_k}"
        )
    if gemm.interleaved:
        return "family=cooperative has no interleaved gate and up rows"
    if gemm.gated and gemm.rows // 2 % GROUP:
        return f"gate and up rows share weight scales of {GROUP} rows"
    if gemm.depth % 16:
        return f"rows of {gemm.depth} bytes are not the multiple of 16 that TMA needs"
    if tile.SWAP_AB:
        return "SWAP_AB is not for family=cooperative"
    columns = (128, 256) if tile.BLOCK_SIZE_M == 128 else (256,)  # a consumer's products have 128
    allowed = {"BLOCK_SIZE_M": (64, 128), "BLOCK_SIZE_N": columns, "BLOCK_SIZE_K": (GROUP,), "num_warps": (8,)}
    for key, values in allowed.items():
        if getattr(tile, key) not in values:
            shown = " or ".join(str(value) for value in values)
            return f"{key}={getattr(tile, key)} is not the {shown} of family=cooperative"
    if tile.num_stages < _LEAST_STAGES:
        return f"num_stages={tile.num_stages} is below the {_LEAST_STAGES} of family=cooperative"
    return None
