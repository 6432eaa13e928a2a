"""Measuring on a GPU through a child process: every class of failure, and what a measurement costs.

The costs are printed: python -m pytest tests/gpu/test_tune.py -s
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.heuristic import default_tiles
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal
from moegen.tune.client import GpuMeasurer
from moegen.tune.compile_pool import CompilePool
from moegen.tune.trial import Measurement
from tests.support import misbehaviour
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
        with CompilePool(4) as made:  # a pool for each process that runs these tests
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
    sys.stdout.flush()


def default_of(folder: Path, gpu: GpuMeasurer, tokens: int) -> LayerTiles:
    (layer,) = import_package(folder).LAYERS
    low_latency = tokens * layer.top_k * 4 <= layer.num_experts
    return default_tiles(layer.gemm("gemm1"), layer.gemm("gemm2"), tokens, gpu.device, low_latency, portable=True)


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


@dataclass
class Pass:
    """All pairs of a bucket, measured one after the other, and what each took in ms."""

    results: list[Measurement]
    ms: list[float]

    @classmethod
    def of(cls, gpu: GpuMeasurer, tokens: int, pairs: list[LayerTiles]) -> "Pass":
        best: float | None = None
        results, ms = [], []
        for pair in pairs:
            began = gpu.usage.measuring_s
            found = gpu.measure(tokens, pair, best)
            ms.append((gpu.usage.measuring_s - began) * 1e3)
            results.append(found)
            assert found.status in ("ok", "slow"), found
            assert found.us is not None
            best = min(best or found.us, found.us)
        return cls(results, ms)

    @property
    def us(self) -> list[float]:
        return [found.us or 0.0 for found in self.results]

    def __str__(self) -> str:
        slow = sum(found.status == "slow" for found in self.results)
        spread = max(found.spread for found in self.results)
        cost = f"first {self.ms[0]:.0f}, median {statistics.median(self.ms):.1f}, most {max(self.ms[1:]):.0f} ms a pair"
        return f"{self.us[0]:.1f} us -> {min(self.us):.1f} us; {slow} slow; spread up to {spread:.1%}; {cost}"


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("name", LAYERS)
def test_pairs_are_checked_and_timed(name: str, tokens: int, packages: dict[str, Path], pool: CompilePool) -> None:
    """Twice, in processes of their own, and no kernel is compiled on the GPU's side.

    Times are shown and not compared: others may be using the GPU.
    """
    folder = packages[name]
    passes = []
    for again in (False, True):
        with measurer(folder, pool) as gpu:
            pairs = pairs_of(folder, gpu, tokens)
            began = time.perf_counter()
            gpu.prefetch(tokens, pairs)
            passes.append(Pass.of(gpu, tokens, pairs))
            wall, usage = time.perf_counter() - began, gpu.usage
            finals = gpu.compare(tokens, [pairs[0], pairs[1], pairs[0]])
            show(
                f"{name} T={tokens}{', again' if again else ''}: {len(pairs)} pairs in {wall:.2f} s, waiting for the "
                f"compiler {usage.waiting_s:.2f} s, preparing {usage.preparing_s:.2f} s; {passes[-1]}; "
                f"finals {finals[0].us:.1f} us, spread {finals[0].spread:.1%}"
            )
            assert finals[0] == finals[2]
            assert (usage.starts, usage.compiled) == (1, 0), "0 kernels are compiled otherwise than they are launched"
    ratios = [one / other for one, other in zip(passes[0].us, passes[1].us, strict=True)]
    show(f"{name} T={tokens}: first pass over second {min(ratios):.3f} to {max(ratios):.3f}")
    show(f"pool: {pool.compiled} kernels, {pool.compiler_s / pool.compiled:.2f} s each")


@pytest.mark.parametrize(
    ("kind", "status", "message", "starts"),
    [
        ("WRONG", "wrong", "relative error", 1),
        ("UNWRITTEN", "wrong", "relative error nan", 1),
        ("OUT_OF_MEMORY", "resources", "out of memory", 1),
        ("ILLEGAL", "crash", "CUDA error", 2),
        ("EXIT", "crash", "exit code 3: no way out", 2),
        ("HANG", "timeout", "within 8 s", 2),
    ],
)
def test_a_failure_is_a_result_and_the_next_config_is_measured(
    kind: str, status: str, message: str, starts: int, packages: dict[str, Path], pool: CompilePool
) -> None:
    folder = packages["small"]
    with measurer(folder, pool, "Saboteur", time_limit_s=8.0) as gpu:
        good = default_of(folder, gpu, 64)
        bad = replace(good, gemm1=replace(good.gemm1, GROUP_SIZE_M=getattr(misbehaviour, kind)))
        gpu.prefetch(64, [good, bad])
        first = gpu.measure(64, good, None)
        began = time.perf_counter()
        found = gpu.measure(64, bad, None)
        failed = time.perf_counter()
        assert (found.status, found.us) == (status, None), found
        assert message in found.message
        second = gpu.measure(64, good, None)
        show(f"{kind}: {failed - began:.1f} s to fail, {time.perf_counter() - failed:.1f} s until the next is measured")
        assert first.us is not None
        assert second.us is not None
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
