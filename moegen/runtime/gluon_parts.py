"""Pieces of the Gluon kernels: instructions that Gluon has no function for, and the way round a ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring and the phase of its barriers, which turns with every round."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)
