"""The kernel of the family "stream": a whole layer of few tokens in one launch, bound by reading the weights.

One block a multiprocessor. In it one warp loads weight tiles by TMA into a ring of shared-memory stages, one warp waits
at the barrier over the grid, and before that gathers scales (stream_scales.py), and the other warps multiply. The
weights of gemm2 do not depend on gemm1, so their tiles follow those of gemm1 in the same ring without a pause, until
`hidden` is complete. Every block has x, then all of `hidden`, in its shared memory (stream_rows.py).

A tile is a few rows of the weight, as low as balance between blocks wants it, and the tensor cores take no less than 64
rows and 8 columns. So its rows are cut into parts of 128 bytes, each a row of the product, and the activations into
parts as well, each a column: of a row's products that one counts where both are the same part.

A *strip* is the rows of a weight that one tile covers. gemm1's units are (slot, strip); those of gemm2 are the strips
alone: a block sums its strip of the output over all slots, in their order, so that nothing is left to reduce and two
runs give the same bits. Gluon, hence imported only where the family runs (moegen/runtime/stream.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_parts import asm, block_barrier, load_acquire, next_stage, wait_for_previous
from .stream_parts import PLAIN, buffers_of, expert_of, fetch_descriptors, item, load_parts, share, wait_for_grid
from .stream_rows import copy_rows, load_segment, quantise_rows, weigh_parts
from .stream_scales import entries_of, gather_scales, new_table

# A thread of the two warps that do not multiply.
_LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)
_GATHERER_REGISTERS: gl.constexpr = gl.constexpr(56)


@gluon.jit
def _stream_weights(w13, w2, routing, ring, fetched, S: gl.constexpr):
    """Every weight tile of this block, in the order in which `_multiply` takes them."""
    LOADS1: gl.constexpr = S.parts // S.step1
    LOADS2: gl.constexpr = S.parts // S.step2
    tiles, empty, ready = ring
    buffers1 = buffers_of(w13, tiles)
    buffers2 = buffers_of(w2, tiles)
    fetch_descriptors(w13, w2, fetched, buffers1, buffers2, S)
    wait_for_previous(S.pdl)
    mbarrier.wait(fetched, 0)
    stage = 0
    phase = 1
    first, last = share(S.units1, gl.program_id(0))
    for unit in range(first, last):
        expert = expert_of(routing, unit // S.strips1, S)
        if expert >= 0:
            row = unit % S.strips1 * S.columns
            for tile in range(S.chunks1):
                mbarrier.wait(empty.index(stage), phase)
                bar = ready.index(stage)
                for load in gl.static_range(LOADS1):
                    part = tile * S.parts + load * S.step1
                    load_parts(w13, True, expert, row, part, bar, buffers1.index(stage * LOADS1 + load), S)
                if S.loads > LOADS1:
                    mbarrier.arrive(bar, count=S.loads - LOADS1)
                stage, phase = next_stage(stage, phase, S.stages)
    # From the other end: the blocks with the larger share of gemm1 get the smaller one of gemm2.
    first, last = share(S.units2, gl.num_programs(0) - 1 - gl.program_id(0))
    for unit in range(first, last):
        token = unit % S.tokens
        row = unit // S.tokens * S.columns
        for tile in range(S.chunks2):
            for load in gl.static_range(LOADS2):
                part = tile * S.parts + load * S.step2
                slot = part // S.hidden_parts
                expert = expert_of(routing, token * S.top_k + gl.minimum(slot, S.top_k - 1), S)
                live = (expert >= 0) & (slot < S.top_k)
                if load == 0:
                    mbarrier.wait(empty.index(stage), phase)
                part = part % S.hidden_parts
                load_parts(w2, live, expert, row, part, ready.index(stage), buffers2.index(stage * LOADS2 + load), S)
            stage, phase = next_stage(stage, phase, S.stages)


@gluon.jit
def _pass_barrier(w13_scale, w2_scale, routing, grid_barrier, tables, signals, S: gl.constexpr):
    """Scales, then the barrier over the grid when this block has written its part of `hidden`."""
    gathered, written, passed = signals
    wait_for_previous(S.pdl)
    before = load_acquire(grid_barrier)
    if S.quantised:
        gather_scales(w13_scale, w2_scale, routing, tables, gathered, S)
    mbarrier.wait(written, 0)
    wait_for_grid(grid_barrier, before)
    mbarrier.arrive(passed, count=1)


@gluon.jit
def _prepare(source, loaded, static_scale, routing, rows, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """x or hidden -> shared memory: windows [S.window, S.part] of it for products."""
    values, steps = rows
    if S.quantised:
        quantise_rows(source, loaded, static_scale, routing, values, steps, FIRST_GEMM, S)
    else:
        copy_rows(source, loaded, values, FIRST_GEMM, S)
    fence_async_shared()
    block_barrier()  # here, or the compiler puts it into the loop
    COUNT: gl.constexpr = values.shape[0] * S.segment // S.window
    return values._reinterpret(values.dtype, [COUNT, S.window, S.part], values.layout)


@gluon.jit
def _by_chunks(values, S: gl.constexpr):
    """One value a part [segments, parts of a segment] as [chunks, parts of a tile]."""
    CHUNKS: gl.constexpr = values.shape[0] * S.segment // S.parts
    return values._reinterpret(gl.float32, [CHUNKS, S.parts], PLAIN)


@gluon.jit
def _by_part(values, STEP: gl.constexpr, S: gl.constexpr):
    """values, one for each row of a product, as [parts, 2, columns]; rows lie in memory as loads bring them."""
    loaded = gl.reshape(values, (S.parts // STEP, 2, S.columns, STEP))
    return gl.reshape(gl.permute(loaded, (0, 3, 1, 2)), (S.parts, 2, S.columns))


@gluon.jit
def _along_rows(values, like, STEP: gl.constexpr, S: gl.constexpr):
    """values [parts, 2, columns], one for each row of a product, ready to broadcast against `like`."""
    ROWS: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    loaded = gl.permute(gl.reshape(values, (S.parts // STEP, STEP, 2, S.columns)), (0, 2, 3, 1))
    return gl.expand_dims(gl.convert_layout(gl.reshape(loaded, (like.shape[0],)), ROWS, assert_trivial=True), 1)


@gluon.jit
def _factor(table, entry, tile, steps, weights, chunk, rows, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """Scales of a tile's products [parts, 2, columns], and of gemm2 the router's weights; rows: zeros of this shape."""
    L: gl.constexpr = rows.type.layout
    PARTS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    if FIRST_GEMM:
        factor = steps.index(chunk).load(PARTS)
    else:
        factor = weights.index(chunk).load(PARTS)
        if S.quantised:  # nobody wrote what a step without an expert is made from
            factor = gl.where(factor != 0.0, factor * steps.index(chunk).load(PARTS), 0.0)
    factor = gl.expand_dims(factor, 1)
    if S.quantised and S.group_k:
        factor = factor * table.index(entry + tile).load(gl.SliceLayout(2, L))
    factor = gl.expand_dims(factor, 2)
    if S.quantised and not S.group_k:
        if not FIRST_GEMM:
            entry += tile * S.parts // S.hidden_parts
        factor = factor * gl.expand_dims(table.index(entry).load(gl.SliceLayout(0, L)), 0)
    return gl.broadcast(factor, rows)[0]


@gluon.jit
def _dot(scale, start, entry, place, ring, windows, steps, weights, table, nothing, FIRST_GEMM: gl.constexpr,
         S: gl.constexpr):  # fmt: skip
    """scale · Σ_k tile · activations · scales over the tiles of one unit, and what follows `place` in the ring.

    start: of the row's chunks; entry: of the table's. The result is [rows of a product, columns of a product], like
    `nothing`: zero where row and column are not the same part.
    """
    ACC: gl.constexpr = nothing.type.layout
    ROWS: gl.constexpr = nothing.shape[0]
    PRODUCT: gl.constexpr = gl.int32 if ring[0].dtype == gl.int8 else gl.float32
    STEP: gl.constexpr = S.step1 if FIRST_GEMM else S.step2
    CHUNKS: gl.constexpr = S.chunks1 if FIRST_GEMM else S.chunks2
    stage, phase = place
    acc = nothing
    zero = gl.zeros(nothing.shape, PRODUCT, layout=ACC)
    rows = _by_part(gl.zeros((ROWS,), gl.float32, layout=gl.SliceLayout(1, ACC)), STEP, S)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
    part = gl.expand_dims(row // (2 * S.columns * STEP) * STEP + row % STEP, 1)
    column = gl.expand_dims(gl.arange(0, S.window, layout=gl.SliceLayout(0, ACC)), 0)
    for chunk in range(CHUNKS):
        first = (start + chunk) * S.parts
        counts = column - first % S.window == part
        mbarrier.wait(ring[2].index(stage), phase)
        window = windows.index(first // S.window).permute((1, 0))
        product = warpgroup_mma(ring[0].index(stage), window, zero, use_acc=False, is_async=True)
        if S.quantised or not FIRST_GEMM:
            factor = _along_rows(
                _factor(table, entry, chunk, steps, weights, start + chunk, rows, FIRST_GEMM, S), acc, STEP, S
            )
        if not FIRST_GEMM:
            counts &= factor != 0.0  # nothing was loaded for a slot without an expert
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(ring[1].index(stage), count=1)
        stage, phase = next_stage(stage, phase, S.stages)
        product = gl.where(counts, product, zero).to(gl.float32)
        if S.quantised or not FIRST_GEMM:
            acc += product * factor
        else:
            acc += product
    return acc * scale, (stage, phase)


@gluon.jit
def _total(acc, STEP: gl.constexpr, S: gl.constexpr, OUT: gl.constexpr):
    """[1, 2, columns]"""
    TILE_ROWS: gl.constexpr = 2 * S.columns
    by_row = gl.permute(gl.reshape(acc, (S.parts // STEP, TILE_ROWS, STEP, S.window)), (1, 0, 2, 3))
    total = gl.sum(gl.reshape(by_row, (TILE_ROWS, S.parts * S.window)), axis=1)
    return gl.convert_layout(gl.reshape(total, (1, 2, S.columns)), OUT)


@gluon.jit
def rows_of(unit, like, S: gl.constexpr):
    """For a tensor [1, 2, columns]: row [1, 1, columns] within each half of the matrix, and the half [1, 2, 1]."""
    PAIRS: gl.constexpr = like.type.layout
    row = unit * S.columns + gl.arange(0, S.columns, layout=gl.SliceLayout(0, gl.SliceLayout(1, PAIRS)))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))
    return gl.expand_dims(gl.expand_dims(row, 0), 1), gl.expand_dims(gl.expand_dims(half, 0), 2)


@gluon.jit
def store_hidden(total, bias, hidden, slot, expert, strip, ACTIVATION: gl.constexpr, S: gl.constexpr):
    """activation(total [1, 2, columns] + bias) -> hidden[slot], one strip of columns."""
    row, half = rows_of(strip, total, S)
    half_rows: gl.constexpr = S.intermediate_size if S.gated else S.intermediate_size // 2
    inside = (row < half_rows) & (half < 2)
    if bias is not None:
        w13_row = 2 * row + half if S.interleaved else half * half_rows + row
        total += gl.load(bias + expert * (2 * half_rows) + w13_row, mask=inside, other=0.0).to(gl.float32)
    start = hidden + slot * S.intermediate_size
    if S.gated:
        gate, up = gl.split(gl.permute(total, (0, 2, 1)))
        value = ACTIVATION(gate, up)
        column = strip * S.columns + gl.arange(0, S.columns, layout=gl.SliceLayout(0, value.type.layout))
        column = gl.expand_dims(column, 0)
        gl.store(start + column, value.to(hidden.dtype.element_ty), mask=column < half_rows)
    else:
        gl.store(start + half * half_rows + row, ACTIVATION(total).to(hidden.dtype.element_ty), mask=inside)


@gluon.jit
def _route(routing, experts, S: gl.constexpr):
    """The local experts of the slots -> shared memory."""
    slot = gl.arange(0, S.slot_room, layout=gl.BlockedLayout([1], [32], [S.warps], [0]))
    experts._reinterpret(gl.int32, [S.slot_room], PLAIN).store(expert_of(routing, gl.minimum(slot, S.slots - 1), S))


@gluon.jit
def _multiply(
    x, w13_input_scale, w2_input_scale, w13_bias, w2_bias, hidden, out, out_stride, routing, ring, shared, signals,
    ACTIVATION: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """gemm1 with activation for this block's units, then gemm2 with the sum over slots for its strips."""
    gathered, written, passed = signals
    x_rows, hidden_rows, tables, weights, experts = shared
    wait_for_previous(S.pdl)
    if S.pdl:
        asm("griddepcontrol.launch_dependents")
    ROWS: gl.constexpr = S.rows
    COLUMNS: gl.constexpr = S.columns
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [S.tensor_warps, S.warps // S.tensor_warps], [16, 8, 32 // S.value_bytes]
    )
    OUT: gl.constexpr = gl.BlockedLayout([1, 2, 1], [1, 1, 32], [1, 1, S.warps], [2, 1, 0])
    WINDOW: gl.constexpr = S.window
    nothing = gl.zeros((ROWS, WINDOW), gl.float32, layout=ACC)
    loaded = load_segment(x, 0, True, S)
    _route(routing, experts, S)
    windows = _prepare(x, loaded, w13_input_scale, routing, x_rows, True, S)
    table1 = tables[0]
    table2 = tables[1]
    x_steps = x_rows[1]
    hidden_steps = hidden_rows[1]
    if S.quantised:
        table1 = entries_of(table1, S)
        table2 = entries_of(table2, S)
        x_steps = _by_chunks(x_steps, S)
        hidden_steps = _by_chunks(hidden_steps, S)
    place = (0, 0)
    first, last = share(S.units1, gl.program_id(0))
    for unit in range(first, last):
        slot = unit // S.strips1
        expert = item(experts, slot)
        if expert >= 0:
            scale = gl.load(routing[0] + slot).to(gl.float32) if S.weight_on_input else 1.0
            if S.quantised:
                mbarrier.wait(gathered.index(unit - first), 0)
            entry = (unit - first) * S.entries1
            start = slot // S.top_k * S.chunks1
            acc, place = _dot(
                scale, start, entry, place, ring, windows, x_steps, weights, table1, nothing, True, S
            )  # fmt: skip
            store_hidden(_total(acc, S.step1, S, OUT), w13_bias, hidden, slot, expert, unit % S.strips1, ACTIVATION, S)
    block_barrier()
    mbarrier.arrive(written, count=1)

    weigh_parts(routing, weights, S)
    weights = _by_chunks(weights, S)
    mbarrier.wait(passed, 0)
    loaded = load_segment(hidden, 0, False, S)
    windows = _prepare(hidden, loaded, w2_input_scale, routing, hidden_rows, False, S)
    half_rows: gl.constexpr = S.hidden_size // 2
    first, last = share(S.units2, gl.num_programs(0) - 1 - gl.program_id(0))
    for unit in range(first, last):
        token = unit % S.tokens
        row, half = rows_of(unit // S.tokens, gl.zeros((1, 2, COLUMNS), gl.float32, layout=OUT), S)
        inside = (row < half_rows) & (half < 2)
        entry = (unit - first) * S.entries2
        acc, place = _dot(
            1.0, token * S.chunks2, entry, place, ring, windows, hidden_steps, weights, table2, nothing, False, S
        )  # fmt: skip
        total = _total(acc, S.step2, S, OUT)
        if w2_bias is not None:
            for slot in range(token * S.top_k, (token + 1) * S.top_k):
                expert = item(experts, slot)
                if expert >= 0:
                    bias = gl.load(w2_bias + expert * S.hidden_size + half * half_rows + row, mask=inside, other=0.0)
                    scale = 1.0 if S.weight_on_input else gl.load(routing[0] + slot).to(gl.float32)
                    total += bias.to(gl.float32) * scale
        gl.store(out + token * out_stride + half * half_rows + row, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(
    do_not_specialize=["out_stride"],
    do_not_specialize_on_alignment=["w13_input_scale", "w2_input_scale", "topk_weights", "topk_ids", "expert_map"],
)
def stream_layer(
    w13,  # descriptor [E, 2, rows / 2, H]: gate and up rows, or two halves; in parts
    w2,  # descriptor [E, 2, H / 2, I], the same block
    w13_scale,  # [E, ceil(rows / group_n), ceil(H / 128)] float32 or e8m0; without K groups [E, rows] or [E]; or None
    w2_scale,  # [E, ceil(H / group_n), ceil(I / 128)], [E, H] or [E], or None
    w13_input_scale,  # [1] float32, static scale of x, or None
    w2_input_scale,  # [1] float32, static scale of hidden, or None
    x,  # [T, H]
    hidden,  # [T·k, I], scratch
    out,  # [T, H]
    out_stride,  # from row to row of out
    w13_bias,  # [E, rows] or None
    w2_bias,  # [E, H] or None
    topk_weights,  # [T, k] float32
    topk_ids,  # [T, k]
    expert_map,  # global -> local expert, or None
    grid_barrier,  # [1] int32, zero when it is new; nothing else that runs at the same time may use it
    ACTIVATION: gl.constexpr,
    S: gl.constexpr,  # StreamSizes
):
    """out = Σ_j weight_j · expert_j(x), the whole layer."""
    VALUES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * S.value_bytes, rank=2)
    tiles = gl.allocate_shared_memory(w13.dtype, [S.stages, S.rows, S.part], VALUES)
    ring = (tiles, _new_barriers(S.stages, 1), _new_barriers(S.stages, S.loads))
    once = _new_barriers(3, 1)
    experts = gl.allocate_shared_memory(gl.int32, [S.slot_room, 1], PLAIN)
    weights = gl.allocate_shared_memory(gl.float32, [S.segments2, S.segment], PLAIN)
    x_values = gl.allocate_shared_memory(w13.dtype, [S.segments1, S.segment, S.part], VALUES)
    hidden_values = gl.allocate_shared_memory(w13.dtype, [S.segments2, S.segment, S.part], VALUES)
    if S.quantised:
        x_steps = gl.allocate_shared_memory(gl.float32, [S.segments1, S.segment], PLAIN)
        hidden_steps = gl.allocate_shared_memory(gl.float32, [S.segments2, S.segment], PLAIN)
        tables = (new_table(S.most_units1, S.entries1, S), new_table(S.most_units2, S.entries2, S))
        gathered = _new_barriers(S.most_units1, 1)
        others: gl.constexpr = _GATHERER_REGISTERS
    else:
        x_steps: gl.constexpr = None
        hidden_steps: gl.constexpr = None
        tables = (None, None)
        gathered: gl.constexpr = None
        others: gl.constexpr = _LOADER_REGISTERS
    shared = ((x_values, x_steps), (hidden_values, hidden_steps), tables, weights, experts)
    routing = (topk_weights, topk_ids, expert_map)
    signals = (gathered, once.index(1), once.index(2))
    gl.warp_specialize(
        [
            (_multiply, (x, w13_input_scale, w2_input_scale, w13_bias, w2_bias, hidden, out, out_stride, routing, ring,
                         shared, signals, ACTIVATION, S)),
            (_stream_weights, (w13, w2, routing, ring, once.index(0), S)),
            (_pass_barrier, (w13_scale, w2_scale, routing, grid_barrier, tables, signals, S)),
        ],
        [1, 1],
        [others, others],
    )  # fmt: skip
