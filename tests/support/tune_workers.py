"""Workers for the tuner's child processes that misbehave on demand; a child imports them by name."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moegen.bench.workload import LayerCall, draw_routing, draw_weights
from moegen.load import import_package
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles
from moegen.tune.cache_keys import settle_cache_keys
from moegen.tune.compile_pool import Compilation, Job
from moegen.tune.gpu import Answer, Compare, Describe, GpuWorker, Measure, Prepare, Setup, package_call
from moegen.tune.space import OPS
from moegen.tune.trial import Measurement
from tests.support.misbehaviour import EXIT, HANG, ILLEGAL, OUT_OF_MEMORY, UNWRITTEN, WRONG, misbehave

H200 = DeviceFacts("NVIDIA H200", "cuda", "90", 132, 232_448)


class FakeCompiler:
    """Compiles nothing; a job's GROUP_SIZE_M says what happens, and its answer tells how many jobs came before."""

    def __init__(self) -> None:
        self.jobs = 0

    def __call__(self, job: Job) -> Compilation:
        if job.op == "gemm1":
            misbehave(job.tiles.gemm1.GROUP_SIZE_M)
        self.jobs += 1
        return Compilation(compiled=1, seconds=0.5)


class SlowCompiler:
    """Compiles nothing, in PAUSE seconds; answers when it began, as `compiled` µs, and when it ended, as `seconds`."""

    PAUSE = 0.3

    def __call__(self, _: Job) -> Compilation:
        began = time.monotonic()
        time.sleep(self.PAUSE)
        return Compilation(seconds=time.monotonic(), compiled=round(began * 1e6))


class NoCompiler:
    """Finds that every kernel compiles, and that those of 8 stages are too large."""

    def __call__(self, job: Job) -> Compilation:
        if job.op in OPS and job.tiles.gemm1.num_stages == 8:
            return Compilation(failure=Measurement("resources", message=f"{job.op}: too large"))
        return Compilation()


class FakeGpu:
    """The protocol of GpuWorker without a GPU: a config takes BLOCK_SIZE_N µs; says its process and its anchor's N."""

    def __init__(self, setup: Setup) -> None:
        if setup.slug == "cannot start":
            raise RuntimeError("no CUDA-capable device is detected")
        self.setup = setup
        self.prepared = 0

    def __call__(self, request: object) -> object:
        match request:
            case Describe():
                return H200
            case Prepare(tokens):
                if tokens == 0:
                    raise MemoryError("one weight copy needs 1000 GB")
                self.prepared = tokens
                return "ready"
            case Measure(tokens, tiles, _, anchor):
                assert tokens == self.prepared
                return self.answer(tiles, anchor)
            case Compare(tokens, finalists):
                assert tokens == self.prepared
                return Answer(tuple(self.answer(tiles, None).measurements[0] for tiles in finalists))
        raise TypeError(request)

    def answer(self, tiles: LayerTiles, anchor: LayerTiles | None) -> Answer:
        kind = tiles.gemm1.GROUP_SIZE_M
        misbehave(kind)
        if kind == WRONG:
            return Answer((Measurement("wrong", message="relative error 1"),))
        if kind == ILLEGAL:
            return Answer((Measurement("crash", message="illegal memory access"),), lost=True)
        message = f"{os.getpid()} {anchor and anchor.gemm1.BLOCK_SIZE_N}"
        return Answer((Measurement("ok", float(tiles.gemm1.BLOCK_SIZE_N), message=message),), compiled=1)


class Saboteur(GpuWorker):
    """The real worker, whose layer calls misbehave on the GPU."""

    def _run(self, call: Any, tiles: LayerTiles) -> torch.Tensor:
        kind = tiles.gemm1.GROUP_SIZE_M
        out: torch.Tensor = call.out
        if kind == UNWRITTEN:
            return out
        if kind == HANG:
            torch.cuda._sleep(10**11)  # about a minute
        if kind == ILLEGAL:
            torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")].sum()
        if kind == OUT_OF_MEMORY:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        misbehave(kind if kind == EXIT else 0)
        super()._run(call, tiles)
        if kind == WRONG:
            out[-1] += 1
        return out


class StubGpu:
    """Launches a layer as GpuWorker does, on CPU tensors, down to a driver that loads and launches nothing."""

    def __init__(self, folder: Path, slug: str) -> None:
        import triton
        from triton import knobs

        self.module = import_package(folder)
        settle_cache_keys(self.module)
        self.layer = next(layer for layer in self.module.LAYERS if layer.slug == slug)
        self.weights = draw_weights(self.layer, torch.Generator().manual_seed(0))
        triton.runtime.driver.set_active(StubDriver())
        self.compiled: list[str] = []
        knobs.compilation.listener = self.listen

    def listen(self, *, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            self.compiled.append(src.name)

    def __call__(self, request: tuple[int, LayerTiles]) -> list[str]:
        """The kernels that a call of so many tokens with these tiles had to compile."""
        tokens, tiles = request
        self.compiled.clear()
        hidden = torch.zeros(tokens, self.layer.hidden_size, dtype=self.layer.dtype)
        popularity = torch.zeros(self.layer.local_experts)
        routing = draw_routing(tokens, self.layer.top_k, popularity, torch.Generator().manual_seed(0))
        call = package_call(self.module, LayerCall(hidden, self.weights, *routing))
        self.module.runtime.layer.run(self.layer, call, tiles)
        return list(self.compiled)


class StubDriver:
    """As much of a driver as a launch asks for."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, None, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": H200.shared_memory},
    )

    def launcher_cls(self, *_: object) -> Any:
        return lambda *_: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device
