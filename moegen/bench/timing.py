"""How it is timed: CUDA graphs of n calls, replayed in turn, device events around each replay, medians."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from moegen.bench import DEFAULT_REPLAYS

WARMUP_MS = 200.0  # clocks and power settle within this; without it the first replays run faster than the later ones

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """What the replays of one graph took: µs per call, one sample a replay, in the order of the rounds."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("samples: at least one replay is needed, got none")

    @property
    def us_per_call(self) -> float:
        """Median over the replays, µs."""
        return statistics.median(self.samples)

    @property
    def us_min(self) -> float:
        """Fastest replay, µs per call."""
        return min(self.samples)

    @property
    def us_max(self) -> float:
        """Slowest replay, µs per call."""
        return max(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: a difference between two candidates below this is noise."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.us_per_call


def ratio(candidate: Timing, base: Timing) -> float:
    """Median over the rounds of candidate / base; above 1 the base is faster.

    The two were replayed side by side in each round, so a clock drift during the run cancels here, while it would not
    in the quotient of the two medians. Raises ValueError if the two do not have the same number of rounds.
    """
    return statistics.median(c / b for c, b in zip(candidate.samples, base.samples, strict=True))


class GraphMemory:
    """Device memory and a stream that graphs captured one after another share.

    The memory stays allocated when a graph goes, so that the next capture asks the driver for none. Graphs that live at
    the same time may share it as well, as long as they are replayed one at a time and keep what they return.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._kept = torch.cuda.CUDAGraph()  # a pool goes with the last graph that uses it
        with self.capture(self._kept):
            self._anchor = torch.zeros(1, device="cuda")

    @contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what is queued inside into `graph`; unlike torch.cuda.graph, nothing is returned to the device."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                yield
            finally:
                graph.capture_end()


class CapturedCalls:
    """One CUDA graph of `calls`, in order, after one eager pass over all of them (compilation, workspaces).

    outputs holds what each call returned during the capture, so that no call's result overwrites an earlier one. With
    `memory`, for many captures in a row, there is no eager pass: the caller has run what has to be compiled.
    """

    def __init__(self, calls: Sequence[Call], memory: GraphMemory | None = None) -> None:
        if not calls:
            raise ValueError("calls: at least one is needed, got none")
        self.size = len(calls)
        self.outputs: list[object] = []
        self._graph = torch.cuda.CUDAGraph()
        if memory is None:
            stream = _run_aside(calls)
            release_memory()  # the eager pass cached as much as the graph's own pool will take
            capture: AbstractContextManager[None] = torch.cuda.graph(self._graph, stream=stream)
        else:
            capture = memory.capture(self._graph)
        with capture:
            self.outputs += [call() for call in calls]
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Queue one replay on the current stream; asynchronous."""
        self._graph.replay()

    def poison_outputs(self) -> None:
        """Fill every floating-point output with NaN: an element that the next replay does not write stays visible."""
        for output in self.outputs:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                output.fill_(float("nan"))


def time_graph(calls: Sequence[Call], replays: int = DEFAULT_REPLAYS, warmup_ms: float = WARMUP_MS) -> Timing:
    """Time `calls` as one CUDA graph and return µs per call; the calls must not synchronise with the host."""
    return time_interleaved([CapturedCalls(calls)], replays=replays, warmup_ms=warmup_ms)[0]


def time_interleaved(
    captured: Sequence[CapturedCalls], *, replays: int = DEFAULT_REPLAYS, warmup_ms: float = WARMUP_MS
) -> list[Timing]:
    """Replay the graphs in turn, `replays` rounds, and return one Timing a graph, in the order given.

    Rounds are interleaved so that clock and temperature drift hit all alike; each round starts with another graph, so
    that none always follows the same neighbour.
    """
    if replays < 1:
        raise ValueError(f"replays: must be at least 1, got {replays}")
    if not captured:
        return []
    _warm_up(captured, warmup_ms)
    return time_rounds(captured, replays)


def time_rounds(captured: Sequence[CapturedCalls], replays: int) -> list[Timing]:
    """`time_interleaved` of at least one graph, without the warm-up: for graphs that have just been replayed."""
    events = [[_event_pair() for _ in range(replays)] for _ in captured]
    captured[0].replay()  # untimed: keeps the device busy while the host queues ahead of it
    for turn in range(replays):
        for index in rotated(len(captured), turn):
            start, end = events[index][turn]
            start.record()
            captured[index].replay()
            end.record()
    torch.cuda.synchronize()
    return [
        Timing(tuple(start.elapsed_time(end) * 1e3 / graph.size for start, end in pairs))
        for graph, pairs in zip(captured, events, strict=True)
    ]


def _run_aside(calls: Sequence[Call]) -> torch.cuda.Stream:
    """Run all calls on a stream of their own, wait for them and return the stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return stream


def rotated(count: int, turn: int) -> list[int]:
    """The indices 0..count-1, beginning with turn modulo count."""
    return [(turn + step) % count for step in range(count)]


def release_memory() -> None:
    """Return what is no longer referenced to the device, so that the next cell starts from an empty cache."""
    gc.collect()
    torch.cuda.empty_cache()


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end


def _warm_up(captured: Sequence[CapturedCalls], warmup_ms: float) -> None:
    """Replay all graphs in turn until warmup_ms have passed, at least once each."""
    end = time.perf_counter() + warmup_ms / 1e3
    while True:
        for graph in captured:
            graph.replay()
        torch.cuda.synchronize()
        if time.perf_counter() >= end:
            return
