"""The producer of the family "cooperative": draws tiles and keeps the ring full (cooperative_kernel.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .cooperative_flow import as_second, await_rows, block_expert, draw, place_of, sorted_slots
from .gluon_parts import next_stage, wait_for_previous

_LAG: gl.constexpr = gl.constexpr(2)  # steps between asking for tokens and announcing them


@gluon.jit
def _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S: gl.constexpr):
    """The blocks of a step: gate and up rows in turn or together, or neighbours."""
    BLOCKS: gl.constexpr = S.products
    for half in gl.static_range(BLOCKS):
        if S.gated and not S.splits:
            start = [expert, half, pid_n * S.width, k]
        else:
            start = [expert, 0, pid_n * (S.block_n // S.sides) + half * S.width, k]
        tma.async_copy_global_to_shared(w, start, bar, w_bufs.index(stage * BLOCKS + half))


@gluon.jit
def _announce(ready, behind, live, S: gl.constexpr):
    """The tokens of stage `behind` have arrived; the stage after it."""
    fence_async_shared()  # cp.async wrote through one proxy, products read through another
    mbarrier.arrive(ready.index(behind), count=1, pred=live)
    return gl.where(behind == S.stages - 1, 0, behind + 1)


@gluon.jit
def _produce_gemm(gemm, base, routing, counters, posts, ring, flow, AWAITED: gl.constexpr, S: gl.constexpr):
    """The tiles of one GEMM, of which `base` is the first, as far as they are this block's; `flow` behind them."""
    a, w, scales, _ = gemm
    a_bufs, w_bufs, scale_bufs, empty, ready = ring
    ticket, done = counters
    tile, count, step = flow
    stage = step % S.stages
    phase = step // S.stages % 2 ^ 1
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16 // S.value_bytes], [4, 8], [4, 1], [1, 0])
    STEP: gl.constexpr = S.step
    BLOCK_M: gl.constexpr = S.block_m
    W_BYTES: gl.constexpr = S.products * w.block_type.nbytes
    num_m = gl.load(routing[3]) // BLOCK_M
    behind = (stage + S.stages - _LAG) % S.stages  # the stage whose tokens are announced next
    steps = 0
    end = base + num_m * S.tiles_n
    pid_m, pid_n = place_of(tile - base, num_m, S)
    expert = block_expert(routing, pid_m, S)
    if S.gathers:
        slots = sorted_slots(routing, pid_m * BLOCK_M, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    else:
        row = gl.load(routing[5] + pid_m)
    while tile < end:
        step += S.steps
        ahead = draw(ticket, posts, count + 1, step, S)
        ahead_m, ahead_n = place_of(ahead - base, num_m, S)
        ahead_expert = block_expert(routing, ahead_m, S)
        if S.gathers:
            ahead_slots = sorted_slots(routing, ahead_m * BLOCK_M, BLOCK_M, gl.SliceLayout(1, LAYOUT))
            rows = slots // S.top_k
            there = slots < routing[4]
            depth = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, LAYOUT)), 0)
            pointers = a + (gl.expand_dims(rows.to(gl.int64) * S.depth, 1) + depth)
            live, pointers = gl.broadcast(gl.expand_dims(there, 1), pointers)  # padding costs no traffic
        else:
            ahead_row = gl.load(routing[5] + ahead_m)
            rows = row + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            there = rows < routing[4]
        for k in range(0, S.steps * STEP, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, W_BYTES if S.gathers else W_BYTES + a.block_type.nbytes)
            _load_weights(w, expert, pid_n, k, bar, w_bufs, stage, S)
            if S.gathers:
                mask = live
                if S.depth % STEP != 0:
                    mask = live & (depth < S.depth - k)
                async_copy.async_copy_global_to_shared(a_bufs.index(stage), pointers + k, mask=mask)
            else:
                if AWAITED > 0:  # noqa: SIM102 - the first one is decided by the compiler
                    if k == 0:
                        await_rows(done, pid_m, AWAITED)
                tma.async_copy_global_to_shared(a, [row, k], bar, a_bufs.index(stage))
            if S.rings_scales:
                token_scales = scales[0] + rows * S.steps + k // STEP
                async_copy.async_copy_global_to_shared(scale_bufs.index(stage), token_scales, mask=there)
            if S.copies:
                async_copy.commit_group()
                async_copy.wait_group(_LAG)
                behind = _announce(ready, behind, steps >= _LAG, S)
                steps += 1
            elif S.joined:  # gemm1's stages are announced twice
                mbarrier.arrive(bar, count=1)
            stage, phase = next_stage(stage, phase, S.stages)
        tile = ahead
        pid_m = ahead_m
        pid_n = ahead_n
        expert = ahead_expert
        if S.gathers:
            slots = ahead_slots
        else:
            row = ahead_row
        count += 1
    if S.copies:
        async_copy.wait_group(0)
        for late in gl.static_range(_LAG):
            behind = _announce(ready, behind, steps + late >= _LAG, S)
    return tile, count, step


@gluon.jit
def produce(first, second, routing, counters, posts, ring, S: gl.constexpr, S2: gl.constexpr):
    """Every tile of this block, in the order in which the consumers take them."""
    wait_for_previous(S.pdl)
    flow = (draw(counters[0], posts, 0, 0, S), 0, 0)
    flow = _produce_gemm(first, 0, routing, counters, posts, ring, flow, 0, S)
    if S2 is not None:
        base = gl.load(routing[3]) // S.block_m * S.tiles_n
        ring = (ring[0], as_second(ring[1], second[1]), ring[2], ring[3], ring[4])
        awaited: gl.constexpr = S.arrivals * S.tiles_n
        flow = _produce_gemm(second, base, routing, counters, posts, ring, flow, awaited, S2)
    if not S.shares_tiles:  # one consumer has been told that there is no more, now the other
        draw(counters[0], posts, flow[1] + 1, flow[2], S)
