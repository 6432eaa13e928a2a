"""The parent's side of measuring on a GPU: wait for the compiler, ask the process with the GPU, replace it when lost.

The parent itself never touches the GPU.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles
from moegen.tune.child import Child, ChildError, ChildTimeoutError
from moegen.tune.compile_pool import CompilePool, Job, jobs_of
from moegen.tune.gpu import Answer, Compare, Describe, Measure, Prepare, Setup
from moegen.tune.trial import SOON, Measurement

WORKER = "moegen.tune.gpu:GpuWorker"
TIME_LIMIT_S = 30.0  # of one config; most take a few hundredths of a second
PREPARE_LIMIT_S = 600.0  # weights of some layers fill the GPU and are quantised first
ATTEMPTS = 2  # to set up a bucket


class MeasurerError(RuntimeError):
    """The GPU cannot measure this layer at this bucket, whatever the config; the message is one line."""


@dataclass(slots=True)
class Usage:
    """What a measurer did so far, times in seconds of wall time.

    statuses     measurements by status; those of `compare` as "final"
    waiting_s    the GPU waited for the compiler
    preparing_s  processes were started and workloads set up
    measuring_s  the GPU process worked on a config
    starts       processes started: all but the first replaced one that was lost
    compiled     kernels that the GPU process had to compile itself: a pool that knows its kernels leaves none

    What the compile pool did, which all measurers of a run share:

    compilers    worker processes
    ahead        kernels that they compiled
    compiler_s   how long they worked, all together
    """

    statuses: Counter[str] = field(default_factory=Counter)
    waiting_s: float = 0.0
    preparing_s: float = 0.0
    measuring_s: float = 0.0
    starts: int = 0
    compiled: int = 0
    compilers: int = 0
    ahead: int = 0
    compiler_s: float = 0.0


class GpuMeasurer:
    """Measures tile configs of one layer of an emitted package on one GPU: a Measurer.

    gpu           number of the GPU as torch counts them
    pool          compiles the candidates; may be shared by several measurers
    time_limit_s  for one config, after which its process is killed and it counts as "timeout"
    seed, routing of the workload: recorded topk_ids (workload.read_routing) instead of drawn ones
    worker        what the process with the GPU runs

    A context manager. One thread at a time may use it. What is measured does not depend on what was measured before,
    nor on whether the process had to be replaced.
    """

    def __init__(
        self,
        package_folder: Path,
        layer_slug: str,
        gpu: int,
        pool: CompilePool,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        seed: int = 0,
        routing: Path | None = None,
        worker: str = WORKER,
    ) -> None:
        self.usage = Usage()
        self._setup = Setup(package_folder.resolve(), layer_slug, gpu, seed, routing)
        self._pool, self._time_limit_s = pool, time_limit_s
        self._child = Child(worker, self._setup)
        self._device: DeviceFacts | None = None
        self._prepared: int | None = None  # tokens
        self._anchors: dict[int, LayerTiles] = {}  # the first config that worked at so many tokens

    def __enter__(self) -> "GpuMeasurer":
        self._child.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    @property
    def device(self) -> DeviceFacts:
        """Facts of the GPU, asked once. Raises MeasurerError if there is none."""
        if self._device is None:
            self._device = cast(DeviceFacts, self._asked_twice(Describe()))
        return self._device

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        """Compile these, in this order, behind what is queued with this rank already; returns at once."""
        for tiles in candidates:
            for job in self._jobs(tokens, tiles):
                self._pool.submit(job, rank)

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        """Compile, check and time one pair. Its failures are measurements; MeasurerError if none could be measured."""
        found = self._failure(tokens, tiles) or self._measure(tokens, tiles, best_us)
        self.usage.statuses[found.status] += 1
        return found

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        """Time the finalists in turn, or each alone if one takes the process down. MeasurerError as in `measure`."""
        found = {tiles: failure for tiles in finalists if (failure := self._failure(tokens, tiles)) is not None}
        ready = tuple(tiles for tiles in dict.fromkeys(finalists) if tiles not in found)
        self.usage.statuses["final"] += len(finalists)
        if ready:
            found |= dict(zip(ready, self._compare(tokens, ready), strict=True))
        return [found[tiles] for tiles in finalists]

    def _jobs(self, tokens: int, tiles: LayerTiles) -> list[Job]:
        return jobs_of(self._setup.folder, self._setup.slug, self.device, tokens, tiles)

    def _failure(self, tokens: int, tiles: LayerTiles) -> Measurement | None:
        """Wait until all kernels are compiled, with the bucket set up meanwhile; why one of them cannot be."""
        futures = [self._pool.submit(job) for job in self._jobs(tokens, tiles)]
        self._prepare(tokens)
        began = time.perf_counter()
        results = [future.result() for future in futures]
        self.usage.waiting_s += time.perf_counter() - began
        return next((result.failure for result in results if result.failure is not None), None)

    def _compare(self, tokens: int, finalists: tuple[LayerTiles, ...]) -> Sequence[Measurement]:
        with suppress(ChildError):
            answer = self._ask(Compare(tokens, finalists), self._time_limit_s * len(finalists))
            if not answer.lost:
                return answer.measurements
        return [self._measure(tokens, tiles, None) for tiles in finalists]  # one of them took the others down

    def _measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        request = Measure(tokens, tiles, best_us, self._anchors.get(tokens))
        try:
            found = self._ask(request, self._time_limit_s).measurements[0]
        except ChildTimeoutError as error:
            return Measurement("timeout", message=str(error))
        except ChildError as error:
            return Measurement("crash", message=str(error))
        if found.status == "ok":
            self._anchors.setdefault(tokens, tiles)
        return found

    def _ask(self, request: Measure | Compare, time_limit_s: float) -> Answer:
        """Send a request to a process that has the bucket; a process that was lost, or says so, goes."""
        self._prepare(request.tokens)
        began = time.perf_counter()
        try:
            answer = cast(Answer, self._child.call(request, time_limit_s))
        except ChildError:
            self._child.stop(patience_s=0)  # one that raised has a fault that nobody thought of
            raise
        finally:
            self.usage.measuring_s += time.perf_counter() - began
        self.usage.compiled += answer.compiled
        if answer.lost:
            self._child.stop(patience_s=0)
        return answer

    def _prepare(self, tokens: int) -> None:
        if self._child.running and self._prepared == tokens:
            return
        self._asked_twice(Prepare(tokens))
        self._prepared = tokens

    def _asked_twice(self, request: Describe | Prepare) -> object:
        """The answer to a request that no config is to blame for; from a new process if the first one is lost."""
        began, failure = time.perf_counter(), ""
        try:
            for _ in range(ATTEMPTS):
                try:
                    return self._child.call(request, PREPARE_LIMIT_S)
                except ChildError as error:
                    failure = str(error)
                    self._child.stop(patience_s=0)
        finally:
            self.usage.preparing_s += time.perf_counter() - began
            self.usage.starts = self._child.starts
        raise MeasurerError(f"{self._setup.slug} on GPU {self._setup.gpu}: {request}: {failure}")
