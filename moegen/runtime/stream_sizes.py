"""The family "stream" in numbers: what its kernels are compiled for, how their work is split, which tiles are legal."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import DeviceFacts
    from .tile import Gemm, TileConfig

GROUP = 128  # values that activations are quantised by; the only K group of weight scales that 8-bit layers have
PART_BYTES = 128  # of a row: what the tensor cores' swizzled layout has in a row
PRODUCT_ROWS, PRODUCT_COLUMNS = 64, 8  # the least of a product on the tensor cores
LEAST_BLOCKS = 64  # multiprocessors: bounds the tiles of a block, whose weight scales it keeps


@dataclass(frozen=True)
class StreamSizes:
    """What a compiled stream kernel is for; one constexpr instead of many.

    num_experts     those that ids count in; local_experts have weights here
    tokens          of the call
    value_bytes     of a weight and of an activation as it is multiplied: 1 or 2
    quantised       whether weights and activations have 8 bits, which the fields down to `least` are about
    group_n, group_k  weight rows and steps of the reduction that share a scale, 0 = all
    by_tensor       whether all slots share the scale of their activations
    ue8m0           whether steps of activations are powers of two
    least           the smallest maximum that a step is made from
    columns, depth  a tile: so many rows of each half of the weight (gate and up, or the halves of w2) by so many steps
    warps           those that multiply
    stages          weight tiles in the ring
    """

    num_experts: int
    local_experts: int
    tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    interleaved: bool
    weight_on_input: bool
    value_bytes: int
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
        """Tiles of a strip of gemm2: its parts for all slots of a token, one slot after the other."""
        return -(-self.top_k * self.hidden_parts // self.parts)

    @property
    def slots(self) -> int:
        """Of all tokens."""
        return self.tokens * self.top_k

    @property
    def units1(self) -> int:
        """Strips of gemm1 for all slots."""
        return self.slots * self.strips1

    @property
    def units2(self) -> int:
        """Strips of gemm2 for all tokens."""
        return self.tokens * self.strips2

    @property
    def hidden_parts(self) -> int:
        """Parts that a slot has in a strip of gemm2: whole tiles if that costs little or scales are one slot's."""
        parts = -(-self.intermediate_size // self.part)
        padded = -(-parts // self.parts) * self.parts
        by_row = self.quantised and not self.group_k
        return padded if by_row or 8 * padded <= 9 * parts else parts

    @property
    def whole(self) -> bool:
        """Whether rows end with a part: otherwise a load that brings several parts would not know where they end."""
        return self.hidden_size % self.part == 0 and self.intermediate_size % self.part == 0

    @property
    def step1(self) -> int:
        """Parts that one load of gemm1 brings."""
        return self.parts if self.whole else 1

    @property
    def step2(self) -> int:
        """Parts that one load of gemm2 brings: of one slot, whichever of its parts a tile begins with."""
        return math.gcd(self.parts, self.hidden_parts) if self.whole else 1

    @property
    def loads(self) -> int:
        """The most loads of a tile."""
        return self.parts // min(self.step1, self.step2)

    @property
    def outside(self) -> int:
        """An index that is outside every row, for loads that are to read nothing."""
        return (max(self.hidden_size, self.intermediate_size) // self.depth + 1) * self.depth

    @property
    def part(self) -> int:
        """Values of a part: of 128 bytes of a row, beside which lie those of the tile's other rows."""
        return PART_BYTES // self.value_bytes

    @property
    def parts(self) -> int:
        """Parts that a row of a tile has."""
        return self.depth // self.part

    @property
    def rows(self) -> int:
        """Rows of a product: all parts of all rows of a tile."""
        return 2 * self.columns * self.parts

    @property
    def tensor_warps(self) -> int:
        """Warps among which the rows of a product are shared; the others have further columns of it."""
        return min(self.warps, self.rows // (PRODUCT_ROWS // 4))

    @property
    def window(self) -> int:
        """Columns of a product: so many parts of the activations, of which each row of it has to do with one."""
        return PRODUCT_COLUMNS * (self.warps // self.tensor_warps)

    @property
    def most_units1(self) -> int:
        """The most units of gemm1 that a block has."""
        return -(-self.units1 // LEAST_BLOCKS)

    @property
    def most_units2(self) -> int:
        """The most units of gemm2 that a block has."""
        return -(-self.units2 // LEAST_BLOCKS)

    @property
    def entries1(self) -> int:
        """Entries of a unit of gemm1 in the table of weight scales: one a tile, or one for the whole rows."""
        return _power_of_two(self.chunks1) if self.group_k else 1

    @property
    def entries2(self) -> int:
        """The same of a unit of gemm2: one a tile, or one a slot."""
        return _power_of_two(self.chunks2 if self.group_k else self.top_k)

    @property
    def entry(self) -> int:
        """Scales in an entry, for each half of the weight: one a part of the tile, or one a row."""
        return self.parts if self.group_k else self.columns

    @property
    def slot_room(self) -> int:
        """`slots` rounded up to a power of two."""
        return _power_of_two(self.slots)

    @property
    def x_parts(self) -> int:
        """Parts of all tokens."""
        return self.tokens * self.chunks1 * self.parts

    @property
    def token_parts(self) -> int:
        """Parts of `hidden` for each token, those that fill its last tile among them."""
        return self.chunks2 * self.parts

    @property
    def segment(self) -> int:
        """Parts that a block prepares at a time: 32 values a thread."""
        return 32 * 32 * self.warps // self.part

    @property
    def segments1(self) -> int:
        """Segments of x."""
        return -(-self.x_parts // self.segment)

    @property
    def segments2(self) -> int:
        """Segments of `hidden`."""
        return -(-self.tokens * self.token_parts // self.segment)

    @property
    def memory(self) -> int:
        """Bytes of shared memory; 3 kB for barriers, reductions and alignment are an upper bound."""
        rows = (self.segments1 + self.segments2) * self.segment
        total = (
            (self.stages * self.rows + rows) * PART_BYTES + 4 * (self.segments2 * self.segment + self.slot_room) + 3072
        )
        if not self.quantised:
            return total
        scales = (self.most_units1 * self.entries1 + self.most_units2 * self.entries2) * 2 * self.entry
        return total + 4 * (rows + scales) + 8 * self.most_units1


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def most_tokens(block_m: int) -> int:
    """The most tokens that a tile with this BLOCK_SIZE_M may be chosen for: within half an octave of it."""
    return math.isqrt(2 * block_m * block_m)


def stream_memory(tile: "TileConfig", gemm: "Gemm") -> int:
    """Bytes of shared memory that a layer with this GEMM takes: an upper bound, as if it were gated."""
    if gemm.op == "gemm1":
        hidden, intermediate = gemm.depth, gemm.rows // (2 if gemm.gated else 1)
    else:
        hidden, intermediate = gemm.rows, gemm.depth
    sizes = StreamSizes(
        num_experts=gemm.num_experts,
        local_experts=gemm.num_experts,
        tokens=most_tokens(tile.BLOCK_SIZE_M),
        top_k=gemm.top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=True,
        interleaved=False,
        weight_on_input=False,
        value_bytes=gemm.a_bits // 8,
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
    if tile.BLOCK_SIZE_M not in (1, 2, 4):
        return f"BLOCK_SIZE_M={tile.BLOCK_SIZE_M} is not the 1, 2 or 4 tokens of family=stream"
    if tile.SWAP_AB or tile.GROUP_SIZE_M != 1:
        return "SWAP_AB and GROUP_SIZE_M are not for family=stream"
    if tile.num_warps not in (4, 8):
        return f"num_warps={tile.num_warps} is not 4 or 8"
    if not 8 <= tile.BLOCK_SIZE_N <= 64:
        return f"BLOCK_SIZE_N={tile.BLOCK_SIZE_N} is outside 8..64"
    parts = tile.BLOCK_SIZE_K * bits // 8 // PART_BYTES
    if not 1 <= parts <= PRODUCT_COLUMNS:
        return f"BLOCK_SIZE_K={tile.BLOCK_SIZE_K} is not 1 to {PRODUCT_COLUMNS} times {PART_BYTES} bytes"
    if tile.BLOCK_SIZE_N * parts < PRODUCT_ROWS:
        return f"{tile.BLOCK_SIZE_N} rows of {parts} times {PART_BYTES} bytes are not the {PRODUCT_ROWS} of a product"
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
