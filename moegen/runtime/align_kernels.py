"""The kernels of the aligned assignment, see align.py.

Every program knows the histogram of all ids, hence where each expert's run starts, and has one of two roles:

* a slot program owns a chunk of consecutive slots. It also knows the histogram of all slots in front of its chunk and
  ranks its own slots, so the position of a slot is `run start + earlier slots of the same expert`.
* a block program owns a range of M blocks: it writes their `expert_ids` and all padding entries inside them.

Meanwhile the memory is idle, and the GEMM behind will begin with the first experts. So further programs may bring the
first of the weights into L2, as far as their experts have slots.
"""

import triton
import triton.language as tl

from .kernel_parts import pdl_begin

NUM_TICKETS = tl.constexpr(2)  # counters of tiles, one a GEMM; behind them is one a block

NO_MAP = tl.constexpr(0)
MAP_IDS = tl.constexpr(1)  # ids become local before they are counted: slots of remote experts vanish
MAP_BLOCKS = tl.constexpr(2)  # all global experts are sorted, expert_ids become local (−1 = remote) on the way out

BLOCK_TILE = tl.constexpr(64)  # M blocks that a block program handles at a time
FETCHED = tl.constexpr(2048)  # bytes of weights, by one thread

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
