"""The family "stream" in numbers: what its kernels are compiled for, how their work is split, which tiles are legal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import DeviceFacts
    from .tile import Gemm, TileConfig

GROUP = 128  # values that activations are quantised by; the only K group of weight scales that the 8-bit kernel has
LEAST_BLOCKS = 64  # multiprocessors: bounds the tiles of a block, whose weight scales it keeps


@dataclass(frozen=True)
class StreamSizes:
    """What a compiled stream kernel is for; one constexpr instead of many.

    num_experts     those that ids count in; local_experts have weights here
    quantised       whether weights and activations have 8 bits, which the fields down to `least` are about
    group_n, group_k  weight rows and steps of the reduction that share a scale, 0 = all
    by_tensor       whether all slots share the scale of their activations
    ue8m0           whether steps of activations are powers of two
    least           the smallest maximum that a step is made from
    columns, depth  a tile: so many rows of each half of the weight (gate and up, or the halves of w2) by so many steps
    warps           those that multiply
    stages          weight tiles in the ring, row_stages chunks of 16-bit activations
    """

    num_experts: int
    local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    interleaved: bool
    weight_on_input: bool
    quantised: bool
    group_n: int
    group_k: int
    by_tensor: bool
    ue8m0: bool
    least: float
    columns: int
    depth: int
    warps: int
    stages: int
    pdl: bool
    row_stages: int = 8

    @property
    def strips1(self) -> int:
        """Strips of gemm1."""
        half = self.intermediate_size if self.gated else self.intermediate_size // 2
        return -(-half // self.columns)

    @property
    def strips2(self) -> int:
        """Strips of gemm2."""
        return -(-(self.hidden_size // 2) // self.columns)

    @property
    def chunks1(self) -> int:
        """Tiles of a strip of gemm1."""
        return -(-self.hidden_size // self.depth)

    @property
    def chunks2(self) -> int:
        """Tiles of a strip of gemm2, for each slot."""
        return -(-self.intermediate_size // self.depth)

    @property
    def outside(self) -> int:
        """An index that is outside every row, for loads that are to read nothing."""
        return (max(self.hidden_size, self.intermediate_size) // self.depth + 1) * self.depth

    @property
    def parts1(self) -> int:
        """Entries that a strip of gemm1 has in the table of weight scales: one a tile, or one for the whole rows."""
        return self.chunks1 if self.group_k else 1

    @property
    def parts2(self) -> int:
        """The same of a strip of gemm2, for each slot."""
        return self.chunks2 if self.group_k else 1

    @property
    def entries1(self) -> int:
        """The most entries of gemm1 that a block has, rounded up to a power of two."""
        return _power_of_two(-(-self.top_k * self.strips1 // LEAST_BLOCKS) * self.parts1)

    @property
    def entries2(self) -> int:
        """The most entries of gemm2 that a block has, rounded up to a power of two."""
        return _power_of_two(-(-self.strips2 // LEAST_BLOCKS) * self.top_k * self.parts2)

    @property
    def entry(self) -> int:
        """Scales in an entry, for each half of the weight: one a K group of the tile, or one a row."""
        return self.tile_groups if self.group_k else self.columns

    @property
    def tile_groups(self) -> int:
        """K groups of a tile."""
        return self.depth // GROUP

    @property
    def segment(self) -> int:
        """K groups that a block quantises at a time: 32 values a thread."""
        return 8 * self.warps

    @property
    def segments1(self) -> int:
        """Segments of the token."""
        return -(-self.chunks1 * self.tile_groups // self.segment)

    @property
    def segments2(self) -> int:
        """Segments of `hidden`, all slots."""
        return -(-self.top_k * self.chunks2 * self.tile_groups // self.segment)

    @property
    def memory(self) -> int:
        """Bytes of shared memory; 2 kB for barriers and reductions are an upper bound."""
        tile = 2 * self.columns * self.depth
        if not self.quantised:
            return 2 * (self.stages * tile + self.row_stages * self.depth) + 2048
        rows = (self.segments1 + self.segments2) * self.segment * (GROUP + 4)
        return self.stages * tile + rows + (self.entries1 + self.entries2) * 2 * self.entry * 4 + 2048


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def stream_memory(tile: "TileConfig", gemm: "Gemm") -> int:
    """Bytes of shared memory that a layer with this GEMM takes: an upper bound, as if it were gated."""
    if gemm.op == "gemm1":
        hidden, intermediate = gemm.depth, gemm.rows // (2 if gemm.gated else 1)
    else:
        hidden, intermediate = gemm.rows, gemm.depth
    sizes = StreamSizes(
        num_experts=gemm.num_experts,
        local_experts=gemm.num_experts,
        top_k=gemm.top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=True,
        interleaved=False,
        weight_on_input=False,
        quantised=gemm.is_w8a8,
        group_n=gemm.group_n,
        group_k=gemm.group_k,
        by_tensor=False,
        ue8m0=False,
        least=0.0,
        columns=tile.BLOCK_SIZE_N // 2,
        depth=tile.BLOCK_SIZE_K,
        warps=tile.num_warps,
        stages=tile.num_stages,
        pdl=tile.PDL,
    )
    return sizes.memory


def why_illegal_stream(tile: "TileConfig", gemm: "Gemm", device: "DeviceFacts") -> str | None:
    """What `why_illegal` says of this family, but for its shared memory."""
    bits = gemm.w_bits
    if not device.has_wgmma:
        return f"family=stream needs compute capability 9.0, not {device.backend} {device.arch}"
    if (gemm.a_bits, bits, gemm.group_k) not in ((16, 16, 0), (8, 8, 0), (8, 8, GROUP)):
        return (
            f"family=stream is for 16-bit weights and activations, or 8-bit ones with no K groups or some of {GROUP}, "
            f"not {bits} and {gemm.a_bits} bits with groups of {gemm.group_k}"
        )
    if gemm.depth * bits // 8 % 16:
        return f"rows of {gemm.depth} values are not the multiple of 16 bytes that TMA needs"
    if tile.BLOCK_SIZE_M != 1:
        return f"BLOCK_SIZE_M={tile.BLOCK_SIZE_M} is not the 1 token of family=stream"
    if tile.SWAP_AB or tile.GROUP_SIZE_M != 1:
        return "SWAP_AB and GROUP_SIZE_M are not for family=stream"
    if tile.num_warps not in (4, 8):
        return f"num_warps={tile.num_warps} is not 4 or 8"
    if tile.BLOCK_SIZE_K not in (256, 512):
        return f"BLOCK_SIZE_K={tile.BLOCK_SIZE_K} is not 256 or 512"
    # A row of each half a warp, or as many as it takes to give each of its threads 16 bytes.
    least = 2 * tile.num_warps * max(1, 512 * 8 // (tile.BLOCK_SIZE_K * bits))
    if not least <= tile.BLOCK_SIZE_N <= 64:
        return f"BLOCK_SIZE_N={tile.BLOCK_SIZE_N} is outside {least}..64"
    if not 2 <= tile.num_stages <= 32:
        return f"num_stages={tile.num_stages} is outside 2..32"
    return _why_illegal_scales(tile, gemm, device) if gemm.is_w8a8 else None


def _why_illegal_scales(tile: "TileConfig", gemm: "Gemm", device: "DeviceFacts") -> str | None:
    """A tile's rows of a half must share those of blocks, and a block have room for those of all its tiles."""
    if gemm.group_k and (gemm.group_n % tile.BLOCK_SIZE_N or gemm.rows % tile.BLOCK_SIZE_N):
        return f"BLOCK_SIZE_N={tile.BLOCK_SIZE_N} does not divide {gemm.rows} rows and the {gemm.group_n} of a scale"
    if device.num_sms < LEAST_BLOCKS:
        return f"family=stream with scales needs {LEAST_BLOCKS} multiprocessors, not {device.num_sms}"
    return None
