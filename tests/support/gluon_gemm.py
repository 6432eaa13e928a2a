"""The kernel of the family "cooperative" run as ordinary Python on torch tensors (gluon.py), through its own launch.

Of the ring of shared memory, what its barriers promise is checked: stages and phases in turn, each stage announced once
and with the bytes that were loaded. The producer runs first, then both consumers, in threads, since they may exchange
values; programs run one after another.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import torch

from moegen.runtime import cooperative_kernel
from tests.support.gluon import Pointer, Shared, Values, as_python, language, read_block

PROGRAMS = 3


class Descriptor:
    """A descriptor in a kernel."""

    def __init__(self, host: Any) -> None:
        self.host, self.dtype = host, host.base.dtype
        size = torch.Size(host.block_shape).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(nbytes=size, shape=list(host.block_shape))


class Tile:
    """A block in shared memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def slice(self, start: int, length: int, dim: int) -> "Tile":
        return Tile(self.values.narrow(dim, start, length))

    def reshape(self, shape: tuple[int, ...]) -> "Tile":
        return Tile(self.values.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> "Tile":
        return Tile(self.values.permute(order))


class Ring:
    """What a producer loads, step by step, and what one partition has of it."""

    def __init__(self, stages: int, halves: int, steps: list[dict[Any, torch.Tensor]] | None) -> None:
        self.stages, self.halves, self.produces = stages, halves, steps is None
        self.steps: list[dict[Any, torch.Tensor]] = [] if steps is None else steps
        self.at = self.announced = self.released = 0
        self.promised: list[int] = []

    @property
    def barriers(self) -> SimpleNamespace:
        """`mbarrier`."""
        return SimpleNamespace(wait=self._wait, expect=self._expect, arrive=self._arrive)

    def parts(self, dtype: torch.dtype) -> tuple[SimpleNamespace, ...]:
        """Buffers of a and w, the barriers empty and ready."""
        buffers = [SimpleNamespace(dtype=dtype, index=lambda i: self._buffer("a", i)),
                   SimpleNamespace(dtype=dtype, index=lambda i: self._buffer("w", i))]  # fmt: skip
        barriers = [SimpleNamespace(index=lambda stage, name=name: (name, int(stage))) for name in ("empty", "ready")]
        return (*buffers, *barriers)

    def write(self, buffer: tuple[str, int], values: torch.Tensor, promised: bool) -> None:
        assert buffer not in self.steps[-1]
        self.steps[-1][buffer] = values
        self.promised[-1] -= values.nbytes if promised else 0

    def _buffer(self, name: str, index: Any) -> Any:
        stage, half = (int(index), 0) if name == "a" else divmod(int(index), self.halves)
        assert stage == self.at % self.stages
        return (name, half) if self.produces else Tile(self.steps[self.at][name, half])

    def _wait(self, barrier: tuple[str, int], phase: Any) -> None:
        if isinstance(barrier, Meeting):
            barrier.meet(int(phase))
            return
        turn = self.at // self.stages & 1
        assert barrier == ("empty" if self.produces else "ready", self.at % self.stages)
        assert int(phase) == (turn ^ 1 if self.produces else turn)

    def _expect(self, barrier: tuple[str, int], size: int) -> None:
        assert barrier == ("ready", self.at % self.stages)
        self.steps.append({})
        self.promised.append(size)

    def _arrive(self, barrier: tuple[str, int], *, pred: Any = True, **_: int) -> None:
        if isinstance(barrier, Meeting):
            return
        if self.produces and bool(pred):
            assert barrier == ("ready", self.announced % self.stages)
            self.announced += 1
        elif not self.produces and bool(pred):
            # A stage may be released while the product of the next one is under way, and in order.
            assert barrier == ("empty", self.released % self.stages)
            assert self.released <= self.at
            self.released += 1

    def next_stage(self, stage: Any, phase: Any, stages: int) -> tuple[Any, Any]:
        """stream_parts.next_stage: the end of a step."""
        self.at += 1
        return (stage + 1, phase) if stage + 1 < stages else (0, phase ^ 1)


class Meeting(threading.Barrier):
    """A barrier of both consumers; who waits has arrived."""

    def __init__(self) -> None:
        super().__init__(2, timeout=60)
        self._times: dict[int, int] = {}

    def meet(self, phase: int) -> None:
        one = self._times.setdefault(threading.get_ident(), 0)
        assert phase == one & 1
        self._times[threading.get_ident()] += 1
        self.wait()


def _broadcast(one: torch.Tensor, other: Any) -> tuple[torch.Tensor, Any]:
    if isinstance(other, Pointer):
        one, offset = torch.broadcast_tensors(one, other.offset)
        return one, Pointer(other.memory, offset)
    return torch.broadcast_tensors(one, other)


def _tile_order(tile: int, num_m: int, num_n: int, group: int) -> tuple[int, int]:
    first = tile // (group * num_n) * group
    size = min(num_m - first, group)
    return first + tile % (group * num_n) % size, tile % (group * num_n) // size


def _multiply(a: Tile, w: Tile, sums: torch.Tensor, *, use_acc: bool, **_: object) -> torch.Tensor:
    product = a.values.double() @ w.values.double()
    return (sums.double() + product if use_acc else product).to(sums.dtype).as_subclass(Values)


def _partition(program: int, ring: Ring) -> Any:
    """The kernel's functions, for one partition of one program."""
    gl = language(program, PROGRAMS)
    gl.broadcast = _broadcast
    gl.NVMMADistributedLayout = gl.BlockedLayout
    nothing = lambda *_, **__: None  # noqa: E731

    def gather(buffer: tuple[str, int], pointers: Pointer, mask: Any = None) -> None:
        ring.write(buffer, gl.load(pointers, mask), promised=False)

    def load(desc: Descriptor, start: list[Any], _barrier: object, buffer: tuple[str, int]) -> None:
        ring.write(buffer, read_block(desc.host, start), promised=True)

    return as_python(
        program,
        PROGRAMS,
        gl=gl,
        mbarrier=ring.barriers,
        next_stage=ring.next_stage,
        tile_order=lambda *sizes: _tile_order(*(int(size) for size in sizes)),
        async_copy=SimpleNamespace(async_copy_global_to_shared=gather, commit_group=nothing, wait_group=nothing),
        tma=SimpleNamespace(async_copy_global_to_shared=load),
        fence_async_shared=nothing,
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=lambda _, deps: deps if len(deps) > 1 else deps[0],
    )(cooperative_kernel)


def _in_kernel(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value


class PythonKernel:
    """In place of gemm1_cooperative and gemm2_cooperative; activation: the layer's, on torch tensors."""

    def __init__(self, activation: Callable[..., torch.Tensor]) -> None:
        self._activation = activation

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, S: Any, DTYPE: Any, **_: Any) -> None:
        a, w, bias, out, out_scale, topk_weights, *assignment, num_slots, a_scale, w_scale = map(_in_kernel, arguments)
        routing, results = (topk_weights, *assignment, num_slots), (out, out_scale, bias)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[str(DTYPE)]
        for program in range(PROGRAMS):
            ring = Ring(S.stages, S.halves, None)
            _partition(program, ring)._produce(a, w, routing, ring.parts(w.dtype), S)
            assert set(ring.promised) <= {0}
            assert ring.announced == (len(ring.steps) if S.gathers else 0)
            exchanged = (Shared(torch.full((4, 64), float("nan"))), Meeting()) if S.shares_groups else ()
            rest = ((a_scale, w_scale), (*results, *exchanged))
            taken = [Ring(S.stages, S.halves, ring.steps) for _ in range(2)]
            consumers = [_partition(program, own)._consume for own in taken]
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(
                    lambda consume, part, own, rest: consume(part, routing, *rest, own, self._activation, dtype, S),
                    consumers, range(2), [own.parts(w.dtype) for own in taken], repeat(rest),
                ))  # fmt: skip
            assert [(own.at, own.released) for own in taken] == [(len(ring.steps),) * 2] * 2
