"""Time tile configs of a package's layers on this GPU, one GEMM at a time, and write every figure to a CSV.

    python tools/sweep_tiles.py out/moe_qwen3_30b_a3b --tokens 1,16,256 --csv sweep.csv

For each token count and BLOCK_SIZE_M: gemm1's candidates with the default gemm2, then gemm2's with the best gemm1. The
time is that of the whole layer, in a CUDA graph with cold weights (moegen.bench). Candidates are compiled ahead in one
process a core; those that do not compile or do not fit are skipped.
"""

import argparse
import csv
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moegen.bench.timing import CapturedCalls, time_interleaved
from moegen.bench.workload import build_workload
from moegen.load import import_package
from moegen.runtime.device import DeviceFacts, device_facts
from moegen.runtime.tile import LayerTiles, TileConfig, default_tiles, why_illegal

Job = tuple[str, str, int, str, LayerTiles]


def main() -> None:
    """Parse, compile, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096,16384")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop measuring after this long")
    parser.add_argument("--thin", type=int, default=1, help="measure every n-th candidate")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    began = time.perf_counter()
    device = device_facts(torch.cuda.current_device())
    cells = [(folder, layer, t) for folder in args.packages for layer in _layers(folder) for t in tokens]
    jobs = [
        (str(f), layer.slug, t, f"cuda:{device.arch}", pair)
        for f, layer, t in cells
        for pair in _pairs(layer, t, device, args.thin)
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, jobs, chunksize=8))
    print(f"compiled {len(jobs)} pairs in {time.perf_counter() - began:.0f} s", flush=True)
    rows = []
    for folder, layer, t in cells:
        if time.perf_counter() - began > args.seconds:
            print("out of time")
            break
        rows += _measure(import_package(folder), layer, t, device, args.thin)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(rows)} configs in {time.perf_counter() - began:.0f} s")


def _layers(folder: Path) -> tuple[Any, ...]:
    return tuple(import_package(folder).LAYERS)


def candidates(layer: Any, op: str, block_m: int, tokens: int, device: DeviceFacts, thin: int) -> Iterator[TileConfig]:
    """The legal tile configs of one GEMM with a given BLOCK_SIZE_M."""
    gemm = layer.gemm(op)
    small = block_m <= 32
    sizes_n = (32, 64, 128, 256)
    sizes_k = (64, 128, 256) if small else (64, 128)
    groups = (1,) if small else (1, 16) if tokens > 1024 else (1,)
    space = itertools.product(sizes_n, sizes_k, groups, (False, True), (4, 8), (3, 4, 5))
    kept = []
    for n, k, group, swap, warps, stages in space:
        if (swap and block_m > 64) or n * block_m / warps < 128 or (stages == 5 and not small):
            continue
        tile = TileConfig(block_m, n, k, group, swap, device.has_pdl, num_warps=warps, num_stages=stages)
        if why_illegal(tile, gemm, device) is None:
            kept.append(tile)
    yield from kept[::thin]


def _block_sizes(layer: Any, tokens: int) -> tuple[int, ...]:
    mean = tokens * layer.top_k / min(tokens * layer.top_k, layer.local_experts)
    sizes = [size for size in (16, 32, 64, 128) if mean / 2 <= size <= 5 * mean or (size == 16 and mean <= 16)]
    return tuple(sizes) or (128,)


def _defaults(layer: Any, block_m: int, device: DeviceFacts) -> LayerTiles:
    """The heuristic's tiles for the batch size at which it picks this BLOCK_SIZE_M."""
    tokens = block_m * layer.local_experts // (2 * layer.top_k)
    pick = default_tiles(layer.gemm("gemm1"), layer.gemm("gemm2"), max(tokens, 1), device, False)
    return LayerTiles(replace(pick.gemm1, BLOCK_SIZE_M=block_m), replace(pick.gemm2, BLOCK_SIZE_M=block_m))


def _pairs(layer: Any, tokens: int, device: DeviceFacts, thin: int) -> Iterator[LayerTiles]:
    """Pairs that together hold every candidate of both GEMMs once."""
    for block_m in _block_sizes(layer, tokens):
        base = _defaults(layer, block_m, device)
        lists = [list(candidates(layer, op, block_m, tokens, device, thin)) for op in ("gemm1", "gemm2")]
        for gemm1, gemm2 in itertools.zip_longest(*lists):
            yield LayerTiles(gemm1 or base.gemm1, gemm2 or base.gemm2)
        yield base


def _compile(job: Job) -> None:
    from moegen.aot import _compiling_for, _runtime_run

    folder, slug, tokens, target, tiles = job
    package = import_package(Path(folder))._dispatch._PACKAGE
    layer = next(layer for layer in package.layers if layer.slug == slug)
    from moegen.device import target_facts

    with _compiling_for(target):
        call = next(package.distinct_calls(layer, 1, target_facts(target), "meta"))[0]
        wide = replace(
            call,
            hidden_states=torch.empty((tokens, layer.hidden_size), dtype=layer.dtype, device="meta"),
            topk_weights=torch.empty((tokens, layer.top_k), device="meta"),
            topk_ids=torch.empty((tokens, layer.top_k), dtype=torch.int32, device="meta"),
            out=torch.empty((tokens, layer.hidden_size), dtype=layer.dtype, device="meta"),
        )
        try:
            _runtime_run(package)(layer, wide, tiles)
        except Exception as error:  # noqa: BLE001 - the config is skipped when it is measured
            print(f"{slug} T={tokens}: {tiles}: {str(error)[:100]}")


def _measure(module: Any, layer: Any, tokens: int, device: DeviceFacts, thin: int) -> list[dict[str, object]]:
    package = module._dispatch._PACKAGE
    chosen: list[LayerTiles] = []
    package._configs.tiles = lambda *_: chosen[0]
    free = torch.cuda.mem_get_info()[0]
    work = build_workload(layer, tokens, "balanced", device=torch.device("cuda"), seed=0, free_bytes=free)
    calls = work.bind(module.fused_experts)[:32]

    def us(tiles: LayerTiles) -> float:
        chosen[:] = [tiles]
        package._seen.clear()
        try:
            return time_interleaved([CapturedCalls(calls)], replays=5, warmup_ms=0)[0].us_min
        except Exception as error:  # noqa: BLE001 - a config that cannot run is a row, not the end
            print(f"T={tokens} {tiles}: {str(error)[:100]}")
            return float("inf")

    rows: list[dict[str, object]] = []
    for block_m in _block_sizes(layer, tokens):
        best = _defaults(layer, block_m, device)
        us(best)  # clocks settle
        for op in ("gemm1", "gemm2"):
            tiles = [getattr(best, op), *candidates(layer, op, block_m, tokens, device, thin)]
            timed = [(us(replace(best, **{op: tile})), tile) for tile in tiles]
            cell = {"layer": layer.slug, "tokens": tokens, "op": op}
            rows += [{**cell, "us": round(time, 2), **asdict(tile)} for time, tile in timed]
            fastest, tile = min(timed, key=lambda pair: pair[0])
            best = replace(best, **{op: tile})
        print(f"{layer.slug} T={tokens}: {fastest:.1f} us {_short(best.gemm1)} {_short(best.gemm2)}", flush=True)
    torch.cuda.empty_cache()
    return rows


def _short(tile: TileConfig) -> str:
    sizes = f"{tile.BLOCK_SIZE_M}/{tile.BLOCK_SIZE_N}/{tile.BLOCK_SIZE_K}/{tile.GROUP_SIZE_M}"
    return f"{sizes}/w{tile.num_warps}/s{tile.num_stages}{'/swap' if tile.SWAP_AB else ''}"


if __name__ == "__main__":
    main()
