"""The heuristic: tile configs for what no tuned record covers; shared by dispatcher and tuner."""

from dataclasses import replace

from .device import DeviceFacts
from .tile import Gemm, LayerTiles, TileConfig, shared_memory, why_illegal_pair

_BLOCK_BYTES = 1024  # of a multiprocessor's shared memory, that every block takes beside its own


def default_tiles(
    gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool, portable: bool = False
) -> LayerTiles:
    """The heuristic: tile configs for `tokens` tokens when no tuned record covers them.

    From sweeps on an H200 (docs/performance.md); on GPUs without wgmma it is the shape of vLLM's defaults. portable:
    of the portable family whatever is faster.
    """
    special = None if portable else _special_tiles(gemm1, gemm2, tokens, device)
    return special or _portable_tiles(gemm1, gemm2, tokens, device, low_latency)


def _special_tiles(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts) -> LayerTiles | None:
    """Those of a family that is faster than the portable one for `tokens` tokens, if there is one.

    "stream" gains 1 to 90 % at one token and up to 25 % at two, "cooperative" up to 90 % with block scales and up to
    25 % without.
    """
    if _streams(gemm1, tokens):
        tiles = family_tiles("stream", gemm1, gemm2, tokens, device)
        if tiles and (tokens != 2 or _two_fit(tiles.gemm1, gemm1, gemm2, device)):
            return tiles
    block_m = _cooperative_rows(gemm1, gemm2, tokens, device)
    return family_tiles("cooperative", gemm1, gemm2, block_m, device) if block_m else None


def _cooperative_rows(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts) -> int:
    """BLOCK_SIZE_M of "cooperative" where it is faster than the portable family, else 0.

    From ten layers on an H200 (docs/results/experiments/h200-families.csv, h200-swapped.txt) and the records in
    tuned_configs/. The family has one launch for both GEMMs, and no loads that wait between tiles; small programs of
    the portable family keep more loads in flight, and share few experts among more multiprocessors.
    """
    slots, mean = tokens * gemm1.top_k, mean_slots(gemm1, tokens)
    enough = slots * gemm1.rows >= 480 * device.num_sms  # nearly two tiles of 256 rows a multiprocessor
    few, wide = mean <= (10 if gemm1.is_w8a8 else 6), mean >= 48
    if gemm1.group_k:
        faster = enough
    elif gemm1.is_w8a8:
        faster, wide = mean >= 32 or (enough and gemm2.depth < 8192), mean >= (64 if gemm2.depth >= 1024 else 128)
    elif few and gemm2.depth < 8192:
        faster = enough
    elif gemm2.depth <= 384:
        faster = True
    elif gemm2.depth <= 1024:
        faster = mean * gemm2.depth >= 6144
    elif gemm2.depth < 8192:
        faster = mean >= (16 if gemm2.depth < 2048 else 32)
    else:
        faster = 512 <= mean <= 1024
    if not faster:
        return 0
    if few:
        return 16
    if gemm1.is_w8a8 and mean <= 20:
        return 32
    return 128 if wide else 64


def family_tiles(family: str, gemm1: Gemm, gemm2: Gemm, block_m: int, device: DeviceFacts) -> LayerTiles | None:
    """The heuristic's tile configs of a family other than the portable one, or None where that does not serve."""
    tiles = _FAMILY_TILES[family](gemm1, gemm2, block_m, device)
    return None if why_illegal_pair(tiles, gemm1, gemm2, device) else tiles


def _streams(gemm1: Gemm, tokens: int) -> bool:
    """Whether "stream" may be faster: experts that several tokens share are read for each of them."""
    return tokens <= 2 or (tokens == 4 and gemm1.group_k > 0 and 16 * gemm1.top_k <= gemm1.num_experts)


def _two_fit(tile: TileConfig, gemm1: Gemm, gemm2: Gemm, device: DeviceFacts) -> bool:
    """Whether a multiprocessor has room for two blocks: then the next launch's wait there while this one ends."""
    memory = max(shared_memory(tile, gemm) for gemm in (gemm1, gemm2))
    return 2 * (memory + _BLOCK_BYTES) <= device.shared_memory + _BLOCK_BYTES


def _stream_tiles(gemm1: Gemm, gemm2: Gemm, block_m: int, device: DeviceFacts) -> LayerTiles:
    """Low tiles, for even shares, unless a block has many; as many stages as leave room for the next launch.

    From up to nine tiles for each of nine layers on an H200 (docs/results/experiments/h200-stream-on-tensor-cores.txt)
    and the records in tuned_configs/.
    """
    many = gemm1.top_k * gemm1.rows > 32 * 4 * device.num_sms
    if many:
        rows, depth, warps, stages = 32, 512 * 8 // gemm1.w_bits, 4, 5
    elif gemm1.is_w8a8 and block_m == 1:
        rows, depth, warps, stages = 16, 1024, 8, 5
    elif gemm1.is_w8a8:
        rows, depth, warps, stages = (16, 512, 4, 8) if block_m == 2 else (32, 512, 4, 5)
    else:
        rows, depth, warps, stages = 16, 512, 4, 5
    if not gemm1.gated:
        rows = 32
    tile = TileConfig(block_m, rows, depth, PDL=device.has_pdl, num_warps=warps, num_stages=stages, family="stream")
    fitting = (replace(tile, num_stages=count) for count in range(stages, 3 * stages // 5 - 1, -1))
    tile = next((one for one in fitting if _two_fit(one, gemm1, gemm2, device)), tile)
    return LayerTiles(tile, tile)


def _cooperative_tiles(gemm1: Gemm, gemm2: Gemm, block_m: int, device: DeviceFacts) -> LayerTiles:
    """The same for both GEMMs, so that one launch runs them; few M blocks at a time, so that gemm2 can soon begin."""
    swaps = block_m < 64
    tile = TileConfig(
        block_m,
        256 if gemm1.group_k or not swaps else 128,
        128 * 8 // gemm1.a_bits,  # 128 bytes
        4 if block_m == 128 else 1,
        SWAP_AB=swaps,
        num_warps=8,
        num_stages=8,  # or as many as fit
        family="cooperative",
    )
    tile = _fitted(_fitted(tile, gemm1, device), gemm2, device)
    return LayerTiles(tile, tile)


_FAMILY_TILES = {"stream": _stream_tiles, "cooperative": _cooperative_tiles}


def mean_slots(gemm: Gemm, tokens: int) -> float:
    """Mean slots per expert that has any, under balanced routing."""
    slots = tokens * gemm.top_k
    return slots / min(slots, gemm.num_experts)


def _portable_tiles(gemm1: Gemm, gemm2: Gemm, tokens: int, device: DeviceFacts, low_latency: bool) -> LayerTiles:
    slots = tokens * gemm1.top_k
    # Long reductions without K groups are worth wgmma, whose token side is 16 wide, from the first token on.
    long = gemm1.is_w8a8 and not gemm1.group_k and min(gemm1.depth, gemm2.depth) >= 4096
    least = 8 if (gemm1.is_decoded or gemm1.is_w8a8) and device.has_wgmma and not long else 16
    block_m = (
        least if low_latency else _block_m(mean_slots(gemm1, tokens), least, gemm1.is_decoded and device.has_wgmma)
    )
    if gemm1.is_w8a8 and gemm1.group_k:
        block_m = min(block_m, 64)  # scaling at every step holds twice the accumulators
    if gemm1.is_float32:
        tiles = [_default_float32_tile(block_m)] * 2
    else:
        tiles = [_default_tile(gemm, block_m, slots, low_latency, device) for gemm in (gemm1, gemm2)]
    return LayerTiles(*(_fitted(tile, gemm, device) for tile, gemm in zip(tiles, (gemm1, gemm2), strict=True)))


# Of the low-latency assignment all slots walk together, so that those of one expert read its weights from L2.
_ALL_SLOTS = 128


def _block_m(mean: float, least: int, decoded: bool) -> int:
    """Twice the mean slots per active expert, rounded up to a power of two within least..128.

    Weights that are decoded for a product take longer than the product: two warps that share the rows do it once for 16
    slots, wgmma's four for 64, and 128 want most of them filled.
    """
    if decoded and mean > 8:
        return 16 if mean <= 16 else 64 if mean <= 128 else 128
    for block in (8, 16, 32, 64):
        if least <= block >= 2 * mean:
            return block
    return 128


def _default_tile(gemm: Gemm, block_m: int, slots: int, low_latency: bool, device: DeviceFacts) -> TileConfig:
    lone_slots = slots if low_latency else 0
    # A scale for every 16 values (nvfp4): four warps were 1.06 to 1.17 times as fast as eight in seven records.
    small_groups = gemm.is_decoded and gemm.group_k == 16 and device.has_wgmma
    big = device.shared_memory >= 160 * 1024
    deep = 128 // min(gemm.a_bits, 16) * 8  # 128 bytes of activations
    if gemm.is_w8a8 and gemm.group_k:
        deep = min(deep, gemm.group_k)
    if block_m == 128:
        wide = 256 if big and gemm.w_bits >= gemm.a_bits else 128
        stages = 4 if device.has_wgmma and gemm.w_bits == 16 else 3
        return TileConfig(128, wide, deep, 16, num_warps=4 if small_groups else 8, num_stages=stages)
    if block_m == 64:
        steps = 128 if small_groups and gemm.depth >= 2048 else deep
        return TileConfig(64, 128, steps, 8, num_warps=4, num_stages=3)
    if not device.has_wgmma:
        depth = deep if gemm.is_w8a8 else 128 if big else 64
        return TileConfig(block_m, 128, depth, 1, num_warps=4, num_stages=4 if big else 3)
    if gemm.is_decoded and block_m <= 16:
        return _decoded_tile(gemm, block_m, slots, low_latency, device)
    if gemm.is_w8a8 and block_m <= 16:
        return _narrow_tile(gemm, block_m, deep, lone_slots)
    if lone_slots and lone_slots * gemm.rows > 64 * 2 * device.num_sms:
        # More programs than two a multiprocessor: small tiles let many of them share one.
        return TileConfig(16, 64, deep, _ALL_SLOTS, SWAP_AB=True, num_warps=4, num_stages=3)
    depth = deep if gemm.is_w8a8 else 128
    stages = 4 if lone_slots or gemm.depth >= 4096 else 3
    group = _ALL_SLOTS if lone_slots else 1
    return TileConfig(block_m, 64, depth, group, SWAP_AB=True, num_warps=4, num_stages=stages)


def _decoded_tile(gemm: Gemm, block_m: int, slots: int, low_latency: bool, device: DeviceFacts) -> TileConfig:
    """Few tokens, weights decoded in registers: two warps share the rows, and each decodes only what it multiplies.

    Four would get wgmma, for which decoded weights pass through shared memory. Tiles of 32 rows where those are few
    programs a multiprocessor: 14 at most, or 44 with the aligned assignment where rows are few and long.
    """
    most = 14 if low_latency else 44 if gemm.rows < 2048 <= gemm.depth else 0
    few = block_m == 8 and slots * gemm.rows <= 32 * most * device.num_sms
    if few or (block_m == 8 and gemm.zero_points and gemm.depth >= 512):
        wide, deep = 32, 256
    else:
        wide, deep = 64, 128 if block_m == 16 or (low_latency and gemm.w_bits == 8) else 256
    if gemm.depth < 512:
        deep = 128  # two steps or three, not one or one and a half
    stages = 4 if few and gemm.rows < 1024 and gemm.depth >= 4096 else 3
    group = _ALL_SLOTS if low_latency else 1
    return TileConfig(block_m, wide, deep, group, SWAP_AB=True, num_warps=2, num_stages=stages)


def _narrow_tile(gemm: Gemm, block_m: int, deep: int, lone_slots: int) -> TileConfig:
    """Few tokens, 8-bit operands: mma.sync, whose token side is 8 wide (Triton's wgmma has 16).

    Programs of two warps with few rows, of which many share a multiprocessor; deep rings where the reduction is long,
    and none deeper than it.
    """
    group = _ALL_SLOTS if lone_slots else 1
    if block_m == 16:
        return TileConfig(16, 128, deep, group, SWAP_AB=True, num_warps=4, num_stages=3)
    if gemm.depth >= 2048:
        return TileConfig(block_m, 32, deep, group, SWAP_AB=True, num_warps=2, num_stages=6)
    short = gemm.depth <= 256
    wide = 128 if short and not lone_slots else 64
    return TileConfig(block_m, wide, deep, group, SWAP_AB=True, num_warps=2, num_stages=2 if short else 3)


def _default_float32_tile(block_m: int) -> TileConfig:
    """Exact float32 products have no tensor cores: small tiles, since every operand goes through registers."""
    return TileConfig(min(block_m, 64), 64, 32, 8, num_warps=4, num_stages=2)


def _fitted(tile: TileConfig, gemm: Gemm, device: DeviceFacts) -> TileConfig:
    """The same tile with what the device has: PDL, and as many stages as the shared memory holds."""
    tile = replace(tile, PDL=device.has_pdl)
    while tile.num_stages > 1 and shared_memory(tile, gemm) > device.shared_memory:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile
