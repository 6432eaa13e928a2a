"""The weight scales of the family "stream": a warp beside those that multiply puts them into tables in shared memory.

A block's tiles are known as soon as its experts are, and so are their scales: one that is loaded when its tile arrives
is late. An entry of a table is what one tile needs: with K groups [parts, 2], for each part of its rows and each half
of the weight; otherwise [2, columns], for all tiles of a unit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .decode import decode_scale
from .stream_parts import expert_of, share

_PLAIN2: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
_PLAIN3: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))


@gluon.jit
def new_table(UNITS: gl.constexpr, ENTRIES: gl.constexpr, S: gl.constexpr):
    """A table for so many units, each of so many entries."""
    ENTRY: gl.constexpr = [1, ENTRIES * S.entry, 2] if S.group_k else [ENTRIES, 2, S.entry]
    return gl.allocate_shared_memory(gl.float32, [UNITS] + ENTRY, _PLAIN3)  # noqa: RUF005 - Triton has no stars


@gluon.jit
def entries_of(table, S: gl.constexpr):
    """The table as entries: [units · entries, parts, 2] or [units · entries, 2, columns]."""
    ENTRY: gl.constexpr = [S.parts, 2] if S.group_k else [2, S.entry]
    SIZE: gl.constexpr = table.shape[0] * table.shape[1] * table.shape[2] * table.shape[3]
    COUNT: gl.constexpr = SIZE // (2 * S.entry)
    return table._reinterpret(gl.float32, [COUNT] + ENTRY, _PLAIN2)  # noqa: RUF005 - as above


@gluon.jit
def _load_scales(scale, routing, slot, strip, FIRST_GEMM: gl.constexpr, S: gl.constexpr):
    """[1, 2, parts] or [slots, 2, columns] as stored, of one strip: of gemm1 for `slot`, of gemm2 for top_k from it."""
    if FIRST_GEMM:
        ENTRIES: gl.constexpr = S.entries1
        ROWS: gl.constexpr = S.intermediate_size * 2 if S.gated else S.intermediate_size
        DEPTH: gl.constexpr = S.hidden_size
    else:
        ENTRIES: gl.constexpr = S.entries2
        ROWS: gl.constexpr = S.hidden_size
        DEPTH: gl.constexpr = S.intermediate_size
    SLOTS: gl.constexpr = 1 if S.group_k else ENTRIES
    WIDTH: gl.constexpr = ENTRIES * S.entry // SLOTS
    LANES: gl.constexpr = min(WIDTH, 32)
    HALVES: gl.constexpr = min(2, 32 // LANES)
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1], [32 // LANES // HALVES, HALVES, LANES], [1, 1, 1], [2, 1, 0])
    GROUP_N: gl.constexpr = S.group_n if S.group_n else ROWS
    ROW_GROUPS: gl.constexpr = (ROWS + GROUP_N - 1) // GROUP_N
    GROUPS: gl.constexpr = (DEPTH + 127) // 128 if S.group_k else 1
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    half = gl.expand_dims(gl.expand_dims(half, 0), 2)
    within = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    within = gl.expand_dims(gl.expand_dims(within, 0), 1)
    row = strip * S.columns
    if S.group_k:
        EACH: gl.constexpr = WIDTH if FIRST_GEMM else S.hidden_parts
        slots = within // EACH
        group = gl.minimum(within % EACH, GROUPS - 1)
    else:
        slots = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
        slots = gl.expand_dims(gl.expand_dims(slots, 1), 2)
        row = gl.minimum(row + within, ROWS // 2 - 1)
        group = 0
    row = 2 * row + half if FIRST_GEMM and S.interleaved else half * (ROWS // 2) + row
    expert = expert_of(routing, slot + gl.minimum(slots, S.top_k - 1), S).to(gl.int64)
    place = expert * (ROW_GROUPS * GROUPS) + (row // GROUP_N * GROUPS + group)
    # Where a slot has no expert nothing is read: a warm-up's weights have no memory.
    known, place = gl.broadcast(expert >= 0, place)
    return gl.load(scale + place, mask=known, other=0)


@gluon.jit
def _store_scales(table, scales, S: gl.constexpr):
    scales = decode_scale(scales)
    table.store(gl.permute(scales, (0, 2, 1)) if S.group_k else scales)


@gluon.jit
def gather_scales(w13_scale, w2_scale, routing, tables, gathered, S: gl.constexpr):
    """Of all units of this block; gathered: for each unit of gemm1 the barrier that says that its scales are there."""
    first, last = share(S.units1, gl.program_id(0))
    unit = gl.minimum(first, S.units1 - 1)
    ahead = _load_scales(w13_scale, routing, unit // S.strips1, unit % S.strips1, True, S)
    for number in range(last - first):
        found = ahead
        unit = gl.minimum(first + number + 1, S.units1 - 1)
        ahead = _load_scales(w13_scale, routing, unit // S.strips1, unit % S.strips1, True, S)
        _store_scales(tables[0].index(number), found, S)
        mbarrier.arrive(gathered.index(number), count=1)
    first, last = share(S.units2, gl.num_programs(0) - 1 - gl.program_id(0))
    for number in range(last - first):
        unit = first + number
        slot = unit % S.tokens * S.top_k
        _store_scales(
            tables[1].index(number), _load_scales(w2_scale, routing, slot, unit // S.tokens, False, S), S
        )  # fmt: skip
