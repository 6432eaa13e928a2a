"""The family "cooperative" on a GPU, through tile configs: oracle in float64, memory poisoned with NaN, graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.runtime.activations import ACTIVATIONS
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
WIDE = TileConfig(128, 256, 128, 4, PDL=True, num_warps=8, num_stages=4, family="cooperative")
NARROW = replace(WIDE, BLOCK_SIZE_N=128, num_stages=6)
SHORT = replace(WIDE, num_stages=3, GROUP_SIZE_M=1, PDL=False)
FLAT = replace(WIDE, GROUP_SIZE_M=1, PDL=False)  # SHORT, without block scales
LOW = replace(WIDE, BLOCK_SIZE_M=64)
SWAPPED = replace(WIDE, BLOCK_SIZE_M=16, SWAP_AB=True, num_stages=6)
SWAPPED_32 = replace(SWAPPED, BLOCK_SIZE_M=32, num_stages=5)
PAIRS = [
    LayerTiles(WIDE, WIDE),
    LayerTiles(NARROW, WIDE),
    LayerTiles(replace(LOW, num_stages=5), LOW),
    LayerTiles(WIDE, NARROW),
    LayerTiles(SHORT, SHORT),
    LayerTiles(LOW, LOW),
    LayerTiles(SWAPPED, SWAPPED),
    LayerTiles(SWAPPED_32, SWAPPED_32),
    LayerTiles(replace(SWAPPED, BLOCK_SIZE_N=128), SWAPPED),
]
MAIN = (0, 1, 2, 6)
SLIM = replace(LOW, BLOCK_SIZE_N=128, num_stages=6)  # without block scales
FP8, UE8M0, INT8 = "fp8_w8a8:128x128", "fp8_w8a8:128x128ue8m0", "int8_w8a8:128x128"
NO_GROUPS = ("none", "fp8_w8a8:channel", "fp8_w8a8:tensor_token", "int8_w8a8:channel", "int8_w8a8:tensor")
SIZES: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 720, "intermediate_size": 384, "quant": (FP8,)}
# Gate and up rows apart, and gated or not.
PLAIN_ROWS = sorted(name for name, row in ACTIVATIONS.items() if not row.interleaved)


def pairs_of(quant: str, gated: bool = True) -> list[LayerTiles]:
    """PAIRS as a scheme without K groups takes them: results are not quantised, 16-bit values come 64 a step."""
    if quant in (FP8, UE8M0, INT8):
        return PAIRS
    low = replace(LOW, num_stages=5 if gated else 4)
    pairs = [*PAIRS[:2], LayerTiles(low, LOW), PAIRS[3], LayerTiles(FLAT, FLAT), *PAIRS[5:], LayerTiles(SLIM, SLIM)]
    deep = 64 if quant == "none" else 128
    return [LayerTiles(*(replace(tile, BLOCK_SIZE_K=deep) for tile in (one.gemm1, one.gemm2))) for one in pairs]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = Path(tmp_path_factory.mktemp("packages"))
    return lambda **fields: packages.build(folder, **{**SIZES, **fields})


@pytest.mark.parametrize("tokens", [1, 70, 517, 3000])
@pytest.mark.parametrize("pair", range(len(PAIRS)))
@pytest.mark.parametrize("quant", [FP8, UE8M0, INT8])
def test_schemes_and_tiles(make: Build, quant: str, pair: int, tokens: int) -> None:
    package = make(quant=(quant,))
    options = {"padding": 0.2, "padded_rows": 64} if pair == 1 else {}
    check(package, make_inputs(package.LAYERS[0], tokens, pair, "cuda", **options), PAIRS[pair])


@pytest.mark.parametrize("tokens", [1, 70, 517, 3000])
@pytest.mark.parametrize("pair", range(len(PAIRS) + 1))
@pytest.mark.parametrize("quant", NO_GROUPS)
def test_schemes_without_k_groups(make: Build, quant: str, pair: int, tokens: int) -> None:
    package = make(quant=(quant,), intermediate_size=336)
    options = {"padding": 0.2, "padded_rows": 64} if pair == 1 else {}
    check(package, make_inputs(package.LAYERS[0], tokens, pair, "cuda", **options), pairs_of(quant)[pair])


@pytest.mark.parametrize("quant", NO_GROUPS[:2])
def test_forms_without_k_groups(make: Build, quant: str) -> None:
    """Biases, un-gated rows that no tile divides, short reductions, float16, tokens with gaps between them."""
    pairs = pairs_of(quant)
    fields: list[dict[str, Any]] = [
        {"bias": True, "dtypes": ("float16",)},
        {"bias": True, "hidden_size": 16, "intermediate_size": 48},
        {"parallel": (Parallel(ep=4),)},
    ]
    for one in fields:
        package = make(quant=(quant,), **one)
        arguments = make_inputs(package.LAYERS[0], 300, 3, "cuda", padding=0.2, mapped="parallel" in one)
        for pair in (pairs[0], pairs[2], *pairs[5:]):
            check(package, arguments, pair)
    package = make(quant=(quant,), activation="relu2_no_mul", bias=True, intermediate_size=400)
    arguments = make_inputs(package.LAYERS[0], 300, 3, "cuda", padding=0.2)
    for pair in pairs_of(quant, gated=False):
        dense = check(package, arguments, pair)
        wide = torch.randn(300, 2 * 720, device="cuda").to(arguments["hidden_states"].dtype)
        wide[:, :720] = arguments["hidden_states"]
        assert torch.equal(run(package, {**arguments, "hidden_states": wide[:, :720]}, pair), dense)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types(make: Build, dtype: str) -> None:
    package = make(dtypes=(dtype,), bias=True)
    for pair in (PAIRS[number] for number in MAIN):
        check(package, make_inputs(package.LAYERS[0], 300, 1, "cuda"), pair)


@pytest.mark.parametrize("activation", PLAIN_ROWS)
def test_activations_and_biases(make: Build, activation: str) -> None:
    package = make(activation=activation, bias=True)
    check(package, make_inputs(package.LAYERS[0], 300, 3, "cuda", padding=0.2), PAIRS[0])


@pytest.mark.parametrize("quant", [FP8, INT8])
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_rows_that_no_tile_divides(make: Build, pair: int, quant: str) -> None:
    """Un-gated: 400 columns of `hidden`, the last group of which is quantised with 16 of them; H is 720."""
    package = make(activation="relu2_no_mul", bias=True, intermediate_size=400, quant=(quant,))
    check(package, make_inputs(package.LAYERS[0], 300, 3, "cuda", padding=0.2), PAIRS[pair])


@pytest.mark.parametrize("hidden_size", [16, 144, 1040])
def test_short_and_odd_reductions(make: Build, hidden_size: int) -> None:
    """Fewer steps than the ring has stages, and depths that no step divides."""
    package = make(hidden_size=hidden_size, intermediate_size=128)
    for pair in (PAIRS[number] for number in MAIN):
        check(package, make_inputs(package.LAYERS[0], 700, 3, "cuda"), pair)


@pytest.mark.parametrize("quant", [FP8, "none"])
@pytest.mark.parametrize("options", [{"hot_expert": 3}, {"empty_experts": tuple(range(10))}, {"padding": 0.9}])
def test_uneven_routing(make: Build, options: dict[str, Any], quant: str) -> None:
    package = make(quant=(quant,))
    for pair in (pairs_of(quant)[number] for number in MAIN):
        check(package, make_inputs(package.LAYERS[0], 700, 4, "cuda", **options), pair)
        assert not run(package, make_inputs(package.LAYERS[0], 100, 4, "cuda", padding=1.0), pair).any()


@pytest.mark.parametrize("pair", MAIN)
def test_expert_map(make: Build, pair: int) -> None:
    package = make(parallel=(Parallel(ep=4),))
    check(package, make_inputs(package.LAYERS[0], 400, 5, "cuda", mapped=True, padding=0.1), PAIRS[pair])


@pytest.mark.parametrize("quant", [FP8, "fp8_w8a8:channel", "none"])
@pytest.mark.parametrize("pair", MAIN)
def test_weight_on_input(make: Build, pair: int, quant: str) -> None:
    package = make(top_k=1, bias=True, quant=(quant,))
    check(package, make_inputs(package.LAYERS[0], 300, 6, "cuda"), pairs_of(quant)[pair], on_input=True)


@pytest.mark.parametrize("quant", [FP8, UE8M0, INT8])
def test_gemm1_quantises_to_the_bits_of_the_quantiser(make: Build, quant: str) -> None:
    """WIDE and LOW write quantised values, NARROW leaves it to a launch; the products themselves are the same."""
    package = make(quant=(quant,), hidden_size=512)
    arguments = make_inputs(package.LAYERS[0], 300, 7, "cuda")
    first = run(package, arguments, PAIRS[0])
    assert all(torch.equal(run(package, arguments, pair), first) for pair in PAIRS[1:])


@pytest.mark.parametrize("quant", [FP8, "none"])
def test_a_thousand_runs_give_one_result(make: Build, quant: str) -> None:
    package = make(hidden_size=2048, intermediate_size=768, quant=(quant,))
    arguments = make_inputs(package.LAYERS[0], 1200, 8, "cuda")
    for pair in (pairs_of(quant)[number] for number in MAIN):
        first = run(package, arguments, pair)
        for _ in range(1000):
            assert torch.equal(first, run(package, arguments, pair))


@pytest.mark.parametrize("quant", [FP8, "none"])
def test_two_streams_share_the_gpu(make: Build, quant: str) -> None:
    """Launches that run both GEMMs wait within for rows: neither may keep the other's programs from beginning."""
    package = make(hidden_size=2048, intermediate_size=768, quant=(quant,))
    arguments = [make_inputs(package.LAYERS[0], 1200, seed, "cuda") for seed in (8, 9)]
    pair = pairs_of(quant)[0]
    alone = [run(package, one, pair) for one in arguments]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in arguments]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for own, one, stream in zip(results, arguments, streams, strict=True):
            with torch.cuda.stream(stream):
                own.append(run(package, one, pair))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for own, first in zip(results, alone, strict=True) for out in own)


@pytest.mark.parametrize("quant", [FP8, "none"])
def test_offsets_beyond_32_bits(make: Build, quant: str) -> None:
    """100 000 tokens x 6 slots x 4096 values exceed 2^31; against the portable family, which has a test of its own."""
    package = make(num_experts=8, top_k=6, hidden_size=4096, intermediate_size=1024, quant=(quant,))
    arguments = make_inputs(package.LAYERS[0], 100_000, 9, "cuda")
    portable = TileConfig(64, 128, 64, 8)
    by_portable = run(package, arguments, LayerTiles(portable, portable))
    for pair in (pairs_of(quant)[number] for number in (0, 2, 6)):
        assert relative_error(run(package, arguments, pair), by_portable) < ROUNDED_TWICE


def test_gathered_rows_beyond_32_bits(make: Build) -> None:
    """700 000 tokens x 4096 values of 8 bits: the tokens themselves exceed 2^31."""
    package = make(num_experts=4, top_k=1, hidden_size=4096, intermediate_size=128)
    arguments = make_inputs(package.LAYERS[0], 1000, 9, "cuda")
    tokens = 700_000
    long = {name: arguments[name].repeat(tokens // 1000, 1) for name in ("hidden_states", "topk_weights", "topk_ids")}
    out = run(package, {**arguments, **long}, PAIRS[0])
    assert torch.equal(out[-1000:], run(package, arguments, PAIRS[0]))


def test_record_warmup_and_capture(make: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record chooses the family; warm-up compiles it without weights; unaligned weights run the portable family."""
    package = make(hidden_size=512)
    layer, public = package.LAYERS[0], package._dispatch._PACKAGE
    write_record(package, tmp_path, device_facts(0), {600: PAIRS[0]})
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


def test_the_heuristic_takes_it(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make(hidden_size=1024)
    families = []
    module = package.runtime.package
    original = module.run
    monkeypatch.setattr(
        module, "run", lambda layer, call, tiles: (families.append(tiles.gemm1.family), original(layer, call, tiles))
    )
    arguments = make_inputs(package.LAYERS[0], 1024, 11, "cuda")
    out = package.fused_experts(**arguments)
    assert families == ["cooperative"]
    assert relative_error(out, oracle(package.LAYERS[0], arguments)) < ROUNDED_TWICE
