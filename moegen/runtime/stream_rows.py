"""The activations of the family "stream": x and `hidden` -> shared memory, as products take them (stream_kernel.py).

Every block has all of them, in parts of 128 bytes: as they are, or quantised, which each block does for itself, to the
bits of runtime/quantise.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .kernel_parts import divide, group_scale, to_8_bit
from .stream_parts import expert_of


@gluon.jit
def _slots_of(part, S: gl.constexpr):
    """The slot of a part of `hidden`, whether there is one, and the number of the part within it."""
    token, within = part // S.token_parts, part % S.token_parts
    inside = (token < S.tokens) & (within // S.hidden_parts < S.top_k)
    return gl.where(inside, token * S.top_k + within // S.hidden_parts, 0), inside, within % S.hidden_parts


@gluon.jit
def load_segment(source, segment, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """[parts, values] of x [T, H] or, if not FIRST_GEMM, of hidden [T·k, I], as many as are prepared at a time.

    What lies outside of the rows is zero.
    """
    LENGTH: gl.constexpr = S.hidden_size if FIRST_GEMM else S.intermediate_size
    EACH: gl.constexpr = S.chunks1 * S.parts
    LANES: gl.constexpr = S.part // 16
    L: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [S.warps, 1], [1, 0])
    part = segment * S.segment + gl.arange(0, S.segment, layout=gl.SliceLayout(1, L))
    if FIRST_GEMM:
        row, inside, number = part // EACH, part < S.x_parts, part % EACH
    else:
        row, inside, number = _slots_of(part, S)
    column = gl.expand_dims(number * S.part, 1)
    column += gl.expand_dims(gl.arange(0, S.part, layout=gl.SliceLayout(0, L)), 0)
    inside = gl.expand_dims(inside, 1) & (column < LENGTH)
    # Not from L1, which may hold what was there before the barrier.
    place = source + (gl.expand_dims(row, 1) * LENGTH + column)
    return gl.load(place, mask=inside, other=0.0, cache_modifier=".cg")


@gluon.jit
def weigh_parts(routing, weights, S: gl.constexpr):
    """What the router says of each part of `hidden` -> weights [segments, parts]; 0 where there is nothing."""
    SEGMENTS: gl.constexpr = weights.shape[0]
    for segment in gl.static_range(SEGMENTS):
        part = gl.arange(0, S.segment, layout=gl.BlockedLayout([1], [32], [S.warps], [0]))
        slot, inside, _ = _slots_of(segment * S.segment + part, S)
        inside = inside & (expert_of(routing, slot, S) >= 0)
        if S.weight_on_input:
            weight = gl.where(inside, 1.0, 0.0)
        else:
            weight = gl.where(inside, gl.load(routing[0] + slot).to(gl.float32), 0.0)  # of padding it may be anything
        weights.index(segment).store(weight)


@gluon.jit
def copy_rows(source, loaded, values, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """x or, if not FIRST_GEMM, hidden -> values [segments, parts, values]; loaded: the first segment."""
    SEGMENTS: gl.constexpr = values.shape[0]
    for segment in gl.static_range(SEGMENTS):
        found = loaded
        if segment + 1 < SEGMENTS:
            loaded = load_segment(source, segment + 1, FIRST_GEMM, S)
        values.index(segment).store(found)


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
def quantise_rows(source, loaded, static_scale, routing, values, steps, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """`copy_rows` in 8 bits, and their steps [segments, parts].

    One step for all slots is that of the slots that have an expert: nobody wrote the others.
    """
    GROUPS: gl.constexpr = S.chunks1 * S.parts if FIRST_GEMM else S.hidden_parts
    SEGMENTS: gl.constexpr = values.shape[0]
    EACH: gl.constexpr = values.shape[1]
    LARGEST: gl.constexpr = 127.0 if values.dtype == gl.int8 else 448.0
    COMMON: gl.constexpr = S.group_k == 0 and static_scale is None
    L: gl.constexpr = loaded.type.layout
    first = gl.arange(0, EACH, layout=gl.SliceLayout(1, L))
    for segment in gl.static_range(SEGMENTS):
        group = segment * EACH + first
        found = loaded.to(gl.float32)
        if segment + 1 < SEGMENTS:
            loaded = load_segment(source, segment + 1, FIRST_GEMM, S)
        if static_scale is not None:
            step = gl.zeros((EACH,), gl.float32, layout=gl.SliceLayout(1, L)) + gl.load(static_scale)
        else:
            largest = gl.max(gl.abs(found), axis=1)
            if S.by_tensor and not FIRST_GEMM:
                slot, _, _ = _slots_of(group, S)
                largest = gl.where(expert_of(routing, slot, S) >= 0, largest, 0.0)
            step = _own_step(largest, LARGEST, S)
        steps.index(segment).store(step)
        if not COMMON:
            values.index(segment).store(to_8_bit(divide(found, gl.expand_dims(step, 1)), LARGEST, values.dtype))
    if COMMON:
        for segment in gl.static_range(SEGMENTS):
            group = segment * EACH + first
            if SEGMENTS > 1:  # more values than registers can keep
                found = load_segment(source, segment, FIRST_GEMM, S).to(gl.float32)
            step = _common_step(steps, group, SEGMENTS * EACH if S.by_tensor else GROUPS, L)
            steps.index(segment).store(step)
            values.index(segment).store(to_8_bit(divide(found, gl.expand_dims(step, 1)), LARGEST, values.dtype))
