"""The family "cooperative" in numbers: what its kernel is compiled for, its shared memory, which tiles are legal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import DeviceFacts
    from .tile import Gemm, LayerTiles, TileConfig

GROUP = 128  # of block scales, both ways: with them the columns of a product and the depth of a step
_STEP_BYTES = 128  # of a row that a step takes: what the tensor cores' swizzled layout has in a row


@dataclass(frozen=True)
class CooperativeSizes:
    """What a compiled kernel is for; one constexpr instead of many.

    num_experts   whose weights are here
    rows, depth   of the weights
    gathers       gemm1: rows of `a` are tokens. gemm2 reads blocks of sorted rows
    gated         gate and up rows, one half of the weights each
    weighted      whether results are multiplied by the router's weights
    value_bytes   of a value of the operands: 1 or 2
    integer       int8 values
    grouped       block scales of 128x128. The other forms scale the sums, or nothing
    token_scales  of those forms: one scale a row of activations, not one for all
    row_scales    one scale a weight row, not one an expert
    joined        whether one launch runs both GEMMs
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
    value_bytes: int
    integer: bool
    grouped: bool
    token_scales: bool
    row_scales: bool
    joined: bool
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
    def step(self) -> int:
        """Values of a row that a step of the reduction takes; block scales change with it."""
        return _STEP_BYTES // self.value_bytes

    @property
    def steps(self) -> int:
        """Of the reduction."""
        return -(-self.depth // self.step)

    @property
    def posts(self) -> int:
        """Places for tiles that are posted: at most two more than the ring has stages have not been taken yet."""
        return posts_of(self.stages)

    @property
    def row_groups(self) -> int:
        """Groups along the rows of the weights."""
        return -(-self.rows // GROUP)

    @property
    def shares_tiles(self) -> bool:
        """Whether each consumer has half of every tile's rows. Otherwise each tile is one's own, in turn."""
        return self.block_m == 128

    @property
    def swaps(self) -> bool:
        """Whether products are weights · tokensᵀ: the tensor cores have at least 64 rows, and columns from 8 on."""
        return self.block_m < 64

    @property
    def tokens(self) -> int:
        """Sorted slots of a tile that are one consumer's."""
        return min(self.block_m, 64)

    @property
    def rings_scales(self) -> bool:
        """Whether the block scales of a step's tokens come through the ring, like the tokens.

        Not those of 128 rows, where the tensor cores are the bound: what the producer does for them cost up to 11 %.
        """
        return self.grouped and not self.shares_tiles

    @property
    def copies(self) -> bool:
        """Whether the producer copies tokens or their scales itself, and so has to say when they are there."""
        return self.gathers or self.rings_scales

    @property
    def arrivals(self) -> int:
        """Of consumers, once each that has a part in a tile is through with it, or with a stage of it."""
        return 2 if self.shares_tiles else 1

    @property
    def product_n(self) -> int:
        """Weight rows of one product: those that share a scale, or all of the tile.

        Of int8 values at most 128: Triton 3.6 has no integer product of 256.
        """
        return min(self.block_n, GROUP) if self.grouped or self.integer else self.block_n

    @property
    def products(self) -> int:
        """Of a consumer and step, and blocks of weight rows that a step loads."""
        return self.block_n // self.product_n

    @property
    def takes_turns(self) -> bool:
        """Whether the consumers issue their products in turn (cooperative_products._product)."""
        return self.grouped and self.gathers and self.shares_tiles

    @property
    def splits(self) -> bool:
        """Whether one product has gate and up columns."""
        return self.gated and self.products == 1

    @property
    def has_high(self) -> bool:
        """Whether a consumer has two sums, of gate and up columns or of neighbours, and not `low` alone."""
        return self.gated or self.block_n == 2 * GROUP

    @property
    def width(self) -> int:
        """Columns of the result that a product makes."""
        return self.product_n // 2 if self.splits else self.product_n

    @property
    def store_n(self) -> int:
        """Columns of 16-bit results that a consumer brings into the order of its stores at a time.

        What that takes of the shared memory is a stage of the ring less where a tile has 64 rows.
        """
        return stored_columns(self.block_m)

    @property
    def weight_box(self) -> list[int]:
        """What one load brings of the weights [E, sides, rows / sides, depth]."""
        return [1, 2, self.width, self.step] if self.splits else [1, 1, self.product_n, self.step]


def quantises_hidden(tile: "TileConfig", gemm1: "Gemm") -> bool:
    """Whether gemm1 quantises what it writes: half a tile of its columns is one group of block scales."""
    return gemm1.group_k == tile.BLOCK_SIZE_N // 2


def joins(tiles: "LayerTiles", gemm1: "Gemm") -> bool:
    """Whether one launch runs both GEMMs: their rings are the same, and nothing has to quantise `hidden` in between."""
    one, other = tiles.gemm1, tiles.gemm2
    same_ring = (one.BLOCK_SIZE_N, one.num_stages) == (other.BLOCK_SIZE_N, other.num_stages)
    return same_ring and (not gemm1.is_w8a8 or quantises_hidden(one, gemm1))


def posts_of(stages: int) -> int:
    """The power of two that is at least `stages` + 2."""
    return 1 << (stages + 1).bit_length()


def stored_columns(block_m: int) -> int:
    """CooperativeSizes.store_n."""
    return GROUP // 2 if block_m == 64 else GROUP


def cooperative_memory(tile: "TileConfig", *gemms: "Gemm") -> int:
    """Bytes of shared memory of a launch that runs one GEMM or joins two: ring, block scales of its tokens, each
    consumer's result on its way to 16-byte stores, barriers, posts.
    """
    stages, posts = tile.num_stages, posts_of(tile.num_stages)
    ring = stages * (tile.BLOCK_SIZE_M + tile.BLOCK_SIZE_N) * _STEP_BYTES
    ring += 4 * stages * tile.BLOCK_SIZE_M if gemms[0].group_k and tile.BLOCK_SIZE_M < 128 else 0
    results = 0
    for gemm in gemms:
        columns = min(GROUP, tile.BLOCK_SIZE_N // 2 if gemm.gated else tile.BLOCK_SIZE_N)
        quantised = gemm.op == "gemm1" and quantises_hidden(tile, gemm)
        own = columns if quantised else 2 * min(columns, stored_columns(tile.BLOCK_SIZE_M))
        results = max(results, 2 * min(tile.BLOCK_SIZE_M, 64) * own)
    total = ring + results + 8 * (2 * stages + posts + 2) + 8 * posts
    return -(-total // 128) * 128 + 4  # what the drawn tile passes through


def why_illegal_cooperative(tile: "TileConfig", gemm: "Gemm", device: "DeviceFacts") -> str | None:
    """What `why_illegal` adds for this family."""
    if not device.has_wgmma:
        return f"family=cooperative needs compute capability 9.0, not {device.backend} {device.arch}"
    if (gemm.a_bits, gemm.w_bits) not in ((8, 8), (16, 16)):
        return (
            f"family=cooperative is for weights and activations of 8 bits or of 16, not {gemm.w_bits} and {gemm.a_bits}"
        )
    if gemm.group_k and (gemm.group_n, gemm.group_k) != (GROUP, GROUP):
        return f"family=cooperative knows block scales of {GROUP}x{GROUP}, not {gemm.group_n}x{gemm.group_k}"
    if gemm.interleaved:
        return "family=cooperative has no interleaved gate and up rows"
    if gemm.gated and gemm.group_k and gemm.rows // 2 % GROUP:
        return f"gate and up rows share weight scales of {GROUP} rows"
    row_bytes = gemm.depth * gemm.a_bits // 8
    if row_bytes % 16:
        return f"rows of {row_bytes} bytes are not the multiple of 16 that TMA needs"
    step = 8 * _STEP_BYTES // gemm.a_bits
    allowed = {
        "BLOCK_SIZE_M": (16, 32, 64, 128), "BLOCK_SIZE_N": (128, 256), "BLOCK_SIZE_K": (step,), "num_warps": (8,)
    }  # fmt: skip
    for key, values in allowed.items():
        if getattr(tile, key) not in values:
            shown = " or ".join(str(value) for value in values)
            return f"{key}={getattr(tile, key)} is not the {shown} of family=cooperative"
    if tile.SWAP_AB != (tile.BLOCK_SIZE_M < 64):  # noqa: SIM300 - no constant is on the left
        return f"SWAP_AB={tile.SWAP_AB} is not for BLOCK_SIZE_M={tile.BLOCK_SIZE_M} of family=cooperative"
    # Gathered tokens are announced two steps after they were asked for; products that add up keep the stage before.
    least = 3 if gemm.group_k else 4
    if tile.num_stages < least:
        return f"num_stages={tile.num_stages} is below the {least} of family=cooperative"
    return None
