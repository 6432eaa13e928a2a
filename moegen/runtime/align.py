"""The aligned assignment: slots sorted by expert, each expert's run padded to a multiple of the M block size.

One slot is one (token, top-k position) pair, numbered `token * top_k + position`. The result tells a grouped GEMM which
slots and which expert each of its M blocks works on. It is a function of the ids alone: no atomics across programs, no
order left to the scheduler, so two calls give identical buffers.

Few ids are counted anew by every program: a second launch would cost more than the counting. Many ids are counted once,
chunk by chunk, by a first launch; the second launch then sums rows of that scratch table instead of reading ids.
"""

from typing import NamedTuple

import torch

from .align_kernels import (
    BLOCK_TILE,
    FETCHED,
    MAP_BLOCKS,
    MAP_IDS,
    NO_MAP,
    NUM_TICKETS,
    align_count_kernel,
    align_kernel,
)
from .kernel_parts import pdl_option

MAX_EXPERTS = 1024

_MOST_FETCHED = 12 << 20  # bytes: what the memory could deliver while this, and the GEMM's beginning, take their time

# At most this many programs a role, so that they all run at once on a large GPU: each reads the whole scratch table.
_PROGRAMS = 128
# numel * (bins + 128) is proportional to the cycles that one program spends on counting all ids: tl.histogram compiles
# to a fixed part for each id and a part that grows with the bins. At this value they cost about as much as a launch.
_RECOUNT_LIMIT = 1 << 21
_MAX_INT32 = 2**31 - 1


class AlignTiles(NamedTuple):
    """The constexpr choices of one (numel, num_experts): equal tiles run the same compiled kernels."""

    bins: int  # histogram bins: num_experts rounded up to a power of two, at least 64 (one wavefront on HIP)
    count_tile: int  # ids that one tl.histogram call counts
    slot_tile: int  # slots that are ranked against each other at a time
    num_warps: int
    two_launches: bool


def align_lengths(numel: int, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> tuple[int, int]:
    """Entries of sorted_token_ids and of expert_ids for `numel` ids: enough for every routing, known from shapes alone.

    pad_sorted_ids rounds the first up to a multiple of block_size. ValueError for sizes that are not allowed.
    """
    if block_size < 1:
        raise ValueError(f"block_size: {block_size} is not allowed; allowed: 1 and above")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: {num_experts} is not allowed; allowed: 1 … {MAX_EXPERTS}")
    length = numel + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = _ceil_div(length, block_size) * block_size
    if numel < num_experts:
        length = min(numel * block_size, length)
    return length, _ceil_div(length, block_size)


def align_launch_key(numel: int, num_experts: int) -> AlignTiles:
    """The constexpr choices for `numel` ids. Two equal keys compile nothing new (for one id dtype and kind of map)."""
    bins = max(64, 1 << (num_experts - 1).bit_length())
    if numel * (bins + 128) > _RECOUNT_LIMIT:
        return AlignTiles(bins, count_tile=256, slot_tile=128, num_warps=4, two_launches=True)
    # A histogram costs as much for masked ids as for real ones: a small batch gets a small tile.
    for count_tile in (128, 512):
        if numel <= count_tile:
            return AlignTiles(bins, count_tile, slot_tile=64, num_warps=4, two_launches=False)
    return AlignTiles(bins, count_tile=1024, slot_tile=64, num_warps=8, two_launches=False)


def align_scratch_size(numel: int, num_experts: int) -> int:
    """int32 elements that `align_into` needs as scratch; 0 when one launch does it all."""
    tiles = align_launch_key(numel, num_experts)
    return _ceil_div(numel, _share(numel, tiles.slot_tile)) * tiles.bins if tiles.two_launches else 0


def align_into(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = False,
    scratch: torch.Tensor | None = None,
    pdl: bool = False,
    weights: torch.Tensor | None = None,
    first_rows: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """`moe_align_block_size` into given buffers: nothing is allocated, every entry of the three outputs is written.

    sorted_token_ids       int32 [L], L at least `align_lengths(...)[0]`
    expert_ids             int32 [cdiv(L, block_size)]
    num_tokens_post_padded int32 [1]
    scratch                int32, at least `align_scratch_size(...)` elements, contents irrelevant; None if that is 0
    pdl                    programmatic dependent launch (kernel_parts.pdl_begin)
    weights                [num_experts, …] of any type, the first of which are brought into L2 if pdl
    first_rows             int32 [cdiv(L, block_size) + 1]: how many slots stand before each block, padding not
                           counted; 0 behind the last used one; the last entry is the number of all slots
    counters               int32 [NUM_TICKETS + cdiv(L, block_size)], set to 0 for kernels behind that count with them
    Raises ValueError for wrong sizes, TypeError for wrong dtypes.
    """
    _check_inputs(topk_ids, num_experts, expert_map)
    numel, length, num_blocks = topk_ids.numel(), sorted_token_ids.numel(), expert_ids.numel()
    _check_buffers(
        numel, block_size, num_experts, sorted_token_ids, expert_ids, num_tokens_post_padded, counters, first_rows
    )
    tiles = align_launch_key(numel, num_experts)
    chunk_size = _share(numel, tiles.slot_tile)
    num_chunks = _ceil_div(numel, chunk_size)
    mapping = _mapping(expert_map, ignore_invalid_experts)
    chunk_counts = None
    if tiles.two_launches:
        chunk_counts = _checked_scratch(scratch, num_chunks * tiles.bins)
        align_count_kernel[(num_chunks,)](
            topk_ids, expert_map, chunk_counts, numel, num_experts, chunk_size,
            MAPPING=mapping, BINS=tiles.bins, COUNT_TILE=tiles.count_tile, PDL=pdl,
            num_warps=tiles.num_warps, **pdl_option(pdl),
        )  # fmt: skip
    # One block program at least: with no ids at all it still writes num_tokens_post_padded = 0.
    blocks_per_program = _share(num_blocks, BLOCK_TILE.value)
    block_programs = max(1, _ceil_div(num_blocks, blocks_per_program))
    threads = 32 * tiles.num_warps
    expert_bytes = bytes_fetched = fetches = 0
    weights = weights if pdl else None  # not by what they are like: that may not choose another compiled kernel
    if weights is not None and _may_be_fetched(weights):
        expert_bytes = weights.stride(0) * weights.element_size()
        bytes_fetched = min(_MOST_FETCHED, weights.numel() * weights.element_size())
        fetches = _ceil_div(bytes_fetched, threads * FETCHED.value)
    align_kernel[(num_chunks + block_programs + fetches,)](
        topk_ids, expert_map, chunk_counts, sorted_token_ids, expert_ids, num_tokens_post_padded, counters, first_rows,
        numel, num_experts, block_size, length, num_blocks, chunk_size, num_chunks, blocks_per_program,
        block_programs, weights, expert_bytes, bytes_fetched, THREADS=threads,
        MAPPING=mapping, BINS=tiles.bins, COUNT_TILE=tiles.count_tile, SLOT_TILE=tiles.slot_tile, PDL=pdl,
        num_warps=tiles.num_warps, **pdl_option(pdl),
    )  # fmt: skip


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort slots by expert and pad each expert's run to a multiple of block_size.

    topk_ids    int32 or int64, any shape, contiguous; ids < 0 or >= num_experts are dropped
    num_experts global number of experts, 1 … 1024
    expert_map  int32 [num_experts], global → local, −1 = on another rank. With ignore_invalid_experts the ids are
                mapped first and slots of remote experts vanish; without it all global experts are sorted and the
                blocks of remote ones carry expert −1

    Returns sorted_token_ids int32 [L] (experts ascending, slots ascending within one, padding = numel), expert_ids
    int32 [cdiv(L, block_size)] (one a block, −1 behind the last used one) and num_tokens_post_padded int32 [1] (entries
    in use). L depends on shapes only, see `align_lengths`. Raises ValueError or TypeError that names the argument.
    """
    length, num_blocks = align_lengths(topk_ids.numel(), block_size, num_experts, pad_sorted_ids)
    device = topk_ids.device
    sorted_token_ids = torch.empty(length, dtype=torch.int32, device=device)
    expert_ids = torch.empty(num_blocks, dtype=torch.int32, device=device)
    num_tokens_post_padded = torch.empty(1, dtype=torch.int32, device=device)
    scratch_size = align_scratch_size(topk_ids.numel(), num_experts)
    scratch = torch.empty(scratch_size, dtype=torch.int32, device=device) if scratch_size else None
    align_into(
        topk_ids, block_size, num_experts, sorted_token_ids, expert_ids, num_tokens_post_padded,
        expert_map, ignore_invalid_experts, scratch,
    )  # fmt: skip
    return sorted_token_ids, expert_ids, num_tokens_post_padded


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _share(total: int, tile: int) -> int:
    """What one program of a role handles: as few whole tiles as keep the number of programs at _PROGRAMS or below."""
    return max(1, _ceil_div(total, tile * _PROGRAMS)) * tile


def _may_be_fetched(weights: torch.Tensor) -> bool:
    """Whether the tensor is in one piece, where and as large as bulk copies want it."""
    return weights.is_contiguous() and weights.data_ptr() % 16 == 0 and weights.numel() > 0


def _mapping(expert_map: torch.Tensor | None, ignore_invalid_experts: bool) -> int:
    if expert_map is None:
        return int(NO_MAP.value)
    return int(MAP_IDS.value if ignore_invalid_experts else MAP_BLOCKS.value)


def _check_inputs(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> None:
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids: dtype {topk_ids.dtype} is not allowed; allowed: torch.int32, torch.int64")
    if not topk_ids.is_contiguous():
        raise ValueError(f"topk_ids: strides {topk_ids.stride()} are not allowed; allowed: contiguous")
    if expert_map is not None:
        _check_int32("expert_map", expert_map)
    if expert_map is not None and expert_map.shape != (num_experts,):
        raise ValueError(f"expert_map: shape {list(expert_map.shape)} is not allowed; allowed: [{num_experts}]")


def _check_buffers(
    numel: int,
    block_size: int,
    num_experts: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    counters: torch.Tensor | None,
    first_rows: torch.Tensor | None,
) -> None:
    needed, _ = align_lengths(numel, block_size, num_experts)
    length = sorted_token_ids.numel()
    if not needed <= length <= _MAX_INT32 - block_size:
        raise ValueError(f"sorted_token_ids: {length} elements are not allowed; allowed: {needed} … 2**31 − block_size")
    for name, buffer, size in (
        ("sorted_token_ids", sorted_token_ids, length),
        ("expert_ids", expert_ids, _ceil_div(length, block_size)),
        ("num_tokens_post_padded", num_tokens_post_padded, 1),
        ("counters", counters, NUM_TICKETS.value + expert_ids.numel()),
        ("first_rows", first_rows, expert_ids.numel() + 1),
    ):
        if buffer is None:
            continue
        if buffer.numel() != size:
            raise ValueError(f"{name}: {buffer.numel()} elements are not allowed; allowed: {size}")
        _check_int32(name, buffer)


def _checked_scratch(scratch: torch.Tensor | None, size: int) -> torch.Tensor:
    given = 0 if scratch is None else scratch.numel()
    if scratch is None or given < size:
        raise ValueError(f"scratch: {given} elements are not allowed; allowed: {size} and above (align_scratch_size)")
    _check_int32("scratch", scratch)
    return scratch


def _check_int32(name: str, buffer: torch.Tensor) -> None:
    if buffer.dtype != torch.int32:
        raise TypeError(f"{name}: dtype {buffer.dtype} is not allowed; allowed: torch.int32")
    if not buffer.is_contiguous():
        raise ValueError(f"{name}: strides {buffer.stride()} are not allowed; allowed: contiguous")
