"""Recorded sweeps, and a Measurer that answers from one: the tuner without a GPU.

A sweep is a gzipped CSV whose first line is a comment with the facts of the cell as JSON, so that its space can be
built without the package it was measured with. Its rows vary one GEMM at a time, beside the heuristic's tile config of
the other GEMM at that BLOCK_SIZE_M (`LayerSpace.start`); `us` is the time of the whole layer.
"""

import csv
import gzip
import io
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import Gemm, TileConfig

from .space import LayerSpace, layer_space
from .trial import Measurement

OPS = ("gemm1", "gemm2")
RACE = 1.5  # a config this many times slower than the best is dropped early, as on the GPU
FIELDS = tuple(field.name for field in fields(TileConfig))


@dataclass(frozen=True)
class Sweep:
    """Every config of one layer's space at one token count, measured.

    results: "gemm1" or "gemm2" -> tile config -> Measurement, the other GEMM at `space.start`.
    """

    layer: str
    device: DeviceFacts
    gemm1: Gemm
    gemm2: Gemm
    tokens: int
    low_latency: bool
    triton: str
    results: dict[str, dict[TileConfig, Measurement]]

    @property
    def name(self) -> str:
        """File name: `nvidia-h200__e128_k8_h2048_i768_bf16_silu__t16.csv.gz`."""
        return f"{self.device.slug}__{self.layer}__t{self.tokens}.csv.gz"

    @cached_property
    def space(self) -> LayerSpace:
        """The space that was swept."""
        return layer_space(self.gemm1, self.gemm2, self.tokens, self.device, self.low_latency)


def write_sweep(folder: Path, sweep: Sweep) -> Path:
    """Write `sweep` into `folder` under its name; the same results give the same bytes."""
    facts = asdict(replace(sweep, results={}))
    del facts["results"]
    text = io.StringIO()
    text.write(f"# {json.dumps(facts, sort_keys=True)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["op", *FIELDS, "status", "us", "spread"])
    for op, measured in sweep.results.items():
        for tile, found in measured.items():
            us = "" if found.us is None else f"{found.us:.2f}"
            values = [int(v) if isinstance(v, bool) else v for v in (getattr(tile, f) for f in FIELDS)]
            writer.writerow([op, *values, found.status, us, f"{found.spread:.4f}"])
    path = folder / sweep.name
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    return path
