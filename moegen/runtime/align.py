"""The aligned assignment: slots sorted by expert, each expert's run padded to a multiple of the M block size.

One slot is one (token, top-k position) pair, numbered `token * top_k + position`. The result tells a grouped GEMM which
slots and which expert each of its M blocks works on. It is a function of the ids alone: no atomics across programs, no
order left to the scheduler, so two calls give identical buffers.

Every program knows the histogram of all ids, hence where each expert's run starts, and has one of two roles:

* a slot program owns a chunk of consecutive slots. It also knows the histogram of all slots in front of its chunk and
  ranks its own slots, so the position of a slot is `run start + earlier slots of the same expert`.
* a block program owns a range of M blocks: it writes their `expert_ids` and all padding entries inside them.

Few ids are counted anew by every program: a second launch would cost more than the counting. Many ids are counted once,
chunk by chunk, by a first launch; the second launch then sums rows of that scratch table instead of reading ids.

Meanwhile the memory is idle, and the GEMM behind will begin with the first experts. So further programs may bring the
first of the weights into L2, as far as their experts have slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .kernel_parts import pdl_begin, pdl_option

MAX_EXPERTS = 1024
NUM_TICKETS = tl.constexpr(2)  # counters of tiles, one a GEMM; behind them is one a block

NO_MAP = tl.constexpr(0)
MAP_IDS = tl.constexpr(1)  # ids become local before they are counted: slots of remote experts vanish
MAP_BLOCKS = tl.constexpr(2)  # all global experts are sorted, expert_ids become local (−1 = remote) on the way out

BLOCK_TILE = tl.constexpr(64)  # M blocks that a block program handles at a time

FETCHED = tl.constexpr(2048)  # bytes of weights, by one thread
_MOST_FETCHED = 12 << 20  # bytes: what the memory could deliver while this, and the GEMM's beginning, take their time

# At most this many programs a role, so that they all run at once on a large GPU: each reads the whole scratch table.
_PROGRAMS = 128
# numel * (bins + 128) is proportional to the cycles that one program spends on counting all ids: tl.histogram compiles
# to a fixed part for each id and a part that grows with the bins. At this value they cost about as much as a launch.
_RECOUNT_LIMIT = 1 << 21
_MAX_INT32 = 2**31 - 1

# Neither a value nor an address may choose another compiled kernel: batches differ in all of them, the buffers may be
# slices of one allocation, and 16-byte accesses would gain next to nothing here.
_PLAIN_INTS = (
    "numel", "num_experts", "block_size", "length", "num_blocks", "chunk_size", "num_chunks", "blocks_per_program",
    "block_programs", "expert_bytes", "bytes_fetched",
)  # fmt: skip
_POINTERS = (
    "topk_ids", "expert_map", "chunk_counts", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "counters",
    "first_rows", "weights",
)  # fmt: skip


class AlignTiles(NamedTuple):
    """The constexpr choices of one (numel, num_experts): equal tiles run the same compiled kernels."""

    bins: int  # histogram bins: num_experts rounded up to a power of two, at least 64 (one wavefront on HIP)
    count_tile: int  # ids that one tl.histogram call counts
    slot_tile: int  # slots that are ranked against each other at a time
    num_warps: int
    two_launches: bool


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_experts(topk_ids, expert_map, slots, end, num_experts, MAPPING: tl.constexpr):
    """Expert of each slot as int32; −1 for slots at or behind `end` and for dropped ids."""
    ids = tl.load(topk_ids + slots, mask=slots < end, other=-1)
    if MAPPING == MAP_IDS:
        ids = tl.load(expert_map + ids, mask=(ids >= 0) & (ids < num_experts), other=-1)
    # Compare before narrowing: an int64 id above 2**31 must not wrap into a valid one.
    return tl.where((ids >= 0) & (ids < num_experts), ids, -1).to(tl.int32)


@triton.jit
def _count_ids(
    topk_ids, expert_map, first, cut, end, num_experts,
    MAPPING: tl.constexpr, BINS: tl.constexpr, COUNT_TILE: tl.constexpr,
):  # fmt: skip
    """Histograms [BINS] of the slots first … cut − 1 and first … end − 1."""
    lane = tl.arange(0, COUNT_TILE)
    before, counts = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    experts = _load_experts(topk_ids, expert_map, first + lane, end, num_experts, MAPPING)
    for start in range(first, end, COUNT_TILE):
        # The next tile's load is in flight while this one is counted.
        upcoming = _load_experts(topk_ids, expert_map, start + COUNT_TILE + lane, end, num_experts, MAPPING)
        tile_counts = tl.histogram(experts, BINS, mask=experts >= 0)
        counts += tile_counts
        if start + COUNT_TILE <= cut:
            before += tile_counts
        elif start < cut:
            before += tl.histogram(experts, BINS, mask=(experts >= 0) & (start + lane < cut))
        experts = upcoming
    return before, counts


@triton.jit
def _sum_chunks(chunk_counts, cut, end, BINS: tl.constexpr):
    """Sums [BINS] of the rows 0 … cut − 1 and 0 … end − 1 of chunk_counts [chunks, BINS]."""
    ROWS: tl.constexpr = 4096 // BINS
    bins = tl.arange(0, BINS)
    before, counts = tl.zeros((ROWS, BINS), tl.int32), tl.zeros((ROWS, BINS), tl.int32)
    for start in range(0, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = tl.load(chunk_counts + rows[:, None] * BINS + bins[None, :], mask=(rows < end)[:, None], other=0)
        counts += tile
        before += tl.where((rows < cut)[:, None], tile, 0)
    return tl.sum(before, 0), tl.sum(counts, 0)


@triton.jit(do_not_specialize=_PLAIN_INTS, do_not_specialize_on_alignment=_POINTERS)
def align_count_kernel(
    topk_ids, expert_map, chunk_counts, numel, num_experts, chunk_size,
    MAPPING: tl.constexpr, BINS: tl.constexpr, COUNT_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First of two launches: program p writes row p of chunk_counts [chunks, BINS]."""
    pdl_begin(PDL)
    chunk = tl.program_id(0)
    first = chunk * chunk_size
    end = tl.minimum(first + chunk_size, numel)
    _, counts = _count_ids(topk_ids, expert_map, first, first, end, num_experts, MAPPING, BINS, COUNT_TILE)
    tl.store(chunk_counts + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _write_slots(
    topk_ids, expert_map, sorted_token_ids, next_position, first, end, num_experts,
    MAPPING: tl.constexpr, BINS: tl.constexpr, SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Scatter the slots first … end − 1; next_position [BINS] is where each expert's next slot goes."""
    lane = tl.arange(0, SLOT_TILE)
    for start in range(first, end, SLOT_TILE):
        experts = _load_experts(topk_ids, expert_map, start + lane, end, num_experts, MAPPING)
        earlier_twin = (experts[:, None] == experts[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(earlier_twin.to(tl.int32), 1)
        position = tl.gather(next_position, tl.maximum(experts, 0), 0) + rank
        tl.store(sorted_token_ids + position, start + lane, mask=experts >= 0)
        if start + SLOT_TILE < end:
            next_position += tl.histogram(experts, BINS, mask=experts >= 0)


@triton.jit
def _write_blocks(
    expert_map, sorted_token_ids, expert_ids, counters, first_rows, run_end, slot_end, padding_before, total,
    first, end, numel, length, block_size, MAPPING: tl.constexpr,
):  # fmt: skip
    """Expert, padding and first row of the blocks first … end − 1.

    run_end, slot_end [BINS]: where runs end with and without their padding; padding_before [BINS]: of all before them.
    """
    TILE: tl.constexpr = BLOCK_TILE
    WIDTH: tl.constexpr = 16
    run_end_block = run_end // block_size
    for tile in range(first, end, TILE):
        # The expert of a block is the number of runs that end at or before its start: the running sum of how many runs
        # end at each block. Runs that end in front of the tile count from its first block on.
        ends_at = tl.maximum(run_end_block - tile, 0)
        experts = tl.cumsum(tl.histogram(ends_at, TILE, mask=ends_at < TILE), 0)
        blocks = tile + tl.arange(0, TILE)
        starts = blocks * block_size
        live = starts < total
        known = tl.where(live, experts, 0)
        padding_from = tl.where(live, tl.gather(slot_end, known, 0), 0)
        if MAPPING == MAP_BLOCKS:
            owner = tl.load(expert_map + known, mask=live, other=-1)
        else:
            owner = tl.where(live, experts, -1)
        tl.store(expert_ids + blocks, owner, mask=blocks < end)
        if counters is not None:
            tl.store(counters + NUM_TICKETS + blocks, 0, mask=blocks < end)
        if first_rows is not None:
            row = tl.where(live, starts - tl.gather(padding_before, known, 0), 0)
            tl.store(first_rows + blocks, row, mask=blocks < end)
        # A loop of fixed width instead of a constexpr block size: one compiled kernel serves every block size.
        for column in range(0, block_size, WIDTH):
            offsets = column + tl.arange(0, WIDTH)
            positions = starts[:, None] + offsets[None, :]
            inside = (offsets < block_size)[None, :] & (blocks < end)[:, None] & (positions < length)
            padding = tl.zeros((TILE, WIDTH), tl.int32) + numel
            tl.store(sorted_token_ids + positions, padding, mask=inside & (positions >= padding_from[:, None]))


@triton.jit
def _fetch_weights(
    topk_ids, expert_map, weights, program, numel, num_experts, expert_bytes, bytes_fetched,
    MAPPING: tl.constexpr, COUNT_TILE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Into L2: a program's share of the first `bytes_fetched` of weights, if some of the first ids want that expert."""
    start = program * (THREADS * FETCHED)
    experts = _load_experts(topk_ids, expert_map, tl.arange(0, COUNT_TILE), numel, num_experts, MAPPING)
    wanted = tl.max((experts == start // expert_bytes).to(tl.int32), 0)
    offsets = start + tl.arange(0, THREADS) * FETCHED
    inside = (offsets <= bytes_fetched - FETCHED).to(tl.int32) * wanted
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [weights.to(tl.int64) + offsets, inside, FETCHED], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN_INTS, do_not_specialize_on_alignment=_POINTERS)
def align_kernel(
    topk_ids, expert_map, chunk_counts, sorted_token_ids, expert_ids, num_tokens_post_padded, counters,
    first_rows, numel, num_experts, block_size, length, num_blocks, chunk_size, num_chunks, blocks_per_program,
    block_programs, weights, expert_bytes, bytes_fetched,
    MAPPING: tl.constexpr, BINS: tl.constexpr, COUNT_TILE: tl.constexpr, SLOT_TILE: tl.constexpr, PDL: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """num_chunks slot programs, block_programs block programs, and those that fetch weights, if there are weights.

    Every entry is written exactly once.
    """
    pdl_begin(PDL)
    program = tl.program_id(0)
    if weights is not None:
        fetches = program - num_chunks - block_programs
        if fetches >= 0:
            _fetch_weights(
                topk_ids, expert_map, weights, fetches, numel, num_experts, expert_bytes, bytes_fetched,
                MAPPING, COUNT_TILE, THREADS,
            )  # fmt: skip
            return
    first = program * chunk_size
    if chunk_counts is None:
        before, counts = _count_ids(topk_ids, expert_map, 0, first, numel, num_experts, MAPPING, BINS, COUNT_TILE)
    else:
        before, counts = _sum_chunks(chunk_counts, program, num_chunks, BINS)
    padded = (counts + block_size - 1) // block_size * block_size
    run_end = tl.cumsum(padded, 0)
    run_start = run_end - padded
    if program < num_chunks:
        _write_slots(
            topk_ids, expert_map, sorted_token_ids, run_start + before, first, tl.minimum(first + chunk_size, numel),
            num_experts, MAPPING, BINS, SLOT_TILE,
        )  # fmt: skip
    else:
        total = tl.sum(padded, 0)
        first_block = (program - num_chunks) * blocks_per_program
        if program == num_chunks:
            tl.store(num_tokens_post_padded, total)
            if counters is not None:
                tl.store(counters + tl.arange(0, NUM_TICKETS), 0)
            if first_rows is not None:
                tl.store(first_rows + num_blocks, tl.sum(counts, 0))
        _write_blocks(
            expert_map, sorted_token_ids, expert_ids, counters, first_rows, run_end, run_start + counts,
            run_end - tl.cumsum(counts, 0) - (padded - counts), total, first_block,
            tl.minimum(first_block + blocks_per_program, num_blocks), numel, length, block_size, MAPPING,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Host side
# --------------------------------------------------------------------------------------------------------------------


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
    counters               int32 [NUM_TICKETS + cdiv(L, block_size)], set to 0 for kernels behind that count with them
    first_rows             int32 [cdiv(L, block_size) + 1]: how many slots stand before each block, padding not
                           counted; 0 behind the last used one; the last entry is the number of all slots
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
    if weights is not None and pdl and _may_be_fetched(weights):
        expert_bytes = weights.stride(0) * weights.element_size()
        bytes_fetched = min(_MOST_FETCHED, weights.numel() * weights.element_size())
        fetches = _ceil_div(bytes_fetched, threads * FETCHED.value)
    align_kernel[(num_chunks + block_programs + fetches,)](
        topk_ids, expert_map, chunk_counts, sorted_token_ids, expert_ids, num_tokens_post_padded, counters, first_rows,
        numel, num_experts, block_size, length, num_blocks, chunk_size, num_chunks, blocks_per_program,
        block_programs, weights if fetches else None, expert_bytes, bytes_fetched, THREADS=threads,
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
