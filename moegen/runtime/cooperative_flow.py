"""What consumers and producer of the family "cooperative" share: which tile comes next, where it lies, and whether the
rows that it reads are there. Arguments are those of cooperative_kernel.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_parts import asm, block_barrier, load_acquire
from .kernel_parts import tile_order


@gluon.jit
def draw(ticket, posts, count, step, S: gl.constexpr):
    """The tile behind those that all programs have drawn so far, posted as number `count` of this block's."""
    numbers, posted = posts
    tile = gl.atomic_add(ticket, 1, sem="relaxed")
    here = count % S.posts
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    numbers.index(2 * here).store(gl.full((1,), tile, gl.int32, layout=LAYOUT))
    numbers.index(2 * here + 1).store(gl.full((1,), step, gl.int32, layout=LAYOUT))
    mbarrier.arrive(posted.index(here), count=1)
    return tile


@gluon.jit
def posted_tile(posts, count, S: gl.constexpr):
    """What the producer posted: a tile and its first step."""
    numbers, posted = posts
    here = count % S.posts
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(posted.index(here), count // S.posts % 2)
    tile = gl.max(numbers.index(2 * here).load(LAYOUT), axis=0)
    return tile, gl.max(numbers.index(2 * here + 1).load(LAYOUT), axis=0)


@gluon.jit
def place_of(tile, num_m, S: gl.constexpr):
    """The M block of a tile and its column of tiles; of the last one if there is no such tile."""
    blocks = gl.maximum(num_m, 1)
    return tile_order(gl.minimum(tile, blocks * S.tiles_n - 1), blocks, S.tiles_n, S.group_m)


@gluon.jit
def block_expert(routing, pid_m, S: gl.constexpr):
    """An expert_map may lead beyond the local experts: top_k_reduce ignores what is computed for such slots."""
    return gl.minimum(gl.load(routing[2] + pid_m), S.num_experts - 1)


@gluon.jit
def sorted_slots(routing, first, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The sorted slots [ROWS] from `first` on."""
    return gl.load(routing[1] + first + gl.arange(0, ROWS, layout=LAYOUT))


@gluon.jit
def await_rows(done, pid_m, ARRIVALS: gl.constexpr):
    """Until gemm1's consumers have finished a block of rows, which TMA may then read; L1 forgets what it had there."""
    while load_acquire(done + pid_m) < ARRIVALS:
        pass
    asm("fence.proxy.async")


@gluon.jit
def release_rows(done, pid_m):
    """One consumer's part of a tile is stored, for TMA of other programs to read."""
    asm("fence.proxy.async")
    block_barrier()
    gl.atomic_add(done + pid_m, 1, sem="release")


@gluon.jit
def as_second(w_bufs, w):
    """The ring's blocks of weights as gemm2 sees them, which may have another form of the same size."""
    SHAPE: gl.constexpr = [w_bufs.shape[0]] + w.block_type.shape  # noqa: RUF005 - Triton has no stars
    return w_bufs._reinterpret(w.dtype, SHAPE, w.layout)
