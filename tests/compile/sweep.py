"""Compile forms of the kernels for one target in one process: `python -m tests.compile.sweep FOLDER TARGET CASE …`.

Packages go below FOLDER; stdout is one JSON list, a record a kernel. The Triton that PYTHONPATH finds first compiles.
"""

import json
import sys
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import triton

from moegen.aot import _compile_target, compile_call, meta_call
from moegen.device import target_facts
from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.cooperative_sizes import cooperative_memory, joins
from moegen.runtime.tile import LayerTiles, TileConfig, shared_memory
from moegen.spec import Parallel
from tests.support.packages import any_activation, portable_tiles, spec_of
from tests.support.weights import SMALL_SCHEMES

# Of 16 experts and top_k 2: 2 tokens are low-latency, 3 are aligned, 1024 reach the largest BLOCK_SIZE_M. All of the
# portable family: "cooperative" has its cases below, "stream" a sweep of its own.
LOW_LATENCY, BOTH, ALL_TILES = 2, 3, 1024
SIZES = {"num_experts": 16, "top_k": 2, "hidden_size": 256, "intermediate_size": 256}

# name -> fields of the spec, tokens
PLAIN_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "tiles": ({}, ALL_TILES),
    "tails": ({"hidden_size": 200, "intermediate_size": 88}, BOTH),  # no tile divides the reductions
    "float16": ({"dtypes": ("float16",)}, BOTH),
    "float32": ({"dtypes": ("float32",)}, BOTH),
    "shard": ({"parallel": (Parallel(ep=2),)}, LOW_LATENCY),  # without and with an expert_map
    "many experts": ({"num_experts": 512, "hidden_size": 64, "intermediate_size": 64}, LOW_LATENCY),
    "silu, clamped": ({"activation": Activation.of("silu", limit=10.0)}, LOW_LATENCY),
    "situ, clamped": ({"activation": Activation.of("situ", beta=4.0, limit=25.0)}, LOW_LATENCY),
    **{name: ({"activation": any_activation(name)}, LOW_LATENCY) for name in ACTIVATIONS if name != "silu"},
    "silu, bias": ({"bias": True}, BOTH),
    **{f"{name}, bias": ({"activation": name, "bias": True}, LOW_LATENCY) for name in ("swigluoai", "relu2_no_mul")},
}
# Every way to store weights; g64 and the ue8m0 form of blocks differ from their neighbours in numbers alone.
SCHEMES = tuple(q for q in SMALL_SCHEMES if q not in ("int4_w4a16:g64", "fp8_w8a8:32x32"))
# One scheme a kind of product, with every tile of the heuristic: on cuda:90 they must become wgmma.
TILED = ("int8_w8a8:channel", "fp8_w8a8:128x128", "int4_w4a16:g128z", "mxfp4_w4a16")
# What a compiler's back end may treat in its own way: types, ways to decode and to multiply, both assignments.
FEW = (
    "tails", "fp8_w8a8:128x128", "int4_w4a16:g32z", "float32", "shard", "gelu", "int8_w8a8:channel", "mxfp4_w4a8",
    "nvfp4_w4a16",
)  # fmt: skip

# The family "cooperative": every form of its kernels, a tile pair each.
_BROAD = TileConfig(128, 256, 128, 4, PDL=True, num_warps=8, num_stages=4, family="cooperative")
_SLIM = replace(_BROAD, BLOCK_SIZE_N=128, num_stages=6)
_LOW = replace(_BROAD, BLOCK_SIZE_M=64)
_SLIM_LOW = replace(_LOW, BLOCK_SIZE_N=128, num_stages=6)
_SWAPPED = replace(_BROAD, BLOCK_SIZE_M=16, SWAP_AB=True, num_stages=6)
_SLIM_SWAPPED = replace(_SWAPPED, BLOCK_SIZE_N=128, num_stages=8)


def _deep(tile: TileConfig) -> TileConfig:
    """The same for 16-bit values: a step takes 128 bytes of a row."""
    return replace(tile, BLOCK_SIZE_K=64)


COOPERATIVE_CASES: dict[str, tuple[dict[str, Any], LayerTiles]] = {
    "cooperative": ({"quant": ("fp8_w8a8:128x128",)}, LayerTiles(_BROAD, _BROAD)),
    "cooperative, narrow, tails": (
        {"quant": ("fp8_w8a8:128x128ue8m0",), "dtypes": ("float16",), "hidden_size": 720, "bias": True},
        LayerTiles(_SLIM, _SLIM),
    ),
    "cooperative, int8, un-gated": (
        {"quant": ("int8_w8a8:128x128",), "activation": "relu2_no_mul", "bias": True, "intermediate_size": 656},
        LayerTiles(_BROAD, _BROAD),
    ),
    "cooperative, 64 rows": ({"quant": ("fp8_w8a8:128x128",)}, LayerTiles(replace(_LOW, num_stages=5), _LOW)),
    "cooperative, swapped": ({"quant": ("fp8_w8a8:128x128",)}, LayerTiles(_SWAPPED, _SWAPPED)),
    "cooperative, 32 rows swapped, bias, un-gated": (
        {"quant": ("fp8_w8a8:128x128",), "activation": "relu2_no_mul", "bias": True, "intermediate_size": 656},
        LayerTiles(*[replace(_SWAPPED, BLOCK_SIZE_M=32, num_stages=5)] * 2),
    ),
    "cooperative, int8 channel, swapped": ({"quant": ("int8_w8a8:channel",)}, LayerTiles(_SLIM_SWAPPED, _SLIM_SWAPPED)),
    "cooperative, channel": ({"quant": ("fp8_w8a8:channel",)}, LayerTiles(_BROAD, _BROAD)),
    "cooperative, int8 tensor, narrow, un-gated": (
        {"quant": ("int8_w8a8:tensor",), "activation": "relu2_no_mul", "bias": True},
        LayerTiles(_SLIM, _SLIM),
    ),
    "cooperative, int8 channel": ({"quant": ("int8_w8a8:channel",)}, LayerTiles(_BROAD, _BROAD)),
    "cooperative, 16 bits": ({}, LayerTiles(_deep(_BROAD), _deep(_BROAD))),
    "cooperative, 16 bits, narrow, tails": (
        {"dtypes": ("float16",), "hidden_size": 712, "intermediate_size": 88, "bias": True},
        LayerTiles(_deep(_SLIM), _deep(_SLIM)),
    ),
    "cooperative, 16 bits, 64 rows": ({}, LayerTiles(_deep(replace(_LOW, num_stages=5)), _deep(_LOW))),
    "cooperative, 16 bits, swapped, bias": (
        {"dtypes": ("float16",), "bias": True, "hidden_size": 712, "intermediate_size": 88},
        LayerTiles(_deep(_SLIM_SWAPPED), _deep(_SLIM_SWAPPED)),
    ),
    "cooperative, 16 bits, 64 narrow rows": ({}, LayerTiles(_deep(_SLIM_LOW), _deep(_SLIM_LOW))),
}
COOPERATIVE_KERNELS = ("gemm1_cooperative", "gemm2_cooperative", "layer_cooperative")
COOPERATIVE_TOKENS = 300


def cases(target: str) -> dict[str, tuple[dict[str, Any], int]]:
    """All that can be compiled for `target` of the portable family."""
    quantised = {quant: ({"quant": (quant,)}, LOW_LATENCY) for quant in (*SCHEMES, "fp8_w8a8:128x128")}
    if target == "cuda:90":
        quantised |= {f"{quant}, tiles": ({"quant": (quant,)}, ALL_TILES) for quant in TILED}
    return PLAIN_CASES | quantised


def cooperative(folder: Path, target: str) -> list[dict[str, Any]]:
    """Compile the cases of "cooperative" for `target`, with the shared memory that is expected: `figure`."""
    records = []
    for case, (fields, tiles) in COOPERATIVE_CASES.items():
        sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 640}  # short reductions would be unrolled
        package = import_package(emit(make_plan(spec_of(**{**sizes, **fields})), folder))._dispatch._PACKAGE
        (layer,) = package.layers
        call = meta_call(package, layer, COOPERATIVE_TOKENS, target_facts(target))
        compiled = compile_call(package, layer, call, tiles, target, COOPERATIVE_KERNELS.__contains__)
        gemms = [layer.gemm(op) for op in ("gemm1", "gemm2")]
        figures = [shared_memory(getattr(tiles, gemm.op), gemm) for gemm in gemms]
        if joins(tiles, gemms[0]):
            figures = [cooperative_memory(tiles.gemm1, *gemms)]
        records += [
            {"case": case, "triton": triton.__version__, "figure": figure, **asdict(item)}
            for item, figure in zip_longest(compiled, figures)
            if item
        ]
    return records


def main(folder: str, target: str, *names: str) -> None:
    """Compile the named cases, on cuda:90 those of "cooperative" as well, and print what came out."""
    records = []
    for case in names:
        fields, tokens = cases(target)[case]
        package = emit(make_plan(spec_of(**{**SIZES, **fields})), Path(folder))
        with portable_tiles(import_package(package)):
            compiled = _compile_target((str(package), target, tokens))
        records += [{"case": case, "triton": triton.__version__, **asdict(item)} for item in compiled]
    if target == "cuda:90":
        records += cooperative(Path(folder), target)
    sys.stdout.write(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
