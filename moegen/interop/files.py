"""Import: which layer a tuned file of vLLM or SGLang is for, and its tile configs as moegen would launch them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moegen.device import TARGETS
from moegen.interop import sglang, vllm
from moegen.interop.strict import FileError
from moegen.interop.table import adopted, read_table
from moegen.runtime.device import DeviceFacts
from moegen.runtime.layer import Layer
from moegen.runtime.tile import LayerTiles, TileConfig, why_illegal
from moegen.spec import VariantSpec

FILE_NAMES = (vllm.file_name, sglang.file_name)
_GPU = re.compile(r"device_name=([^,]+?)(?:,|_down\.json$|\.json$)")


@dataclass(frozen=True, slots=True)
class Imported:
    """What a file holds for one layer: its tile configs by token count, and what could not be used, in words."""

    tiles: dict[int, LayerTiles]
    skipped: tuple[str, ...]


def gpu_of(path: Path) -> str:
    """The name of the GPU in a file's name, as its project writes it. FileError without one."""
    match = _GPU.search(path.name)
    if match is None:
        raise FileError(f"{path}: not a name of vLLM or SGLang: E=…,N=…,device_name=….json")
    return match.group(1)


def known_gpu(name: str, others: Sequence[DeviceFacts] = ()) -> DeviceFacts | None:
    """The GPU that a project writes as `name`: one of the table in moegen.device, or of `others`."""
    for facts in (*others, *TARGETS.values()):
        if name in (vllm.device_name(facts.name), sglang.device_name(facts.name)):
            return facts
    return None


def matching(path: Path, variants: Sequence[VariantSpec]) -> VariantSpec:
    """The layer that vLLM or SGLang would use the file for, whatever its GPU.

    FileError if there is none, or several: their names leave out the hidden size, top_k and the activation.
    """
    gpu = gpu_of(path)
    name = path.name.removesuffix(sglang.DOWN) + ".json" if path.name.endswith(sglang.DOWN) else path.name
    names: dict[str, VariantSpec] = {}
    found = []
    for variant in variants:
        own = [_name(of, variant, gpu) for of in FILE_NAMES]
        names |= {text: variant for text in own if text}
        found += [variant] if name in own else []
    if not found:
        raise FileError(f"{path}: no layer looks for this name; they look for: {'; '.join(names) or 'no file'}")
    if len(found) > 1:
        slugs = ", ".join(variant.slug for variant in found)
        raise FileError(f"{path}: the name fits several layers: {slugs}; choose one with --layer")
    return found[0]


def _name(of: Callable[[VariantSpec, str], str], variant: VariantSpec, gpu: str) -> str | None:
    try:
        return of(variant, gpu)
    except FileError:
        return None


def import_tiles(path: Path, variant: VariantSpec, layer: Layer, device: DeviceFacts) -> Imported:
    """Read a tuned file, and SGLang's `_down` file beside it, for one layer (`layer` is that of `variant`).

    FileError for anything broken, and if not a single token count has tile configs that are legal on `device`.
    """
    if path.name.endswith(sglang.DOWN):
        path = path.with_name(path.name.removesuffix(sglang.DOWN) + ".json")
    up = read_table(path)
    beside = path.with_name(sglang.down_name(path.name))
    down = read_table(beside) if beside.is_file() else {}
    tiles: dict[int, LayerTiles] = {}
    skipped = []
    for tokens, gemm1 in up.items():
        # As SGLang does: the nearest entry, with the up GEMM's BLOCK_SIZE_M, since both read one assignment.
        gemm2 = replace(nearest(down, tokens), BLOCK_SIZE_M=gemm1.BLOCK_SIZE_M) if down else gemm1
        pair = LayerTiles(adopted(gemm1, variant, device), adopted(gemm2, variant, device))
        reason = _why_illegal(pair, layer, device)
        if reason is None:
            tiles[tokens] = pair
        else:
            skipped.append(f"{path}: {tokens}: {reason}")
    if not tiles:
        raise FileError(f"{skipped[0]}; no token count of the file can be used")
    return Imported(tiles, tuple(skipped))


def nearest(table: dict[int, TileConfig], tokens: int) -> TileConfig:
    """The entry whose token count is nearest, the first one on a tie: vLLM's and SGLang's own rule."""
    return table[min(table, key=lambda key: abs(key - tokens))]


def _why_illegal(pair: LayerTiles, layer: Layer, device: DeviceFacts) -> str | None:
    for op, tile in (("gemm1", pair.gemm1), ("gemm2", pair.gemm2)):
        reason = why_illegal(tile, layer.gemm(op), device)
        if reason is not None:
            return f"{op}: {reason}"
    return None
