"""Recorded sweeps, and a Measurer that answers from one: the tuner without a GPU.

A sweep is a gzipped CSV whose first line is a comment with the facts of the cell as JSON, so that its space can be
built without the package it was measured with. Its rows vary one GEMM at a time, beside the heuristic's tile config of
the other GEMM of that kind (`LayerSpace.start`); `us` is the time of the whole layer.
"""

import csv
import gzip
import io
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig
from moegen.tune.space import AXES, OPS, LayerSpace, kind_of, layer_space, varied
from moegen.tune.trial import SOON, Measurement, Status

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
        """The space that was swept: all of it, but for the other assignment.

        Of a sweep that was recorded, the families that there were then.
        """
        recorded = {tile.family for measured in self.results.values() for tile in measured}
        families = recorded or tuple(AXES)
        space = layer_space(self.gemm1, self.gemm2, self.tokens, self.device, self.low_latency, families)
        return replace(space, others=())


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


def read_sweep(path: Path) -> Sweep:
    """The sweep of a file that `write_sweep` wrote."""
    with gzip.open(path, "rt", newline="") as file:
        facts = json.loads(file.readline().removeprefix("# "))
        rows = list(csv.DictReader(file))
    device, gemm1, gemm2 = DeviceFacts(**facts.pop("device")), Gemm(**facts.pop("gemm1")), Gemm(**facts.pop("gemm2"))
    results: dict[str, dict[TileConfig, Measurement]] = {op: {} for op in OPS}
    for row in rows:
        us = float(row["us"]) if row["us"] else None
        results[row["op"]][_tile(row)] = Measurement(cast(Status, row["status"]), us, float(row["spread"]))
    return Sweep(device=device, gemm1=gemm1, gemm2=gemm2, results=results, **facts)


def _tile(row: dict[str, str]) -> TileConfig:
    values: dict[str, Any] = {name: int(row[name]) for name in FIELDS if name != "family"}
    flags = {name: bool(values[name]) for name in ("SWAP_AB", "PDL")}
    return TileConfig(**values | flags, family=row["family"])


class Replay:
    """A Measurer over sweeps of one layer, one a token count.

    The time of a pair is that of the two starts plus what each GEMM's own config adds to it: of one kind, the GEMMs
    run one after the other. noise: relative deviation of a simulated measurement, 0 = the recorded times.

    measured counts what was asked, comparisons included.
    """

    def __init__(self, sweeps: Sequence[Sweep], noise: float = 0.0, seed: int = 0) -> None:
        self.sweeps = {sweep.tokens: sweep for sweep in sweeps}
        self.measured = 0
        self._noise = noise
        self._random = random.Random(seed)  # noqa: S311 - no secret

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        """Nothing to compile."""

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        """What the sweep says of this pair; KeyError if it was not in the space."""
        self.measured += 1
        found = self.true(tokens, tiles)
        if found.us is None:
            return found
        us = found.us * (1 + self._random.gauss(0, self._noise))
        if best_us is not None and us > RACE * best_us:
            return Measurement("slow", us)
        return replace(found, us=us)

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        """The recorded times: what the noise of many rounds averages to."""
        self.measured += len(finalists)
        return [self.true(tokens, tiles) for tiles in finalists]

    def true(self, tokens: int, tiles: LayerTiles) -> Measurement:
        """The recorded time of this pair without noise."""
        sweep = self.sweeps[tokens]
        kind = kind_of(tiles)
        start, ops = sweep.space.start(kind), sweep.space.ops(kind)
        starts = [sweep.results[op][getattr(start, op)] for op in ops]
        own = [sweep.results[op][getattr(tiles, op)] for op in ops]
        for found in (*own, *starts):
            if found.us is None:
                return found
        us = sum(cast(float, found.us) for found in own)
        us -= (len(ops) - 1) * statistics.mean(cast(float, found.us) for found in starts)
        return Measurement("ok", us, max(found.spread for found in own))

    def optimum(self, tokens: int) -> tuple[LayerTiles, float]:
        """The best pair of a sweep and its time, µs."""
        sweep = self.sweeps[tokens]
        pairs = []
        for kind in sweep.space.kinds:
            pair = sweep.space.start(kind)
            for op in sweep.space.ops(kind):
                times = {t: sweep.results[op][t].us for t in getattr(sweep.space, op)[kind].tiles}
                timed = {tile: us for tile, us in times.items() if us is not None}
                pair = varied(pair, op, min(timed, key=timed.__getitem__)) if timed else pair
            pairs.append(pair)
        times_of = {pair: self.true(tokens, pair).us for pair in pairs}
        return min(((pair, us) for pair, us in times_of.items() if us is not None), key=lambda found: found[1])
