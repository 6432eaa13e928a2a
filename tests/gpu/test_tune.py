"""Measuring on a GPU through a child process: every class of failure, and what a measurement costs.

The costs are printed: python -m pytest tests/gpu/test_tune.py -s
"""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.tile import LayerTiles, TileConfig, default_tiles, why_illegal
from moegen.tune.client import GpuMeasurer
from moegen.tune.compile_pool import CompilePool
from tests.support import tune_workers
from tests.support.packages import spec_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: measures kernels in a child process"),
]

LAYERS = {
    "small": {"num_experts": 8, "top_k": 2, "hidden_size": 512, "intermediate_size": 256},
    "qwen3-30b-a3b": {"num_experts": 128, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768},
}
PAIRS = 30


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompilePool]:
    """A pool that starts with an empty cache, which the children share with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with CompilePool() as made:
            yield made


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {name: emit(make_plan(spec_of(**sizes)), folder) for name, sizes in LAYERS.items()}


def measurer(folder: Path, pool: CompilePool, worker: str = "", **options: float) -> GpuMeasurer:
    (layer,) = import_package(folder).LAYERS
    named = {"worker": f"tests.support.tune_workers:{worker}"} if worker else {}
    return GpuMeasurer(folder, layer.slug, 0, pool, **named, **options)  # type: ignore[arg-type]


def show(text: str) -> None:
    sys.stdout.write(text + "\n")


def default_of(folder: Path, gpu: GpuMeasurer, tokens: int) -> LayerTiles:
    (layer,) = import_package(folder).LAYERS
    low_latency = tokens * layer.top_k * 4 <= layer.num_experts
    return default_tiles(layer.gemm("gemm1"), layer.gemm("gemm2"), tokens, gpu.device, low_latency)


def pairs_of(folder: Path, gpu: GpuMeasurer, tokens: int) -> list[LayerTiles]:
    """The default and plausible others, gemm1 and gemm2 varied together."""
    (layer,) = import_package(folder).LAYERS
    start = default_of(folder, gpu, tokens)
    block_m = start.gemm1.BLOCK_SIZE_M
    tiles = [
        TileConfig(block_m, n, k, group, swap, gpu.device.has_pdl, num_warps=warps, num_stages=stages)
        for stages, n, k, group, swap, warps in itertools.product(
            (3, 4), (64, 128, 256), (64, 128), (1, 8), (False, True), (4, 8)
        )
    ]
    legal = [t for t in tiles if not any(why_illegal(t, layer.gemm(op), gpu.device) for op in ("gemm1", "gemm2"))]
    return [start, *(LayerTiles(tile, tile) for tile in legal[:: max(1, len(legal) // PAIRS)])]


@pytest.mark.parametrize("name", LAYERS)
def test_pairs_are_checked_and_timed(name: str, packages: dict[str, Path], pool: CompilePool) -> None:
    folder = packages[name]
    with measurer(folder, pool) as gpu:
        for tokens in (1, 64, 4096):
            pairs = pairs_of(folder, gpu, tokens)
            before = replace(gpu.usage)
            began = time.perf_counter()
            gpu.prefetch(tokens, pairs)
            best: float | None = None
            results = []
            for pair in pairs:
                result = gpu.measure(tokens, pair, best)
                results.append(result)
                if result.status == "ok" and result.us is not None:
                    best = min(best or result.us, result.us)
            wall = time.perf_counter() - began
            assert {result.status for result in results} <= {"ok", "slow"}, results
            assert results[0].status == "ok"
            again = gpu.measure(tokens, pairs[0], None)
            assert again.us == pytest.approx(results[0].us, rel=0.05)
            finals = gpu.compare(tokens, [pairs[0], pairs[1], pairs[0]])
            assert finals[0] == finals[2]
            assert finals[0].us == pytest.approx(results[0].us, rel=0.05)
            usage = gpu.usage
            show(
                f"\n{name} T={tokens}: {len(pairs)} pairs in {wall:.2f} s; {results[0].us:.1f} us -> {best:.1f} us; "
                f"{sum(r.status == 'slow' for r in results)} slow; "
                f"measuring {(usage.measuring_s - before.measuring_s) / (len(pairs) + 1) * 1e3:.1f} ms a pair; "
                f"waiting for the compiler {(usage.waiting_s - before.waiting_s) / wall:.0%} of the wall time; "
                f"preparing {usage.preparing_s - before.preparing_s:.1f} s; "
                f"largest spread {max(r.spread for r in results):.1%}, finals {max(r.spread for r in finals):.1%}"
            )
        assert gpu.usage.starts == 1
        assert gpu.usage.compiled == 0, "kernels that the pool compiled otherwise than they are launched"
    show(f"pool: {pool.compiled} kernels, {pool.compiler_s / pool.compiled:.2f} s each")


def test_a_time_does_not_depend_on_the_process(packages: dict[str, Path], pool: CompilePool) -> None:
    times = []
    for buckets in ((16,), (256, 16)):
        with measurer(packages["qwen3-30b-a3b"], pool) as gpu:
            for tokens in buckets:
                found = gpu.measure(tokens, default_of(packages["qwen3-30b-a3b"], gpu, tokens), None)
            times.append(found.us)
    assert times[0] == pytest.approx(times[1], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "status", "message", "starts"),
    [
        ("WRONG", "wrong", "relative error", 1),
        ("UNWRITTEN", "wrong", "relative error nan", 1),
        ("OUT_OF_MEMORY", "resources", "out of memory", 1),
        ("HANG", "timeout", "within 8 s", 2),
        ("ILLEGAL", "crash", "CUDA error", 2),
        ("EXIT", "crash", "exit code 3: no way out", 2),
    ],
)
def test_a_failure_is_a_result_and_the_next_config_is_measured(
    kind: str, status: str, message: str, starts: int, packages: dict[str, Path], pool: CompilePool
) -> None:
    folder = packages["small"]
    with measurer(folder, pool, "Saboteur", time_limit_s=8.0) as gpu:
        good = default_of(folder, gpu, 64)
        bad = replace(good, gemm1=replace(good.gemm1, GROUP_SIZE_M=getattr(tune_workers, kind)))
        gpu.prefetch(64, [good, bad])
        first = gpu.measure(64, good, None)
        found = gpu.measure(64, bad, None)
        assert (found.status, found.us) == (status, None), found
        assert message in found.message
        second = gpu.measure(64, good, None)
        assert second.us == pytest.approx(first.us, rel=0.1)
        assert gpu.usage.starts == starts
        if kind != "HANG":  # takes long, and is the same as EXIT for the parent
            assert [result.status for result in gpu.compare(64, [good, bad])] == ["ok", status]


def test_what_needs_too_much_never_reaches_the_gpu(packages: dict[str, Path], pool: CompilePool) -> None:
    folder = packages["small"]
    with measurer(folder, pool) as gpu:
        good = default_of(folder, gpu, 4096)
        big = TileConfig(good.gemm1.BLOCK_SIZE_M, 256, 128, num_warps=8, num_stages=6)
        found = gpu.measure(4096, LayerTiles(big, good.gemm2), None)
        assert found.status == "resources", found
        assert gpu.usage.measuring_s == 0


def test_recorded_routing(packages: dict[str, Path], pool: CompilePool, tmp_path: Path) -> None:
    """All tokens to the same two experts: a layer call reads a quarter of the weights."""
    path = tmp_path / "ids.pt"
    torch.save(torch.tensor([[3, 5]]).repeat(100, 1), path)
    folder = packages["small"]
    (layer,) = import_package(folder).LAYERS
    with GpuMeasurer(folder, layer.slug, 0, pool, routing=path) as gpu:
        assert gpu.measure(64, default_of(folder, gpu, 64), None).status == "ok"
