"""Where measurements come from: a GPU of this machine or a folder of recorded sweeps; `moegen tune` asks them alike."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import triton

from moegen.bench import ROUTINGS
from moegen.interop.strict import FileError
from moegen.runtime.configs import BUCKETS
from moegen.runtime.device import DeviceFacts
from moegen.runtime.layer import is_low_latency
from moegen.runtime.tile import LayerTiles
from moegen.spec import VariantSpec
from moegen.tune import client, compile_pool
from moegen.tune.client import GpuMeasurer, Usage
from moegen.tune.compile_pool import CompilePool
from moegen.tune.record import layer_of
from moegen.tune.replay import Replay, Sweep, read_sweep
from moegen.tune.space import LayerSpace, layer_space
from moegen.tune.trial import Measurement, Measurer

STANDARD = tuple(tokens for tokens in BUCKETS if tokens <= 4096)  # those of vLLM's and SGLang's files


class Source(Protocol):
    """Measurements of the layers of one package on one GPU.

    routing, triton, torch: what times depend on, as records state them.
    """

    routing: str
    triton: str
    torch: str

    @property
    def device(self) -> DeviceFacts:
        """Facts of the GPU."""

    @property
    def usage(self) -> Usage:
        """What was measured and waited for so far, over all layers."""

    def buckets(self, variant: VariantSpec, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """The token counts of `wanted` that can be measured; None: all there are."""

    def space(self, variant: VariantSpec, tokens: int) -> LayerSpace:
        """What may be tried for one layer at one token count."""

    def measurer(self, variant: VariantSpec) -> Measurer:
        """The measurer of one layer, which ends that of any other."""


class GpuSource:
    """One GPU of this machine; `jobs` processes compile for it. A context manager.

    routing: a file of recorded topk_ids, or None for balanced and power-law routing by turns. MeasurerError where the
    GPU cannot run the package.
    """

    triton = triton.__version__
    torch = torch.__version__.split("+")[0]
    compiler, worker = compile_pool.WORKER, client.WORKER

    def __init__(
        self,
        package: Path,
        variants: Sequence[VariantSpec],
        gpu: int,
        jobs: int | None,
        routing: Path | None,
        seed: int,
    ) -> None:
        self._package, self._gpu, self._file, self._seed = package, gpu, routing, seed
        self._first = variants[0]
        self._pool = CompilePool(jobs, worker=self.compiler)
        self._measurer: GpuMeasurer | None = None
        self._slug = ""
        self._device: DeviceFacts | None = None
        self._used: list[Usage] = []
        self.routing = "+".join(ROUTINGS) if routing is None else _named(routing)

    def __enter__(self) -> "GpuSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self._pool.close()

    @property
    def device(self) -> DeviceFacts:
        """Facts of the GPU. MeasurerError if there is none, or none that runs the package."""
        if self._device is None:
            self._device = self._of(self._first.slug).device
        return self._device

    @property
    def usage(self) -> Usage:
        """The sum over the layers so far, and what was compiled for them."""
        pool = self._pool
        total = Usage(compilers=pool.workers, ahead=pool.compiled, compiler_s=pool.compiler_s)
        for one in self._used:
            total.statuses.update(one.statuses)
            for name in ("waiting_s", "preparing_s", "measuring_s", "starts", "compiled"):
                setattr(total, name, getattr(total, name) + getattr(one, name))
        return total

    def buckets(self, variant: VariantSpec, wanted: Sequence[int] | None) -> tuple[int, ...]:  # noqa: ARG002
        """What is wanted: a GPU measures any token count. The standard ones by default."""
        return tuple(wanted or STANDARD)

    def space(self, variant: VariantSpec, tokens: int) -> LayerSpace:
        """The space for this GPU."""
        layer = layer_of(variant)
        low_latency = is_low_latency(layer, tokens, None)
        return layer_space(layer.gemm("gemm1"), layer.gemm("gemm2"), tokens, self.device, low_latency)

    def measurer(self, variant: VariantSpec) -> Measurer:
        """The process with the GPU stays until another layer is asked for: its weights are drawn only once."""
        return self._of(variant.slug)

    def _of(self, slug: str) -> GpuMeasurer:
        if self._measurer is None or self._slug != slug:
            self._drop()
            self._slug = slug
            self._measurer = GpuMeasurer(
                self._package, slug, self._gpu, self._pool, seed=self._seed, routing=self._file, worker=self.worker
            ).__enter__()
            self._used.append(self._measurer.usage)
        return self._measurer

    def _drop(self) -> None:
        if self._measurer is not None:
            self._measurer.__exit__()
            self._measurer = None


class ReplaySource:
    """The sweeps in a folder, all of one GPU. A context manager, as GpuSource is.

    FileError for a folder without sweeps, or with sweeps of several GPUs or versions of Triton.
    """

    torch = ""

    def __init__(self, folder: Path) -> None:
        try:
            sweeps = [read_sweep(path) for path in sorted(folder.glob("*.csv.gz"))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{folder}: not recorded sweeps: {error}") from error
        origins = sorted({(sweep.device.name, sweep.triton) for sweep in sweeps})
        if len(origins) != 1:
            raise FileError(f"{folder}: sweeps of one GPU and one Triton are needed, found: {origins or 'none'}")
        self._sweeps = sweeps
        self.device = sweeps[0].device
        self.triton = sweeps[0].triton
        self.routing = f"replay of {folder.resolve().name}"
        self.usage = Usage()

    def __enter__(self) -> "ReplaySource":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def buckets(self, variant: VariantSpec, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """Those of `wanted` that were recorded."""
        recorded = sorted(sweep.tokens for sweep in self._sweeps if sweep.layer == variant.slug)
        return tuple(tokens for tokens in recorded if wanted is None or tokens in wanted)

    def space(self, variant: VariantSpec, tokens: int) -> LayerSpace:
        """The space that was swept."""
        return next(s.space for s in self._sweeps if (s.layer, s.tokens) == (variant.slug, tokens))

    def measurer(self, variant: VariantSpec) -> Measurer:
        """The recorded times themselves, without simulated noise: a run that goes on must not differ from another."""
        return _Counted([sweep for sweep in self._sweeps if sweep.layer == variant.slug], self.usage)


class _Counted(Replay):
    """A replay that counts its answers as a GPU's measurer does."""

    def __init__(self, sweeps: Sequence[Sweep], usage: Usage) -> None:
        super().__init__(sweeps)
        self._usage = usage

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        found = super().measure(tokens, tiles, best_us)
        self._usage.statuses[found.status] += 1
        return found


def _named(routing: Path) -> str:
    return f"{routing.name} {hashlib.sha256(routing.read_bytes()).hexdigest()[:12]}"
