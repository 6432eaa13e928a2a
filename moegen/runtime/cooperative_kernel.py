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
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .cooperative_finish import finish, router_weights
from .cooperative_products import FIRST_TURN, multiply, multiply_groups, skip
from .gluon_parts import asm, block_barrier, load_acquire, next_stage, wait_for_previous
from .kernel_parts import tile_order

_LAG: gl.constexpr = gl.constexpr(2)  # steps between asking for tokens and announcing them
# Registers a thread. With 240 and 24 the compiler overlaps a consumer's products and spills.
_CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(224)
_PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(56)


@gluon.jit
def _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S: gl.constexpr):
    """The blocks of a step: gate and up rows in turn or together, or neighbours."""
    BLOCKS: gl.constexpr = S.products
    for half in gl.static_range(BLOCKS):
        if S.gated and not S.splits:
            start = [expert, half, pid_n * S.width, k]
        else:
            start = [expert, 0, pid_n * (S.block_n // S.sides) + half * S.width, k]
        tma.async_copy_global_to_shared(w, start, bar, w_bufs.index(stage * BLOCKS + half))


@gluon.jit
def _announce(ready, behind, live, S: gl.constexpr):
    """The tokens of stage `behind` have arrived; the stage after it."""
    fence_async_shared()  # cp.async wrote through one proxy, products read through another
    mbarrier.arrive(ready.index(behind), count=1, pred=live)
    return gl.where(behind == S.stages - 1, 0, behind + 1)


@gluon.jit
def _draw(ticket, posts, count, step, S: gl.constexpr):
    """The tile behind those that all programs have drawn so far, posted as number `count` of this block's."""
    numbers, posted = posts
    tile = gl.atomic_add(ticket, 1, sem="relaxed")
    here = count % S.posts
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    numbers.index(2 * here).store(gl.full((1,), tile, gl.int32, layout=LAYOUT))
    numbers.index(2 * here + 1).store(gl.full((1,), step, gl.int32, layout=LAYOUT))
    mbarrier.arrive(posted.index(here), count=1)
    return tile


@gluon.jit
def _posted(posts, count, S: gl.constexpr):
    """What the producer posted: a tile and its first step."""
    numbers, posted = posts
    here = count % S.posts
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(posted.index(here), count // S.posts % 2)
    tile = gl.max(numbers.index(2 * here).load(LAYOUT), axis=0)
    return tile, gl.max(numbers.index(2 * here + 1).load(LAYOUT), axis=0)


@gluon.jit
def _place(tile, num_m, S: gl.constexpr):
    """The M block of a tile and its column of tiles; of the last one if there is no such tile."""
    blocks = gl.maximum(num_m, 1)
    return tile_order(gl.minimum(tile, blocks * S.tiles_n - 1), blocks, S.tiles_n, S.group_m)


@gluon.jit
def _expert(routing, pid_m, S: gl.constexpr):
    """An expert_map may lead beyond the local experts: top_k_reduce ignores what is computed for such slots."""
    return gl.minimum(gl.load(routing[2] + pid_m), S.num_experts - 1)


@gluon.jit
def _slots(routing, first, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sorted slots [ROWS] from `first` on."""
    return gl.load(routing[1] + first + gl.arange(0, ROWS, layout=LAYOUT))


@gluon.jit
def _await_rows(done, pid_m, ARRIVALS: gl.constexpr):
    """Until gemm1's consumers have finished a block of rows, which TMA may then read; L1 forgets what it had there."""
    while load_acquire(done + pid_m) < ARRIVALS:
        pass
    asm("fence.proxy.async")


@gluon.jit
def _release_rows(done, pid_m):
    """One consumer's part of a tile is stored, for TMA of other programs to read."""
    asm("fence.proxy.async")
    block_barrier()
    gl.atomic_add(done + pid_m, 1, sem="release")


@gluon.jit
def _produce_gemm(gemm, base, routing, counters, posts, ring, flow, AWAITED: gl.constexpr, S: gl.constexpr):
    """The tiles of one GEMM, of which `base` is the first, as far as they are this block's; `flow` behind them."""
    a, w, scales, _ = gemm
    a_bufs, w_bufs, scale_bufs, empty, ready = ring
    ticket, done = counters
    tile, count, step = flow
    stage = step % S.stages
    phase = step // S.stages % 2 ^ 1
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16 // S.value_bytes], [4, 8], [4, 1], [1, 0])
    STEP: gl.constexpr = S.step
    BLOCK_M: gl.constexpr = S.block_m
    W_BYTES: gl.constexpr = S.products * w.block_type.nbytes
    num_m = gl.load(routing[3]) // BLOCK_M
    behind = (stage + S.stages - _LAG) % S.stages  # the stage whose tokens are announced next
    steps = 0
    end = base + num_m * S.tiles_n
    pid_m, pid_n = _place(tile - base, num_m, S)
    expert = _expert(routing, pid_m, S)
    if S.gathers:
        slots = _slots(routing, pid_m * BLOCK_M, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    else:
        row = gl.load(routing[5] + pid_m)
    while tile < end:
        step += S.steps
        ahead = _draw(ticket, posts, count + 1, step, S)
        ahead_m, ahead_n = _place(ahead - base, num_m, S)
        ahead_expert = _expert(routing, ahead_m, S)
        if S.gathers:
            ahead_slots = _slots(routing, ahead_m * BLOCK_M, BLOCK_M, gl.SliceLayout(1, LAYOUT))
            rows = slots // S.top_k
            there = slots < routing[4]
            depth = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, LAYOUT)), 0)
            pointers = a + (gl.expand_dims(rows.to(gl.int64) * S.depth, 1) + depth)
            live, pointers = gl.broadcast(gl.expand_dims(there, 1), pointers)  # padding costs no traffic
        else:
            ahead_row = gl.load(routing[5] + ahead_m)
            rows = row + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            there = rows < routing[4]
        for k in range(0, S.steps * STEP, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, W_BYTES if S.gathers else W_BYTES + a.block_type.nbytes)
            _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S)
            if S.gathers:
                mask = live
                if S.depth % STEP != 0:
                    mask = live & (depth < S.depth - k)
                async_copy.async_copy_global_to_shared(a_bufs.index(stage), pointers + k, mask=mask)
            else:
                if AWAITED > 0:  # noqa: SIM102 - the first one is decided by the compiler
                    if k == 0:
                        _await_rows(done, pid_m, AWAITED)
                tma.async_copy_global_to_shared(a, [row, k], bar, a_bufs.index(stage))
            if S.rings_scales:
                token_scales = scales[0] + rows * S.steps + k // STEP
                async_copy.async_copy_global_to_shared(scale_bufs.index(stage), token_scales, mask=there)
            if S.copies:
                async_copy.commit_group()
                async_copy.wait_group(_LAG)
                behind = _announce(ready, behind, steps >= _LAG, S)
                steps += 1
            elif S.joined:  # gemm1's stages are announced twice
                mbarrier.arrive(bar, count=1)
            stage, phase = next_stage(stage, phase, S.stages)
        tile = ahead
        pid_m = ahead_m
        pid_n = ahead_n
        expert = ahead_expert
        if S.gathers:
            slots = ahead_slots
        else:
            row = ahead_row
        count += 1
    if S.copies:
        async_copy.wait_group(0)
        for late in gl.static_range(_LAG):
            behind = _announce(ready, behind, steps + late >= _LAG, S)
    return tile, count, step


@gluon.jit
def _produce(first, second, routing, counters, posts, ring, S: gl.constexpr, S2: gl.constexpr):
    """Every tile of this block, in the order in which the consumers take them."""
    wait_for_previous(S.pdl)
    flow = (_draw(counters[0], posts, 0, 0, S), 0, 0)
    flow = _produce_gemm(first, 0, routing, counters, posts, ring, flow, 0, S)
    if S2 is not None:
        base = gl.load(routing[3]) // S.block_m * S.tiles_n
        ring = (ring[0], _as_second(ring[1], second[1]), ring[2], ring[3], ring[4])
        awaited: gl.constexpr = S.arrivals * S.tiles_n
        flow = _produce_gemm(second, base, routing, counters, posts, ring, flow, awaited, S2)
    if not S.shares_tiles:  # one consumer has been told that there is no more, now the other
        _draw(counters[0], posts, flow[1] + 1, flow[2], S)


@gluon.jit
def _as_second(w_bufs, w):
    """The ring's blocks of weights as gemm2 sees them, which may have another form of the same size."""
    SHAPE: gl.constexpr = [w_bufs.shape[0]] + w.block_type.shape  # noqa: RUF005 - Triton has no stars
    return w_bufs._reinterpret(w.dtype, SHAPE, w.layout)


@gluon.jit
def _facts(routing, tile, num_m, skip: gl.constexpr, LEADS: gl.constexpr, LAYOUT: gl.constexpr, S: gl.constexpr):
    """What a consumer has to know of a tile: expert, its first row of `hidden`, sorted slots [tokens], and on request
    the first of them once more.
    """
    pid_m, _ = _place(tile, num_m, S)
    first = pid_m * S.block_m + skip
    lead = gl.load(routing[1] + first) if LEADS else 0
    return (
        _expert(routing, pid_m, S), gl.load(routing[5] + pid_m) + skip, _slots(routing, first, S.tokens, LAYOUT), lead
    )  # fmt: skip


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
        pid_m, pid_n = _place(tile - base, num_m, S)
        column = pid_n * (S.block_n // S.sides)
        place = (step % S.stages, step // S.stages % 2)
        if HALVED:
            padding = lead >= routing[4]
        else:
            padding: gl.constexpr = False
        if padding:
            skip(ring, place, part, S)
            tile, step = _posted(posts, count + 1, S)
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
            tile, step = _posted(posts, count + EVERY, S)
            ahead_facts = _facts(routing, tile - base, num_m, SKIP, HALVED, TOKENS, S)
            finish(
                low, high, expert, slots, weights, row, column, routing, scales, results, ACTIVATION, DTYPE, S
            )  # fmt: skip
        if S.joined and S.gathers:
            _release_rows(counters[1], pid_m)
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
    tile, step = _posted(posts, COUNT, S)
    flow = (tile, COUNT, step)
    flow = _consume_gemm(
        part, first[2], first[3], 0, routing, counters, posts, ring, turns, flow, ACTIVATION, DTYPE, S
    )  # fmt: skip
    if S2 is not None:
        base = gl.load(routing[3]) // S.block_m * S.tiles_n
        ring = (ring[0], _as_second(ring[1], second[1]), ring[2], ring[3], ring[4])
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
            (_produce, (first, second, routing, counters, posts, ring, S, S2)),
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
