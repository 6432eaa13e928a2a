"""Compile a package ahead of time for GPUs that are not here, through the package's own launches.

The package runs on meta tensors under a driver that only knows a target; every launch stops after compiling. So what
is compiled is what the dispatcher would launch, specialisation of arguments included.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moegen.device import target_facts
from moegen.load import import_package
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles

TENSOR_CORES = {
    "cuda": re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)"),
    "hip": re.compile(r"\b(v_mfma|v_wmma)"),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel compiled for one target, or the reason why it could not be.

    registers per thread, shared_memory bytes per block, spills bytes per thread; tensor_cores is the instruction
    found (None: scalar arithmetic); error is None on success.
    """

    target: str
    layer: str
    kernel: str
    tokens: int
    constants: str
    registers: int = 0
    shared_memory: int = 0
    spills: int = 0
    tensor_cores: str | None = None
    error: str | None = None


def compile_targets(folder: Path, targets: list[str], max_tokens: int = 65536, jobs: int = 2) -> list[Compiled]:
    """Compile every kernel that the package in `folder` launches for 1..max_tokens tokens, for each target.

    ValueError for an unknown target, before anything is compiled. One process a target, `jobs` at a time.
    """
    for target in targets:
        target_facts(target)
    arguments = [(str(folder), target, max_tokens) for target in targets]
    with ProcessPoolExecutor(min(jobs, len(targets)), mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return [item for found in pool.map(_compile_target, arguments) for item in found]


def _compile_target(arguments: tuple[str, str, int]) -> list[Compiled]:
    folder, target, max_tokens = arguments
    package = import_package(Path(folder))._dispatch._PACKAGE
    facts = target_facts(target)
    found: list[Compiled] = []
    for layer in package.layers:
        for call, tiles in package.distinct_calls(layer, max_tokens, facts, "meta"):
            found += compile_call(package, layer, call, tiles, target)
    return list({replace(item, tokens=0): item for item in reversed(found)}.values())[::-1]


def compile_call(
    package: Any,  # noqa: ANN401 - an emitted package's classes exist only once it is imported
    layer: Any,  # noqa: ANN401
    call: Any,  # noqa: ANN401
    tiles: LayerTiles,
    target: str,
    wanted: Callable[[str], bool] = lambda _: True,
) -> list[Compiled]:
    """Compile what one call on meta tensors launches, as far as `wanted(kernel name)` is true; one record a kernel.

    It ends with the first kernel that does not compile. Compiled kernels stay in Triton's cache on disk. The process
    has a driver without a GPU from then on.
    """
    run, tokens = sys.modules[type(package).__module__].run, call.hidden_states.shape[0]
    return compile_launches(lambda: run(layer, call, tiles), layer.slug, tokens, target, wanted)


def compile_launches(
    launch: Callable[[], None], layer: str, tokens: int, target: str, wanted: Callable[[str], bool] = lambda _: True
) -> list[Compiled]:
    """The same for whatever `launch` launches on meta tensors; `layer` and `tokens` only name the records."""
    failed = []
    with _compiling_for(target, wanted) as compiled:
        try:
            launch()
        except Exception as failure:  # noqa: BLE001 - a compiler may raise anything; it becomes a record
            kernel, constants = getattr(failure, "moegen_launch", (f"launch {len(compiled) + 1}", ""))
            failed = [Compiled(target, layer, kernel, tokens, constants, error=_reason(failure))]
    return [_measure(target, layer, tokens, kernel, text) for kernel, text in compiled] + failed


def meta_call(package: Any, layer: Any, tokens: int, device: DeviceFacts) -> Any:  # noqa: ANN401 - as above
    """A call of `tokens` tokens on meta tensors, without an expert_map, for `compile_call`."""
    call, _ = next(package.distinct_calls(layer, 1, device, "meta"))
    hidden_states = call.hidden_states.new_empty((tokens, layer.hidden_size))
    return replace(
        call,
        hidden_states=hidden_states,
        topk_weights=call.topk_weights.new_empty((tokens, layer.top_k)),
        topk_ids=call.topk_ids.new_empty((tokens, layer.top_k)),
        out=torch.empty_like(hidden_states),
    )


def _reason(failure: Exception) -> str:
    """Type, place and reason: the first and the last line of a compiler's message, without the source between."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {' '.join(dict.fromkeys([*lines[:1], *lines[-1:]]))}"


@contextmanager
def _compiling_for(target: str, wanted: Callable[[str], bool]) -> Iterator[list[tuple[Any, str]]]:
    """Inside, a launch of a wanted kernel compiles it for `target` and appends it to the list; nothing is launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)

    class TargetDriver:
        def get_current_target(self) -> GPUTarget:
            return gpu

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    compiled: list[tuple[Any, str]] = []
    original = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - Triton's own signature
        if not wanted(self.__name__):
            return None
        shown = " ".join(f"{key}={value}" for key, value in kwargs.items() if key.isupper() or key.startswith("num_"))
        kwargs["warmup"] = True
        try:
            kernel = original(self, *args, **kwargs)
        except Exception as failure:
            failure.moegen_launch = (self.__name__, shown)  # type: ignore[attr-defined]
            raise
        compiled.append((kernel, shown))
        return kernel

    driver.set_active(TargetDriver())  # stays: this process exists to compile for one target
    triton.JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        triton.JITFunction.run = original


def _measure(target: str, layer: str, tokens: int, kernel: Any, constants: str) -> Compiled:  # noqa: ANN401
    backend = target.split(":")[0]
    assembly = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    usage = _cuda_usage(kernel) if backend == "cuda" else _hip_usage(assembly)
    match = TENSOR_CORES[backend].search(assembly)
    return Compiled(
        target,
        layer,
        kernel.metadata.name,
        tokens,
        constants,
        registers=usage[0],
        shared_memory=kernel.metadata.shared,
        spills=usage[1],
        tensor_cores=match.group(1) if match else None,
    )


def _cuda_usage(kernel: Any) -> tuple[int, int]:  # noqa: ANN401
    """(registers a thread, bytes of local memory a thread) as cuobjdump, which Triton carries, reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    spills = max((int(match.group(1)) for match in (stack, local) if match), default=0)
    return (int(registers.group(1)) if registers else 0), spills


def _hip_usage(assembly: str) -> tuple[int, int]:
    counts = {}
    for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        match = re.search(rf"\.{key}:\s*(\d+)", assembly)
        counts[key] = int(match.group(1)) if match else 0
    return counts["vgpr_count"], 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])
