"""JSON of which nothing is taken on trust: a fault is an error that names the file and, where there is one, the key."""

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 20  # a hundred times the longest config file there is
MAX_DEPTH = 8  # records have four levels
MAX_BUCKETS = 256
MAX_TOKENS = 1 << 24


class FileError(ValueError):
    """A file that cannot be used; the message names file, key, value and what is allowed."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    FileError for a file that is missing, too long, not UTF-8, not JSON, nested too deep, not a mapping, or that has a
    key twice, NaN, an infinity or a number that no float holds: Python's reader would let all of the last ones pass.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise FileError(f"{path}: longer than {MAX_BYTES} bytes, which no config file is")
    try:
        data = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise FileError(f"{path}: not a readable JSON file: nested too deep") from error
    except ValueError as error:
        raise FileError(f"{path}: not a readable JSON file: {error}") from error
    if _deeper_than(MAX_DEPTH, data):
        raise FileError(f"{path}: nested more than {MAX_DEPTH} deep")
    if not isinstance(data, dict):
        raise FileError(f"{path}: {shown(data)} is not a mapping")
    return data


def token_counts(path: Path, buckets: object, where: str = "") -> dict[int, Any]:
    """`{"16": …}` with the token counts as integers, in ascending order; `where` is the path of the mapping's keys.

    FileError for anything that is not a mapping of 1 to MAX_BUCKETS token counts.
    """
    if not isinstance(buckets, dict) or not 1 <= len(buckets) <= MAX_BUCKETS:
        found = f"{len(buckets)} keys" if isinstance(buckets, dict) else shown(buckets)
        raise FileError(f"{path}: {where or 'buckets'}: {found} where 1..{MAX_BUCKETS} token counts are allowed")
    for key in buckets:
        if not re.fullmatch("[1-9][0-9]{0,7}", key) or int(key) > MAX_TOKENS:
            raise FileError(f"{path}: {where}{shown(key)}: not a token count within 1..{MAX_TOKENS}")
    return {int(key): buckets[key] for key in sorted(buckets, key=int)}


def shown(value: object, limit: int = 60) -> str:
    """The value as a message shows it: cut short, since a hostile one may be long."""
    text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >> 64 else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _deeper_than(limit: int, data: object) -> bool:
    """Level by level and not by recursion, which a deep value would break."""
    level = [data]
    for _ in range(limit + 1):
        dicts = [item for value in level if isinstance(value, dict) for item in value.values()]
        level = dicts + [item for value in level if isinstance(value, list) for item in value]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"{text[:60]} is more than a float holds")
    return value
