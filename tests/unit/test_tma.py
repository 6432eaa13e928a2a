"""The family "tma": what is refused and why, how many programs run at a time, and what weights it can read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from moegen.runtime.configs import ENV_CONFIG_DIR
from moegen.runtime.tile import Gemm, LayerTiles, TileConfig, flattens, shared_memory, why_illegal
from moegen.runtime.tma import programs_at_once, quantises_hidden, readable_by_tma
from tests.support.packages import make_inputs, unnamed
from tests.support.record_files import write_record

H200 = TARGETS["cuda:90"]
ROWS = Gemm("gemm1", 128, 8, 1536, 2048, True, a_bits=8, w_bits=8, group_k=0)
BLOCKS = replace(ROWS, group_k=128, group_n=128)
SECOND = replace(BLOCKS, op="gemm2", rows=2048, depth=768, gated=False)
WIDE = TileConfig(64, 256, 128, 16, num_warps=4, num_stages=2, family="tma")
SMALL = replace(WIDE, BLOCK_SIZE_N=128, num_stages=3)
TALL = TileConfig(128, 128, 128, 16, num_warps=8, num_stages=3, family="tma")

ILLEGAL: list[tuple[TileConfig, Gemm, str]] = [
    (WIDE, replace(ROWS, a_bits=16, w_bits=16), "family=tma is for 8-bit weights and activations, not 16 and 16 bits"),
    (WIDE, replace(ROWS, a_bits=16), "family=tma is for 8-bit weights and activations, not 8 and 16 bits"),
    (replace(WIDE, SWAP_AB=True), ROWS, "SWAP_AB is not for family=tma"),
    (WIDE, replace(ROWS, depth=2040), "rows of 2040 bytes are not the multiple of 16 that TMA needs"),
    (replace(TALL, BLOCK_SIZE_M=512), ROWS, "family=tma has blocks of at most 256"),
    (WIDE, replace(BLOCKS, group_n=64), "BLOCK_SIZE_N=256 does not fit weight scales of 64 rows"),
    (replace(SMALL, BLOCK_SIZE_N=64), replace(SECOND, group_n=96), "BLOCK_SIZE_N=64 does not fit weight scales of 96"),
    (WIDE, replace(BLOCKS, rows=2 * 192), "gate and up rows share weight scales of 128 rows"),
    (replace(WIDE, num_stages=6), BLOCKS, "245760 bytes of shared memory exceed the 232448 of NVIDIA H200"),
]


@pytest.mark.parametrize(("tile", "gemm", "reason"), ILLEGAL)
def test_illegal(tile: TileConfig, gemm: Gemm, reason: str) -> None:
    found = why_illegal(tile, gemm, H200)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "cuda:90"])
def test_no_other_target_runs_it(target: str) -> None:
    device = TARGETS[target]
    reason = f"family=tma needs compute capability 9.0, not {device.backend} {device.arch}"
    assert why_illegal(WIDE, BLOCKS, device) == reason


@pytest.mark.parametrize("tile", [WIDE, SMALL, TALL, replace(WIDE, BLOCK_SIZE_M=128, num_warps=8, num_stages=4)])
@pytest.mark.parametrize(
    "gemm",
    [BLOCKS, SECOND, ROWS, replace(ROWS, interleaved=True), replace(BLOCKS, interleaved=True, rows=2 * 192)],
)
def test_legal(tile: TileConfig, gemm: Gemm) -> None:
    assert why_illegal(tile, gemm, H200) is None


@pytest.mark.parametrize(
    ("tile", "gemm", "programs"),
    [
        (SMALL, SECOND, 3),  # 168 registers a thread, 72 KB of shared memory
        (WIDE, BLOCKS, 2),
        (replace(WIDE, num_stages=3), BLOCKS, 1),  # 120 KB
        (replace(WIDE, BLOCK_SIZE_M=128, num_warps=8, num_stages=4), BLOCKS, 1),
        (TALL, ROWS, 2),
        (TALL, replace(ROWS, op="gemm2", gated=False), 2),  # 112 KB with the next tile's loads
        (TALL, BLOCKS, 1),  # products and sums of 256 threads
    ],
)
def test_programs_of_a_multiprocessor(tile: TileConfig, gemm: Gemm, programs: int) -> None:
    assert programs_at_once(tile, gemm) == programs


def test_shared_memory_of_stores_that_overlap_loads() -> None:
    second = replace(ROWS, op="gemm2", gated=False)
    assert (flattens(second), flattens(ROWS), flattens(SECOND)) == (True, False, False)
    operands = 2 * 128 * 128 * 3
    assert shared_memory(TALL, second) == operands + 128 * 128
    assert shared_memory(TALL, ROWS) == shared_memory(TALL, SECOND) == operands


def test_which_tiles_quantise_the_intermediate() -> None:
    assert quantises_hidden(WIDE, BLOCKS)
    assert not quantises_hidden(SMALL, BLOCKS)
    assert not quantises_hidden(WIDE, replace(BLOCKS, interleaved=True))
    assert not quantises_hidden(WIDE, ROWS)


def call_of(package: ModuleType, arguments: dict[str, Any]) -> Any:
    weights = [unnamed(package, name, arguments) for name in ("w13", "w2")]
    x = arguments["hidden_states"]
    return package.runtime.layer.Call(x, *weights, arguments["topk_weights"], arguments["topk_ids"], None, False, x)


def shifted(weight: torch.Tensor) -> torch.Tensor:
    """The same values, one byte away from an aligned address."""
    memory = torch.empty(weight.numel() + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + 1
    return memory[start : start + weight.numel()].view(weight.dtype).view(weight.shape).copy_(weight)


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        (lambda w: w, True),
        (shifted, False),
        (lambda w: torch.nn.functional.pad(w.view(torch.int8), (0, 16)).view(w.dtype)[..., : w.shape[2]], True),
        (lambda w: torch.nn.functional.pad(w.view(torch.int8), (0, 5)).view(w.dtype)[..., : w.shape[2]], False),
        (lambda w: w.mT.contiguous().mT, False),
    ],
)
def test_weights_that_a_descriptor_can_read(
    change: Callable[[torch.Tensor], torch.Tensor], readable: bool, build: Callable[..., ModuleType]
) -> None:
    package = build(quant=("fp8_w8a8:channel",))
    arguments = make_inputs(package.LAYERS[0], 1)
    for name in ("w13", "w2"):
        assert readable_by_tma(call_of(package, {**arguments, name: change(arguments[name])})) == readable


def test_weights_that_it_cannot_read_run_the_portable_family(
    build: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = build(quant=("fp8_w8a8:channel",))
    layer, module = package.LAYERS[0], package.runtime.package
    tiles = LayerTiles(replace(TALL, PDL=True), replace(TALL, PDL=True))
    write_record(package, tmp_path, H200, {64: tiles})
    monkeypatch.setenv(ENV_CONFIG_DIR, str(tmp_path))
    families: list[str] = []
    monkeypatch.setattr(module, "run", lambda _layer, _call, chosen: families.append(chosen.gemm1.family))
    monkeypatch.setattr(module, "device_facts", lambda _: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fresh = module.Package(tmp_path, package.LAYERS)
    for padded_rows in (0, 5, 0, 5):
        fresh._run(layer, call_of(package, make_inputs(layer, 64, padded_rows=padded_rows)))
    assert families == ["tma", "portable", "tma", "portable"]


def test_a_record_of_two_families_is_refused(
    build: Callable[..., ModuleType], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = build(quant=("fp8_w8a8:channel",))
    portable = replace(TALL, family="portable")
    write_record(package, tmp_path, H200, {64: LayerTiles(TALL, portable)})
    found = package.runtime.configs.Configs(tmp_path).tiles(package.LAYERS[0], 64, None, H200)
    assert found.gemm1.family == "portable"
    assert "family of gemm1 and gemm2 are tma and portable; allowed: one value" in caplog.text
