"""The products of the family "cooperative": what a consumer multiplies of a tile, with block scales or without.

Block scales change with every step. The tensor cores cannot scale, so each step's product is scaled and added by
ordinary ones: nothing in the loop makes one consumer wait for the other, and one scales while the product of the other
runs. Without block scales products add up on the tensor cores, one in flight while the next is issued.

`ring`, `routing` and S are those of cooperative_kernel.py; place is the next stage of the ring and its phase.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .cooperative_finish import GROUP, along_tokens, columns_of, rows_of
from .decode import decode_scale
from .gluon_parts import asm, next_stage

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
def _issue(a_tile, w_tile, sums, ADDS: gl.constexpr, S: gl.constexpr):
    """A product of tokens and one block of weight rows, on its way; added to `sums` or not."""
    w_tile = w_tile.reshape((S.product_n, S.step))
    if S.swaps:
        return warpgroup_mma(w_tile, a_tile.permute((1, 0)), sums, use_acc=ADDS, is_async=True)
    else:
        return warpgroup_mma(a_tile, w_tile.permute((1, 0)), sums, use_acc=ADDS, is_async=True)


@gluon.jit
def _product(a_tile, w_tile, nothing, part: gl.constexpr, S: gl.constexpr):
    """Issue one product and wait for no one, but in gemm1 for one's turn.

    Products of gemm1 then queue, instead of sharing the tensor cores and ending, hence scaling, together. The short
    reductions of gemm2 gain nothing from it, and it ties the consumers' epilogues together.
    """
    _await_turn(part, S)
    product = _issue(a_tile, w_tile, nothing, False, S)
    _pass_turn(part, S)
    return product


@gluon.jit
def _scaled(product, factor, S: gl.constexpr):
    """product [tokens, N] times factor [tokens]."""
    return product.to(gl.float32) * along_tokens(factor, product, S)


@gluon.jit
def _weight_scales(w_scale, expert, column, step, S: gl.constexpr):
    """The weights' scales of a step, as they are stored, of both halves of a tile's columns; of the last step if there
    is none.
    """
    HIGH: gl.constexpr = S.columns // GROUP if S.gated else 1  # groups from low to high
    last = (expert + 1) * S.row_groups - 1
    group = gl.minimum(expert * S.row_groups + column // GROUP, last)
    step = gl.minimum(step, S.steps - 1)
    low_scale = gl.load(w_scale + group * S.steps + step)
    if S.has_high:  # noqa: SIM108 - too long for one line
        high_scale = gl.load(w_scale + gl.minimum(group + HIGH, last) * S.steps + step)
    else:
        high_scale = low_scale
    return low_scale, high_scale


@gluon.jit
def _await_tile(own, part: gl.constexpr, S: gl.constexpr):
    """Where tiles are the consumers' in turn: until the other one is through with the stages of the tile before.

    A barrier of the ring tells rounds apart by their parity, and who waits for a tile too early is two rounds ahead.
    """
    if not S.shares_tiles:
        turns, number = own
        mbarrier.wait(turns.index(part), (number + part + 1) % 2)


@gluon.jit
def _pass_tile(own, part: gl.constexpr, S: gl.constexpr):
    """This consumer is through with the stages of its tile."""
    if not S.shares_tiles:
        mbarrier.arrive(own[0].index(1 - part), count=1)


@gluon.jit
def multiply(ring, place, own, nothing, part: gl.constexpr, S: gl.constexpr):
    """The sums of a consumer's part of one tile, low and high; own: turns and the number of the tile among its own."""
    a_bufs, w_bufs, _, empty, ready = ring
    stage, phase = place
    PRODUCTS: gl.constexpr = S.products
    low = nothing
    high = nothing
    _await_tile(own, part, S)
    behind = 0  # a value of its own: with that of `stage`, Triton would take it for one that the loop does not change
    for k in range(S.steps):
        mbarrier.wait(ready.index(stage), phase)
        a_tile = a_bufs.index(stage)
        if S.shares_tiles:
            a_tile = a_tile.slice(part * S.tokens, S.tokens, 0)
        product = _issue(a_tile, w_bufs.index(stage * PRODUCTS), low, True, S)
        if PRODUCTS == 2:
            second = _issue(a_tile, w_bufs.index(stage * PRODUCTS + 1), high, True, S)
            low, high = warpgroup_mma_wait(2, deps=(product, second))
        else:
            low = warpgroup_mma_wait(1, deps=(product,))
        mbarrier.arrive(empty.index(behind), count=1, pred=k > 0)  # of the step before
        behind = stage
        stage, phase = next_stage(stage, phase, S.stages)
    low, high = warpgroup_mma_wait(0, deps=(low, high))
    mbarrier.arrive(empty.index(behind), count=1)
    _pass_tile(own, part, S)
    low = low.to(gl.float32)
    if PRODUCTS == 2:
        high = high.to(gl.float32)
    elif S.has_high:
        low, high = columns_of(low, S)
    return low, high


@gluon.jit
def multiply_groups(routing, scales, expert, slots, row, column, ring, place, own, nothing, part: gl.constexpr,
                    S: gl.constexpr):  # fmt: skip
    """`multiply` with block scales; column: the first of the tile, row: that of `hidden` which the first slot has."""
    a_bufs, w_bufs, scale_bufs, empty, ready = ring
    stage, phase = place
    PRODUCTS: gl.constexpr = S.products
    ACC: gl.constexpr = nothing.type.layout
    TOKENS: gl.constexpr = gl.SliceLayout(0 if S.swaps else 1, ACC)
    # Of rows that appear while the kernel runs: once they are there, and past L1, which may hold lines of before.
    AWAITS_ROWS: gl.constexpr = S.joined and not S.gathers
    FRESH: gl.constexpr = ".cg" if AWAITS_ROWS else ""
    # Loaded steps ahead: a load takes longer than a step whose stage is full. What is not used below costs nothing.
    now = _weight_scales(scales[1], expert, column, 0, S)
    soon = _weight_scales(scales[1], expert, column, 1, S)
    later = _weight_scales(scales[1], expert, column, 2, S)
    if not S.rings_scales:
        if AWAITS_ROWS:
            mbarrier.wait(ready.index(stage), phase)
        token_scales = scales[0] + rows_of(slots, row, routing, S) * S.steps
        token_scale = gl.load(token_scales, cache_modifier=FRESH)
    low = gl.zeros(nothing.shape, gl.float32, layout=ACC)
    high = low
    if S.splits:
        low, high = columns_of(low, S)
    _await_tile(own, part, S)
    for k in range(S.steps):
        mbarrier.wait(ready.index(stage), phase)
        a_tile = a_bufs.index(stage)
        if S.shares_tiles:
            a_tile = a_tile.slice(part * S.tokens, S.tokens, 0)
        product = _product(a_tile, w_bufs.index(stage * PRODUCTS), nothing, part, S)
        if S.rings_scales:
            token_scale = scale_bufs.index(stage).load(TOKENS)
        factor_low = token_scale * decode_scale(now[0])
        factor_high = token_scale * decode_scale(now[1])
        if S.rings_scales:
            now = soon
            soon = later
            later = _weight_scales(scales[1], expert, column, k + 3, S)
        else:  # registers are for no more than one step
            now = _weight_scales(scales[1], expert, column, k + 1, S)
            token_scale = gl.load(token_scales + gl.minimum(k + 1, S.steps - 1), cache_modifier=FRESH)
        product = warpgroup_mma_wait(0, deps=(product,))
        if PRODUCTS == 2:
            low += _scaled(product, factor_low, S)
            product = _product(a_tile, w_bufs.index(stage * PRODUCTS + 1), nothing, part, S)
            product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(stage), count=1)
        if PRODUCTS == 2:
            high += _scaled(product, factor_high, S)
        elif S.splits:
            left, right = columns_of(product, S)
            low += _scaled(left, factor_low, S)
            high += _scaled(right, factor_high, S)
        else:
            low += _scaled(product, factor_low, S)
        stage, phase = next_stage(stage, phase, S.stages)
    _pass_tile(own, part, S)
    return low, high


@gluon.jit
def skip(ring, place, part: gl.constexpr, S: gl.constexpr):
    """A tile of whose slots this consumer's are padding: its stages and turns pass, for the other's sake."""
    _, _, _, empty, ready = ring
    stage, phase = place
    PRODUCTS: gl.constexpr = S.products
    for _step in range(S.steps):
        mbarrier.wait(ready.index(stage), phase)
        for _product_of_it in gl.static_range(PRODUCTS):
            _await_turn(part, S)
            _pass_turn(part, S)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, S.stages)
