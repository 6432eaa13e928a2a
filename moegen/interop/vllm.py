"""vLLM's tuned files: `E=…,N=…,device_name=…[,dtype=…][,block_shape=[…]].json`, one tile config for both GEMMs.

As vLLM 0.33.0 looks them up, in $VLLM_TUNED_CONFIG_FOLDER and then in its own `fused_moe/configs/`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from moegen.interop.strict import FileError
from moegen.interop.table import entry, table_text
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import VariantSpec

DTYPES = {"fp8_w8a8": "fp8_w8a8", "int8_w8a16": "int8_w8a16", "int4_w4a16": "int4_w4a16"}


def device_name(gpu: str) -> str:
    """The GPU's name as vLLM writes it; every H200 has one name."""
    name = re.sub("[ /]+", "_", gpu)
    return "NVIDIA_H200" if "H200" in name.split("_") else name


def file_name(variant: VariantSpec, gpu: str) -> str:
    """The name under which vLLM looks for the layer's file; FileError for a scheme that it has no file for.

    `gpu` is the name as `device_name` gives it.
    """
    scheme = variant.scheme
    if scheme.kind and scheme.mode not in DTYPES:
        reason = "it reads the file of bfloat16" if scheme.mode == "int8_w8a8" else "other kernels run it"
        raise FileError(f"{variant.slug}: vLLM has no tuned file for {scheme.mode}: {reason}")
    dtype = DTYPES[scheme.mode] if scheme.kind else "float32" if variant.dtype == "float32" else ""
    block = scheme.block_shape
    parts = [f"E={variant.local_experts}", f"N={variant.intermediate_size}", f"device_name={gpu}"]
    parts += [f"dtype={dtype}"] if dtype else []
    parts += [f"block_shape=[{block[0]},{block[1]}]"] if block is not None and all(block) else []
    return ",".join(parts) + ".json"


def export(
    variant: VariantSpec,
    gpu: str,
    tiles: Mapping[int, LayerTiles],
    versions: Mapping[int, str],
    common: Mapping[int, TileConfig],
) -> dict[Path, str]:
    """Path below the output folder -> text.

    gpu is the driver's name; versions: the Triton version of each token count; common: the tile config that both GEMMs
    use at a token count, gemm1's where there is none. FileError as in `file_name`.
    """
    table = {tokens: common.get(tokens, pair.gemm1) for tokens, pair in tiles.items()}
    same = set(versions.values())
    head = {"triton_version": same.pop()} if len(same) == 1 else {}
    return {Path(file_name(variant, device_name(gpu))): table_text(table, head)}


def default_tile(variant: VariantSpec, tokens: int) -> TileConfig:
    """What vLLM uses where it has no file, unquantised and for fp8."""
    block = variant.scheme.block_shape
    if block is not None:
        low = tokens <= 8 and block[0] % 64 == 0
        wide, stages = (64 if low else block[0]), (4 if low and tokens <= 4 else 3)
        return TileConfig(16 if tokens <= 64 else 64, wide, block[1], 1 if tokens <= 16 else 32, num_stages=stages)
    return TileConfig(
        BLOCK_SIZE_M=next(size for size, most in ((16, 32), (32, 96), (64, 512), (128, tokens)) if tokens <= most),
        BLOCK_SIZE_N=64 if tokens <= 64 else 128,
        BLOCK_SIZE_K=128 if variant.scheme.kind or tokens <= 64 else 64,
        GROUP_SIZE_M=16 if tokens // variant.local_experts > 128 else 1,
        num_warps=4 if tokens <= 128 else 8,
        num_stages=4 if tokens <= 32 else 3,
    )


def alike(pair: LayerTiles) -> bool:
    """Whether both GEMMs have one tile config, as far as vLLM's files go."""
    return entry(pair.gemm1) == entry(pair.gemm2)
