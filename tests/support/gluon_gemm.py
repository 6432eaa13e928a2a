"""The kernels of the family "cooperative" run as ordinary Python on torch tensors (gluon.py), through their own launch.

Every partition of every program is a thread, shared memory is a ring as large as the kernel's and its barriers count as
mbarriers do. So a stage that nobody releases, announces or fills hangs here as well, and then fails.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from moegen.runtime import cooperative_kernel
from tests.support.gluon import Pointer, Shared, as_python, language, load, read_block

PROGRAMS = 3
LONGEST_S = 30.0  # a wait
_ATOMIC = threading.Lock()
_SEEN: dict[tuple[int, int, int], tuple[int, float]] = {}  # thread, counter -> what it read there, and since when


class Descriptor:
    """A descriptor in a kernel."""

    def __init__(self, host: Any) -> None:
        self.host, self.dtype, self.layout = host, host.base.dtype, None
        size = torch.Size(host.block_shape).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(nbytes=size, shape=list(host.block_shape))


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all promised bytes are in."""

    def __init__(self) -> None:
        self._count = self._missing = self._bytes = self._phase = 0
        self._changed = threading.Condition()

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def wait(self, phase: Any) -> None:
        with self._changed:
            ended = self._changed.wait_for(lambda: self._phase & 1 != int(phase), LONGEST_S)
        assert ended, "a barrier that nobody completes"

    def add(self, arrivals: int, promised: int) -> None:
        """Arrivals, and bytes that are promised (positive) or brought (negative)."""
        with self._changed:
            self._missing -= arrivals
            self._bytes += promised
            assert self._missing >= 0, "an arrival too many"
            if self._missing == 0 and self._bytes == 0:
                self._missing = self._count
                self._phase += 1
                self._changed.notify_all()


class Memory(Shared):
    """Buffers of shared memory whose blocks are read and written in place."""

    def index(self, index: Any) -> "Memory":
        return Memory(self.memory[int(index)])

    def slice(self, start: int, length: int, dim: int) -> "Memory":
        return Memory(self.memory.narrow(dim, start, length))

    def reshape(self, shape: tuple[int, ...]) -> "Memory":
        return Memory(self.memory.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> "Memory":
        return Memory(self.memory.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], _layout: object) -> "Memory":
        assert dtype == self.dtype
        return Memory(self.memory.view(shape))


def _broadcast(one: torch.Tensor, other: Any) -> tuple[torch.Tensor, Any]:
    if isinstance(other, Pointer):
        one, offset = torch.broadcast_tensors(one, other.offset)
        return one, Pointer(other.memory, offset)
    return torch.broadcast_tensors(one, other)


def _tile_order(tile: int, num_m: int, num_n: int, group: int) -> tuple[int, int]:
    first = tile // (group * num_n) * group
    size = min(num_m - first, group)
    return first + tile % (group * num_n) % size, tile % (group * num_n) // size


def _multiply(a: Memory, w: Memory, sums: torch.Tensor, *, use_acc: bool, **_: object) -> torch.Tensor:
    product = a.memory.double() @ w.memory.double()
    return (sums.double() + product if use_acc else product).to(sums.dtype)


def _gather(buffer: Memory, pointers: Pointer, mask: Any = None) -> None:
    buffer.memory.copy_(load(pointers, mask))


def _fetch(desc: Descriptor, start: list[Any], barrier: Barrier, buffer: Memory) -> None:
    buffer.memory.copy_(read_block(desc.host, start))
    barrier.add(0, -desc.block_type.nbytes)


def _allocate(dtype: torch.dtype, shape: list[int], _layout: object) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return barriers[0] if len(shape) == 1 else SimpleNamespace(index=lambda i: barriers[int(i)])
    plain = dtype if dtype.itemsize > 1 else torch.uint8
    nan = 0x7F if dtype.itemsize == 1 or not dtype.is_floating_point else float("nan")
    return Memory(torch.full(shape, nan, dtype=plain).view(dtype))


def _atomic_add(pointer: Pointer, value: int, **_: object) -> int:
    with _ATOMIC:
        place = pointer.memory.view(-1)[int(pointer.offset) : int(pointer.offset) + 1]
        before = int(place)
        place += value
    return before


def _load_acquire(pointer: Pointer) -> int:
    """Who spins lets the others run, and gives up when nothing changes."""
    time.sleep(1e-4)
    found = int(pointer.memory.view(-1)[int(pointer.offset)])
    place = threading.get_ident(), pointer.memory.data_ptr(), int(pointer.offset)
    before, since = _SEEN.get(place, (-1, 0.0))
    if found != before:
        _SEEN[place] = found, time.monotonic()
    else:
        assert time.monotonic() < since + LONGEST_S, "rows that nobody finishes"
    return found


class PythonKernels:
    """In place of the module cooperative_kernel; activation: the layer's, on torch tensors; at_once: programs that the
    GPU has room for.
    """

    def __init__(self, activation: Callable[..., torch.Tensor], at_once: int = PROGRAMS) -> None:
        self._activation, self._at_once = activation, at_once

    def kernel(self, name: str) -> Any:
        """In place of cooperative._kernel."""
        return {(PROGRAMS,): lambda *args, **options: self._launch(name, args, options)}

    def _launch(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[str(options["DTYPE"])]
        sizes = {key: options[key] for key in ("S", "S2") if key in options}
        arguments = tuple(map(_in_kernel, arguments))
        partitions: list[Callable[[], None]] = []
        _SEEN.clear()
        for program in range(PROGRAMS):
            module = _module(program, partitions)
            # One thread allocates, as one block does, and hands its partitions over.
            getattr(module, name)(*arguments, self._activation, dtype, **sizes, num_warps=4)
        with ThreadPoolExecutor(len(partitions) // PROGRAMS * self._at_once) as threads:
            for running in [threads.submit(partition) for partition in partitions]:
                running.result()


def _module(program: int, partitions: list[Callable[[], None]]) -> SimpleNamespace:
    """The kernels' functions, for one program, whose partitions are added to a list instead of run."""
    gl = language(program, PROGRAMS)
    gl.broadcast = _broadcast
    gl.NVMMADistributedLayout = gl.NVMMASharedLayout = gl.SwizzledSharedLayout = gl.BlockedLayout
    gl.num_warps = lambda: 4
    gl.full = lambda shape, value, dtype, **_: torch.full(shape, int(value), dtype=dtype)
    gl.atomic_add = _atomic_add
    gl.allocate_shared_memory = _allocate
    nothing = lambda *_, **__: None  # noqa: E731

    def specialise(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        partitions.extend(lambda run=run, args=args: run(*args) for run, args in parts)

    gl.warp_specialize = specialise
    return as_python(
        program,
        PROGRAMS,
        gl=gl,
        mbarrier=SimpleNamespace(
            MBarrierLayout=nothing,
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, phase: barrier.wait(phase),
            expect=lambda barrier, size: barrier.add(1, size),
            arrive=lambda barrier, count, pred=True: barrier.add(count if bool(pred) else 0, 0),
        ),
        tile_order=lambda *sizes: _tile_order(*(int(size) for size in sizes)),
        async_copy=SimpleNamespace(async_copy_global_to_shared=_gather, commit_group=nothing, wait_group=nothing),
        tma=SimpleNamespace(async_copy_global_to_shared=_fetch),
        fence_async_shared=nothing,
        load_acquire=_load_acquire,
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=lambda _, deps: deps if len(deps) > 1 else deps[0],
    )(cooperative_kernel)


def _in_kernel(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value
