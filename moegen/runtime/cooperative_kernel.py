"""The kernels of the family "cooperative": grouped GEMMs whose consumers wait for their own products.

A block of 12 warps: consumer 0 (the default partition), consumer 1, a producer. Programs are persistent, one a
multiprocessor. A tile is 128 sorted slots by BLOCK_SIZE_N weight rows, a step takes 128 bytes of each row, and consumer
c has slots 64 c … 64 c + 63 of it. Tiles of fewer slots are the consumers' in turn: one finishes its tile while the
other multiplies. Of less than 64 slots products are weights · tokensᵀ, since what the tensor cores do in vain takes
power from the clock. The producer fills a ring, tile after tile without a pause: weights by TMA, tokens by cp.async in
gemm1, which gathers them, and by TMA in gemm2. It draws the tiles, the first one as well, from a counter that all
programs share, one ahead, and posts each with its first step, counted from the first tile's. Expert and slots of a tile
are loaded before the one before is finished, since a chain of loads would take as long as some steps.

One launch may run both GEMMs: the tiles of gemm2 follow those of gemm1, and a block of rows is read once gemm1's
consumers have finished all its tiles. Whoever draws a tile runs already, and tiles are drawn in order, so the tile that
everybody waits for is always at work, however few programs the GPU has room for.

S is a CooperativeSizes (S2 gemm2's where both run); routing is (topk_weights [num_slots], sorted_token_ids, expert_ids,
num_tokens_post_padded, num_slots, first_rows: the row of `hidden` in which each block of sorted slots begins, since it
has no rows for padding), ring (tiles of a, blocks of w, block scales of a if S.rings_scales, the barriers that say they
are empty and loaded), posts (tiles and their first steps, the barriers that say they are there), turns (for each
consumer the barrier that says that the other one is through with the stages of a tile), flow (the next tile, its place
among those of this block, its first step), results (out, out_scale, bias). Gluon, hence imported only where the family
runs (cooperative.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .cooperative_finish import finish, router_weights
from .cooperative_flow import as_second, block_expert, place_of, posted_tile, release_rows, sorted_slots
from .cooperative_produce import produce
from .cooperative_products import FIRST_TURN, multiply, multiply_groups, skip
from .gluon_parts import asm, wait_for_previous

# Registers a thread. With 240 and 24 the compiler overlaps a consumer's products and spills.
_CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(224)
_PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(56)


@gluon.jit
def _facts(routing, tile, num_m, skip: gl.constexpr, LEADS: gl.constexpr, LAYOUT: gl.constexpr, S: gl.constexpr):
    """What a consumer has to know of a tile: expert, its first row of `hidden`, sorted slots [tokens], and on request
    the first of them once more.
    """
    pid_m, _ = place_of(tile, num_m, S)
    first = pid_m * S.block_m + skip
    lead = gl.load(routing[1] + first) if LEADS else 0
    expert = block_expert(routing, pid_m, S)
    row = gl.load(routing[5] + pid_m) + skip
    return expert, row, sorted_slots(routing, first, S.tokens, LAYOUT), lead


@gluon.jit
def _consume_gemm(part: gl.constexpr, scales, results, base, routing, counters, posts, ring, turns, flow,
                  ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """`_produce_gemm`, for consumer `part`."""
    tile, count, step = flow
    SHAPE: gl.constexpr = (S.product_n, S.tokens) if S.swaps else (S.tokens, S.product_n)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE[1], 32 // S.value_bytes])
    TOKENS: gl.constexpr = gl.SliceLayout(0 if S.swaps else 1, ACC)
    PRODUCT: gl.constexpr = gl.int32 if ring[0].dtype == gl.int8 else gl.float32
    SKIP: gl.constexpr = part * S.tokens if S.shares_tiles else 0  # slots of the tile before this consumer's
    HALVED: gl.constexpr = S.shares_tiles and part == 1  # an expert's padding follows its slots
    EVERY: gl.constexpr = 1 if S.shares_tiles else 2
    num_m = gl.load(routing[3]) // S.block_m
    nothing = gl.zeros(SHAPE, PRODUCT, layout=ACC)
    if S.takes_turns and part == 1:
        asm("bar.arrive " + FIRST_TURN)  # consumer 0 begins
    end = base + num_m * S.tiles_n
    expert, row, slots, lead = _facts(routing, tile - base, num_m, SKIP, HALVED, TOKENS, S)
    while tile < end:
        weights = router_weights(slots, routing, S)
        pid_m, pid_n = place_of(tile - base, num_m, S)
        column = pid_n * (S.block_n // S.sides)
        place = (step % S.stages, step // S.stages % 2)
        if HALVED:
            padding = lead >= routing[4]
        else:
            padding: gl.constexpr = False
        if padding:
            skip(ring, place, part, S)
            tile, step = posted_tile(posts, count + 1, S)
            ahead_facts = _facts(routing, tile - base, num_m, SKIP, HALVED, TOKENS, S)
        else:
            own = (turns, count // 2)
            if S.grouped:
                low, high = multiply_groups(
                    routing, scales, expert, slots, row, column, ring, place, own, nothing, part, S
                )  # fmt: skip
            else:
                low, high = multiply(ring, place, own, nothing, part, S)
            # Not earlier: products leave registers for no more, and the producer may be waiting for these.
            tile, step = posted_tile(posts, count + EVERY, S)
            ahead_facts = _facts(routing, tile - base, num_m, SKIP, HALVED, TOKENS, S)
            finish(
                low, high, expert, slots, weights, row, column, routing, scales, results, ACTIVATION, DTYPE, S
            )  # fmt: skip
        if S.joined and S.gathers:
            release_rows(counters[1], pid_m)
        expert, row, slots, lead = ahead_facts
        count += EVERY
    if S.takes_turns and part == 0:
        asm("bar.sync " + FIRST_TURN)  # takes consumer 1's last arrival
    return tile, count, step


@gluon.jit
def _consume(part: gl.constexpr, first, second, routing, counters, posts, ring, turns, ACTIVATION: gl.constexpr,
             DTYPE: gl.constexpr, S: gl.constexpr, S2: gl.constexpr):  # fmt: skip
    """The tiles of this block as far as they are consumer `part`'s."""
    wait_for_previous(S.pdl)
    if S.pdl:
        asm("griddepcontrol.launch_dependents")
    COUNT: gl.constexpr = 0 if S.shares_tiles else part
    tile, step = posted_tile(posts, COUNT, S)
    flow = (tile, COUNT, step)
    flow = _consume_gemm(
        part, first[2], first[3], 0, routing, counters, posts, ring, turns, flow, ACTIVATION, DTYPE, S
    )  # fmt: skip
    if S2 is not None:
        base = gl.load(routing[3]) // S.block_m * S.tiles_n
        ring = (ring[0], as_second(ring[1], second[1]), ring[2], ring[3], ring[4])
        _consume_gemm(
            part, second[2], second[3], base, routing, counters, posts, ring, turns, flow, ACTIVATION, DTYPE, S2
        )  # fmt: skip


@gluon.jit
def _run(first, second, routing, counters, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr,
         S2: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """One GEMM, or both of a layer. first, second: a, w, scales and results of each.

    a: gemm1's values [tokens, DEPTH]; gemm2's descriptor of sorted rows [rows, DEPTH], block [BLOCK_SIZE_M, S.step].
    w: descriptor [E, sides, ROWS / sides, DEPTH], block S.weight_box.
    scales: with block scales of a [rows of a, steps] float32 and of w [E, row groups, steps] float32 or e8m0. Otherwise
    of a [rows of a] or [1], of w [E, ROWS] or [E], float32, or None and None.
    results: out [num_slots, columns], gemm1's in the order of the assignment, gemm2's in (token, slot) order; its
    scales [num_slots, groups] float32 or None; bias [E, ROWS] or None.
    """
    w = first[1]
    VALUES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * S.value_bytes, rank=2)
    STAGES: gl.constexpr = S.stages
    POSTS: gl.constexpr = S.posts
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    a_bufs = gl.allocate_shared_memory(w.dtype, [STAGES, S.block_m, S.step], VALUES)
    w_bufs = gl.allocate_shared_memory(w.dtype, [STAGES * S.products] + w.block_type.shape, w.layout)  # noqa: RUF005 - Triton has no stars
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=S.arrivals)
        mbarrier.init(ready.index(stage), count=2 if S.copies else 1)
    numbers = gl.allocate_shared_memory(gl.int32, [2 * POSTS, 1], FLAT)
    posted = gl.allocate_shared_memory(gl.int64, [POSTS, 1], mbarrier.MBarrierLayout())
    for post in gl.static_range(POSTS):
        mbarrier.init(posted.index(post), count=1)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)
    if S.rings_scales:
        scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, S.block_m], FLAT)
    else:
        scale_bufs: gl.constexpr = None
    ring = (a_bufs, w_bufs, scale_bufs, empty, ready)
    posts = (numbers, posted)
    gl.warp_specialize(
        [
            (_consume, (0, first, second, routing, counters, posts, ring, turns, ACTIVATION, DTYPE, S, S2)),
            (_consume, (1, first, second, routing, counters, posts, ring, turns, ACTIVATION, DTYPE, S, S2)),
            (produce, (first, second, routing, counters, posts, ring, S, S2)),
        ],
        [WARPS, WARPS if S.gathers else 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


# The shared arguments of the kernels; sorted_token_ids and so on are the aligned assignment, of whose counters `ticket`
# [1] counts the tiles that were drawn, and done [blocks] the parts of tiles that gemm1 has finished.
_ANY_ALIGNMENT = (
    "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "first_rows", "ticket", "done",
)  # fmt: skip


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def gemm1_cooperative(
    a, w, bias, out, out_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, first_rows, ticket,
    num_slots, a_scale, w_scale, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Gathered tokens · w13ᵀ with activation, into `hidden` in sorted order."""
    gemm = (a, w, (a_scale, w_scale), (out, out_scale, bias))
    routing = (topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots, first_rows)
    _run(gemm, None, routing, (ticket, None), ACTIVATION, DTYPE, S, None, num_warps)


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def gemm2_cooperative(
    a, w, bias, out, out_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, first_rows, ticket,
    num_slots, a_scale, w_scale, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Sorted rows of `hidden` · w2ᵀ, each to its slot."""
    gemm = (a, w, (a_scale, w_scale), (out, out_scale, bias))
    routing = (topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots, first_rows)
    _run(gemm, None, routing, (ticket, None), ACTIVATION, DTYPE, S, None, num_warps)


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def layer_cooperative(
    a, w13, bias13, hidden, hidden_scale, rows, w2, bias2, out, topk_weights, sorted_token_ids, expert_ids,
    num_tokens_post_padded, first_rows, ticket, done, num_slots, a_scale, w13_scale, w2_scale, ACTIVATION: gl.constexpr,
    DTYPE: gl.constexpr, S: gl.constexpr, S2: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Both, in one launch; `rows` is the descriptor of `hidden`."""
    first = (a, w13, (a_scale, w13_scale), (hidden, hidden_scale, bias13))
    second = (rows, w2, (hidden_scale, w2_scale), (out, None, bias2))
    routing = (topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots, first_rows)
    _run(first, second, routing, (ticket, done), ACTIVATION, DTYPE, S, S2, num_warps)
