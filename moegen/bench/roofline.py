"""The floor of a layer call, and the two measured ceilings under it: reading memory, and cuBLAS."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moegen.bench.timing import release_memory, time_graph
from moegen.bench.workload import Layer, layer_bytes, layer_flops

READ_BYTES = 4 * 2**30  # far beyond any L2
MATMUL_SIZE = 8192
CALLS, REPLAYS = 4, 20  # one launch a graph would count the start of the graph in full

# (elements of a block, blocks a program reads, warps): 16-byte loads in all of them; which is best depends on the GPU.
READ_CONFIGS = ((2048, 8, 4), (4096, 4, 8), (4096, 8, 8), (8192, 4, 8), (8192, 8, 16), (16384, 4, 16))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device reached in this run: bytes per second read, FLOP per second of a dense product in `dtype`."""

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


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Measure both ceilings on `device`: about 4.3 GB of memory and a few seconds."""
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
    """FLOP per second of torch.matmul on two random square matrices in `dtype`; TF32 stays off for float32."""
    size = MATMUL_SIZE
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    with _ieee_float32():
        timing = time_graph([lambda: torch.matmul(a, b, out=out)] * CALLS, replays=REPLAYS)
    return 2 * size**3 / timing.us_per_call * 1e6


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
