"""The kernel of the family "cooperative" behind a tile's products: scales, router's weights, bias, activation, stores.

`routing`, `scales`, `results` and S are those of cooperative_kernel.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .kernel_parts import divide, group_scale, to_8_bit

GROUP: gl.constexpr = gl.constexpr(128)  # cooperative_sizes.GROUP
EACH: gl.constexpr = gl.constexpr(64)  # slots of a consumer: the rows of a wgmma


@gluon.jit
def rows_of(slots, row, routing, S: gl.constexpr):
    """The rows [64] of a that sorted slots read, those of `hidden` from `row` on; padding has some row as well."""
    if S.gathers:
        return gl.minimum(slots, routing[4] - 1) // S.top_k
    else:
        return gl.minimum(row + gl.arange(0, EACH, layout=slots.type.layout), routing[4] - 1)


@gluon.jit
def _router_weights(slots, routing, S: gl.constexpr):
    """The router's weights [64] of slots, if they count."""
    if S.weighted:
        return gl.load(routing[0] + slots, mask=slots < routing[4], other=0.0)
    else:
        return slots


@gluon.jit
def each_row(vector, values):
    """vector [64] ready to broadcast against values [64, N]: their rows are where the products' are."""
    return gl.expand_dims(gl.convert_layout(vector, gl.SliceLayout(1, values.type.layout), assert_trivial=True), 1)


@gluon.jit
def _times_scales(values, scales, routing, expert, slots, row, start, column, S: gl.constexpr):
    """values [64, N], sums of quantised products, times their scales; start: of the weight rows of column 0."""
    if S.token_scales:
        rows = rows_of(slots, row, routing, S)
        values *= each_row(gl.load(scales[0] + rows), values)
    else:
        values *= gl.load(scales[0])
    if S.row_scales:
        columns = column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
        values *= gl.expand_dims(gl.load(scales[1] + start + columns, mask=columns < S.columns, other=0.0), 0)
    else:
        values *= gl.load(scales[1] + expert)
    return values


@gluon.jit
def _add_bias(values, bias, start, column, S: gl.constexpr):
    """values [64, N] + bias[start + column …]."""
    columns = column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
    loaded = gl.load(bias + start + columns, mask=columns < S.columns, other=0.0)
    return values + gl.expand_dims(loaded.to(gl.float32), 0)


@gluon.jit
def _of_both(largest, maxima, met, part: gl.constexpr, turn):
    """The larger of both consumers' values [64]. Of one turn's exchange nothing is written before the next but one."""
    maxima.index(2 * turn + part).store(largest)
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, turn)
    return gl.maximum(largest, maxima.index(2 * turn + 1 - part).load(largest.type.layout))


@gluon.jit
def _quantised(values, results, routing, first, row, column, part: gl.constexpr, turn, DTYPE: gl.constexpr,
               S: gl.constexpr):  # fmt: skip
    """values [64, 128], a group, or a consumer's half of one, in the type of out; stores the scales.

    To the bits of runtime/quantise.py.
    """
    out = results[0]
    LARGEST: gl.constexpr = 127.0 if out.dtype.element_ty == gl.int8 else 448.0
    GROUPS: gl.constexpr = (S.columns + GROUP - 1) // GROUP
    values = values.to(DTYPE).to(gl.float32)
    if S.columns % GROUP != 0:
        columns = column + gl.arange(0, GROUP, layout=gl.SliceLayout(0, values.type.layout))
        values = gl.where(gl.expand_dims(columns < S.columns, 0), values, 0.0)
    largest = gl.max(gl.abs(values), axis=1)
    if S.shares_groups:
        largest = _of_both(largest, results[3], results[4], part, turn)
    step = group_scale(largest, 1e-10, LARGEST, S.ue8m0)
    lane = gl.arange(0, EACH, layout=step.type.layout)
    live = gl.load(routing[1] + first + lane) < routing[4]
    # Of two consumers that share a group the first one stores its scale.
    mine = (column % GROUP == 0) & (column < S.columns)
    gl.store(results[1] + (row + lane) * GROUPS + column // GROUP, step, mask=live & mine)
    return to_8_bit(divide(values, gl.expand_dims(step, 1)), LARGEST, out.dtype.element_ty)


@gluon.jit
def _destination(low, results, routing, first):
    """Sorted slots [64] as the stores of columns like `low` want them."""
    out = results[0]
    if out.dtype.element_ty != gl.float32:  # 16 bytes a thread; of float32 it has 8, which are whole sectors as well
        VALUES: gl.constexpr = 16 if results[1] is not None else 8
        LANES: gl.constexpr = low.shape[1] // VALUES
        STORED: gl.constexpr = gl.BlockedLayout([LANES // 2, VALUES], [32 // LANES, LANES], [4, 1], [1, 0])
    else:
        STORED: gl.constexpr = low.type.layout
    return gl.load(routing[1] + first + gl.arange(0, EACH, layout=gl.SliceLayout(1, STORED)))


@gluon.jit
def _store(values, slots, results, routing, first, row, column, part: gl.constexpr, turn, DTYPE: gl.constexpr,
           S: gl.constexpr):  # fmt: skip
    """values [64, N] to the columns from `column` on: gemm1's to the rows from `row` on, gemm2's to their slots."""
    N: gl.constexpr = values.shape[1]
    STORED: gl.constexpr = slots.type.layout.parent
    out = results[0]
    if results[1] is not None:
        values = _quantised(values, results, routing, first, row, column, part, turn, DTYPE, S)
    values = gl.convert_layout(values.to(out.dtype.element_ty), STORED)
    rows = row + gl.arange(0, EACH, layout=slots.type.layout) if S.gathers else slots
    columns = gl.expand_dims(column + gl.arange(0, N, layout=gl.SliceLayout(0, STORED)), 0)
    inside = gl.expand_dims(slots < routing[4], 1) & (columns < S.columns)
    gl.store(out + (gl.expand_dims(rows.to(gl.int64) * S.columns, 1) + columns), values, mask=inside)


@gluon.jit
def finish(low, high, expert, slots, first, row, column, routing, scales, results, part: gl.constexpr, turn,
           ACTIVATION: gl.constexpr, DTYPE: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """What follows the products: scales, router's weights, bias, activation, stores. `high` counts if S.has_high.

    first: place in the assignment of the first of slots [64]; row: that of `hidden` which it has.
    """
    # Loads whose results are wanted at the end, or late.
    stored = _destination(low, results, routing, first)
    weights = _router_weights(slots, routing, S)
    bias = results[2]
    WEIGHT_FIRST: gl.constexpr = S.weighted and S.gathers  # on the input, hence before the bias
    start = expert * S.rows  # the weight row of the result's column 0; of `high` where gate and up rows are apart
    high_start = start + S.columns if S.gated else start
    high_column = column if S.gated else column + low.shape[1]
    if scales[0] is not None and not S.grouped:
        low = _times_scales(low, scales, routing, expert, slots, row, start, column, S)
        if S.has_high:
            high = _times_scales(high, scales, routing, expert, slots, row, high_start, high_column, S)
    if WEIGHT_FIRST:
        low *= each_row(weights, low)
        if S.has_high:
            high *= each_row(weights, high)
    if bias is not None:
        low = _add_bias(low, bias, start, column, S)
        if S.has_high:
            high = _add_bias(high, bias, high_start, high_column, S)
    if S.weighted and not WEIGHT_FIRST:
        low *= each_row(weights, low)
        if S.has_high:
            high *= each_row(weights, high)
    if S.gated:
        _store(ACTIVATION(low, high), stored, results, routing, first, row, column, part, turn, DTYPE, S)
    else:
        _store(
            ACTIVATION(low) if S.gathers else low, stored, results, routing, first, row, column, part, turn, DTYPE, S
        )
        if S.has_high:
            high = ACTIVATION(high) if S.gathers else high
            _store(high, stored, results, routing, first, row, high_column, part, turn, DTYPE, S)
