"""Compiles candidates ahead on all CPU cores, into Triton's cache on disk, where the process with the GPU finds them.

Each worker is a Child: a compiler that hangs, crashes or raises fails the one kernel that it was given.
"""

import heapq
import itertools
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import triton

from moegen.aot import Compiled, compile_call, compile_launches, meta_call
from moegen.load import import_package
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.cache_keys import settle_cache_keys
from moegen.tune.child import Child, ChildError
from moegen.tune.space import OPS
from moegen.tune.trial import SOON, Measurement, Status

WORKER = "moegen.tune.compile_pool:CompileWorker"
TIME_LIMIT_S = 120.0  # for a few kernels; one takes about a second
NICENESS = 10  # the process that measures must not wait for a core


@dataclass(frozen=True, slots=True)
class Job:
    """Kernels to compile: those of one GEMM ("gemm1", "gemm2") with its tile config, or all "others" of a call."""

    folder: Path
    slug: str
    device: DeviceFacts
    tokens: int
    op: str
    tiles: LayerTiles

    @property
    def target(self) -> str:
        """`cuda:90`, as moegen.aot names it."""
        return f"{self.device.backend}:{self.device.arch}"

    def wants(self, kernel: str) -> bool:
        """Whether the kernel of that name belongs to this job."""
        return kernel.startswith(self.op) if self.op in OPS else not kernel.startswith(OPS)


@dataclass(frozen=True, slots=True)
class Compilation:
    """What came of a job: its kernels, how many of them were not in the cache, and why it failed, if it did."""

    kernels: tuple[Compiled, ...] = ()
    compiled: int = 0
    seconds: float = 0.0
    failure: Measurement | None = None


def jobs_of(folder: Path, slug: str, device: DeviceFacts, tokens: int, tiles: LayerTiles) -> list[Job]:
    """The jobs that together compile all that a call of `tokens` tokens with `tiles` launches.

    A job has of `tiles` only what its kernels depend on, so that different candidates have jobs in common.
    """

    def job(op: str, first: TileConfig, second: TileConfig) -> Job:
        return Job(folder, slug, device, tokens, op, LayerTiles(first, second, low_latency=tiles.low_latency))

    if tiles.gemm1.family == "stream":  # one kernel, which is neither GEMM's own
        return [job("others", tiles.gemm1, tiles.gemm1)]
    if tiles.gemm1.family == "cooperative":  # both tile configs decide whether one kernel runs both GEMMs
        return [job(op, tiles.gemm1, tiles.gemm2) for op in ("others", *OPS)]
    gemms = [job(op, tile, tile) for op, tile in zip(OPS, (tiles.gemm1, tiles.gemm2), strict=True)]
    plain = [TileConfig(t.BLOCK_SIZE_M, 64, 64, PDL=t.PDL) for t in (tiles.gemm1, tiles.gemm2)]
    return [job("others", *plain), *gemms]


class CompilePool:
    """Worker processes that compile jobs: those of the lowest rank first, of one rank in the order in which they came.

    workers        how many; one a CPU core if None, less one for the process that measures
    time_limit_s   after which a job has failed and its worker is replaced

    Every job is done once. One that failed has failed for all token counts. Jobs that differ by their token count alone
    have most kernels in common, so they are not in work at the same time: the second one finds them in the cache.
    Shared by all measurers of a process; all methods are safe in all threads.
    """

    def __init__(self, workers: int | None = None, *, time_limit_s: float = TIME_LIMIT_S, worker: str = WORKER) -> None:
        self.workers = workers or max(1, len(os.sched_getaffinity(0)) - 1)
        self.compiled = 0  # kernels
        self.compiler_s = 0.0  # of all workers together
        self._time_limit_s = time_limit_s
        self._changed = threading.Condition()
        self._closed = False
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, Job]] = []  # a heap; an entry whose rank is not the job's is out of date
        self._ranks: dict[Job, int] = {}  # of the jobs that wait
        self._in_work: dict[Job, list[tuple[int, int, Job]]] = {}  # job of any token count -> what waits for its end
        self._done: dict[Job, Future[Compilation]] = {}
        self._failed: dict[Job, Compilation] = {}
        self._children = [Child(worker) for _ in range(self.workers)]
        self._threads = [threading.Thread(target=self._serve, args=(child,), daemon=True) for child in self._children]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job, rank: int = SOON) -> Future[Compilation]:
        """Queue a job unless it is queued or done; its result is a failure rather than an exception.

        One that waits with a higher rank gets this one. RuntimeError if the pool is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the compile pool is closed")
            new = job not in self._done
            if new:
                self._done[job] = Future()
            if new or rank < self._ranks.get(job, rank):
                self._ranks[job] = rank
                heapq.heappush(self._queue, (rank, next(self._numbers), job))
                self._changed.notify()
            return self._done[job]

    def close(self) -> None:
        """Stop compiling: jobs in work are dropped, those that wait are cancelled."""
        with self._changed:
            self._closed = True
            for future in self._done.values():
                future.cancel()
            self._changed.notify_all()
        for child in self._children:
            child.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self, child: Child) -> None:
        """One worker's thread: start the process before there is work, then do one job after the other."""
        child.start()
        while (job := self._next()) is not None:
            future = self._done[job]
            if future.set_running_or_notify_cancel():
                future.set_result(self._compile(child, job))
            self._finished(job)
        child.stop()

    def _next(self) -> Job | None:
        """The job to do now, which is in work from then on; None once the pool is closed."""
        with self._changed:
            while not self._closed:
                if not self._queue:
                    self._changed.wait()
                    continue
                entry = heapq.heappop(self._queue)
                rank, _, job = entry
                if self._ranks.get(job) != rank:
                    continue
                behind = self._in_work.get(_anywhere(job))
                if behind is not None:
                    behind.append(entry)
                    continue
                del self._ranks[job]
                self._in_work[_anywhere(job)] = []
                return job
        return None

    def _finished(self, job: Job) -> None:
        with self._changed:
            for entry in self._in_work.pop(_anywhere(job)):
                heapq.heappush(self._queue, entry)
                self._changed.notify()

    def _compile(self, child: Child, job: Job) -> Compilation:
        anywhere = _anywhere(job)
        known = self._failed.get(anywhere)
        if known is not None:
            return known
        try:
            done = cast(Compilation, child.call(job, self._time_limit_s))
        except ChildError as error:
            done = Compilation(failure=Measurement("compile", message=f"{job.op}: compiler: {error}"))
        with self._changed:
            self.compiled += done.compiled
            self.compiler_s += done.seconds
            if done.failure is not None:
                self._failed[anywhere] = done
        return done


def _anywhere(job: Job) -> Job:
    """What jobs have in common that differ by their token count alone."""
    return replace(job, tokens=0)


@triton.jit  # type: ignore[untyped-decorator]
def _nothing() -> None:
    pass


class CompileWorker:
    """What runs in a worker process.

    A process's first kernel takes a second or more longer than the next ones: Triton hashes itself, torch imports sympy
    for a meta tensor. That is over before the first job comes, since the process with the GPU takes longer to start.
    """

    def __init__(self) -> None:
        os.nice(NICENESS)
        torch.set_num_threads(1)
        torch.empty_like(torch.empty(1, device="meta"))
        compile_launches(lambda: _nothing[(1,)](), "", 0, "cuda:90")
        self._misses = 0
        triton.knobs.compilation.listener = self._listen

    def _listen(self, *, cache_hit: bool, **_: object) -> None:
        self._misses += not cache_hit

    def __call__(self, job: Job) -> Compilation:
        """Compile one job."""
        began, misses = time.perf_counter(), self._misses
        kernels = self.kernels(job)
        seconds = time.perf_counter() - began
        return Compilation(tuple(kernels), self._misses - misses, seconds, failure_of(kernels, job.device))

    def kernels(self, job: Job) -> list[Compiled]:
        """What the job compiles."""
        module = import_package(job.folder)
        settle_cache_keys(module)
        package = module._dispatch._PACKAGE
        layer = next(layer for layer in package.layers if layer.slug == job.slug)
        call = meta_call(package, layer, job.tokens, job.device)
        return compile_call(package, layer, call, job.tiles, job.target, job.wants)


# What compilers say of a kernel that is correct but too large for the GPU.
TOO_MUCH = ("out of resource", "too much shared data", "too many resources", "out of memory")


def failure_of(kernels: list[Compiled], device: DeviceFacts) -> Measurement | None:
    """The first reason why kernels cannot run on `device`, as a measurement; None if they can."""
    for kernel in kernels:
        if kernel.error is not None:
            too_much = any(words in kernel.error.lower() for words in TOO_MUCH)
            status: Status = "resources" if too_much else "compile"
            return Measurement(status, message=f"{kernel.kernel}: {kernel.error}")
        if kernel.shared_memory > device.shared_memory:
            message = f"{kernel.shared_memory} bytes of shared memory, {device.shared_memory} are there"
            return Measurement("resources", message=f"{kernel.kernel}: {message}")
    return None
