"""TileConfig and its legality: the only ones, shared by dispatcher, tuner and validator."""

from dataclasses import KW_ONLY, asdict, dataclass, fields

from .cooperative_sizes import cooperative_memory, joins, why_illegal_cooperative
from .device import DeviceFacts
from .stream_sizes import stream_memory, why_illegal_stream

# "portable" are the templates. The others are for compute capability 9.0, in Gluon, and for weights of 16 bits, or of 8
# like the activations: "cooperative" for many tokens, "stream" for a few.
FAMILIES = ("portable", "cooperative", "stream")


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How one grouped GEMM is cut into blocks. Field names are those of vLLM's and SGLang's config files.

    BLOCK_SIZE_M   rows of the (token, slot) axis a block
    BLOCK_SIZE_N   rows of the weight a block (a gated GEMM1 makes BLOCK_SIZE_N / 2 outputs of them)
    BLOCK_SIZE_K   steps of the reduction
    GROUP_SIZE_M   M blocks that are walked together for the sake of L2
    SWAP_AB        compute weight · tokensᵀ, so that the weight rows fill the M side of the tensor-core instruction
    PDL            programmatic dependent launch: start before the previous kernel has ended (gemm1's holds for the
                   assignment and the quantisation, gemm2's for the reduce)

    Of family "cooperative" num_warps are those that multiply; as many as a warpgroup load beside them.
    Family "stream" has one config for both GEMMs: its tiles are BLOCK_SIZE_N weight rows by BLOCK_SIZE_K steps, and
    num_stages of them make its ring.
    """

    BLOCK_SIZE_M: int
    BLOCK_SIZE_N: int
    BLOCK_SIZE_K: int
    GROUP_SIZE_M: int = 1
    SWAP_AB: bool = False
    PDL: bool = False
    num_warps: int = 4
    num_stages: int = 3
    family: str = "portable"

    @classmethod
    def from_dict(cls, data: object, where: str = "tile config") -> "TileConfig":
        """Checked construction from JSON; ValueError names the key, the value and what is allowed."""
        if not isinstance(data, dict):
            raise ValueError(f"{where}: {data!r} is not a mapping")
        known = {f.name: f for f in fields(cls)}
        for key, value in data.items():
            if key not in known:
                raise ValueError(f"{where}.{key}: unknown key; allowed: {', '.join(known)}")
            expected = type(value) if key == "family" else known[key].type
            if type(value) is not expected or (key == "family" and value not in FAMILIES):
                allowed = " or ".join(FAMILIES) if key == "family" else getattr(expected, "__name__", expected)
                raise ValueError(f"{where}.{key}: {value!r} is not allowed; allowed: {allowed}")
        missing = [k for k in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K") if k not in data]
        if missing:
            raise ValueError(f"{where}.{missing[0]}: missing")
        return cls(**data)

    def to_dict(self) -> dict[str, int | bool | str]:
        """JSON form, the inverse of `from_dict`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LayerTiles:
    """The tile configs of one layer at one token bucket; both GEMMs read one assignment, hence one BLOCK_SIZE_M.

    low_latency  whether calls without an expert_map take the low-latency assignment; None = by the rule. Of the
                 portable family only: the others have one assignment each
    """

    gemm1: TileConfig
    gemm2: TileConfig
    _: KW_ONLY
    low_latency: bool | None = None


@dataclass(frozen=True, slots=True)
class Gemm:
    """One grouped GEMM as tile choice sees it.

    op            "gemm1" (tokens · w13ᵀ) or "gemm2" (hidden · w2ᵀ)
    num_experts   experts whose weights are on this GPU
    top_k         slots per token
    rows          weight rows: 2I or I for gemm1, H for gemm2
    depth         length of the reduction: H for gemm1, I for gemm2
    gated         gemm1 with a gated activation: the tile's rows are gate and up rows by turns
    a_bits, w_bits  bits of a stored activation and weight value
    group_k       reduction steps that share a scale, 0 = all
    group_n       weight rows that share one, for block scales
    interleaved   gate and up rows are stored by turns
    zero_points   whether weights have zero points
    """

    op: str
    num_experts: int
    top_k: int
    rows: int
    depth: int
    gated: bool
    a_bits: int
    w_bits: int
    group_k: int
    zero_points: bool = False
    group_n: int = 0
    interleaved: bool = False

    @property
    def is_float32(self) -> bool:
        """Whether the products are exact float32, without tensor cores."""
        return self.a_bits == 32

    @property
    def is_decoded(self) -> bool:
        """Whether weights are decoded in registers, for a product of 16-bit values."""
        return self.w_bits < self.a_bits == 16

    @property
    def is_w8a8(self) -> bool:
        """Whether both operands are 8 bit."""
        return self.a_bits == 8


def why_illegal(tile: TileConfig, gemm: Gemm, device: DeviceFacts) -> str | None:
    """The reason why `tile` cannot run `gemm` on `device`, or None when it can."""
    for key in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"):
        value = getattr(tile, key)
        if value < 1 or value & (value - 1):
            return f"{key}={value} is not a power of two"
    if tile.PDL and not device.has_pdl:
        return f"PDL needs compute capability 9.0 or newer, not {device.backend} {device.arch}"
    if tile.family not in FAMILIES:
        return f"family={tile.family} is unknown; known: {', '.join(FAMILIES)}"
    if tile.family == "stream":
        return why_illegal_stream(tile, gemm, device) or _why_too_large(shared_memory(tile, gemm), device)
    if tile.BLOCK_SIZE_M == 8 and not (tile.SWAP_AB and device.backend == "cuda"):
        return "BLOCK_SIZE_M=8 needs SWAP_AB and a CUDA GPU: tokens on the tensor core's side that may be 8 wide"
    smallest = {"BLOCK_SIZE_M": 8, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 16}
    for key, least in smallest.items():
        if not least <= getattr(tile, key) <= 512:
            return f"{key}={getattr(tile, key)} is outside {least}..512"
    if not 1 <= tile.num_warps <= 16:
        return f"num_warps={tile.num_warps} is outside 1..16"
    if not 1 <= tile.num_stages <= 8:
        return f"num_stages={tile.num_stages} is outside 1..8"
    if not 1 <= tile.GROUP_SIZE_M <= 1024:
        return f"GROUP_SIZE_M={tile.GROUP_SIZE_M} is outside 1..1024"
    if gemm.is_w8a8 and tile.BLOCK_SIZE_K < 32:
        return f"BLOCK_SIZE_K={tile.BLOCK_SIZE_K} is below the 32 steps of an 8-bit tensor-core product"
    if gemm.is_w8a8 and gemm.group_k % tile.BLOCK_SIZE_K:
        return f"BLOCK_SIZE_K={tile.BLOCK_SIZE_K} does not divide the quant group of {gemm.group_k}"
    if tile.family == "cooperative":
        return why_illegal_cooperative(tile, gemm, device) or _why_too_large(shared_memory(tile, gemm), device)
    accumulators = tile.BLOCK_SIZE_M * tile.BLOCK_SIZE_N // (32 * tile.num_warps)
    if accumulators > 256:
        return f"{accumulators} accumulators per thread do not fit into 255 registers"
    return _why_too_large(shared_memory(tile, gemm), device)


def why_illegal_pair(tiles: LayerTiles, gemm1: Gemm, gemm2: Gemm, device: DeviceFacts) -> str | None:
    """`why_illegal` of the first of both GEMMs that is, or of the launch that runs both, or None."""
    reason = why_illegal(tiles.gemm1, gemm1, device) or why_illegal(tiles.gemm2, gemm2, device)
    if reason is None and tiles.gemm1.family == "cooperative" and joins(tiles, gemm1):
        reason = _why_too_large(cooperative_memory(tiles.gemm1, gemm1, gemm2), device)
    return reason


def _why_too_large(needed: int, device: DeviceFacts) -> str | None:
    if needed > device.shared_memory:
        return f"{needed} bytes of shared memory exceed the {device.shared_memory} of {device.name}"
    return None


def shared_memory(tile: TileConfig, gemm: Gemm) -> int:
    """Bytes of shared memory that the pipelined operand tiles take: an upper bound (mma.sync drops one stage)."""
    if tile.family == "stream":
        return stream_memory(tile, gemm)
    if tile.family == "cooperative":
        return cooperative_memory(tile, gemm)
    bits = tile.BLOCK_SIZE_M * gemm.a_bits + tile.BLOCK_SIZE_N * gemm.w_bits
    operands = bits * tile.BLOCK_SIZE_K * tile.num_stages // 8
    if gemm.w_bits < gemm.a_bits:  # weights decoded in registers may pass through one more tile
        operands += tile.BLOCK_SIZE_N * tile.BLOCK_SIZE_K * gemm.a_bits // 8
    epilogue = tile.BLOCK_SIZE_M * tile.BLOCK_SIZE_N * 4 // (2 if gemm.gated else 1)
    return max(operands, epilogue)
