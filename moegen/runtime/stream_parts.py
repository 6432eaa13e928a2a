"""Pieces of the stream kernel: its barrier over the grid, shares of the work, routing, loads.

`routing` is (topk_weights, topk_ids, expert_map) as in `stream_layer`, S the StreamSizes of the kernel; slots are
numbered through all tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_parts import load_acquire

PLAIN: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


@gluon.jit
def wait_for_grid(word, before):
    """A barrier over the grid, by one warp a block; before: the word at any time of this launch until now.

    The arrivals of a grid add up to 2 ** 31: the top bit flips when the last block arrives, and the word is ready for
    the next launch whatever its grid.
    """
    arrival = gl.where(gl.program_id(0) == 0, 2147483647 - (gl.num_programs(0) - 2), 1)
    gl.atomic_add(word, arrival, sem="release", scope="gpu")  # what it returns would come a round trip later
    while (load_acquire(word) ^ before) >= 0:
        pass


@gluon.jit
def share(units, block):
    """The units of one block: as even as whole units allow."""
    blocks = gl.num_programs(0)
    return block * units // blocks, (block + 1) * units // blocks


@gluon.jit
def expert_of(routing, slot, S: gl.constexpr):
    """The local expert of a slot as int32, -1 when nothing is to be computed for it."""
    expert = gl.load(routing[1] + slot)
    if routing[2] is not None:
        known = (expert >= 0) & (expert < S.num_experts)
        expert = gl.load(routing[2] + expert, mask=known, other=-1)
    return gl.where((expert >= 0) & (expert < S.local_experts), expert, -1).to(gl.int32)


@gluon.jit
def item(buffer, index):
    """One value of a vector [count, 1] in shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(buffer.index(index).load(LAYOUT), axis=0)


@gluon.jit
def load_parts(desc, live, expert, row, part, bar, buffer, S: gl.constexpr):
    """Start the load of some parts of a weight tile, and arrive at their barrier; only that unless live."""
    mbarrier.expect(bar, desc.block_type.nbytes, pred=live)
    if S.whole:
        tma.async_copy_global_to_shared(desc, [expert, 0, row, part, 0], bar, buffer, pred=live)
    else:
        tma.async_copy_global_to_shared(desc, [expert, 0, row, part * S.part], bar, buffer, pred=live)
    mbarrier.arrive(bar, count=1, pred=live == 0)


@gluon.jit
def buffers_of(desc, buffers):
    """The ring's memory as blocks of `desc`."""
    SIZE: gl.constexpr = desc.block_type.nbytes
    TOTAL: gl.constexpr = (
        buffers.shape[0] * buffers.shape[1] * buffers.shape[2] * (buffers.dtype.primitive_bitwidth // 8)
    )
    return buffers._reinterpret(desc.dtype, [TOTAL // SIZE] + desc.block_type.shape, desc.layout)  # noqa: RUF005 - Triton has no stars


@gluon.jit
def fetch_descriptors(desc1, desc2, bar, buffers1, buffers2, S: gl.constexpr):
    """Two loads that lie outside their tensors: zeros, no traffic, but the descriptors are on chip when it counts."""
    origin: gl.constexpr = [0, 0, 0, S.outside, 0] if S.whole else [0, 0, 0, S.outside]
    mbarrier.expect(bar, desc1.block_type.nbytes + desc2.block_type.nbytes)
    tma.async_copy_global_to_shared(desc1, origin, bar, buffers1.index(0))
    tma.async_copy_global_to_shared(desc2, origin, bar, buffers2.index(0))
