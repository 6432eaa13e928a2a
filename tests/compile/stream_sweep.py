"""Compile the family "stream" for cuda:90 in one process: `python -m tests.compile.stream_sweep FOLDER CASE …`.

Packages go below FOLDER, each with a config record; stdout is one JSON list, a record a kernel.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import triton

from moegen.aot import _compile_target
from moegen.device import TARGETS
from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.device import DeviceFacts
from moegen.runtime.stream_sizes import most_tokens
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import Parallel
from tests.support.packages import spec_of
from tests.support.record_files import write_record

TARGET = "cuda:90"
SIZES = {"num_experts": 16, "top_k": 4, "hidden_size": 512, "intermediate_size": 256}
LOW = TileConfig(1, 16, 512, PDL=True, num_warps=4, num_stages=5, family="stream")
HIGH = TileConfig(1, 32, 256, PDL=True, num_warps=8, num_stages=5, family="stream")
# Of 8 bits a tile has half the bytes.
LOW_8, HIGH_8 = replace(LOW, num_stages=9), replace(HIGH, num_stages=9)
DEEP_8 = replace(LOW_8, BLOCK_SIZE_K=1024, num_warps=8, num_stages=4)
WIDE_8 = replace(LOW_8, num_warps=8)
LOWEST = replace(LOW, BLOCK_SIZE_N=8)
BLOCK = {"quant": ("fp8_w8a8:128x128",)}
CHANNEL = {"quant": ("fp8_w8a8:channel",)}

# name -> fields of the spec, tile
CASES: dict[str, tuple[dict[str, Any], TileConfig]] = {
    "low tiles": ({}, LOW),
    "high tiles": ({}, HIGH),
    "low tiles, 8 warps": ({}, replace(LOW, num_warps=8)),
    "lowest tiles": ({}, LOWEST),
    "two tokens": ({}, replace(LOW, BLOCK_SIZE_M=2, num_stages=4)),
    "tails": ({"hidden_size": 328, "intermediate_size": 136}, LOW),
    "float16": ({"dtypes": ("float16",)}, HIGH),
    "bias, interleaved": ({"activation": "swigluoai", "bias": True}, LOW),
    "bias, high": ({"activation": "swigluoai", "bias": True}, HIGH),
    "not gated": ({"activation": "relu2_no_mul"}, LOW),
    "erf": ({"activation": "gelu"}, LOW),
    "clamp": ({"activation": "situ"}, HIGH),
    "shard": ({"parallel": (Parallel(ep=2),)}, LOW),  # without and with an expert_map
    "fp8, low": (BLOCK, LOW_8),
    "fp8, low, 8 warps": (BLOCK, replace(LOW_8, num_warps=8)),
    "fp8, high": ({**BLOCK, "hidden_size": 7168, "top_k": 8}, HIGH_8),
    "fp8, deep": (BLOCK, DEEP_8),
    "fp8, tails, bias, interleaved": (
        {**BLOCK, "hidden_size": 592, "intermediate_size": 272, "activation": "swigluoai", "bias": True},
        LOW_8,
    ),
    "fp8, not gated": ({**BLOCK, "activation": "relu2_no_mul"}, LOW_8),
    "fp8, ue8m0, shard": ({"quant": ("fp8_w8a8:128x128ue8m0",), "parallel": (Parallel(ep=2),)}, LOW_8),
    "int8": ({"quant": ("int8_w8a8:128x128",)}, LOW_8),
    "fp8, two tokens": (BLOCK, replace(LOW_8, BLOCK_SIZE_M=2)),
    "fp8, five tokens": (BLOCK, replace(LOW_8, BLOCK_SIZE_M=4, num_stages=6)),
    "fp8, channel": (CHANNEL, WIDE_8),
    "fp8, channel, tails, bias, interleaved": (
        {**CHANNEL, "hidden_size": 592, "intermediate_size": 144, "activation": "swigluoai", "bias": True},
        HIGH_8,
    ),
    "fp8, channel, deep": (CHANNEL, DEEP_8),
    "fp8, channel, two segments": ({**CHANNEL, "intermediate_size": 1536}, LOW_8),
    "fp8, tensor": ({"quant": ("fp8_w8a8:tensor",)}, WIDE_8),
    "fp8, tensor, shard": ({"quant": ("fp8_w8a8:tensor",), "parallel": (Parallel(ep=2),)}, HIGH_8),
    "fp8, tensor and token": ({"quant": ("fp8_w8a8:tensor_token",)}, LOW_8),
    "int8, channel": ({"quant": ("int8_w8a8:channel",)}, WIDE_8),
    "int8, tensor": ({"quant": ("int8_w8a8:tensor",), "activation": "relu2_no_mul"}, LOW_8),
}


def package_with_record(folder: Path, fields: dict[str, Any], tile: TileConfig, device: DeviceFacts) -> Path:
    """An emitted package whose record for `device` has this tile config for as many tokens as it is for."""
    package = emit(make_plan(spec_of(**{**SIZES, **fields})), folder)
    write_record(import_package(package), package / "configs", device, {tile.BLOCK_SIZE_M: LayerTiles(tile, tile)})
    return package


def main(folder: str, *names: str) -> None:
    """Compile the named cases and print what came out."""
    records = []
    for number, case in enumerate(names):
        fields, tile = CASES[case]
        package = package_with_record(Path(folder) / str(number), fields, tile, TARGETS[TARGET])
        compiled = _compile_target((str(package), TARGET, most_tokens(tile.BLOCK_SIZE_M)))
        least = tile.BLOCK_SIZE_M - tile.BLOCK_SIZE_M // 4  # token counts below have a bucket of their own
        compiled = [item for item in compiled if item.tokens >= least]
        records += [{"case": case, "triton": triton.__version__, **asdict(item)} for item in compiled]
    sys.stdout.write(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
