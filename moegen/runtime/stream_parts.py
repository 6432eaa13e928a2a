"""Pieces of the stream kernel: instructions that Gluon has no function for, shares of the work, routing, loads.

`routing` is (topk_weights, topk_ids, expert_map) as in `stream_layer`, S the StreamSizes of the kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

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
def wait_for_grid(word):
    """A barrier over the grid, by one warp a block.

    The arrivals of a grid add up to 2 ** 31: the top bit flips when the last block arrives, and the word is ready for
    the next launch whatever its grid.
    """
    arrival = gl.where(gl.program_id(0) == 0, 2147483647 - (gl.num_programs(0) - 2), 1)
    before = gl.atomic_add(word, arrival, sem="acq_rel", scope="gpu")
    while (load_acquire(word) ^ before) >= 0:
        pass


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
def end_reads():
    """What this block has read of shared memory is in registers: TMA may write there.

    Without the fence a load that was issued may still be under way when the barrier lets go, and TMA, which no order of
    ordinary accesses binds, overtake it. Seen about once in 5,000 launches where processes shared the GPU.
    """
    fence_async_shared()
    block_barrier()


@gluon.jit
def expert_of(routing, slot, S: gl.constexpr):
    """The local expert of a slot as int32, -1 when nothing is to be computed for it."""
    expert = gl.load(routing[1] + slot)
    if routing[2] is not None:
        known = (expert >= 0) & (expert < S.num_experts)
        expert = gl.load(routing[2] + expert, mask=known, other=-1)
    return gl.where((expert >= 0) & (expert < S.local_experts), expert, -1).to(gl.int32)


@gluon.jit
def scale_of(routing, slot, WEIGHTED: gl.constexpr):
    """What the products of a slot are multiplied by."""
    if WEIGHTED:
        return gl.load(routing[0] + slot)
    else:
        return 1.0


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
