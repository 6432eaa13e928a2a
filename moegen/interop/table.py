"""What vLLM's and SGLang's tuned files have in common: token count -> one tile config, for the six fields of both."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moegen.interop.strict import FileError, read_json, shown, token_counts
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import VariantSpec

FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
OPTIONAL = ("num_warps", "num_stages")  # SGLang leaves them to Triton, whose defaults are TileConfig's
# Read by other back ends or for other kernels; nothing here corresponds to them.
IGNORED = ("waves_per_eu", "matrix_instr_nonkdim", "kpack", "SPLIT_K", "num_ctas", "grf_mode", "USE_TMA")
MOST = 65536


def read_table(path: Path) -> dict[int, TileConfig]:
    """Token count -> tile config of a file of vLLM or SGLang; fields that it does not know have their defaults.

    FileError names the file and the key of anything that these projects do not write.
    """
    data = read_json(path)
    data.pop("triton_version", None)
    return {tokens: _tile(path, tokens, entry) for tokens, entry in token_counts(path, data).items()}


def _tile(path: Path, tokens: int, entry: object) -> TileConfig:
    if not isinstance(entry, dict):
        raise FileError(f"{path}: {tokens}: {shown(entry)} is not a mapping")
    for key, value in entry.items():
        where = f"{path}: {tokens}.{shown(key)}"
        if key not in FIELDS and key not in IGNORED:
            raise FileError(f"{where}: unknown key; allowed: {', '.join(FIELDS + IGNORED)}")
        if key in FIELDS and not (type(value) is int and 1 <= value <= MOST):
            raise FileError(f"{where}: {shown(value)} is not allowed; allowed: an integer from 1 to {MOST}")
        if key in FIELDS and key not in ("GROUP_SIZE_M", "num_stages") and value & (value - 1):
            raise FileError(f"{where}: {value} is not allowed; allowed: a power of two")
    missing = [key for key in FIELDS if key not in entry and key not in OPTIONAL]
    if missing:
        raise FileError(f"{path}: {tokens}.{missing[0]}: missing")
    return TileConfig(**{key: entry[key] for key in FIELDS if key in entry})


def table_text(table: Mapping[int, TileConfig], head: Mapping[str, str]) -> str:
    """The file: the keys of `head`, then the token counts in ascending order, laid out as the projects' tuners do."""
    entries = {str(tokens): entry(table[tokens]) for tokens in sorted(table)}
    return json.dumps({**head, **entries}, indent=4) + "\n"


def entry(tile: TileConfig) -> dict[str, int]:
    """The fields of a tile config that both projects know."""
    return {key: getattr(tile, key) for key in FIELDS}


def swaps(tile: TileConfig, variant: VariantSpec, device: DeviceFacts) -> bool:
    """Whether the projects swap the operands: fp8 on compute capability 9.0 with the token side the short one."""
    return variant.scheme.mode == "fp8_w8a8" and device.has_wgmma and tile.BLOCK_SIZE_M < 64 <= tile.BLOCK_SIZE_N


def adopted(tile: TileConfig, variant: VariantSpec, device: DeviceFacts) -> TileConfig:
    """A file's tile config as the projects launch it, with the fields that only moegen has.

    They cut BLOCK_SIZE_K down to the quant group. 8 tokens are one side of a product only with swapped operands.
    """
    scheme = variant.scheme
    if scheme.row.activation is not None and scheme.group_k:
        tile = replace(tile, BLOCK_SIZE_K=min(tile.BLOCK_SIZE_K, scheme.group_k))
    return replace(tile, SWAP_AB=swaps(tile, variant, device) or tile.BLOCK_SIZE_M == 8, PDL=device.has_pdl)


def offered(pair: LayerTiles, variant: VariantSpec, device: DeviceFacts) -> LayerTiles:
    """Tile configs that the projects can launch: where they do not swap the operands, BLOCK_SIZE_M is at least 16."""
    if all(swaps(tile, variant, device) for tile in (pair.gemm1, pair.gemm2)):
        return pair
    return LayerTiles(*(replace(t, BLOCK_SIZE_M=max(16, t.BLOCK_SIZE_M)) for t in (pair.gemm1, pair.gemm2)))
