"""The family "tma" on a GPU, chosen through tile configs: oracle in float64, memory poisoned with NaN, CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.runtime.device import device_facts
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import Parallel
from tests.support import packages
from tests.support.by_tiles import ROUNDED_TWICE, check, run
from tests.support.packages import make_inputs, oracle, relative_error
from tests.support.record_files import write_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or not device_facts(0).has_wgmma, reason="needs a GPU of compute capability 9.0"
    ),
]

Build = Callable[..., ModuleType]
WIDE = TileConfig(64, 256, 128, 16, PDL=True, num_warps=4, num_stages=2, family="tma")
SMALL = replace(WIDE, BLOCK_SIZE_N=128, num_stages=3)
LARGE = replace(WIDE, BLOCK_SIZE_M=128, num_warps=8, num_stages=3)
TALL = replace(LARGE, BLOCK_SIZE_N=128)
BLOCK_PAIRS = [LayerTiles(WIDE, SMALL), LayerTiles(SMALL, WIDE), LayerTiles(LARGE, LARGE)]
ROW_PAIRS = [LayerTiles(TALL, TALL), LayerTiles(LARGE, TALL), LayerTiles(SMALL, WIDE)]
BLOCKS = ("fp8_w8a8:128x128", "fp8_w8a8:128x128ue8m0", "int8_w8a8:128x128")
BY_ROW = ("fp8_w8a8:tensor", "fp8_w8a8:tensor_token", "fp8_w8a8:channel", "int8_w8a8:channel", "int8_w8a8:tensor")
SIZES: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 720, "intermediate_size": 384}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = Path(tmp_path_factory.mktemp("packages"))
    return lambda quant, **fields: packages.build(folder, quant=(quant,), **{**SIZES, **fields})


@pytest.mark.parametrize("tokens", [1, 70, 517])
@pytest.mark.parametrize("pair", range(3))
@pytest.mark.parametrize("quant", [*BLOCKS, *BY_ROW])
def test_schemes_and_tiles(make: Build, quant: str, pair: int, tokens: int) -> None:
    package = make(quant)
    tiles = (BLOCK_PAIRS if quant in BLOCKS else ROW_PAIRS)[pair]
    options = {"padding": 0.2, "padded_rows": 64} if pair == 1 else {}
    check(package, make_inputs(package.LAYERS[0], tokens, pair, "cuda", **options), tiles)


@pytest.mark.parametrize("activation", ["swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("quant", ["fp8_w8a8:128x128", "int8_w8a8:channel"])
def test_other_rows_and_biases(make: Build, quant: str, activation: str) -> None:
    """Interleaved gate and up rows, un-gated ones; sizes that no tile divides."""
    package = make(quant, activation=activation, bias=True, intermediate_size=400)
    tiles = BLOCK_PAIRS[0] if quant in BLOCKS else ROW_PAIRS[0]
    check(package, make_inputs(package.LAYERS[0], 300, 3, "cuda", padding=0.2), tiles)


@pytest.mark.parametrize("options", [{"hot_expert": 3}, {"empty_experts": tuple(range(10))}, {"padding": 0.9}])
@pytest.mark.parametrize("quant", ["fp8_w8a8:128x128", "fp8_w8a8:channel"])
def test_uneven_routing(make: Build, quant: str, options: dict[str, Any]) -> None:
    package = make(quant)
    tiles = BLOCK_PAIRS[0] if quant in BLOCKS else ROW_PAIRS[0]
    check(package, make_inputs(package.LAYERS[0], 700, 4, "cuda", **options), tiles)
    assert not run(package, make_inputs(package.LAYERS[0], 100, 4, "cuda", padding=1.0), tiles).any()


@pytest.mark.parametrize("quant", ["fp8_w8a8:128x128", "fp8_w8a8:channel"])
def test_expert_map(make: Build, quant: str) -> None:
    package = make(quant, parallel=(Parallel(ep=4),))
    tiles = BLOCK_PAIRS[0] if quant in BLOCKS else ROW_PAIRS[0]
    check(package, make_inputs(package.LAYERS[0], 400, 5, "cuda", mapped=True, padding=0.1), tiles)


def test_weight_on_input(make: Build) -> None:
    package = make("fp8_w8a8:128x128", top_k=1, bias=True)
    check(package, make_inputs(package.LAYERS[0], 300, 6, "cuda"), BLOCK_PAIRS[0], on_input=True)


@pytest.mark.parametrize("pair", range(3))
def test_gemm1_quantises_to_the_bits_of_the_quantiser(make: Build, pair: int) -> None:
    """WIDE and LARGE write quantised values, SMALL leaves it to a launch; the products themselves are the same."""
    package = make("fp8_w8a8:128x128", hidden_size=512)
    arguments = make_inputs(package.LAYERS[0], 300, 7, "cuda")
    assert torch.equal(run(package, arguments, BLOCK_PAIRS[pair]), run(package, arguments, BLOCK_PAIRS[0]))


def test_a_thousand_runs_give_one_result(make: Build) -> None:
    package = make("fp8_w8a8:128x128", hidden_size=2048, intermediate_size=768)
    arguments = make_inputs(package.LAYERS[0], 600, 8, "cuda")
    first = run(package, arguments, BLOCK_PAIRS[0])
    for _ in range(1000):
        assert torch.equal(first, run(package, arguments, BLOCK_PAIRS[0]))


def test_offsets_beyond_32_bits(make: Build) -> None:
    """100 000 tokens x 6 slots x 4096 values exceed 2^31; against the portable family, which has a test of its own."""
    package = make("fp8_w8a8:128x128", num_experts=8, top_k=6, hidden_size=4096, intermediate_size=1024)
    arguments = make_inputs(package.LAYERS[0], 100_000, 9, "cuda")
    portable = TileConfig(64, 128, 128, 8)
    by_portable = run(package, arguments, LayerTiles(portable, portable))
    assert relative_error(run(package, arguments, BLOCK_PAIRS[0]), by_portable) < ROUNDED_TWICE


def test_record_warmup_and_capture(make: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record chooses the family; warm-up compiles it without weights; unaligned weights run the portable family."""
    package = make("fp8_w8a8:128x128", hidden_size=512)
    layer, public = package.LAYERS[0], package._dispatch._PACKAGE
    write_record(package, tmp_path, device_facts(0), {600: BLOCK_PAIRS[0]})
    fresh = type(public)(tmp_path, package.LAYERS)
    monkeypatch.setattr(package._dispatch, "_PACKAGE", fresh)
    package.warmup(700)
    for padded_rows in (0, 5):
        arguments = make_inputs(layer, 600, 10, "cuda", padded_rows=padded_rows)
        if padded_rows:
            package.fused_experts(**arguments)  # unaligned rows are not what warm-up takes for granted
        out = torch.empty_like(arguments["hidden_states"])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            package.fused_experts(**arguments, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, oracle(layer, arguments)) < ROUNDED_TWICE
