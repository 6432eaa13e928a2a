"""Record exhaustive sweeps: time every tile config of a layer's space on this GPU, one GEMM at a time.

    python tools/sweep_tiles.py out/moe_qwen3_30b_a3b=1,16,256 out/fp8/moe_qwen3_30b_a3b=16 --out sweeps

Writes one file a layer and token count, as moegen/tune/replay.py describes it. The time is that of the whole layer in a
CUDA graph with cold weights, half of its calls with balanced and half with power-law routing; the other GEMM keeps the
heuristic's tile config of that kind. Candidates compile ahead on all other cores, while others are measured.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from moegen.aot import compile_call, meta_call
from moegen.bench import ROUTINGS
from moegen.bench.workload import NOMINAL_BYTES_PER_US, NOMINAL_FLOP_PER_US, build_workload, layer_bytes, layer_flops
from moegen.device import target_facts
from moegen.load import import_package
from moegen.runtime.device import DeviceFacts, device_facts
from moegen.runtime.layer import is_low_latency
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.replay import Sweep, write_sweep
from moegen.tune.space import OPS, varied
from moegen.tune.trial import Measurement

GRAPH_US, MAX_CALLS, REPLAYS = 1000.0, 40, 8
TOLERANCE = 0.05  # relative difference to the heuristic's result; a config that computes something else is far above


@dataclass(frozen=True)
class Cell:
    """One layer of one package at one token count, with the facts that its sweep begins with."""

    folder: Path
    layer: Any
    sweep: Sweep

    def candidates(self) -> Iterator[tuple[str, TileConfig, LayerTiles]]:
        """(op, its tile config, the pair to launch), kind by kind; the pair of starts comes first."""
        space = self.sweep.space
        for kind in space.kinds:
            start = space.start(kind)
            for op in space.ops(kind):
                own = getattr(space, op)[kind]
                for tile in sorted(own.tiles, key=lambda tile: tile != own.start):
                    yield op, tile, varied(start, op, tile)


def main() -> None:
    """Compile, measure, write a file a cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+", metavar="PACKAGE=TOKENS,…")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further cell after this long")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_facts(torch.cuda.current_device())
    cells = [cell for text in args.cells for cell in _cells(text, device)]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn")) as pool:
        compiled = _submit(pool, cells)
        for cell in cells:
            if time.perf_counter() - began > args.seconds:
                print("out of time")
                pool.shutdown(wait=False, cancel_futures=True)
                break
            _measure_cell(cell, compiled)
            path = write_sweep(args.out, cell.sweep)
            print(f"{path} {_summary(cell.sweep)} at {time.perf_counter() - began:.0f} s", flush=True)


def _cells(text: str, device: DeviceFacts) -> Iterator[Cell]:
    folder, _, tokens = text.partition("=")
    for layer in import_package(Path(folder)).LAYERS:
        for count in (int(t) for t in tokens.split(",")):
            low = is_low_latency(layer, count, None)
            gemms = layer.gemm("gemm1"), layer.gemm("gemm2")
            sweep = Sweep(layer.slug, device, *gemms, count, low, triton.__version__, {op: {} for op in OPS})
            yield Cell(Path(folder), layer, sweep)


def _key(cell: Cell, op: str, tile: TileConfig) -> tuple[object, ...]:
    """What a compiled GEMM depends on: the token count only by whether there is a sort."""
    return str(cell.folder), cell.layer.slug, cell.sweep.low_latency, op, tile


def _submit(pool: ProcessPoolExecutor, cells: list[Cell]) -> dict[tuple[object, ...], Future[str]]:
    """Compile every distinct GEMM of all cells, in the order of measuring."""
    futures: dict[tuple[object, ...], Future[str]] = {}
    for cell in cells:
        for op, tile, pair in cell.candidates():
            if _key(cell, op, tile) not in futures:
                target = f"cuda:{cell.sweep.device.arch}"
                job = (str(cell.folder), cell.layer.slug, cell.sweep.tokens, target, op, pair)
                futures[_key(cell, op, tile)] = pool.submit(_compile, *job)
    return futures


def _compile(folder: str, slug: str, tokens: int, target: str, op: str, tiles: LayerTiles) -> str:
    """Compile one GEMM of a call into Triton's cache; the reason if that fails, else an empty string."""
    torch.set_num_threads(1)
    package = import_package(Path(folder))._dispatch._PACKAGE
    layer = next(layer for layer in package.layers if layer.slug == slug)
    call = meta_call(package, layer, tokens, target_facts(target))
    whole = tiles.gemm1.family == "stream"  # one kernel, which is neither GEMM's own
    found = compile_call(package, layer, call, tiles, target, lambda kernel: whole or kernel.startswith(op))
    return next((kernel.error for kernel in found if kernel.error), "")


class Timer:
    """Times pairs of tile configs on the calls of one cell, with as little host work a pair as possible."""

    def __init__(self, cell: Cell) -> None:
        package = import_package(cell.folder)._dispatch._PACKAGE
        self._run = sys.modules[type(package).__module__].run
        self._layer = cell.layer
        self._calls = _calls(cell, package)
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None  # the last one stays: with it goes the pool's memory
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        self.expected: torch.Tensor | None = None

    def measure(self, tiles: LayerTiles, best_us: float) -> Measurement:
        """Median over the replays; the first pair's result is what the others have to compute."""
        first = self._calls[0]
        try:
            with torch.cuda.stream(self._stream):
                first.out.fill_(float("nan"))
                self._run(self._layer, first, tiles)
                wrong = self._difference(first.out)
                samples = self._samples(tiles, best_us)
        except triton.runtime.errors.OutOfResources as error:
            return Measurement("resources", message=str(error))
        if not wrong <= TOLERANCE:
            return Measurement("wrong", message=f"relative difference {wrong:.3f}")
        low, us, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Measurement("ok", us, (high - low) / us)

    def _difference(self, out: torch.Tensor) -> float:
        if self.expected is None:
            self.expected = out.float().clone()
        return float((out.float() - self.expected).norm() / self.expected.norm())

    def _samples(self, tiles: LayerTiles, best_us: float) -> list[float]:
        # Not torch.cuda.graph(): it collects garbage and empties the cache, which takes longer than the measurement.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        for call in self._calls:
            self._run(self._layer, call, tiles)
        graph.capture_end()
        self._graph = graph
        samples: list[float] = []
        for replays in (2, REPLAYS - 2):  # a clear loser is not worth more than two
            graph.replay()  # untimed: keeps the device busy while the host queues ahead of it
            self._events[0].record()
            for event in self._events[1 : replays + 1]:
                graph.replay()
                event.record()
            self._stream.synchronize()
            pairs = zip(self._events, self._events[1 : replays + 1], strict=False)
            samples += [before.elapsed_time(after) * 1e3 / len(self._calls) for before, after in pairs]
            if min(samples) > 2 * best_us:
                break
        return samples


def _calls(cell: Cell, package: Any) -> list[Any]:
    """Checked calls, balanced and power-law routing by turns, about GRAPH_US of them."""
    layer, tokens = cell.layer, cell.sweep.tokens
    active = min(tokens * layer.top_k, layer.local_experts)
    memory_us = layer_bytes(layer, tokens, active) / NOMINAL_BYTES_PER_US
    us = max(memory_us, layer_flops(layer, tokens) / NOMINAL_FLOP_PER_US)
    each = max(2, min(MAX_CALLS, math.ceil(GRAPH_US / us)) // 2)
    calls: list[Any] = []
    package._run = lambda _, call: calls.append(call)  # what the dispatcher would launch
    works = []
    for seed, routing in enumerate(ROUTINGS):
        free = torch.cuda.mem_get_info()[0]
        works.append(build_workload(layer, tokens, routing, device=torch.device("cuda"), seed=seed, free_bytes=free))
    for turn in range(each):
        for work in works:
            work.calls[turn % len(work.calls)].run(import_package(cell.folder).fused_experts)
    del package._run
    return calls


def _measure_cell(cell: Cell, compiled: dict[tuple[object, ...], Future[str]]) -> None:
    timer, best = Timer(cell), math.inf
    for _ in range(20):  # clocks settle
        timer.measure(cell.sweep.space.default, math.inf)
    for op, tile, pair in cell.candidates():
        failure = compiled[_key(cell, op, tile)].result()
        found = Measurement("compile", message=failure) if failure else timer.measure(pair, best)
        cell.sweep.results[op][tile] = found
        best = min(best, found.us or math.inf)
    torch.cuda.synchronize()
    del timer
    torch.cuda.empty_cache()


def _summary(sweep: Sweep) -> str:
    found = [result for results in sweep.results.values() for result in results.values()]
    times = [result.us for result in found if result.us is not None]
    failed = sorted({result.status for result in found if result.us is None})
    classes = ", ".join(f"{sum(r.status == status for r in found)} {status}" for status in failed)
    return f"{len(found)} configs ({classes or 'no failures'}), best {min(times):.1f} us"


if __name__ == "__main__":
    main()
