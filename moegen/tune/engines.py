"""`moegen tune --engine vllm`: an installed vLLM's own Triton kernel, tuned by moegen's search.

Written against vLLM 0.33.0: `fused_experts` under `override_config`, `invoke_fused_moe_triton_kernel` to compile ahead.
vLLM has one tile config for both GEMMs, so the search varies gemm1's, and gemm2's stays a placeholder.
"""

import importlib.metadata
import itertools
import os
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any

import torch

from moegen.aot import Compiled, compile_launches
from moegen.bench.timing import Call
from moegen.interop import vllm
from moegen.interop.strict import FileError
from moegen.interop.table import entry
from moegen.load import import_package
from moegen.runtime.align import align_lengths
from moegen.runtime.assignment import low_latency_applies
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, why_illegal
from moegen.spec import VariantSpec
from moegen.tune.compile_pool import CompileWorker, Job
from moegen.tune.gpu import GpuWorker, Setup
from moegen.tune.record import layer_of
from moegen.tune.sources import GpuSource
from moegen.tune.space import Kind, LayerSpace, Space

# The space of vLLM's own tuner, but for BLOCK_SIZE_M, of which only some are plausible for a token count.
BLOCK_SIZES_M = (16, 32, 64, 128, 256)
AXES: dict[str, tuple[int, ...]] = {
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
MODES = ("none", "fp8_w8a8")
DTYPES = ("bfloat16", "float16")  # its kernel multiplies float32 as TF32, which the check does not accept
# Whether vLLM rounds the scales of activations up to powers of two, which it does by default where DeepGEMM runs, also
# for its Triton kernel. The oracle has the layer's own scheme: rounded otherwise, no result is within the tolerance.
ROUNDED_SCALES = ("VLLM_USE_DEEP_GEMM", "VLLM_USE_DEEP_GEMM_E8M0")


def check_variant(variant: VariantSpec) -> None:
    """FileError for a layer that is not tuned with vLLM's kernel here."""
    known = variant.scheme.mode in MODES and variant.dtype in DTYPES
    if not known or variant.activation.slug != "silu" or variant.bias:
        form = f"{variant.quant}, {variant.dtype}, {variant.activation.slug}{', bias' if variant.bias else ''}"
        allowed = f"{' or '.join(MODES)}, {' or '.join(DTYPES)}, silu, without bias"
        raise FileError(f"--engine vllm: {variant.slug}: {form} is not allowed; allowed: {allowed}")


def engine_version() -> str:
    """`vllm-0.33.0`. FileError if vLLM is not installed."""
    try:
        return f"vllm-{importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise FileError("--engine vllm: vLLM is not installed in this environment") from error


def vllm_space(variant: VariantSpec, tokens: int, device: DeviceFacts) -> LayerSpace:
    """What may be tried: BLOCK_SIZE_M near that of vLLM's default, the rest of vLLM's own space as far as legal."""
    default = vllm.default_tile(variant, tokens)
    layer = layer_of(variant)
    gemms = [layer.gemm("gemm1"), layer.gemm("gemm2")]
    step = min(variant.scheme.block_shape or (0,))  # vLLM cuts BLOCK_SIZE_K down to it
    plain = [Gemm(g.op, g.num_experts, g.top_k, g.rows, g.depth, False, g.a_bits, g.w_bits, step) for g in gemms]

    def legal(tile: TileConfig) -> bool:
        return not any(why_illegal(tile, gemm, device) for gemm in plain)

    first: dict[Kind, Space] = {}
    for size in BLOCK_SIZES_M:
        if not default.BLOCK_SIZE_M // 2 <= size <= 2 * default.BLOCK_SIZE_M:
            continue
        every = (
            TileConfig(size, n, k, group, num_warps=warps, num_stages=stages)
            for n, k, group, warps, stages in itertools.product(*AXES.values())
        )
        tiles = [tile for tile in every if legal(tile)]
        if size == default.BLOCK_SIZE_M and default not in tiles:
            tiles.append(default)
        if tiles:
            like = min(tiles, key=lambda tile: _distance(tile, default))
            first[Kind("portable", size)] = Space(like, tuple(tiles))
    second = {kind: Space(placeholder(kind.block_m), (placeholder(kind.block_m),)) for kind in first}
    return LayerSpace(tokens, LayerTiles(default, placeholder(default.BLOCK_SIZE_M)), first, second)


def placeholder(block_m: int) -> TileConfig:
    """Stands for gemm2's tile config, which is gemm1's."""
    return TileConfig(block_m, 64, 64)


def _distance(tile: TileConfig, other: TileConfig) -> int:
    return sum(getattr(tile, field) != getattr(other, field) for field in AXES)


class VllmKernels:
    """vLLM's functions, as one layer needs them; a process is for one layer, since vLLM reads its settings once."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a package's own Layer
        os.environ.update(dict.fromkeys(ROUNDED_SCALES, str(int(layer.scheme.ue8m0))))
        from vllm.model_executor.layers import fused_moe

        self._module: ModuleType = fused_moe
        self._scheme = layer.scheme

    def __call__(self, call: Any, tile: TileConfig) -> torch.Tensor:  # noqa: ANN401 - a package's own Call
        """One layer call under `tile`; returns a new tensor [T, H]."""
        override: AbstractContextManager[object] = self._module.override_config(entry(tile))
        with override:
            options = {"quant_config": self._config(call)} if self._scheme.kind else {}
            out: torch.Tensor = self._module.fused_experts(
                call.hidden_states, call.w13.values, call.w2.values, call.topk_weights, call.topk_ids, **options
            )
        return out

    def _config(self, call: Any) -> object:  # noqa: ANN401 - as above
        """vLLM's quant config of the call's weights."""
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        scheme = self._scheme
        return fp8_w8a8_moe_quant_config(
            w1_scale=call.w13.scale,
            w2_scale=call.w2.scale,
            per_act_token_quant=scheme.kind in ("channel", "tensor_token"),
            per_out_ch_quant=scheme.kind == "channel",
            block_shape=list(scheme.block_shape) if scheme.block_shape else None,
        )


class VllmWorker(GpuWorker):
    """What runs in the process with the GPU: GpuWorker, but for whose kernels it measures."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._kernels = VllmKernels(self._layer)

    def _launches(self, tiles: LayerTiles) -> list[Call]:
        """vLLM returns new tensors, and leaves the calls' own outputs alone."""
        return [partial(self._kernels, call, tiles.gemm1) for call in self._calls]


class VllmCompiler(CompileWorker):
    """What runs in a compiler process: vLLM's launcher on meta tensors, for both GEMMs of a config at once.

    Where this vLLM's launcher is another one, nothing is compiled ahead, and the process with the GPU compiles.
    """

    def kernels(self, job: Job) -> list[Compiled]:
        """Those of the whole call for a job of gemm1, none for the others."""
        if job.op != "gemm1":
            return []
        layer = next(layer for layer in import_package(job.folder).LAYERS if layer.slug == job.slug)
        launch = partial(_launch_both, layer, job.tokens, entry(job.tiles.gemm1))
        return compile_launches(launch, job.slug, job.tokens, job.target)


def _launch_both(layer: Any, tokens: int, config: dict[str, int]) -> None:  # noqa: ANN401 - a package's own Layer
    """What vLLM launches for the two GEMMs of a call. Raises what Triton raises, and nothing else."""
    try:
        from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel as invoke

        slots, block = tokens * layer.top_k, config["BLOCK_SIZE_M"]
        alone = low_latency_applies(tokens, layer.top_k, layer.local_experts, None)
        length, blocks = (slots, slots) if alone else align_lengths(slots, block, layer.local_experts)
        ids = None if alone else _meta(length, dtype=torch.int32)
        assignment = (ids, _meta(blocks, dtype=torch.int32), _meta(1, dtype=torch.int32))
        for op, rows_of_a, top_k in (("gemm1", tokens, layer.top_k), ("gemm2", slots, 1)):
            a, b, a_scale, b_scale = _gemm_arguments(layer, op, rows_of_a)
            weights = _meta(tokens, layer.top_k, dtype=torch.float32)
            out = _meta(tokens, layer.top_k, b.shape[1], dtype=layer.dtype)
            invoke(
                a, b, out, a_scale, b_scale, weights, *assignment, op == "gemm2", top_k, dict(config),
                **_modes(layer),
            )  # fmt: skip
    except Exception as error:
        if hasattr(error, "moegen_launch"):
            raise


def _gemm_arguments(
    layer: Any,  # noqa: ANN401 - as above
    op: str,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A, B and their scales of one GEMM on the meta device."""
    experts, weight_rows, depth = layer.w13_shape if op == "gemm1" else layer.w2_shape
    scheme = layer.scheme
    stored = torch.float8_e4m3fn if scheme.kind else layer.dtype
    a_scale = b_scale = None
    if scheme.kind:
        b_scale = _meta(*scheme.scale_shape(experts, weight_rows, depth), dtype=torch.float32)
        groups = -(-depth // scheme.group_k) if scheme.group_k else 1
        a_scale = _meta(1, dtype=torch.float32) if scheme.kind == "tensor" else _meta(rows, groups, dtype=torch.float32)
    a, b = _meta(rows, depth, dtype=stored), _meta(experts, weight_rows, depth, dtype=stored)
    return a, b, a_scale, b_scale


def _modes(layer: Any) -> dict[str, object]:  # noqa: ANN401 - as above
    import triton.language as tl

    scheme = layer.scheme
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {
        "compute_type": names[layer.dtype],
        "use_fp8_w8a8": scheme.mode == "fp8_w8a8",
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": scheme.kind in ("channel", "tensor_token"),
        "block_shape": list(scheme.block_shape) if scheme.block_shape else None,
    }


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class VllmSource(GpuSource):
    """A GPU of this machine that runs vLLM's kernel."""

    compiler = f"{__name__}:VllmCompiler"
    worker = f"{__name__}:VllmWorker"

    def space(self, variant: VariantSpec, tokens: int) -> LayerSpace:
        """vLLM's own space on this GPU."""
        return vllm_space(variant, tokens, self.device)
