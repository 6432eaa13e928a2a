"""Pieces of the stream kernel: instructions that Gluon has no function for, shares of the work, routing, loads.

`routing` is (expert_ids, sorted_ids, num_sorted, num_tokens) as in `stream_layer`, S the StreamSizes of the kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed in Triton 3.7


@gluon.jit
def asm(TEXT: gl.constexpr):
    """An instruction without operands."""
    gl.inline_asm_elementwise(TEXT + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_previous(PDL: gl.constexpr):
    """Programmatic dependent launch, first half of kernel_parts.pdl_begin: every warp waits for itself."""
    if PDL:
        asm("griddepcontrol.wait")


@gluon.jit
def load_acquire(pointer):
    """int32 at `pointer`, and after it what was written before the release that it sees."""
    asm: gl.constexpr = "ld.acquire.gpu.global.b32 $0, [$1];"
    return gl.inline_asm_elementwise(asm, "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def to_float32(x):
    """bfloat16 by a shift and a mask of the register that holds two values, one instruction each."""
    if x.dtype == gl.bfloat16:
        asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return gl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def share(units, block):
    """The units of one block: as even as whole units allow."""
    blocks = gl.num_programs(0)
    return block * units // blocks, (block + 1) * units // blocks


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring and the phase of its barriers, which turns with every round."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def num_blocks(routing, S: gl.constexpr):
    """Expert blocks of the assignment: slots without a sort, else the runs of the aligned assignment."""
    if routing[2] is None:
        return routing[3] * S.top_k
    else:
        return gl.load(routing[2]) // S.tokens


@gluon.jit
def expert_of(routing, block, S: gl.constexpr):
    """The expert of a block as int32, -1 when nothing is to be computed for it."""
    expert = gl.load(routing[0] + block)
    return gl.where((expert >= 0) & (expert < S.num_experts), expert, -1).to(gl.int32)


@gluon.jit
def for_each_token(value, S: gl.constexpr):
    """A tuple of one and the same value."""
    TOKENS: gl.constexpr = S.tokens
    values = ()
    for _ in gl.static_range(TOKENS):
        values = values + (value,)
    return values


@gluon.jit
def lanes_of(routing, block, S: gl.constexpr):
    """The slots of an expert's block of the aligned assignment; padding is T * k."""
    LANES: gl.constexpr = S.tokens
    slots = ()
    for lane in gl.static_range(LANES):
        slots = slots + (gl.load(routing[1] + block * S.tokens + lane),)
    return slots


@gluon.jit
def slots_of(routing, block, S: gl.constexpr):
    """For each token a slot that an expert's block holds of it, or -1. Several would have the same `hidden`."""
    TOKENS: gl.constexpr = S.tokens
    slots = ()
    if routing[1] is None:
        slots = slots + (block,)
    else:
        lanes = lanes_of(routing, block, S)
        for token in gl.static_range(TOKENS):
            found = -1
            for lane in gl.static_range(TOKENS):
                is_its = (lanes[lane] < routing[3] * S.top_k) & (lanes[lane] // S.top_k == token)
                found = gl.where(is_its, lanes[lane], found)
            slots = slots + (found,)
    return slots


@gluon.jit
def scales_of(topk_weights, routing, block, WEIGHTED: gl.constexpr, S: gl.constexpr):
    """For each token the routed weight of its slot in an expert's block; their sum if it names an expert twice."""
    TOKENS: gl.constexpr = S.tokens
    scales = ()
    if not WEIGHTED:
        scales = for_each_token(1.0, S)
    elif routing[1] is None:
        scales = scales + (gl.load(topk_weights + block),)
    else:
        lanes = lanes_of(routing, block, S)
        weights = ()
        for lane in gl.static_range(TOKENS):
            live = lanes[lane] < routing[3] * S.top_k
            weights = weights + (gl.load(topk_weights + lanes[lane], mask=live, other=0.0),)
        for token in gl.static_range(TOKENS):
            scale = 0.0
            for lane in gl.static_range(TOKENS):
                scale += gl.where(lanes[lane] // S.top_k == token, weights[lane], 0.0)
            scales = scales + (scale,)
    return scales


@gluon.jit
def load_tile(desc, coordinates, stage, phase, buffers, empty, ready, STAGES: gl.constexpr):
    """Start the load of one block of `desc` as soon as its stage is empty; what follows it in the ring."""
    mbarrier.wait(empty.index(stage), phase)
    bar = ready.index(stage)
    mbarrier.expect(bar, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coordinates, bar, buffers.index(stage))
    return next_stage(stage, phase, STAGES)


@gluon.jit
def fetch_descriptors(desc1, desc2, origin, bar, buffer):
    """Two loads that lie outside their tensors: zeros, no traffic, but the descriptors are on chip when it counts."""
    mbarrier.expect(bar, 2 * desc1.block_type.nbytes)
    tma.async_copy_global_to_shared(desc1, origin, bar, buffer)
    tma.async_copy_global_to_shared(desc2, origin, bar, buffer)
