"""Time what the heuristic chooses between: its own tile configs of every family beside each other, and peers.

    python tools/compare_tiles.py out/moe_qwen3_30b_a3b=16,256,4096 out/fp8/moe_deepseek_v3=1024 --csv cells.csv
        --peer PEER.py:fused_experts=vllm --seconds 240

The rules of moegen/runtime/heuristic.py come from such rows; records are left out. The method is that of `moegen
bench`, but results are compared with the portable family's, on 64 tokens. Kernels compile ahead on all cores. A cell
runs in a process that is replaced when a kernel hangs, so that one that does costs seconds and not the run.
"""

import argparse
import csv
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import triton

from moegen.bench import ROUTINGS
from moegen.bench.measure import Cell, Options, measure_cell
from moegen.bench.peers import PACKAGE, Candidate, load_peer
from moegen.bench.report import CSV_COLUMNS, Environment, csv_rows
from moegen.bench.roofline import Ceilings, measure_ceilings, operand_dtype
from moegen.load import import_package, with_tiles
from moegen.runtime.device import DeviceFacts, device_facts
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.layer import is_low_latency
from moegen.runtime.tile import LayerTiles
from moegen.tune.child import Child, ChildError
from moegen.tune.compile_pool import Compilation, CompilePool, jobs_of
from moegen.tune.space import AXES, family_starts

PORTABLE = "portable"


@dataclass(frozen=True)
class Request:
    """One cell: a layer of a package at one token count, and what to time: provider -> its tile configs."""

    folder: Path
    slug: str
    tokens: int
    pairs: dict[str, LayerTiles]


def main() -> int:
    """The exit code: 0 if every cell was timed in every form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+", metavar="PACKAGE=TOKENS,…")
    parser.add_argument("--csv", type=Path, required=True, help="a row a cell and provider, written as they come")
    parser.add_argument("--peer", action="append", default=[], metavar="FILE.py:function[=label]")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0])
    parser.add_argument("--replays", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further cell after this long")
    parser.add_argument("--cell-seconds", type=float, default=30, help="after which a cell hangs (default %(default)s)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    device = device_facts(torch.cuda.current_device())
    requests = [request for text in args.cells for request in requests_of(text, device)]
    worker = Child(f"{Path(__file__).stem}:Worker", tuple(args.peer), args.routing, args.replays)
    bad = 0
    with args.csv.open("w", newline="", encoding="utf-8") as file, CompilePool() as pool:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        compiling = [compile_ahead(pool, request, device) for request in requests]
        for request, kernels in zip(requests, compiling, strict=True):
            if time.monotonic() > deadline:
                print(f"out of time before {request.slug} T={request.tokens}")
                bad += 1
                break
            failures = [found.failure.message for found in (one.result() for one in kernels) if found.failure]
            try:
                cell = cast(Cell, worker.call(request, args.cell_seconds))
            except ChildError as error:
                failures.append(str(error))
            else:
                writer.writerows(csv_rows(environment(), [cell]))
                file.flush()
                print(shown(cell), flush=True)
                bad += any(result.timing is None for result in cell.results)
            for failure in failures:
                print(f"{request.slug} T={request.tokens}: {failure}", flush=True)
            bad += bool(failures)
    worker.stop()
    return int(bad > 0)


def environment() -> Environment:
    """Where the rows come from."""
    return Environment(torch.cuda.get_device_name(), torch.__version__, triton.__version__, " ".join(sys.argv))


def requests_of(text: str, device: DeviceFacts) -> list[Request]:
    """The cells of one argument, every layer of the package at every token count."""
    folder, _, tokens = text.partition("=")
    return [
        Request(Path(folder), layer.slug, count, pairs_of(layer, count, device))
        for layer in import_package(Path(folder)).LAYERS
        for count in (int(one) for one in tokens.split(","))
    ]


def pairs_of(layer: Any, tokens: int, device: DeviceFacts) -> dict[str, LayerTiles]:
    """The heuristic's choice, that within the portable family, and its pair of every other family and BLOCK_SIZE_M."""
    gemms = layer.gemm("gemm1"), layer.gemm("gemm2")
    low_latency = is_low_latency(layer, tokens, None)
    pairs = {
        PACKAGE: default_tiles(*gemms, tokens, device, low_latency),
        PORTABLE: default_tiles(*gemms, tokens, device, low_latency, portable=True),
    }
    for family in (family for family in AXES if family != PORTABLE):
        starts = family_starts(family, *gemms, tokens, device)
        pairs |= {f"{family} {kind.block_m}": pair for kind, pair in starts.items()}
    return {label: pair for label, pair in pairs.items() if label == PACKAGE or pair != pairs[PACKAGE]}


def compile_ahead(pool: CompilePool, request: Request, device: DeviceFacts) -> list[Future[Compilation]]:
    """What the cell launches, in the pool."""
    jobs = [
        job
        for pair in request.pairs.values()
        for job in jobs_of(request.folder, request.slug, device, request.tokens, pair)
    ]
    return [pool.submit(job) for job in dict.fromkeys(jobs)]


def shown(cell: Cell) -> str:
    """One line: µs of each provider, fastest first, with its time over the heuristic's choice."""
    parts = []
    for result in sorted(cell.results, key=lambda result: result.timing.us_per_call if result.timing else 0):
        ratio = cell.ratio_to_package(result)
        if result.timing is None:
            parts.append(f"{result.provider} {result.status}: {result.message}")
        else:
            times = "" if ratio is None else f" x{ratio:.3f}"
            parts.append(f"{result.provider} {result.timing.us_per_call:.1f}{times}")
    floor = f" floor {cell.floor.us:.1f}" if cell.floor else ""
    return f"{cell.layer} T={cell.tokens}{floor} | " + " | ".join(parts)


class Worker:
    """What runs in the process with the GPU: a Request -> its Cell."""

    def __init__(self, peers: tuple[str, ...], routing: str, replays: int) -> None:
        self._peers = [load_peer(peer) for peer in peers]
        self._routing, self._replays = routing, replays
        self._ceilings: dict[torch.dtype, Ceilings] = {}

    def __call__(self, request: Request) -> Cell:
        """Time one cell."""
        module = import_package(request.folder)
        layer = next(layer for layer in module.LAYERS if layer.slug == request.slug)
        functions = {label: with_tiles(module, pair) for label, pair in request.pairs.items()}
        portable = functions.get(PORTABLE, functions[PACKAGE])
        device = torch.device("cuda")
        dtype = operand_dtype(layer, device)
        if dtype not in self._ceilings:
            self._ceilings[dtype] = measure_ceilings(dtype, device)
        return measure_cell(
            layer,
            request.tokens,
            self._routing,
            [*(Candidate(label, function) for label, function in functions.items()), *self._peers],
            self._ceilings[dtype],
            device=device,
            options=Options(replays=self._replays),
            reference=lambda _, *args, **kwargs: portable(*args, **kwargs),
        )


if __name__ == "__main__":
    sys.exit(main())
