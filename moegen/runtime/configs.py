"""Which tile configs a call uses: user folder, then the package's records, then the heuristic; logged once a layer."""

import json
import logging
import math
import os
import re
from pathlib import Path

import torch
import triton

from .device import DeviceFacts
from .heuristic import default_tiles
from .layer import Layer, is_low_latency
from .tile import LayerTiles, TileConfig, why_illegal

SCHEMA = 1
# The standard token buckets of vLLM's and SGLang's files, continued by powers of two.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768, 65536)
ENV_CONFIG_DIR = "MOEGEN_CONFIG_DIR"
log = logging.getLogger("moegen")


def bucket_of(tokens: int, buckets: tuple[int, ...] = BUCKETS) -> int:
    """The bucket nearest to `tokens` in log space; the smaller one on a tie."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket / tokens)))


def layer_facts(layer: Layer) -> dict[str, object]:
    """All of a layer that its optimum depends on, as a config record states it."""
    return {
        "num_experts": layer.num_experts,
        "local_experts": layer.local_experts,
        "top_k": layer.top_k,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "quant": layer.quant,
        "activation": layer.activation.slug,
        "bias": layer.bias,
    }


class RecordError(ValueError):
    """A config record that cannot be used; the message names file, key, value and what is allowed."""


def read_record(path: Path, layer: Layer, device: DeviceFacts) -> dict[int, LayerTiles]:
    """Bucket -> tile configs of one config record.

    RecordError on a broken file, a newer schema, another GPU or layer, or a tile config that is illegal here. A
    record tuned with another Triton version is used, with a warning.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not a readable JSON file: {error}") from error
    found = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if type(found) is not int or found != SCHEMA:  # type() and not isinstance: True would pass as 1
        raise RecordError(f"{path}: schema: {found!r} is not allowed; allowed: {SCHEMA}")
    expected = {"gpu": {"name": device.name, "arch": device.arch}, "layer": layer_facts(layer)}
    for key, value in expected.items():
        if data.get(key) != value:
            raise RecordError(f"{path}: {key}: {data.get(key)!r} is not allowed; allowed: {value!r}")
    tuned_with = data.get("triton")
    if tuned_with != triton.__version__:
        log.warning("%s was tuned with Triton %s, this is %s", path, tuned_with, triton.__version__)
    buckets = data.get("buckets")
    if not isinstance(buckets, dict) or not buckets:
        raise RecordError(f"{path}: buckets: {buckets!r} is not a mapping of token counts")
    return {_tokens(path, key): _tiles(path, key, entry, layer, device) for key, entry in buckets.items()}


def _tokens(path: Path, key: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,7}", key) or int(key) > 1 << 24:
        raise RecordError(f"{path}: buckets.{key}: not allowed; allowed: a token count within 1..{1 << 24}")
    return int(key)


def _tiles(path: Path, key: str, entry: object, layer: Layer, device: DeviceFacts) -> LayerTiles:
    tiles = {}
    for op in ("gemm1", "gemm2"):
        where = f"{path}: buckets.{key}.{op}"
        try:
            tiles[op] = TileConfig.from_dict(entry.get(op) if isinstance(entry, dict) else entry, where)
        except ValueError as error:
            raise RecordError(str(error)) from error
        reason = why_illegal(tiles[op], layer.gemm(op), device)
        if reason is not None:
            raise RecordError(f"{where}: {reason}")
    if tiles["gemm1"].BLOCK_SIZE_M != tiles["gemm2"].BLOCK_SIZE_M:
        sizes = f"{tiles['gemm1'].BLOCK_SIZE_M} and {tiles['gemm2'].BLOCK_SIZE_M}"
        raise RecordError(f"{path}: buckets.{key}: BLOCK_SIZE_M of gemm1 and gemm2 are {sizes}; allowed: one value")
    if tiles["gemm1"].family != tiles["gemm2"].family:
        names = f"{tiles['gemm1'].family} and {tiles['gemm2'].family}"
        raise RecordError(f"{path}: buckets.{key}: family of gemm1 and gemm2 are {names}; allowed: one value")
    stream = tiles["gemm1"].family == "stream"
    if stream and (key != str(tiles["gemm1"].BLOCK_SIZE_M) or tiles["gemm1"] != tiles["gemm2"]):
        allowed = "in the bucket of its BLOCK_SIZE_M, with one tile config for both GEMMs"
        raise RecordError(f"{path}: buckets.{key}: family=stream is not allowed; allowed: {allowed}")
    low_latency = entry.get("low_latency") if isinstance(entry, dict) else None
    if low_latency is not None and (type(low_latency) is not bool or tiles["gemm1"].family != "portable"):
        allowed = "true or false" if tiles["gemm1"].family == "portable" else "nothing, its family has one assignment"
        raise RecordError(f"{path}: buckets.{key}.low_latency: {low_latency!r} is not allowed; allowed: {allowed}")
    return LayerTiles(tiles["gemm1"], tiles["gemm2"], low_latency=low_latency)


class Configs:
    """The tile configs of one package; every answer is kept, so a call costs one dictionary look-up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[tuple[str, DeviceFacts], dict[int, LayerTiles]] = {}
        self._chosen: dict[tuple[str, int, bool, DeviceFacts, bool], LayerTiles] = {}

    def tiles(
        self,
        layer: Layer,
        tokens: int,
        expert_map: torch.Tensor | None,
        device: DeviceFacts,
        portable: bool = False,
    ) -> LayerTiles:
        """Tile configs of `layer` for `tokens` >= 1 tokens on `device`.

        A record answers for token counts within half an octave of one of its buckets, the nearest in log space; the
        heuristic answers for the rest, by bucket, so that the kernels stay few. With `portable` the heuristic answers
        in any case, and with that family.
        """
        low_latency = is_low_latency(layer, tokens, expert_map)
        key = (layer.slug, tokens, low_latency, device, portable)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(layer, tokens, low_latency, device, portable)
        return chosen

    def _choose(self, layer: Layer, tokens: int, low_latency: bool, device: DeviceFacts, portable: bool) -> LayerTiles:
        record = {} if portable else self._record(layer, device)
        if record:
            bucket = bucket_of(tokens, tuple(sorted(record)))
            if max(bucket / tokens, tokens / bucket) <= math.sqrt(2):
                return record[bucket]
        gemms = layer.gemm("gemm1"), layer.gemm("gemm2")
        return default_tiles(*gemms, bucket_of(tokens), device, low_latency, portable)

    def _record(self, layer: Layer, device: DeviceFacts) -> dict[int, LayerTiles]:
        key = (layer.slug, device)
        if key not in self._records:
            self._records[key] = self._load(layer, device)
        return self._records[key]

    def _load(self, layer: Layer, device: DeviceFacts) -> dict[int, LayerTiles]:
        name = Path(device.slug) / f"{layer.slug}.json"
        user = os.environ.get(ENV_CONFIG_DIR)
        for path in ([Path(user) / name] if user else []) + [self._folder / name]:
            if not path.is_file():
                continue
            try:
                record = read_record(path, layer, device)
            except RecordError as error:
                log.warning("refused: %s", error)
                continue
            log.info("%s on %s: tile configs from %s", layer.slug, device.name, path)
            return record
        log.info("%s on %s: no tuned record, heuristic tile configs", layer.slug, device.name)
        return {}
