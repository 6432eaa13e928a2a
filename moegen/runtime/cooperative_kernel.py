"""The kernel of the family "cooperative": a grouped GEMM whose consumers wait for their own products.

A block of 12 warps: consumer 0 (the default partition), consumer 1, a producer. Programs are persistent, one a
multiprocessor. A tile is 128 sorted slots by BLOCK_SIZE_N weight rows, a step takes 128 bytes of each row, and consumer
c has slots 64 c … 64 c + 63 of it; of a tile of 64 slots it has half of the columns. The producer fills a ring, tile
after tile without a pause: weights by TMA, tokens by cp.async in gemm1, which gathers them, and by TMA in gemm2.

Block scales change with every step. The tensor cores cannot scale, so each step's product is scaled and added by
ordinary ones: nothing in the loop makes one consumer wait for the other, and one scales while the product of the other
runs. Without block scales products add up on the tensor cores, one in flight while the next is issued.

S is a CooperativeSizes; routing is (topk_weights [num_slots], sorted_token_ids, expert_ids, num_tokens_post_padded,
num_slots), ring (tiles of a, blocks of w, the barriers that say they are empty and loaded), results (out, out_scale,
bias, and for consumers that share groups the maxima that they exchange and a barrier). Gluon, hence imported only where
the family runs (cooperative.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .cooperative_finish import EACH, GROUP, finish, rows_of
from .decode import decode_scale
from .kernel_parts import tile_order
from .stream_parts import asm, next_stage, wait_for_previous

_LAG: gl.constexpr = gl.constexpr(2)  # steps between asking for tokens and announcing them
# Registers a thread. With 240 and 24 the compiler overlaps a consumer's products and spills.
_CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(224)
_PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(56)
# For `_product`; Triton takes the first few barriers of a block.
_FIRST_TURN: gl.constexpr = gl.constexpr("8, 256")
_SECOND_TURN: gl.constexpr = gl.constexpr("9, 256")


@gluon.jit
def _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S: gl.constexpr):
    """The blocks of a step: gate and up rows in turn or together, or neighbours."""
    HALVES: gl.constexpr = S.halves
    for half in gl.static_range(HALVES):
        if S.gated and not S.splits:
            start = [expert, half, pid_n * S.width, k]
        else:
            start = [expert, 0, pid_n * (S.block_n // S.sides) + half * S.width, k]
        tma.async_copy_global_to_shared(w, start, bar, w_bufs.index(stage * S.halves + half))


@gluon.jit
def _announce(ready, behind, live, S: gl.constexpr):
    """The tokens of stage `behind` have arrived; the stage after it."""
    fence_async_shared()  # cp.async wrote through one proxy, products read through another
    mbarrier.arrive(ready.index(behind), count=1, pred=live)
    return gl.where(behind == S.stages - 1, 0, behind + 1)


@gluon.jit
def _produce(a, w, routing, ring, S: gl.constexpr):
    """Every tile of this block, in the order in which the consumers take them."""
    _, sorted_ids, expert_ids, num_sorted, num_slots = routing
    a_bufs, w_bufs, empty, ready = ring
    wait_for_previous(S.pdl)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16 // S.value_bytes], [4, 8], [4, 1], [1, 0])
    STEP: gl.constexpr = S.step
    BLOCK_M: gl.constexpr = S.block_m
    W_BYTES: gl.constexpr = S.halves * w.block_type.nbytes
    num_m = gl.load(num_sorted) // BLOCK_M
    stage = 0
    phase = 1
    behind = S.stages - _LAG  # the stage whose tokens are announced next
    steps = 0
    for tile in range(gl.program_id(0), num_m * S.tiles_n, gl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, S.tiles_n, S.group_m)
        # An expert_map may lead beyond the local experts: top_k_reduce ignores what is computed for such slots.
        expert = gl.minimum(gl.load(expert_ids + pid_m), S.num_experts - 1)
        if S.gathers:
            slots = gl.load(sorted_ids + pid_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT)))
            rows = slots // S.top_k
            depth = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, LAYOUT)), 0)
            pointers = a + (gl.expand_dims(rows.to(gl.int64) * S.depth, 1) + depth)
            live, pointers = gl.broadcast(gl.expand_dims(slots < num_slots, 1), pointers)  # padding costs no traffic
        for k in range(0, S.steps * STEP, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = ready.index(stage)
            if S.gathers:
                mbarrier.expect(bar, W_BYTES)
                _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S)
                mask = live
                if S.depth % STEP != 0:
                    mask = live & (depth < S.depth - k)
                async_copy.async_copy_global_to_shared(a_bufs.index(stage), pointers + k, mask=mask)
                async_copy.commit_group()
                async_copy.wait_group(_LAG)
                behind = _announce(ready, behind, steps >= _LAG, S)
                steps += 1
            else:
                mbarrier.expect(bar, W_BYTES + a.block_type.nbytes)
                tma.async_copy_global_to_shared(a, [pid_m * BLOCK_M, k], bar, a_bufs.index(stage))
                _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S)
            stage, phase = next_stage(stage, phase, S.stages)
    if S.gathers:
        async_copy.wait_group(0)
        for late in gl.static_range(_LAG):
            behind = _announce(ready, behind, steps + late >= _LAG, S)


@gluon.jit
def _await_turn(part: gl.constexpr, S: gl.constexpr):
    """If the consumers take turns: wait for one's own."""
    if S.takes_turns:
        asm("bar.sync " + (_FIRST_TURN if part == 0 else _SECOND_TURN))


@gluon.jit
def _pass_turn(part: gl.constexpr, S: gl.constexpr):
    """If the consumers take turns: it is the other one's."""
    if S.takes_turns:
        asm("bar.arrive " + (_SECOND_TURN if part == 0 else _FIRST_TURN))


@gluon.jit
def _product(a_tile, w_tile, nothing, part: gl.constexpr, S: gl.constexpr):
    """Issue one product and wait for no one, but in gemm1 for one's turn.

    Products of gemm1 then queue, instead of sharing the tensor cores and ending, hence scaling, together. The short
    reductions of gemm2 gain nothing from it, and it ties the consumers' epilogues together.
    """
    _await_turn(part, S)
    w_tile = w_tile.reshape((GROUP, GROUP)).permute((1, 0))
    product = warpgroup_mma(a_tile, w_tile, nothing, use_acc=False, is_async=True)
    _pass_turn(part, S)
    return product


@gluon.jit
def _columns(values):
    """[64, N] -> its left and right N / 2 columns, in registers."""
    return gl.split(gl.permute(gl.reshape(values, (EACH, 2, values.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def _scaled(product, factor):
    """product [64, N] times factor [64]."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, product.type.layout), assert_trivial=True)
    return product.to(gl.float32) * gl.expand_dims(factor, 1)


@gluon.jit
def _scales(a_scale, w_scale, routing, expert, row, first, ACC: gl.constexpr, S: gl.constexpr):
    """Where the scales of a consumer's part of a tile begin: of its rows [64], and of both halves of its columns."""
    HIGH: gl.constexpr = S.columns // GROUP if S.gated else 1  # groups from low to high
    a_rows = rows_of(first, routing, gl.SliceLayout(1, ACC), S)
    last = (expert + 1) * S.row_groups - 1
    group = gl.minimum(expert * S.row_groups + row // GROUP, last)
    high = gl.minimum(group + HIGH, last)
    return a_scale + a_rows * S.steps, w_scale + group * S.steps, w_scale + high * S.steps


@gluon.jit
def _multiply(ring, place, nothing, part: gl.constexpr, S: gl.constexpr):
    """The sums of a consumer's part of one tile, low and high, and the place in the ring behind it."""
    a_bufs, w_bufs, empty, ready = ring
    stage, phase = place
    SHAPE: gl.constexpr = (S.product_n, S.step)
    FIRST_HALF: gl.constexpr = 0 if S.parts_by_rows else part
    low = nothing
    high = nothing
    behind = 0  # a value of its own: with that of `stage`, Triton would take it for one that the loop does not change
    for k in range(S.steps):
        mbarrier.wait(ready.index(stage), phase)
        a_tile = a_bufs.index(stage)
        if S.parts_by_rows:
            a_tile = a_tile.slice(part * EACH, EACH, 0)
        w_tile = w_bufs.index(stage * S.halves + FIRST_HALF).reshape(SHAPE).permute((1, 0))
        product = warpgroup_mma(a_tile, w_tile, low, use_acc=True, is_async=True)
        if S.products == 2:
            w_tile = w_bufs.index(stage * S.halves + 1).reshape(SHAPE).permute((1, 0))
            second = warpgroup_mma(a_tile, w_tile, high, use_acc=True, is_async=True)
            low, high = warpgroup_mma_wait(2, deps=(product, second))
        else:
            low = warpgroup_mma_wait(1, deps=(product,))
        mbarrier.arrive(empty.index(behind), count=1, pred=k > 0)  # of the step before
        behind = stage
        stage, phase = next_stage(stage, phase, S.stages)
    low, high = warpgroup_mma_wait(0, deps=(low, high))
    mbarrier.arrive(empty.index(behind), count=1)
    low = low.to(gl.float32)
    if S.products == 2:
        high = high.to(gl.float32)
    elif S.has_high:
        low, high = _columns(low)
    return low, high, (stage, phase)


@gluon.jit
def _multiply_groups(routing, scales, expert, first, column, ring, place, nothing, part: gl.constexpr,
                     S: gl.constexpr):  # fmt: skip
    """`_multiply` with block scales."""
    a_bufs, w_bufs, empty, ready = ring
    stage, phase = place
    ACC: gl.constexpr = nothing.type.layout
    FIRST_HALF: gl.constexpr = 0 if S.parts_by_rows else part
    token_scales, low_scales, high_scales = _scales(scales[0], scales[1], routing, expert, column, first, ACC, S)
    # A step's scales are loaded one step ahead: a load in front of the product would delay it.
    token_scale = gl.load(token_scales)
    low_scale = decode_scale(gl.load(low_scales))
    high_scale = decode_scale(gl.load(high_scales))
    low = gl.zeros((EACH, GROUP), gl.float32, layout=ACC)
    high = low
    if S.splits:
        low, high = _columns(low)
    for k in range(S.steps):
        ahead = gl.minimum(k + 1, S.steps - 1)
        factor_low = token_scale * low_scale
        factor_high = token_scale * high_scale
        mbarrier.wait(ready.index(stage), phase)
        a_tile = a_bufs.index(stage)
        if S.parts_by_rows:
            a_tile = a_tile.slice(part * EACH, EACH, 0)
        product = _product(a_tile, w_bufs.index(stage * S.halves + FIRST_HALF), nothing, part, S)
        token_scale = gl.load(token_scales + ahead)
        low_scale = decode_scale(gl.load(low_scales + ahead))
        if S.has_high:
            high_scale = decode_scale(gl.load(high_scales + ahead))
        product = warpgroup_mma_wait(0, deps=(product,))
        if S.products == 2:
            low += _scaled(product, factor_low)
            product = _product(a_tile, w_bufs.index(stage * S.halves + 1), nothing, part, S)
            product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(stage), count=1)
        if S.products == 2:
            high += _scaled(product, factor_high)
        elif S.splits:
            left, right = _columns(product)
            low += _scaled(left, factor_low)
            high += _scaled(right, factor_high)
        else:
            low += _scaled(product, factor_low)
        stage, phase = next_stage(stage, phase, S.stages)
    return low, high, (stage, phase)


@gluon.jit
def _skip(ring, place, part: gl.constexpr, S: gl.constexpr):
    """A tile of whose slots this consumer's are padding: its stages and turns pass, for the other's sake."""
    _, _, empty, ready = ring
    stage, phase = place
    PRODUCTS: gl.constexpr = S.products
    for _step in range(S.steps):
        mbarrier.wait(ready.index(stage), phase)
        for _product_of_it in gl.static_range(PRODUCTS):
            _await_turn(part, S)
            _pass_turn(part, S)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, S.stages)
    return stage, phase


@gluon.jit
def _consume(part: gl.constexpr, routing, scales, results, ring, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
             S: gl.constexpr):  # fmt: skip
    """The tiles of this block as far as they are consumer `part`'s."""
    wait_for_previous(S.pdl)
    if S.pdl:
        asm("griddepcontrol.launch_dependents")
    PRODUCT_N: gl.constexpr = S.product_n
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PRODUCT_N, 32 // S.value_bytes])
    PRODUCT: gl.constexpr = gl.int32 if ring[0].dtype == gl.int8 else gl.float32
    num_m = gl.load(routing[3]) // S.block_m
    nothing = gl.zeros((EACH, PRODUCT_N), PRODUCT, layout=ACC)
    place = (0, 0)
    turn = 0  # of tiles, by twos
    if S.takes_turns and part == 1:
        asm("bar.arrive " + _FIRST_TURN)  # consumer 0 begins
    for tile in range(gl.program_id(0), num_m * S.tiles_n, gl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, S.tiles_n, S.group_m)
        expert = gl.minimum(gl.load(routing[2] + pid_m), S.num_experts - 1)
        first = pid_m * S.block_m
        column = pid_n * (S.block_n // S.sides)
        if S.parts_by_rows:
            first += part * EACH
        else:
            column += part * S.width
        if S.parts_by_rows and part == 1:  # an expert's padding follows its slots
            padding = gl.load(routing[1] + first) >= routing[4]
        else:
            padding: gl.constexpr = False
        if padding:
            place = _skip(ring, place, part, S)
        else:
            if S.grouped:
                low, high, place = _multiply_groups(
                    routing, scales, expert, first, column, ring, place, nothing, part, S
                )
            else:
                low, high, place = _multiply(ring, place, nothing, part, S)
            finish(low, high, expert, first, column, routing, scales, results, part, turn, ACTIVATION, DTYPE, S)
        turn ^= 1
    if S.takes_turns and part == 0:
        asm("bar.sync " + _FIRST_TURN)  # takes consumer 1's last arrival


@gluon.jit
def _gemm(
    a,  # gemm1: values [tokens, DEPTH]; gemm2: descriptor of sorted rows [rows, DEPTH], block [BLOCK_SIZE_M, S.step]
    w,  # descriptor [E, sides, ROWS / sides, DEPTH], block S.weight_box
    bias,  # [E, ROWS] or None
    out,  # gemm1: [sorted slots, columns]; gemm2: [num_slots, columns] in (token, slot) order
    out_scale,  # [sorted slots, groups] float32, or None if out is not quantised
    routing,
    # With block scales of a [rows of a, steps] float32, of w [E, row groups, steps] float32 or e8m0. Otherwise of a
    # [rows of a] or [1], of w [E, ROWS] or [E], float32, or None and None.
    scales,
    ACTIVATION: gl.constexpr,
    DTYPE: gl.constexpr,  # of the layer
    S: gl.constexpr,
    WARPS: gl.constexpr,  # of a partition
):
    VALUES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * S.value_bytes, rank=2)
    STAGES: gl.constexpr = S.stages
    a_bufs = gl.allocate_shared_memory(w.dtype, [STAGES, S.block_m, S.step], VALUES)
    w_bufs = gl.allocate_shared_memory(w.dtype, [STAGES * S.halves] + w.block_type.shape, w.layout)  # noqa: RUF005 - Triton has no stars
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=2)
        mbarrier.init(ready.index(stage), count=2 if S.gathers else 1)
    if S.shares_groups:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        maxima = gl.allocate_shared_memory(gl.float32, [4, EACH], FLAT)
        met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(met, count=2)
        results = (out, out_scale, bias, maxima, met)
    else:
        results = (out, out_scale, bias)  # type: ignore[assignment]
    ring = (a_bufs, w_bufs, empty, ready)
    gl.warp_specialize(
        [
            (_consume, (0, routing, scales, results, ring, ACTIVATION, DTYPE, S)),
            (_consume, (1, routing, scales, results, ring, ACTIVATION, DTYPE, S)),
            (_produce, (a, w, routing, ring, S)),
        ],
        [WARPS, WARPS if S.gathers else 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


# The shared arguments of both kernels; sorted_token_ids and so on are the aligned assignment.
_ANY_ALIGNMENT = ("topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded")


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def gemm1_cooperative(
    a, w, bias, out, out_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots,
    a_scale, w_scale, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Gathered tokens · w13ᵀ with activation, into `hidden` in sorted order."""
    routing = (topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots)
    _gemm(a, w, bias, out, out_scale, routing, (a_scale, w_scale), ACTIVATION, DTYPE, S, num_warps)


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def gemm2_cooperative(
    a, w, bias, out, out_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots,
    a_scale, w_scale, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sorted rows of `hidden` · w2ᵀ, each to its slot."""
    routing = (topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, num_slots)
    _gemm(a, w, bias, out, out_scale, routing, (a_scale, w_scale), ACTIVATION, DTYPE, S, num_warps)
