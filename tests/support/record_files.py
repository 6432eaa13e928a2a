"""Config records, written where a package looks for them."""

import json
from pathlib import Path
from types import ModuleType

import triton

from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles


def write_record(package: ModuleType, folder: Path, device: DeviceFacts, buckets: dict[int, LayerTiles]) -> None:
    """The record of the package's first layer on `device`, below `folder`: a package's `configs` or a user's folder."""
    layer = package.LAYERS[0]
    tiles = {
        str(tokens): {op: getattr(both, op).to_dict() for op in ("gemm1", "gemm2")} for tokens, both in buckets.items()
    }
    record = {
        "schema": package.runtime.configs.SCHEMA,
        "gpu": {"name": device.name, "arch": device.arch},
        "layer": package.runtime.configs.layer_facts(layer),
        "triton": triton.__version__,
        "buckets": tiles,
    }
    path = folder / device.slug / f"{layer.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
