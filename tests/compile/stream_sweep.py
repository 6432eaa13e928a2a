"""Compile the family "stream" for cuda:90 in one process: `python -m tests.compile.stream_sweep FOLDER`.

Packages with a config record that chooses it go below FOLDER; stdout is one JSON list, a record a kernel.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from moegen.aot import _compile_target
from moegen.device import TARGETS
from moegen.emit import emit
from moegen.load import import_package
from moegen.plan import make_plan
from moegen.runtime.device import DeviceFacts
from moegen.spec import Parallel
from tests.support.packages import spec_of

TARGET = "cuda:90"
TOKENS = 8
SIZES = {"num_experts": 16, "top_k": 4, "hidden_size": 512, "intermediate_size": 256}
DEEP = {"BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 512}
HIGH = {"BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256}

# name -> fields of the spec, tile
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "deep tiles": ({}, DEEP),
    "high tiles": ({}, HIGH),
    "4 warps": ({}, {**DEEP, "num_warps": 4}),
    "tails": ({"hidden_size": 328, "intermediate_size": 136}, DEEP),
    "float16": ({"dtypes": ("float16",)}, HIGH),
    "bias, interleaved": ({"activation": "swigluoai", "bias": True}, DEEP),
    "not gated": ({"activation": "relu2_no_mul"}, DEEP),
    "erf": ({"activation": "gelu"}, DEEP),
    "clamp": ({"activation": "situ"}, DEEP),
    "shard": ({"parallel": (Parallel(ep=2),)}, DEEP),
}


def stream_tile(**changes: int) -> dict[str, Any]:
    """A tile config of the family as a record holds it."""
    base = {"BLOCK_SIZE_M": TOKENS, "num_warps": 8, "num_stages": 6, "PDL": True, "family": "stream"}
    return {**base, **changes}


def package_with_record(folder: Path, fields: dict[str, Any], tile: dict[str, Any], device: DeviceFacts) -> Path:
    """An emitted package whose record for `device` has one tile config for 1 … TOKENS tokens."""
    package = emit(make_plan(spec_of(**{**SIZES, **fields})), folder)
    module = import_package(package)
    facts = sys.modules[f"{module.__name__}.runtime.configs"].layer_facts
    for layer in module.LAYERS:
        record = {
            "schema": 1,
            "gpu": {"name": device.name, "arch": device.arch},
            "layer": facts(layer),
            "triton": triton.__version__,
            "buckets": {str(tokens): {"gemm1": tile, "gemm2": tile} for tokens in (1, 2, 4, 8)},
        }
        path = package / "configs" / device.slug / f"{layer.slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    return package


def main(folder: str) -> None:
    """Compile all cases and print what came out."""
    records = []
    for case, (fields, tile) in CASES.items():
        package = package_with_record(
            Path(folder) / case.replace(" ", "-"), fields, stream_tile(**tile), TARGETS[TARGET]
        )
        compiled = _compile_target((str(package), TARGET, TOKENS))
        records += [{"case": case, "triton": triton.__version__, **asdict(item)} for item in compiled]
    sys.stdout.write(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
