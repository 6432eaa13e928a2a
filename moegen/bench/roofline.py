"""The floor of a layer call, and the two measured ceilings under it: reading memory, and cuBLAS."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moegen.bench.timing import release_memory, time_graph
from moegen.bench.workload import Layer, fp8_dtype, layer_bytes, layer_flops, scheme_of

READ_BYTES = 4 * 2**30  # far beyond any L2
MATMUL_SIZE = 8192
CALLS, REPLAYS = 4, 20  # one launch a graph would count the start of the graph in full

# (elements of a block, blocks a program reads, warps): 16-byte loads in all of them; which is best depends on the GPU.
READ_CONFIGS = ((2048, 8, 4), (4096, 4, 8), (4096, 8, 8), (8192, 4, 8), (8192, 8, 16), (16384, 4, 16))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reached in this run: bytes per second read, FLOP per second of a dense product of `dtype`.

    `dtype` is that of the operands, so for int8 the operations are integer ones.
    """

    dtype: str
    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of one call under the ceilings, µs, and which of the two terms is the larger."""

    memory_us: float
    compute_us: float
    bytes: float
    flops: int

    @property
    def us(self) -> float:
        """max(memory, compute), µs."""
        return max(self.memory_us, self.compute_us)

    @property
    def bound(self) -> str:
        """'memory' or 'compute'."""
        return "memory" if self.memory_us >= self.compute_us else "compute"


def floor(layer: Layer, tokens: int, active_experts: float, ceilings: Ceilings) -> Floor:
    """The floor of one call that reads the weights of active_experts experts."""
    moved, flops = layer_bytes(layer, tokens, active_experts), layer_flops(layer, tokens)
    return Floor(moved / ceilings.read_bytes_per_s * 1e6, flops / ceilings.flops_per_s * 1e6, moved, flops)


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def operand_dtype(layer: Layer, device: torch.device) -> torch.dtype:
    """What the layer's GEMMs multiply: fp8 or int8 where weights and activations have 8 bits, else the layer's dtype.

    Weight-only schemes are computed in the layer's dtype, and so is mxfp4_w4a8 (runtime/quantise.py says why).
    """
    kind = scheme_of(layer).row.activation
    return {"fp8": fp8_dtype(device), "int8": torch.int8}.get(kind or "", layer.dtype)


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Measure both ceilings on `device`, products of `dtype` operands: about 4.3 GB of memory and a few seconds."""
    read = read_bandwidth(device)
    release_memory()
    rate = matmul_rate(dtype, device)
    release_memory()
    return Ceilings(dtype_name(dtype), read, rate)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best streaming read: READ_BYTES random bytes, one xor per program written back."""
    count = READ_BYTES // 4
    data = torch.empty(count, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
    times = [_read_us(data, *config) for config in READ_CONFIGS]
    return READ_BYTES / min(times) * 1e6


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of the BLAS library on two square matrices of random `dtype` numbers."""
    product = matmul_call(dtype, device, MATMUL_SIZE)
    with _ieee_float32():
        timing = time_graph([product] * CALLS, replays=REPLAYS)
    return 2 * MATMUL_SIZE**3 / timing.us_per_call * 1e6


def matmul_call(dtype: torch.dtype, device: torch.device, size: int) -> Callable[[], torch.Tensor]:
    """One product of two [size, size] matrices, to be called again and again; TF32 is the caller's choice.

    fp8 takes one scale a matrix and the fast accumulation, whatever the layer does: the highest rate there is.
    """
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == torch.int8:
        first, second = ((part * 40).round().clamp(-127, 127).to(dtype) for part in (a, b))  # three deviations fit
        whole = torch.empty(size, size, dtype=torch.int32, device=device)
        return lambda: torch._int_mm(first, second.t(), out=whole)
    first, second = a.to(dtype), b.to(dtype)
    if dtype.itemsize == 1:
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            first, second.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    out = torch.empty_like(first)
    return lambda: torch.matmul(first, second, out=out)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Float32 products without TF32, whatever the process has set; restored on leaving."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _read_us(data: torch.Tensor, block: int, blocks: int, num_warps: int) -> float:
    """µs of one pass over data [n] int32; n must be a multiple of block * blocks."""
    programs = data.numel() // (block * blocks)
    out = torch.empty(programs, dtype=torch.int32, device=data.device)

    def launch() -> None:
        _read_kernel[(programs,)](data, out, BLOCK=block, BLOCKS=blocks, num_warps=num_warps)

    return time_graph([launch] * CALLS, replays=REPLAYS).us_per_call


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(data_ptr, out_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Each program reads BLOCKS consecutive blocks and writes the sum: nothing can be left out, little is written."""
    pid = tl.program_id(0)
    offsets = pid.to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.int32)
    for block in tl.static_range(BLOCKS):
        acc ^= tl.load(data_ptr + offsets + block * BLOCK)
    tl.store(out_ptr + pid, tl.sum(acc, axis=0))
