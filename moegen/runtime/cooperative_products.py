"""The products of the family "cooperative": what a consumer multiplies of a tile, with block scales or without.

Block scales change with every step. The tensor cores cannot scale, so each step's product is scaled and added by
ordinary ones: nothing in the loop makes one consumer wait for the other, and one scales while the product of the other
runs. Without block scales products add up on the tensor cores, one in flight while the next is issued.

`ring`, `routing` and S are those of cooperative_kernel.py; place is the next stage of the ring and its phase.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .cooperative_finish import EACH, GROUP, each_row, rows_of
from .decode import decode_scale
from .stream_parts import asm, next_stage

# For `_product`; Triton takes the first few barriers of a block.
FIRST_TURN: gl.constexpr = gl.constexpr("8, 256")
SECOND_TURN: gl.constexpr = gl.constexpr("9, 256")


@gluon.jit
def _await_turn(part: gl.constexpr, S: gl.constexpr):
    """If the consumers take turns: wait for one's own."""
    if S.takes_turns:
        asm("bar.sync " + (FIRST_TURN if part == 0 else SECOND_TURN))


@gluon.jit
def _pass_turn(part: gl.constexpr, S: gl.constexpr):
    """If the consumers take turns: it is the other one's."""
    if S.takes_turns:
        asm("bar.arrive " + (SECOND_TURN if part == 0 else FIRST_TURN))


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
    return product.to(gl.float32) * each_row(factor, product)


@gluon.jit
def _scales(a_scale, w_scale, routing, expert, slots, column, row, S: gl.constexpr):
    """Where the scales of a consumer's part of a tile begin: of its rows [64], and of both halves of its columns."""
    HIGH: gl.constexpr = S.columns // GROUP if S.gated else 1  # groups from low to high
    a_rows = rows_of(slots, row, routing, S)
    last = (expert + 1) * S.row_groups - 1
    group = gl.minimum(expert * S.row_groups + column // GROUP, last)
    high = gl.minimum(group + HIGH, last)
    return a_scale + a_rows * S.steps, w_scale + group * S.steps, w_scale + high * S.steps


@gluon.jit
def multiply(ring, place, nothing, part: gl.constexpr, S: gl.constexpr):
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
def multiply_groups(routing, scales, expert, slots, row, column, ring, place, nothing, part: gl.constexpr,
                     S: gl.constexpr):  # fmt: skip
    """`multiply` with block scales."""
    a_bufs, w_bufs, empty, ready = ring
    stage, phase = place
    ACC: gl.constexpr = nothing.type.layout
    FIRST_HALF: gl.constexpr = 0 if S.parts_by_rows else part
    token_scales, low_scales, high_scales = _scales(scales[0], scales[1], routing, expert, slots, column, row, S)
    # Of rows that appear while the kernel runs: once they are there, and past L1, which may hold lines of before.
    if S.joined and not S.gathers:
        mbarrier.wait(ready.index(stage), phase)
    FRESH: gl.constexpr = ".cg" if S.joined and not S.gathers else ""
    # A step's scales are loaded one step ahead: a load in front of the product would delay it.
    token_scale = gl.load(token_scales, cache_modifier=FRESH)
    low_scale = decode_scale(gl.load(low_scales))
    high_scale = decode_scale(gl.load(high_scales))
    low = gl.zeros((EACH, GROUP), gl.float32, layout=ACC)
    high = low
    if S.splits:
        low, high = _columns(low)
    for k in range(S.steps):
        ahead = gl.minimum(k + 1, S.steps - 1)
        mbarrier.wait(ready.index(stage), phase)
        a_tile = a_bufs.index(stage)
        if S.parts_by_rows:
            a_tile = a_tile.slice(part * EACH, EACH, 0)
        product = _product(a_tile, w_bufs.index(stage * S.halves + FIRST_HALF), nothing, part, S)
        factor_low = token_scale * low_scale
        factor_high = token_scale * high_scale
        token_scale = gl.load(token_scales + ahead, cache_modifier=FRESH)
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
def skip(ring, place, part: gl.constexpr, S: gl.constexpr):
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
