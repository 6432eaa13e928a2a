"""What runs in the process that holds a GPU: check one pair of tile configs against the oracle, then time it.

A config is run once eagerly, with everything that torch.empty returns filled with NaN; its calls are captured in a CUDA
graph, of which one replay is checked; only then is it timed. One layer, one bucket at a time.

Where power limits the clock, a GPU that comes from a pause is faster than one that has been working. There a config is
replayed in turn with an anchor, another config, and its time is that of the anchor on a warm GPU times their ratio.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from triton import knobs
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from moegen.bench.measure import WrongResultError
from moegen.bench.timing import Call, CapturedCalls, GraphMemory, Timing, release_memory, time_interleaved, time_rounds
from moegen.bench.workload import LayerCall
from moegen.load import import_package
from moegen.runtime.device import device_facts
from moegen.runtime.tile import LayerTiles
from moegen.tune.cache_keys import settle_cache_keys
from moegen.tune.child import one_line
from moegen.tune.compile_pool import TOO_MUCH
from moegen.tune.trial import Measurement, Status
from moegen.tune.workload import Bucket, WeightCopies, build_bucket, read_routing

RACE_REPLAYS = 3
RACE_FACTOR = 1.5  # slower than this times the best is not worth more replays
REPLAYS = 7
FINAL_ROUNDS = 10  # finalists are replayed in turn, so many rounds at a time,
FINAL_NOISE = 0.01  # until the noise of all of them is below this
FINAL_LIMIT_S = 3.0  # or this long, warm-up excluded


Graphs = TypeVar("Graphs")  # what is captured of a config to be timed


@dataclass(frozen=True, slots=True)
class Setup:
    """What a GPU process is for: one layer of one package; routing is a file of recorded topk_ids."""

    folder: Path
    slug: str
    gpu: int
    seed: int
    routing: Path | None


@dataclass(frozen=True, slots=True)
class Describe:
    """Ask for the GPU's DeviceFacts."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Ask to set up a bucket; the answer is a line that describes it."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Ask for one measurement, in an Answer. anchor: a config that is known to work, or None if this is the first."""

    tokens: int
    tiles: LayerTiles
    best_us: float | None
    anchor: LayerTiles | None


@dataclass(frozen=True, slots=True)
class Compare:
    """Ask for measurements of several configs side by side, in an Answer."""

    tokens: int
    finalists: tuple[LayerTiles, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Measurements, in the order asked for.

    lost      whether the GPU's state may be broken, so that the process has to be replaced
    compiled  kernels that were not in Triton's cache on disk: 0 if the compile pool knows what a launch asks for
    """

    measurements: tuple[Measurement, ...]
    lost: bool = False
    compiled: int = 0


@dataclass(frozen=True, slots=True)
class Anchor:
    """The graph of a config that works, and what a call in it takes on a warm GPU, µs."""

    graph: CapturedCalls
    us: float


class GpuWorker:
    """The worker of the GPU's Child."""

    def __init__(self, setup: Setup) -> None:
        torch.cuda.set_device(setup.gpu)
        self._module = import_package(setup.folder)
        settle_cache_keys(self._module)
        self._layer = next(layer for layer in self._module.LAYERS if layer.slug == setup.slug)
        self._device = torch.device("cuda", setup.gpu)
        self._module.runtime.checks.check_device(self._layer.scheme, device_facts(setup.gpu))
        with poisoned_memory():
            pass  # torch imports much at its first use, which no config should have to pay for
        self._seed = setup.seed
        self._routing = None if setup.routing is None else read_routing(setup.routing, self._layer)
        self._weights: WeightCopies | None = None
        self._memory: GraphMemory | None = None
        self._bucket: Bucket | None = None
        self._anchor: Anchor | None = None
        self._calls: list[Any] = []  # the package's own form of the bucket's calls
        self._misses = 0  # since the last answer
        knobs.compilation.listener = self._listen

    def _listen(self, *, cache_hit: bool, **_: object) -> None:
        self._misses += not cache_hit

    def __call__(self, request: object) -> object:
        """Answer one of the requests above."""
        with torch.inference_mode():
            match request:
                case Describe():
                    return device_facts(torch.cuda.current_device())
                case Prepare(tokens):
                    return self._prepare(tokens)
                case Measure(tokens, tiles, best_us, known):
                    anchor = self._anchored(known or tiles)
                    return self._answer(tokens, (tiles,), self._captured, lambda one: [raced(one[0], best_us, anchor)])
                case Compare(tokens, finalists):
                    return self._answer(tokens, finalists, self._captured_apart, compared)
        raise TypeError(f"request: {type(request).__name__} is not known")

    def _prepare(self, tokens: int) -> str:
        began = time.perf_counter()
        self._bucket, self._memory, self._calls, self._anchor = None, None, [], None
        release_memory()
        if self._weights is None:
            self._weights = WeightCopies(self._layer, self._device, self._seed)
        bucket = build_bucket(self._layer, tokens, self._weights, self._routing, device=self._device, seed=self._seed)
        self._calls = [package_call(self._module, call) for call in bucket.calls]
        self._memory = GraphMemory()
        self._bucket = bucket
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return f"{tokens} tokens: {len(bucket.calls)} calls, {bucket.copies} weight copies, {seconds:.1f} s"

    def _answer(
        self,
        tokens: int,
        configs: Sequence[LayerTiles],
        captured_by: Callable[[Bucket, LayerTiles], Graphs],
        timed_by: Callable[[Sequence[Graphs]], list[Measurement]],
    ) -> Answer:
        """Capture and check each config, then time those that passed, if any."""
        if self._bucket is None or self._bucket.tokens != tokens:
            raise ValueError(f"tokens: {tokens} is not allowed; allowed: the count that was prepared last")
        lost = False
        results: list[Measurement | Graphs] = []
        for tiles in configs:
            try:
                results.append(captured_by(self._bucket, tiles))
            except Exception as error:  # noqa: BLE001 - whatever a config causes is its result
                failure = Measurement(status_of(error), message=one_line(error))
                results.append(failure)
                lost = lost or failure.status == "crash" or not _healthy()
        ready = [result for result in results if not isinstance(result, Measurement)]
        if lost:  # what was captured cannot be trusted to run
            timed = iter([Measurement("crash", message="lost with the GPU's state") for _ in ready])
        else:
            timed = iter(timed_by(ready) if ready else [])
        found = tuple(result if isinstance(result, Measurement) else next(timed) for result in results)
        compiled, self._misses = self._misses, 0
        return Answer(found, lost, compiled)

    def _anchored(self, tiles: LayerTiles) -> Anchor | None:
        """The bucket's anchor if it is hot; made of `tiles` if there is none yet, and none if they do not work."""
        if self._bucket is not None and self._bucket.hot and self._anchor is None:
            with suppress(WrongResultError, OutOfResources, torch.OutOfMemoryError):
                graph = self._captured(self._bucket, tiles)
                self._anchor = Anchor(graph, time_interleaved([graph], replays=FINAL_ROUNDS)[0].us_per_call)
        return self._anchor

    def _captured(self, bucket: Bucket, tiles: LayerTiles) -> CapturedCalls:
        """The graph of all calls with `tiles`, after both checks. Raises WrongResultError, and what launches raise."""
        calls = self._launches(tiles)
        self._calls[0].out.fill_(float("nan"))
        with poisoned_memory():
            output = calls[0]()
        bucket.checks[0].verify(output)
        captured = CapturedCalls(calls, self._memory)
        captured.poison_outputs()
        captured.replay()
        torch.cuda.synchronize()
        for check, index in zip(bucket.checks, (0, -1), strict=True):
            check.verify(captured.outputs[index])
        return captured

    def _captured_apart(self, bucket: Bucket, tiles: LayerTiles) -> tuple[CapturedCalls, ...]:
        """A graph of the calls of each routing, once all of them together have passed both checks."""
        self._captured(bucket, tiles)
        calls = self._launches(tiles)
        return tuple(CapturedCalls(calls[first :: bucket.routings], self._memory) for first in range(bucket.routings))

    def _launches(self, tiles: LayerTiles) -> list[Call]:
        """The bucket's calls with `tiles`; each returns its output."""
        return [partial(self._run, call, tiles) for call in self._calls]

    def _run(self, call: Any, tiles: LayerTiles) -> torch.Tensor:  # noqa: ANN401 - as above
        """One layer call; returns its output."""
        self._module.runtime.layer.run(self._layer, call, tiles)
        out: torch.Tensor = call.out
        return out


def package_call(package: ModuleType, call: LayerCall) -> Any:  # noqa: ANN401 - its classes come with the package
    """A call as the package's own `run` takes it, with an output of its own."""
    w, weight = call.weights, package.runtime.weight.Weight
    return package.runtime.layer.Call(
        hidden_states=call.hidden_states,
        w13=weight.of("w13", w.w13, w.kwargs),
        w2=weight.of("w2", w.w2, w.kwargs),
        topk_weights=call.topk_weights,
        topk_ids=call.topk_ids,
        expert_map=None,
        apply_router_weight_on_input=False,
        out=torch.empty_like(call.hidden_states),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its like return NaN, or the largest integer: stale memory cannot pass as a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def raced(graph: CapturedCalls, best_us: float | None, anchor: Anchor | None) -> Measurement:
    """Time one graph: a few replays, and more unless it is clearly slower than best_us."""
    first = anchored_rounds(graph, anchor, RACE_REPLAYS)
    if best_us is not None and first.us_min > RACE_FACTOR * best_us:
        return Measurement("slow", first.us_per_call, first.spread)
    more = anchored_rounds(graph, anchor, REPLAYS - RACE_REPLAYS)
    timing = Timing(first.samples + more.samples)
    return Measurement("ok", timing.us_per_call, timing.spread)


def anchored_rounds(graph: CapturedCalls, anchor: Anchor | None, replays: int) -> Timing:
    """Replay `graph`; with an anchor in turn with it, as if the anchor took in each round what it takes when warm."""
    if anchor is None:
        return time_rounds([graph], replays)[0]
    timing, base = time_rounds([graph, anchor.graph], replays)
    return Timing(tuple(us / base_us * anchor.us for us, base_us in zip(timing.samples, base.samples, strict=True)))


def compared(configs: Sequence[Sequence[CapturedCalls]]) -> list[Measurement]:
    """Time the graphs of one or more configs in turn until all configs are known well, or the time is over.

    A config's time is the mean of those of its graphs, one a routing and as many for each config.
    """
    graphs, routings = [graph for own in configs for graph in own], len(configs[0])
    timings = time_interleaved(graphs, replays=FINAL_ROUNDS)
    end = time.perf_counter() + FINAL_LIMIT_S
    while True:
        steady = without_drift(timings)
        found = [meaned(steady[first : first + routings]) for first in range(0, len(steady), routings)]
        if max(one.spread for one in found) < FINAL_NOISE or time.perf_counter() > end:
            return found
        more = time_rounds(graphs, FINAL_ROUNDS)
        timings = [Timing(old.samples + new.samples) for old, new in zip(timings, more, strict=True)]


def meaned(timings: Sequence[Timing]) -> Measurement:
    """What one config's timings, one a routing, say of it."""
    mean = Timing(tuple(statistics.fmean(samples) for samples in zip(*(one.samples for one in timings), strict=True)))
    apart = tuple(timing.us_per_call for timing in timings) if len(timings) > 1 else ()
    return Measurement("ok", mean.us_per_call, mean.spread, apart=apart)


def without_drift(timings: Sequence[Timing]) -> list[Timing]:
    """The same timings as if each round had taken as long as the median round.

    A clock that drifts changes all times of a round alike, which says nothing about one against another.
    """
    rounds = [statistics.fmean(samples) for samples in zip(*(timing.samples for timing in timings), strict=True)]
    usual = statistics.median(rounds)
    return [
        Timing(tuple(sample * usual / mean for sample, mean in zip(timing.samples, rounds, strict=True)))
        for timing in timings
    ]


def status_of(error: Exception) -> Status:
    """The class of a failure."""
    if isinstance(error, WrongResultError):
        return "wrong"
    text = str(error).lower()
    if isinstance(error, OutOfResources | torch.OutOfMemoryError) or any(words in text for words in TOO_MUCH):
        return "resources"
    return "compile" if isinstance(error, TritonError) else "crash"


def _healthy() -> bool:
    """Whether the GPU still computes: an error of a kernel may stay with the process for ever."""
    try:
        torch.cuda.synchronize()
        return bool((torch.zeros(8, device="cuda") + 1).sum() == 8)
    except RuntimeError:
        return False
