"""The kernel of the family "cooperative" behind a tile's products: scales, router's weights, bias, activation, stores.

Values are [tokens, columns], where the tokens are a consumer's sorted slots; [columns, tokens] if S.swaps.
`routing`, `scales`, `results` and S are those of cooperative_kernel.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .kernel_parts import divide, group_scale, to_8_bit

GROUP: gl.constexpr = gl.constexpr(128)  # cooperative_sizes.GROUP


@gluon.jit
def rows_of(slots, row, routing, S: gl.constexpr):
    """The rows of a that sorted slots [tokens] read, those of `hidden` from `row` on; padding has some row as well."""
    if S.gathers:
        return gl.minimum(slots, routing[4] - 1) // S.top_k
    else:
        return gl.minimum(row + gl.arange(0, S.tokens, layout=slots.type.layout), routing[4] - 1)


@gluon.jit
def router_weights(slots, routing, S: gl.constexpr):
    """The router's weights of slots [tokens], if they count."""
    if S.weighted:
        return gl.load(routing[0] + slots, mask=slots < routing[4], other=0.0)
    else:
        return slots


@gluon.jit
def columns_of(values, S: gl.constexpr):
    """The left and the right half of the columns of `values`, in registers."""
    if S.swaps:
        return gl.split(gl.permute(gl.reshape(values, (2, values.shape[0] // 2, values.shape[1])), (1, 2, 0)))
    else:
        return gl.split(gl.permute(gl.reshape(values, (values.shape[0], 2, values.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def along_tokens(vector, values, S: gl.constexpr):
    """vector [tokens] ready to broadcast against values."""
    AXIS: gl.constexpr = 0 if S.swaps else 1
    layout: gl.constexpr = gl.SliceLayout(AXIS, values.type.layout)
    return gl.expand_dims(gl.convert_layout(vector, layout, assert_trivial=True), AXIS)


@gluon.jit
def _columns(column, values, S: gl.constexpr):
    """The columns of `values`, of which `column` is the first, ready to broadcast against them."""
    AXIS: gl.constexpr = 1 if S.swaps else 0
    layout: gl.constexpr = gl.SliceLayout(AXIS, values.type.layout)
    return gl.expand_dims(column + gl.arange(0, values.shape[1 - AXIS], layout=layout), AXIS)


@gluon.jit
def _times_scales(values, scales, routing, expert, slots, row, start, column, S: gl.constexpr):
    """values, sums of quantised products, times their scales; start: of the weight rows of column 0."""
    if S.token_scales:
        rows = rows_of(slots, row, routing, S)
        values *= along_tokens(gl.load(scales[0] + rows), values, S)
    else:
        values *= gl.load(scales[0])
    if S.row_scales:
        columns = _columns(column, values, S)
        values *= gl.load(scales[1] + start + columns, mask=columns < S.columns, other=0.0)
    else:
        values *= gl.load(scales[1] + expert)
    return values


@gluon.jit
def _add_bias(values, bias, start, column, S: gl.constexpr):
    """values + bias[start + column …]."""
    columns = _columns(column, values, S)
    return values + gl.load(bias + start + columns, mask=columns < S.columns, other=0.0).to(gl.float32)


@gluon.jit
def _quantised(values, out, out_scale, slots, routing, row, column, DTYPE: gl.constexpr, S: gl.constexpr):
    """values [tokens, 128], a group, in the type of out; stores the scales. To the bits of runtime/quantise.py."""
    LARGEST: gl.constexpr = 127.0 if out.dtype.element_ty == gl.int8 else 448.0
    GROUPS: gl.constexpr = (S.columns + GROUP - 1) // GROUP
    values = values.to(DTYPE).to(gl.float32)
    if S.columns % GROUP != 0:
        columns = column + gl.arange(0, GROUP, layout=gl.SliceLayout(0, values.type.layout))
        values = gl.where(gl.expand_dims(columns < S.columns, 0), values, 0.0)
    step = group_scale(gl.max(gl.abs(values), axis=1), 1e-10, LARGEST, S.ue8m0)
    live = gl.convert_layout(slots, step.type.layout, assert_trivial=True) < routing[4]
    lane = gl.arange(0, S.tokens, layout=step.type.layout)
    gl.store(out_scale + (row + lane) * GROUPS + column // GROUP, step, mask=live & (column < S.columns))
    return to_8_bit(divide(values, gl.expand_dims(step, 1)), LARGEST, out.dtype.element_ty)


@gluon.jit
def _store(values, slots, out, routing, row, column, VALUES: gl.constexpr, S: gl.constexpr):
    """values [tokens, N] to the columns from `column` on: gemm1's to the rows from `row` on, gemm2's to their slots.

    VALUES: 16 bytes, which a thread stores at a time; of float32 it stores 8, which are whole sectors as well.
    """
    N: gl.constexpr = values.shape[1]
    if out.dtype.element_ty != gl.float32:
        LANES: gl.constexpr = N // VALUES
        EACH: gl.constexpr = max(S.tokens * LANES // 128, 1)  # rows of a thread
        STORED: gl.constexpr = gl.BlockedLayout([EACH, VALUES], [32 // LANES, LANES], [4, 1], [1, 0])
    else:
        STORED: gl.constexpr = values.type.layout
    values = gl.convert_layout(values.to(out.dtype.element_ty), STORED)
    slots = gl.convert_layout(slots, gl.SliceLayout(1, STORED))
    rows = row + gl.arange(0, S.tokens, layout=slots.type.layout) if S.gathers else slots
    columns = gl.expand_dims(column + gl.arange(0, N, layout=gl.SliceLayout(0, STORED)), 0)
    inside = gl.expand_dims(slots < routing[4], 1) & (columns < S.columns)
    gl.store(out + (gl.expand_dims(rows.to(gl.int64) * S.columns, 1) + columns), values, mask=inside)


@gluon.jit
def _finish_columns(values, slots, results, routing, row, column, DTYPE: gl.constexpr, S: gl.constexpr):
    """Quantise values if `out` has scales, and store them."""
    out, out_scale, _ = results
    if S.swaps:
        values = gl.permute(values, (1, 0))
    if out_scale is not None:
        values = _quantised(values, out, out_scale, slots, routing, row, column, DTYPE, S)
        _store(values, slots, out, routing, row, column, 16, S)
    elif values.shape[1] > S.store_n:
        left, right = columns_of(values, S)
        _store(left, slots, out, routing, row, column, 8, S)
        _store(right, slots, out, routing, row, column + left.shape[1], 8, S)
    else:
        _store(values, slots, out, routing, row, column, 8, S)


@gluon.jit
def finish(low, high, expert, slots, weights, row, column, routing, scales, results, ACTIVATION: gl.constexpr,
           DTYPE: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """What follows the products: scales, router's weights, bias, activation, stores. `high` counts if S.has_high.

    row: that of `hidden` which the first of slots [tokens] has; weights: those of router_weights.
    """
    bias = results[2]
    WEIGHT_FIRST: gl.constexpr = S.weighted and S.gathers  # on the input, hence before the bias
    start = expert * S.rows  # the weight row of the result's column 0; of `high` where gate and up rows are apart
    high_start = start + S.columns if S.gated else start
    high_column = column if S.gated else column + low.shape[0 if S.swaps else 1]
    if scales[0] is not None and not S.grouped:
        low = _times_scales(low, scales, routing, expert, slots, row, start, column, S)
        if S.has_high:
            high = _times_scales(high, scales, routing, expert, slots, row, high_start, high_column, S)
    if WEIGHT_FIRST:
        low *= along_tokens(weights, low, S)
        if S.has_high:
            high *= along_tokens(weights, high, S)
    if bias is not None:
        low = _add_bias(low, bias, start, column, S)
        if S.has_high:
            high = _add_bias(high, bias, high_start, high_column, S)
    if S.weighted and not WEIGHT_FIRST:
        low *= along_tokens(weights, low, S)
        if S.has_high:
            high *= along_tokens(weights, high, S)
    if S.gated:
        _finish_columns(ACTIVATION(low, high), slots, results, routing, row, column, DTYPE, S)
    else:
        _finish_columns(ACTIVATION(low) if S.gathers else low, slots, results, routing, row, column, DTYPE, S)
        if S.has_high:
            high = ACTIVATION(high) if S.gathers else high
            _finish_columns(high, slots, results, routing, row, high_column, DTYPE, S)
