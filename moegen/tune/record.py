"""Config records: built from tuned buckets, read back with everything in them checked, written atomically, merged.

The form is that of tuned_configs/README.md; what the dispatcher reads of it is `moegen.runtime.configs.read_record`.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

from moegen.device import gpu_facts
from moegen.interop.strict import read_json, shown, token_counts
from moegen.runtime.activations import ACTIVATIONS, Activation
from moegen.runtime.configs import SCHEMA, RecordError, layer_facts, read_record
from moegen.runtime.device import DeviceFacts
from moegen.runtime.layer import Layer
from moegen.runtime.tile import LayerTiles
from moegen.spec import SpecError, VariantSpec
from moegen.tune.fingerprint import is_current, why_stale


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedBucket:
    """The tile configs of one token count, and what is known of them.

    us, default_us  median µs of a layer call with these tiles and with the heuristic's, measured side by side
    spread          relative noise of `us`
    tried           configs that were measured for this bucket, failed ones included
    effort, seed    of the search
    routing         what the calls were routed by: "balanced+power_law", or the name and hash of a routing file
    triton, torch, moegen   versions it was tuned with
    kernels         hashes of the layer's kernels (moegen.tune.fingerprint)
    source          where tiles come from that nobody measured here: the name of the imported file
    """

    tiles: LayerTiles
    us: float | None = None
    default_us: float | None = None
    spread: float | None = None
    tried: int | None = None
    effort: str = ""
    seed: int | None = None
    routing: str = ""
    triton: str = ""
    torch: str = ""
    moegen: str = ""
    kernels: str = ""
    source: str = ""

    @property
    def gain(self) -> float | None:
        """The default's time over this one: 1.05 is 5 % faster. None if nothing was measured."""
        return self.default_us / self.us if self.us and self.default_us else None

    def why_stale(self, variant: VariantSpec) -> str | None:
        """Why its times need not hold any more for this layer, or None."""
        return why_stale(self.kernels, self.tiles.gemm1.family, self.triton, variant)


@dataclass(frozen=True, slots=True)
class Record:
    """All buckets of one layer on one GPU."""

    gpu: DeviceFacts
    variant: VariantSpec
    buckets: dict[int, TunedBucket] = field(default_factory=dict)

    @property
    def name(self) -> Path:
        """Where look-ups find it below a folder of records: `nvidia-h200/<layer>.json`."""
        return Path(self.gpu.slug) / f"{self.variant.slug}.json"


def layer_of(variant: VariantSpec) -> Layer:
    """The layer that tile choice and legality ask, without kernels: enough for everything but a launch."""
    return Layer(
        slug=variant.slug,
        num_experts=variant.num_experts,
        local_experts=variant.local_experts,
        top_k=variant.top_k,
        hidden_size=variant.hidden_size,
        intermediate_size=variant.intermediate_size,
        dtype=getattr(torch, variant.dtype),
        scheme=variant.scheme,
        activation=variant.activation,
        bias=variant.bias,
        kernels=ModuleType("no_kernels"),
    )


# ----------------------------------------------------------------------------------------------------------- reading


def load_record(path: Path) -> Record:
    """Read a record and check all of it, for the GPU and the layer that it names itself; no GPU is needed.

    FileError or RecordError names file, key, value and what is allowed.
    """
    data = read_json(path)
    gpu, variant = _gpu(path, data.get("gpu")), _variant(path, data.get("layer"))
    tiles = read_record(path, layer_of(variant), gpu)
    entries = token_counts(path, data["buckets"], "buckets.")
    stated = data["triton"] if _text(data.get("triton")) else ""
    buckets = {tokens: _bucket(path, tokens, tiles[tokens], entries[tokens], stated) for tokens in entries}
    return Record(gpu, variant, buckets)


def _gpu(path: Path, data: object) -> DeviceFacts:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("name", "arch")):
        raise RecordError(f"{path}: gpu: {shown(data)} is not allowed; allowed: a mapping with name and arch")
    try:
        return gpu_facts(data["name"], data["arch"])
    except ValueError as error:
        raise RecordError(f"{path}: gpu.{error}") from error


def _variant(path: Path, data: object) -> VariantSpec:
    names = [f.name for f in fields(VariantSpec)]
    if not isinstance(data, dict):
        raise RecordError(f"{path}: layer: {shown(data)} is not allowed; allowed: a mapping with {', '.join(names)}")
    for key in sorted({*names} ^ {*data}):
        fault = "missing" if key in names else "unknown"
        raise RecordError(f"{path}: layer.{shown(key)}: {fault}; needed: {', '.join(names)}")
    try:
        return VariantSpec(**{**data, "activation": activation_of_slug(data["activation"])})
    except SpecError as error:
        raise RecordError(f"{path}: layer.{error}") from error
    except ValueError as error:
        raise RecordError(f"{path}: layer.activation: {error}") from error


def activation_of_slug(slug: object) -> Activation:
    """The inverse of `Activation.slug`: `silu_limit10`; ValueError for anything else."""
    for name in sorted(ACTIVATIONS, key=len, reverse=True) if isinstance(slug, str) else ():
        match = re.fullmatch(f"{name}((?:_(?:alpha|beta|limit)[0-9pme+]+)*)", str(slug))
        if match is None:
            continue
        own = re.findall("_(alpha|beta|limit)([^_]+)", match.group(1))
        values = {key: float(text.replace("p", ".").replace("m", "-")) for key, text in own}
        found = Activation.of(name, **values)
        if found.slug == slug:
            return found
    raise ValueError(f"{shown(slug)} is not the slug of an activation, such as silu or silu_limit10")


def _number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12  # type: ignore[operator]


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


# The keys of a bucket beside gemm1 and gemm2, each with its check and what it allows; all of them are optional.
_KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("us", "default_us", "spread"), (_number, "a number of at least 0")),
    **dict.fromkeys(("tried", "seed"), (_count, "an integer of at least 0")),
    **dict.fromkeys(("effort", "routing", "triton", "torch", "moegen", "kernels", "source"), (_text, "a short text")),
}


def _bucket(path: Path, tokens: int, tiles: LayerTiles, entry: dict[str, Any], triton: str) -> TunedBucket:
    """One entry of `buckets`; `triton` is the version of a bucket that was tuned and names none itself."""
    found: dict[str, Any] = {}
    for key, (check, allowed) in _KEYS.items():
        if entry.get(key) is None:
            continue
        if not check(entry[key]):
            where = f"{path}: buckets.{tokens}.{key}"
            raise RecordError(f"{where}: {shown(entry[key])} is not allowed; allowed: {allowed}")
        found[key] = entry[key]
    if "source" not in found:
        found.setdefault("triton", triton)
    return TunedBucket(tiles=tiles, **found)


# ----------------------------------------------------------------------------------------------------------- writing


def record_text(record: Record) -> str:
    """The record as JSON, one line a GEMM; the same record always gives the same bytes."""
    versions = [bucket.triton for bucket in record.buckets.values() if bucket.triton]
    head = {
        "schema": SCHEMA,
        "gpu": {"name": record.gpu.name, "arch": record.gpu.arch},
        "layer": layer_facts(layer_of(record.variant)),
        "triton": max(versions, key=version_key, default=""),
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    buckets = [
        f"    {json.dumps(str(tokens))}: {_bucket_text(record.buckets[tokens])}" for tokens in sorted(record.buckets)
    ]
    return "\n".join(["{", *lines, '  "buckets": {', ",\n".join(buckets), "  }", "}", ""])


def _bucket_text(bucket: TunedBucket) -> str:
    lines = [f'      "{op}": {json.dumps(getattr(bucket.tiles, op).to_dict())}' for op in ("gemm1", "gemm2")]
    if bucket.tiles.low_latency is not None:
        lines.append(f'      "low_latency": {json.dumps(bucket.tiles.low_latency)}')
    known = {key: getattr(bucket, key) for key in _KEYS if getattr(bucket, key) not in (None, "")}
    lines += [f"      {json.dumps(known)[1:-1]}"] if known else []
    return "{\n" + ",\n".join(lines) + "\n    }"


def write_record(path: Path, record: Record) -> None:
    """Write a temporary file beside `path` and rename it: a reader sees the old record or the new one, never a part."""
    with locked(path):
        replace_text(path, record_text(record))


def add_bucket(path: Path, record: Record, tokens: int, bucket: TunedBucket) -> None:
    """Put one bucket into the file, beside what other tuners have written there; `record` names GPU and layer.

    RecordError, and an unchanged file, if what is there is broken or belongs to another GPU or layer.
    """

    def added(found: Record | None) -> Record:
        return replace(record, buckets={**(found.buckets if found else {}), tokens: bucket})

    update_record(path, record, added)


def update_record(path: Path, record: Record, change: Callable[[Record | None], Record]) -> Record:
    """Replace what is at `path` (None: nothing yet) by what `change` makes of it, and return that; nobody else writes
    in between. RecordError, and an unchanged file, if what is there is broken or not of the GPU and layer of `record`.
    """
    with locked(path):
        found = load_record(path) if path.exists() else None
        if found is not None:
            _refuse_other(record, found, str(path))
        changed = change(found)
        replace_text(path, record_text(changed))
    return changed


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, nobody else writes to the folder of `path`, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        yield


def replace_text(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it, so that there is the old text or the new one at any time."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------- merging


def merge_records(one: Record, other: Record, names: tuple[str, str] = ("the first", "the second")) -> Record:
    """All buckets of both; where both have one, the better founded one (`rank`), the first one's on a tie.

    RecordError that names `names` if GPU or layer differ.
    """
    _refuse_other(one, other, " and ".join(names))
    buckets = dict(one.buckets)
    for tokens, bucket in other.buckets.items():
        if tokens not in buckets or rank(bucket, one.variant) > rank(buckets[tokens], one.variant):
            buckets[tokens] = bucket
    return replace(one, buckets=buckets)


def rank(bucket: TunedBucket, variant: VariantSpec) -> tuple[bool, bool, tuple[int, ...], float]:
    """Which of two buckets to trust more: measured before imported, with the kernels of today before older ones, with a
    newer Triton before an older one, and then the larger gain over the default.

    The gain and not the time, since only the two times of one bucket were measured side by side.
    """
    current = is_current(bucket.kernels, bucket.tiles.gemm1.family, variant)
    return bucket.us is not None, current, version_key(bucket.triton), bucket.gain or 0.0


def version_key(version: str) -> tuple[int, ...]:
    """`3.10.0` sorts behind `3.9.1`; a version that is not stated sorts first."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _refuse_other(one: Record, other: Record, where: str) -> None:
    for what, mine, theirs in (
        ("GPU", (one.gpu.name, one.gpu.arch), (other.gpu.name, other.gpu.arch)),
        ("layer", one.variant.slug, other.variant.slug),
    ):
        if mine != theirs:
            raise RecordError(f"{where}: two records of one {what} are needed, not {mine!r} and {theirs!r}")
