"""The kernel of the family "stream": a whole layer of one token in one launch, bound by reading the weights.

One block a multiprocessor. In it one warp loads weight tiles by TMA into a ring of shared-memory stages, one warp loads
the activations that go with them, and the other warps multiply. The weights of gemm2 do not depend on gemm1, so their
tiles follow those of gemm1 in the same ring without a pause, while a barrier over the grid waits until `hidden` is
complete. A weight meets one token, so the products run on the ordinary cores in float32: a tile is as low as balance
between blocks wants it, which tensor cores do not allow.

A *strip* is the rows of a weight that one tile covers. gemm1's units are (slot, strip); those of gemm2 are the strips
alone: a block sums its strip of the output over all slots, in their order, so that nothing is left to reduce and two
runs give the same bits. Gluon, hence imported only where the family runs (moegen/runtime/stream.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .stream_parts import (
    asm,
    block_barrier,
    end_reads,
    expert_of,
    fetch_descriptors,
    load_tile,
    next_stage,
    scale_of,
    share,
    wait_for_grid,
    wait_for_previous,
)

LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)  # a thread of the two warps that load


@gluon.jit
def stream_weights(w13, w2, routing, ring, fetched, S: gl.constexpr):
    """Every weight tile of this block, in the order in which `_multiply` takes them."""
    OUTSIDE: gl.constexpr = S.outside
    buffers, empty, ready = ring
    fetch_descriptors(w13, w2, [0, 0, 0, OUTSIDE], fetched, buffers.index(0))
    wait_for_previous(S.pdl)
    mbarrier.wait(fetched, 0)
    stage = 0
    phase = 1
    first, last = share(S.top_k * S.strips1, gl.program_id(0))
    for unit in range(first, last):
        expert = expert_of(routing, unit // S.strips1, S)
        if expert >= 0:
            row = unit % S.strips1 * S.columns
            for k in range(0, S.hidden_size, S.depth):
                stage, phase = load_tile(w13, [expert, 0, row, k], stage, phase, buffers, empty, ready, S.stages)
    # From the other end: the blocks with the larger share of gemm1 get the smaller one of gemm2.
    first, last = share(S.strips2, gl.num_programs(0) - 1 - gl.program_id(0))
    for unit in range(first, last):
        for slot in range(S.top_k):
            expert = expert_of(routing, slot, S)
            if expert >= 0:
                row = unit * S.columns
                for k in range(0, S.intermediate_size, S.depth):
                    stage, phase = load_tile(w2, [expert, 0, row, k], stage, phase, buffers, empty, ready, S.stages)


@gluon.jit
def _stream_rows(x, hidden, routing, grid_barrier, ring, fetched, written, S: gl.constexpr):
    """The activations for each weight tile; in between the barrier over the grid, which only this warp waits at."""
    OUTSIDE: gl.constexpr = S.outside
    buffers, empty, ready = ring
    fetch_descriptors(x, hidden, [0, OUTSIDE], fetched, buffers.index(0))
    wait_for_previous(S.pdl)
    mbarrier.wait(fetched, 0)
    stage = 0
    phase = 1
    first, last = share(S.top_k * S.strips1, gl.program_id(0))
    for unit in range(first, last):
        if expert_of(routing, unit // S.strips1, S) >= 0:
            for k in range(0, S.hidden_size, S.depth):
                stage, phase = load_tile(x, [0, k], stage, phase, buffers, empty, ready, S.row_stages)

    mbarrier.wait(written, 0)
    wait_for_grid(grid_barrier)
    asm("fence.proxy.async")  # hidden was written by ordinary stores and is read by TMA

    first, last = share(S.strips2, gl.num_programs(0) - 1 - gl.program_id(0))
    for _ in range(first, last):
        for slot in range(S.top_k):
            if expert_of(routing, slot, S) >= 0:
                for k in range(0, S.intermediate_size, S.depth):
                    stage, phase = load_tile(hidden, [slot, k], stage, phase, buffers, empty, ready, S.row_stages)


@gluon.jit
def to_float32(x):
    """bfloat16 by a shift and a mask of the register that holds two values, one instruction each."""
    if x.dtype == gl.bfloat16:
        asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return gl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def _add_once(acc, value, S: gl.constexpr):
    """acc + value [1, 2, columns], in the first of the chunks that are yet to be summed."""
    CHUNKS: gl.constexpr = S.depth // 8
    chunk = gl.arange(0, CHUNKS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, acc.type.layout))))
    first = gl.expand_dims(gl.expand_dims(gl.expand_dims(chunk == 0, 0), 1), 2)
    return acc + gl.where(first, gl.expand_dims(value, 3), 0.0)


@gluon.jit
def _dot(acc, scale, LENGTH: gl.constexpr, place, w_ring, a_ring, S: gl.constexpr, TILE: gl.constexpr):
    """acc + Σ_k tile · row · scale over the tiles of one unit and slot."""
    w_stage, w_phase, a_stage, a_phase = place
    for _ in range(0, LENGTH, S.depth):
        mbarrier.wait(w_ring[2].index(w_stage), w_phase)
        w = to_float32(w_ring[0].index(w_stage).load(TILE))
        mbarrier.wait(a_ring[2].index(a_stage), a_phase)
        a = a_ring[0].index(a_stage).load(gl.SliceLayout(1, gl.SliceLayout(2, TILE)))
        end_reads()
        mbarrier.arrive(w_ring[1].index(w_stage), count=1)
        mbarrier.arrive(a_ring[1].index(a_stage), count=1)
        w_stage, w_phase = next_stage(w_stage, w_phase, S.stages)
        a_stage, a_phase = next_stage(a_stage, a_phase, S.row_stages)
        a = gl.expand_dims(gl.expand_dims(to_float32(a) * scale, 1), 2)
        acc += gl.sum(gl.reshape(w * a, (1, 2, S.columns, S.depth // 8, 8)), axis=4)
    return acc, (w_stage, w_phase, a_stage, a_phase)


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
def _multiply(
    w13_bias, w2_bias, hidden, out, routing, w_ring, a_ring, written,
    ACTIVATION: gl.constexpr, S: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """gemm1 with activation for this block's units, then gemm2 with the sum over slots for its strips."""
    wait_for_previous(S.pdl)
    if S.pdl:
        asm("griddepcontrol.launch_dependents")
    # Each warp holds whole rows: no sum crosses warps, and a thread reads 16 bytes at a time. An accumulator has one
    # value for the eight of a row that a thread holds.
    EACH: gl.constexpr = S.columns // WARPS
    CHUNKS: gl.constexpr = S.depth // 8
    COLUMNS: gl.constexpr = S.columns
    TILE: gl.constexpr = gl.BlockedLayout([1, 2, EACH, 8], [1, 1, 1, 32], [1, 1, WARPS, 1], [3, 2, 1, 0])
    FINE: gl.constexpr = gl.BlockedLayout([1, 2, EACH, 1, 8], [1, 1, 1, 32, 1], [1, 1, WARPS, 1, 1], [4, 3, 2, 1, 0])
    ACC: gl.constexpr = gl.SliceLayout(4, FINE)
    nothing = gl.zeros((1, 2, COLUMNS, CHUNKS), gl.float32, layout=ACC)
    place = (0, 0, 0, 0)
    first, last = share(S.top_k * S.strips1, gl.program_id(0))
    for unit in range(first, last):
        slot = unit // S.strips1
        expert = expert_of(routing, slot, S)
        if expert >= 0:
            scale = scale_of(routing, slot, S.weight_on_input)
            acc, place = _dot(nothing, scale, S.hidden_size, place, w_ring, a_ring, S, TILE)
            store_hidden(gl.sum(acc, axis=3), w13_bias, hidden, slot, expert, unit % S.strips1, ACTIVATION, S)
    asm("fence.proxy.async")
    block_barrier()
    mbarrier.arrive(written, count=1)

    half_rows: gl.constexpr = S.hidden_size // 2
    first, last = share(S.strips2, gl.num_programs(0) - 1 - gl.program_id(0))
    for strip in range(first, last):
        acc = nothing
        row, half = rows_of(strip, gl.sum(nothing, axis=3), S)
        inside = (row < half_rows) & (half < 2)
        for slot in range(S.top_k):
            expert = expert_of(routing, slot, S)
            if expert >= 0:
                scale = scale_of(routing, slot, not S.weight_on_input)
                if w2_bias is not None:  # loaded ahead of the tiles, used behind them
                    bias = gl.load(w2_bias + expert * S.hidden_size + half * half_rows + row, mask=inside, other=0.0)
                acc, place = _dot(acc, scale, S.intermediate_size, place, w_ring, a_ring, S, TILE)
                if w2_bias is not None:
                    acc = _add_once(acc, bias.to(gl.float32) * scale, S)
        gl.store(out + half * half_rows + row, gl.sum(acc, axis=3).to(out.dtype.element_ty), mask=inside)


@gluon.jit
def new_ring(desc, STAGES: gl.constexpr):
    """Buffers for blocks of `desc`, and for each the barriers that say it is empty and that it is loaded."""
    buffers = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)  # noqa: RUF005 - Triton has no stars
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
        mbarrier.init(ready.index(stage), count=1)
    return buffers, empty, ready


@gluon.jit(do_not_specialize_on_alignment=["topk_weights", "topk_ids", "expert_map"])
def stream_layer(
    w13,  # descriptor [E, 2, rows / 2, H]: gate and up rows, or two halves; block [1, 2, columns, depth]
    w2,  # descriptor [E, 2, H / 2, I], the same block
    x,  # descriptor [1, H], block [1, depth]
    hidden_rows,  # descriptor of `hidden`, block [1, depth]
    hidden,  # [k, I], scratch
    out,  # [H]
    w13_bias,  # [E, rows] or None
    w2_bias,  # [E, H] or None
    topk_weights,  # [k]
    topk_ids,  # [k]
    expert_map,  # global -> local expert, or None
    grid_barrier,  # [1] int32, zero when it is new; nothing else that runs at the same time may use it
    ACTIVATION: gl.constexpr,
    S: gl.constexpr,  # StreamSizes
    num_warps: gl.constexpr,
):
    """out = Σ_j weight_j · expert_j(x), the whole layer."""
    w_ring = new_ring(w13, S.stages)
    a_ring = new_ring(x, S.row_stages)
    once = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(once.index(i), count=1)
    routing = (topk_weights, topk_ids, expert_map)
    gl.warp_specialize(
        [
            (_multiply, (w13_bias, w2_bias, hidden, out, routing, w_ring, a_ring, once.index(2),
                         ACTIVATION, S, num_warps)),
            (stream_weights, (w13, w2, routing, w_ring, once.index(0), S)),
            (_stream_rows, (x, hidden_rows, routing, grid_barrier, a_ring, once.index(1), once.index(2), S)),
        ],
        [1, 1],
        [LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
