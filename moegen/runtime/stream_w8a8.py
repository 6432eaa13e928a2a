"""The kernel of the family "stream" for 8-bit weights and activations; see stream_kernel.py.

The warps that multiply quantise the token before gemm1 and `hidden` behind the barrier over the grid, every block for
itself: to the bits of runtime/quantise.py, but into shared memory. So no activation passes through a ring. The weight
scales lie there as well. A block loads all that it needs at the start: one that is loaded when its tile arrives is
late.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .decode import decode_scale
from .kernel_parts import divide, group_scale, to_8_bit
from .stream_kernel import LOADER_REGISTERS, new_ring, rows_of, store_hidden, stream_weights
from .stream_parts import (
    asm,
    block_barrier,
    end_reads,
    expert_of,
    next_stage,
    scale_of,
    share,
    wait_for_grid,
    wait_for_previous,
)

_PLAIN: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
_PLAIN2: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
_PLAIN3: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))


@gluon.jit
def _pass_barrier(grid_barrier, written, passed, S: gl.constexpr):
    """One warp: the barrier over the grid when this block has written its part of `hidden`."""
    wait_for_previous(S.pdl)
    mbarrier.wait(written, 0)
    wait_for_grid(grid_barrier)
    mbarrier.arrive(passed, count=1)


@gluon.jit
def _load_groups(source, group, ROWS: gl.constexpr, LENGTH: gl.constexpr, GROUPS: gl.constexpr, L: gl.constexpr):
    """[groups, 128] float32 of source [ROWS, LENGTH], which has GROUPS groups a row; zero outside."""
    row = gl.expand_dims(group // GROUPS, 1)
    column = gl.expand_dims(group % GROUPS * 128, 1) + gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, L)), 0)
    inside = (row < ROWS) & (column < LENGTH)
    # Not from L1, which may hold what was there before the barrier.
    return gl.load(source + row * LENGTH + column, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)


@gluon.jit
def _own_step(largest, LARGEST: gl.constexpr, S: gl.constexpr):
    """The step that a group of this largest magnitude would have by itself, as in quantise.py."""
    if S.by_tensor:
        step = gl.maximum(group_scale(largest, 0.0, LARGEST, False), S.least)
    else:
        step = group_scale(largest, S.least, LARGEST, S.ue8m0)
    return step


@gluon.jit
def _common_step(steps, group, SHARE: gl.constexpr, L: gl.constexpr):
    """The largest of the `steps` of SHARE groups that follow each other, for each group of them.

    It is the step of their largest magnitude, since a greater one makes no smaller step. So groups may have it already.
    """
    SEGMENTS: gl.constexpr = steps.shape[0]
    EACH: gl.constexpr = steps.shape[1]
    common = gl.zeros((EACH,), gl.float32, layout=gl.SliceLayout(1, L))
    for segment in gl.static_range(SEGMENTS):
        other = segment * EACH + gl.arange(0, EACH, layout=gl.SliceLayout(0, L))
        shared = gl.expand_dims(group // SHARE, 1) == gl.expand_dims(other // SHARE, 0)
        found = gl.expand_dims(steps.index(segment).load(gl.SliceLayout(0, L)), 0)
        common = gl.maximum(common, gl.max(gl.where(shared, found, 0.0), axis=1))
    return common


@gluon.jit
def _quantise(source, static_scale, routing, values, steps, FIRST_GEMM: gl.constexpr, S: gl.constexpr,
              WARPS: gl.constexpr):  # fmt: skip
    """x or, if not FIRST_GEMM, hidden -> shared memory: values [segments, groups, 128], steps [segments, groups].

    One step for all slots is that of the slots that have an expert: nobody wrote the others.
    """
    ROWS: gl.constexpr = 1 if FIRST_GEMM else S.top_k
    LENGTH: gl.constexpr = S.hidden_size if FIRST_GEMM else S.intermediate_size
    GROUPS: gl.constexpr = (S.chunks1 if FIRST_GEMM else S.chunks2) * S.tile_groups
    SEGMENTS: gl.constexpr = values.shape[0]
    EACH: gl.constexpr = values.shape[1]
    LARGEST: gl.constexpr = 127.0 if values.dtype == gl.int8 else 448.0
    COMMON: gl.constexpr = S.group_k == 0 and static_scale is None
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    first = gl.arange(0, EACH, layout=gl.SliceLayout(1, L))
    for segment in gl.static_range(SEGMENTS):
        group = segment * EACH + first
        loaded = _load_groups(source, group, ROWS, LENGTH, GROUPS, L)
        if static_scale is not None:
            step = gl.zeros((EACH,), gl.float32, layout=gl.SliceLayout(1, L)) + gl.load(static_scale)
        else:
            largest = gl.max(gl.abs(loaded), axis=1)
            if S.by_tensor and not FIRST_GEMM:
                expert = expert_of(routing, gl.minimum(group // GROUPS, ROWS - 1), S)
                largest = gl.where(expert >= 0, largest, 0.0)
            step = _own_step(largest, LARGEST, S)
        steps.index(segment).store(step)
        if not COMMON:
            values.index(segment).store(to_8_bit(divide(loaded, gl.expand_dims(step, 1)), LARGEST, values.dtype))
    if COMMON:
        for segment in gl.static_range(SEGMENTS):
            group = segment * EACH + first
            if SEGMENTS > 1:  # more values than registers can keep
                loaded = _load_groups(source, group, ROWS, LENGTH, GROUPS, L)
            step = _common_step(steps, group, SEGMENTS * EACH if S.by_tensor else GROUPS, L)
            steps.index(segment).store(step)
            values.index(segment).store(to_8_bit(divide(loaded, gl.expand_dims(step, 1)), LARGEST, values.dtype))


@gluon.jit
def _gather_scales(scale, routing, table, FIRST_GEMM: gl.constexpr, S: gl.constexpr, WARPS: gl.constexpr):
    """The weight scales of this block's tiles or, without K groups, units, in order: table [entries, 2, scales].

    An entry has the K groups of a tile, or its rows, for each half.
    """
    ENTRIES: gl.constexpr = table.shape[0]
    ENTRY: gl.constexpr = table.shape[2]
    LANES: gl.constexpr = ENTRY if ENTRY < 16 else 16
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1], [16 // LANES, 2, LANES], [WARPS, 1, 1], [2, 1, 0])
    entry = gl.arange(0, ENTRIES, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    if FIRST_GEMM:
        PARTS: gl.constexpr = S.parts1
        ROWS: gl.constexpr = S.intermediate_size * 2 if S.gated else S.intermediate_size
        DEPTH: gl.constexpr = S.hidden_size
        unit = gl.minimum(share(S.top_k * S.strips1, gl.program_id(0))[0] + entry // PARTS, S.top_k * S.strips1 - 1)
        slot = unit // S.strips1
        row = unit % S.strips1 * S.columns
    else:
        PARTS: gl.constexpr = S.parts2
        ROWS: gl.constexpr = S.hidden_size
        DEPTH: gl.constexpr = S.intermediate_size
        strip = share(S.strips2, gl.num_programs(0) - 1 - gl.program_id(0))[0] + entry // (PARTS * S.top_k)
        slot = entry // PARTS % S.top_k
        row = gl.minimum(strip, S.strips2 - 1) * S.columns
    GROUP_N: gl.constexpr = S.group_n if S.group_n else ROWS
    GROUPS: gl.constexpr = (DEPTH + 127) // 128 if S.group_k else 1
    expert = expert_of(routing, slot, S).to(gl.int64)
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    half = gl.expand_dims(gl.expand_dims(half, 0), 2)
    within = gl.arange(0, ENTRY, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    within = gl.expand_dims(gl.expand_dims(within, 0), 1)
    row = gl.expand_dims(gl.expand_dims(row, 1), 2)
    group = gl.expand_dims(gl.expand_dims(entry % PARTS * ENTRY, 1), 2)
    if S.group_k:
        group = gl.minimum(group + within, GROUPS - 1)
    else:
        row = gl.minimum(row + within, ROWS // 2 - 1)
    row = 2 * row + half if FIRST_GEMM and S.interleaved else half * (ROWS // 2) + row
    ROW_GROUPS: gl.constexpr = (ROWS + GROUP_N - 1) // GROUP_N
    expert = gl.expand_dims(gl.expand_dims(expert, 1), 2)
    place = expert * (ROW_GROUPS * GROUPS) + row // GROUP_N * GROUPS + group
    # Where a slot has no expert nothing is read: a warm-up's weights have no memory.
    known, place = gl.broadcast(expert >= 0, place)
    table.store(decode_scale(gl.load(scale + place, mask=known, other=0)))


@gluon.jit
def _products(w, a):
    """w · a, to be summed: float32, or for integers int32 sums of four with zeros between."""
    if w.dtype == gl.int8:
        asm: gl.constexpr = "dp4a.s32.s32 $0, $4, $5, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        w, a = gl.broadcast(w, a)
        return gl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r,r", [w, a], dtype=gl.int32, is_pure=True, pack=4)
    else:
        return w.to(gl.float32) * a.to(gl.float32)


@gluon.jit
def _factor(table, entry, steps, chunk, scale, ACC: gl.constexpr, S: gl.constexpr):
    """What sums in the layout ACC are multiplied by; the table's entry has K groups or rows."""
    AXES: gl.constexpr = gl.SliceLayout(4, ACC)
    HALVES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2 if S.group_k else 3, AXES))
    step = steps.index(chunk).load(gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(2, AXES)))) * scale
    factor = gl.expand_dims(gl.expand_dims(table.index(entry).load(HALVES), 0), 2 if S.group_k else 3)
    step = gl.expand_dims(gl.expand_dims(gl.expand_dims(step, 0), 0), 2)
    return gl.expand_dims(factor * step, 4)


@gluon.jit
def _dot(acc, scale, CHUNKS: gl.constexpr, entry, chunk, place, ring, table, values, steps, S: gl.constexpr,
         TILE: gl.constexpr):  # fmt: skip
    """acc + Σ_k tile · row · scales over the tiles of one unit and slot; the row's chunks start at `chunk`.

    Scales of K groups multiply the sums of each tile, those of whole rows the sum of all tiles.
    """
    ACC: gl.constexpr = acc.type.layout
    IN: gl.constexpr = S.depth // 128
    COLUMNS: gl.constexpr = S.columns
    SUM: gl.constexpr = gl.int32 if values.dtype == gl.int8 else gl.float32
    stage, phase = place
    sums = gl.zeros((1, 2, COLUMNS, IN, 8), SUM, layout=ACC)
    for k in range(CHUNKS):
        if S.group_k:
            factor = _factor(table, entry + k, steps, chunk + k, scale, ACC, S)
        a = values.index(chunk + k).load(gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, TILE))))
        a = gl.expand_dims(gl.expand_dims(gl.expand_dims(a, 0), 1), 2)
        mbarrier.wait(ring[2].index(stage), phase)
        products = _products(ring[0].index(stage).load(TILE), a)
        end_reads()
        mbarrier.arrive(ring[1].index(stage), count=1)
        stage, phase = next_stage(stage, phase, S.stages)
        found = gl.sum(gl.reshape(products, (1, 2, COLUMNS, IN, 8, 16)), axis=5)
        found = gl.convert_layout(found, ACC, assert_trivial=True)
        if S.group_k:
            acc += found.to(gl.float32) * factor
        else:
            sums += found
    if not S.group_k:
        acc += sums.to(gl.float32) * _factor(table, entry, steps, chunk, scale, ACC, S)
    return acc, (stage, phase)


@gluon.jit
def _total(acc):
    """[1, 2, columns]"""
    return gl.sum(gl.sum(acc, axis=4), axis=3)


@gluon.jit
def _multiply(
    x, w13_scale, w2_scale, w13_input_scale, w2_input_scale, w13_bias, w2_bias, hidden, out, routing, ring, written,
    passed, shared, ACTIVATION: gl.constexpr, S: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """gemm1 with activation for this block's units, then gemm2 with the sum over slots for its strips."""
    (x_values, x_steps, h_values, h_steps, table1, table2) = shared
    wait_for_previous(S.pdl)
    if S.pdl:
        asm("griddepcontrol.launch_dependents")
    IN: gl.constexpr = S.depth // 128
    COLUMNS: gl.constexpr = S.columns
    ALONG: gl.constexpr = S.depth // 16 if S.depth < 512 else 32  # lanes along a row, with 16 bytes each at a time
    EACH: gl.constexpr = COLUMNS * ALONG // (32 * WARPS)
    TILE: gl.constexpr = gl.BlockedLayout([1, 2, EACH, 16], [1, 1, 32 // ALONG, ALONG], [1, 1, WARPS, 1], [3, 2, 1, 0])
    FINE: gl.constexpr = gl.BlockedLayout(
        [1, 2, EACH, 1, 1, 16], [1, 1, 32 // ALONG, ALONG // 8, 8, 1], [1, 1, WARPS, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    nothing = gl.zeros((1, 2, COLUMNS, IN, 8), gl.float32, layout=gl.SliceLayout(5, FINE))
    _gather_scales(w13_scale, routing, table1, True, S, WARPS)
    _gather_scales(w2_scale, routing, table2, False, S, WARPS)
    _quantise(x, w13_input_scale, routing, x_values, x_steps, True, S, WARPS)
    block_barrier()  # here, or the compiler puts it into the loop
    table1 = table1._reinterpret(gl.float32, [table1.shape[0], 2, S.entry], _PLAIN2)
    table2 = table2._reinterpret(gl.float32, [table2.shape[0], 2, S.entry], _PLAIN2)
    X_CHUNKS: gl.constexpr = x_values.shape[0] * x_values.shape[1] // IN
    H_CHUNKS: gl.constexpr = h_values.shape[0] * h_values.shape[1] // IN
    values = x_values._reinterpret(x_values.dtype, [X_CHUNKS, S.depth], _PLAIN)
    steps = x_steps._reinterpret(gl.float32, [X_CHUNKS, IN], _PLAIN)
    place = (0, 0)
    first, last = share(S.top_k * S.strips1, gl.program_id(0))
    for unit in range(first, last):
        slot = unit // S.strips1
        expert = expert_of(routing, slot, S)
        if expert >= 0:
            scale = scale_of(routing, slot, S.weight_on_input)
            acc, place = _dot(
                nothing, scale, S.chunks1, (unit - first) * S.parts1, 0, place, ring, table1, values, steps, S, TILE
            )
            store_hidden(_total(acc), w13_bias, hidden, slot, expert, unit % S.strips1, ACTIVATION, S)
    block_barrier()
    mbarrier.arrive(written, count=1)

    mbarrier.wait(passed, 0)
    _quantise(hidden, w2_input_scale, routing, h_values, h_steps, False, S, WARPS)
    block_barrier()
    values = h_values._reinterpret(h_values.dtype, [H_CHUNKS, S.depth], _PLAIN)
    steps = h_steps._reinterpret(gl.float32, [H_CHUNKS, IN], _PLAIN)
    half_rows: gl.constexpr = S.hidden_size // 2
    first, last = share(S.strips2, gl.num_programs(0) - 1 - gl.program_id(0))
    for strip in range(first, last):
        acc = nothing
        biases = _total(nothing)
        row, half = rows_of(strip, biases, S)
        inside = (row < half_rows) & (half < 2)
        for slot in range(S.top_k):
            expert = expert_of(routing, slot, S)
            if expert >= 0:
                scale = scale_of(routing, slot, not S.weight_on_input)
                if w2_bias is not None:
                    bias = gl.load(w2_bias + expert * S.hidden_size + half * half_rows + row, mask=inside, other=0.0)
                    biases += bias.to(gl.float32) * scale
                entry = ((strip - first) * S.top_k + slot) * S.parts2
                acc, place = _dot(
                    acc, scale, S.chunks2, entry, slot * S.chunks2, place, ring, table2, values, steps, S, TILE
                )
        total = _total(acc)
        if w2_bias is not None:
            total += biases
        gl.store(out + half * half_rows + row, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _new_rows(dtype, SEGMENTS: gl.constexpr, S: gl.constexpr):
    """Shared memory for quantised groups of 128 values, in segments that the block makes at a time, and their steps."""
    values = gl.allocate_shared_memory(dtype, [SEGMENTS, S.segment, 128], _PLAIN2)
    return values, gl.allocate_shared_memory(gl.float32, [SEGMENTS, S.segment], _PLAIN)


@gluon.jit(
    do_not_specialize_on_alignment=["w13_input_scale", "w2_input_scale", "topk_weights", "topk_ids", "expert_map"]
)
def stream_layer_w8a8(
    w13,  # descriptor [E, 2, rows / 2, H]: gate and up rows, or two halves; block [1, 2, columns, depth]
    w2,  # descriptor [E, 2, H / 2, I], the same block
    w13_scale,  # [E, ceil(rows / group_n), ceil(H / 128)] float32 or e8m0; without K groups [E, rows] or [E]
    w2_scale,  # [E, ceil(H / group_n), ceil(I / 128)], [E, H] or [E]
    w13_input_scale,  # [1] float32, static scale of x, or None
    w2_input_scale,  # [1] float32, static scale of hidden, or None
    x,  # [H]
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
    ring = new_ring(w13, S.stages)
    once = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(once.index(i), count=1)
    x_values, x_steps = _new_rows(w13.dtype, S.segments1, S)
    h_values, h_steps = _new_rows(w13.dtype, S.segments2, S)
    table1 = gl.allocate_shared_memory(gl.float32, [S.entries1, 2, S.entry], _PLAIN3)
    table2 = gl.allocate_shared_memory(gl.float32, [S.entries2, 2, S.entry], _PLAIN3)
    shared = (x_values, x_steps, h_values, h_steps, table1, table2)
    routing = (topk_weights, topk_ids, expert_map)
    gl.warp_specialize(
        [
            (_multiply, (x, w13_scale, w2_scale, w13_input_scale, w2_input_scale, w13_bias, w2_bias, hidden, out,
                         routing, ring, once.index(1), once.index(2), shared, ACTIVATION, S, num_warps)),
            (stream_weights, (w13, w2, routing, ring, once.index(0), S)),
            (_pass_barrier, (grid_barrier, once.index(1), once.index(2), S)),
        ],
        [1, 1],
        [LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
