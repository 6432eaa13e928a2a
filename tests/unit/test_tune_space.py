"""Which tile configs the tuner tries."""

from dataclasses import replace

import pytest

from moegen.device import TARGETS
from moegen.runtime.cooperative_sizes import joins
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import Gemm, TileConfig, why_illegal, why_illegal_pair
from moegen.tune.replay import Sweep
from moegen.tune.space import AXES, OPS, Kind, LayerSpace, Space, layer_space, varied
from moegen.tune.trial import Measurement
from tests.support.made_up import DEVICE, GEMMS

BITS = {
    "bf16": {"a_bits": 16, "w_bits": 16, "group_k": 0},
    "fp8": {"a_bits": 8, "w_bits": 8, "group_k": 0},
    "fp8 block": {"a_bits": 8, "w_bits": 8, "group_k": 128, "group_n": 128},
    "mxfp4": {"a_bits": 16, "w_bits": 4, "group_k": 32},
    "float32": {"a_bits": 32, "w_bits": 32, "group_k": 0},
}


def space_of(tokens: int, quant: str = "bf16", device: DeviceFacts = DEVICE) -> LayerSpace:
    gemms = [replace(gemm, **BITS[quant]) for gemm in GEMMS.values()]
    return layer_space(*gemms, tokens, device, low_latency=tokens * 8 * 4 <= 128)


def spaces_of(space: LayerSpace) -> list[tuple[str, Kind, Space]]:
    return [(op, kind, own) for op in OPS for kind, own in getattr(space, op).items()]


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("quant", sorted(BITS))
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096, 65536])
def test_default_and_starts_are_in_every_space(quant: str, tokens: int, target: str) -> None:
    space = space_of(tokens, quant, TARGETS[target])
    assert space.default in space
    assert all(space.start(kind) in space for kind in space.kinds)


@pytest.mark.parametrize("quant", sorted(BITS))
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
def test_every_config_is_legal_and_there_once(quant: str, tokens: int) -> None:
    for op, kind, own in spaces_of(space_of(tokens, quant)):
        gemm: Gemm = replace(GEMMS[op], **BITS[quant])
        assert [why_illegal(tile, gemm, DEVICE) for tile in own.tiles] == [None] * len(own.tiles)
        assert len(set(own.tiles)) == len(own.tiles)
        assert {(tile.family, tile.BLOCK_SIZE_M) for tile in own.tiles} == {kind}


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(1, (16,)), (16, (16, 32)), (256, (16, 32, 64)), (1024, (64, 128)), (16384, (64, 128))]
)
def test_block_sizes_lie_around_the_mean_number_of_slots(tokens: int, sizes: tuple[int, ...]) -> None:
    kinds = space_of(tokens).kinds
    assert tuple(kind.block_m for kind in kinds if kind.family == "portable") == sizes
    assert (Kind("stream", 1) in kinds) == (tokens == 1)


@pytest.mark.parametrize("quant", ["fp8 block", "fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
def test_the_family_stream_is_tried_where_its_tile_is_for_these_tokens(tokens: int, quant: str) -> None:
    space = space_of(tokens, quant)
    kinds = [kind for kind in space.kinds if kind.family == "stream"]
    assert kinds == [Kind("stream", tokens)] * (tokens in (1, 2, 4))
    for kind in kinds:
        assert space.ops(kind) == ("gemm1",)
        assert {tile.BLOCK_SIZE_M for tile in space.gemm1[kind].tiles} == {tokens}
        assert space.gemm1[kind].tiles == space.gemm2[kind].tiles


@pytest.mark.parametrize("quant", ["fp8 block", "fp8", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "sizes"), [(2048, (64, 128)), (512, (16, 32, 64, 128)), (16, (16, 32, 64)), (2, ())]
)
def test_where_there_are_tiles_enough_the_family_cooperative_is_tried(
    tokens: int, sizes: tuple[int, ...], quant: str
) -> None:
    kinds = space_of(tokens, quant).kinds
    assert tuple(kind.block_m for kind in kinds if kind.family == "cooperative") == sizes
    assert {kind.family for kind in space_of(tokens, quant, TARGETS["cuda:100"]).kinds} == {"portable"}


@pytest.mark.parametrize("quant", ["fp8 block", "fp8", "bf16"])
def test_a_launch_that_runs_both_gemms_has_one_config(quant: str) -> None:
    """Varied together, so that no move of the search leaves the one launch for two."""
    space, gemms = space_of(4096, quant), [replace(gemm, **BITS[quant]) for gemm in GEMMS.values()]
    for kind in (kind for kind in space.kinds if kind.family == "cooperative"):
        assert space.ops(kind) == ("gemm1",)
        for tile in space.gemm1[kind].tiles:
            pair = varied(space.start(kind), "gemm1", tile)
            assert pair.gemm1 == pair.gemm2 == tile
            assert pair in space
            assert why_illegal_pair(pair, *gemms, DEVICE) is None
            assert joins(pair, gemms[0]) == (quant == "bf16" or (quant == "fp8 block" and tile.BLOCK_SIZE_N == 256))
        assert replace(space.start(kind), gemm2=replace(space.start(kind).gemm2, GROUP_SIZE_M=2)) not in space


@pytest.mark.parametrize(("quant", "tokens"), [("fp8 block", 4096), ("bf16", 1)])
def test_a_sweep_knows_the_families_that_it_was_recorded_with(quant: str, tokens: int) -> None:
    """One of portable kernels alone stays whole when a new family becomes the heuristic's choice."""
    gemms = [replace(gemm, **BITS[quant]) for gemm in GEMMS.values()]
    facts = (*gemms, tokens, tokens == 1, "3.6.0")
    whole = Sweep("layer", DEVICE, *facts, {op: {} for op in OPS}).space
    old = {op: {tile: Measurement("ok", 1.0) for tile in whole.tiles(op) if tile.family == "portable"} for op in OPS}
    space = Sweep("layer", DEVICE, *facts, old).space
    assert whole.default.gemm1.family != "portable"
    assert space.default.gemm1.family == "portable"
    assert space.default in space
    assert {op: set(space.tiles(op)) for op in OPS} == {op: set(tiles) for op, tiles in old.items()}


def test_near_the_rule_both_assignments_are_tried() -> None:
    """128 experts, top_k 8: the rule ends at 4 tokens."""
    chosen = {tokens: {pair.low_latency for pair in space_of(tokens).others} for tokens in (1, 2, 4, 5, 8, 16, 17, 64)}
    assert chosen == {1: {False}, 2: {False}, 4: {False}, 5: {True}, 8: {True}, 16: {True}, 17: set(), 64: set()}
    space = space_of(8)
    assert all(pair in space for pair in space.others)
    assert replace(space.default, low_latency=True) not in space


def varying(tokens: int, size: int) -> set[str]:
    return set(space_of(tokens).gemm1[Kind("portable", size)].axes)


def test_an_axis_is_open_only_where_it_can_matter() -> None:
    assert varying(1, 16) == set(AXES["portable"]) - {"BLOCK_SIZE_M", "GROUP_SIZE_M"}
    assert varying(16, 16) == set(AXES["portable"]) - {"BLOCK_SIZE_M", "GROUP_SIZE_M", "PDL"}
    assert varying(4096, 64) == set(AXES["portable"]) - {"BLOCK_SIZE_M", "PDL"}
    assert varying(4096, 128) == set(AXES["portable"]) - {"BLOCK_SIZE_M", "PDL", "SWAP_AB"}
    assert min(tile.num_warps for tile in space_of(4096).gemm1[Kind("portable", 64)].tiles) == 4


def test_a_closed_axis_keeps_the_heuristics_value() -> None:
    own = space_of(16).gemm1[Kind("portable", 16)]
    assert {tile.PDL for tile in own.tiles} == {own.start.PDL} == {True}


def test_no_pdl_where_the_gpu_has_none() -> None:
    assert not any(t.PDL for _, _, own in spaces_of(space_of(1, device=TARGETS["cuda:80"])) for t in own.tiles)


def test_indices_and_tile_are_inverse() -> None:
    own = space_of(16).gemm2[Kind("portable", 16)]
    assert all(own.tile(own.indices(tile)) == tile for tile in own.tiles)


def test_indices_that_are_illegal_together_are_no_config() -> None:
    own = space_of(16).gemm2[Kind("portable", 16)]
    assert own.tile({field: len(values) - 1 for field, values in own.axes.items()}) is None


def test_neighbours_differ_in_one_field_nearest_first() -> None:
    own = space_of(16).gemm1[Kind("portable", 16)]
    tile = TileConfig(16, 64, 64, 1, False, True, num_warps=4, num_stages=4)
    steps = []
    for other in own.neighbours(tile):
        moved = {f: abs(own.indices(other)[f] - own.indices(tile)[f]) for f in own.axes}
        steps += [step for step in moved.values() if step]
        assert other in own
    assert steps == sorted(steps)
    # One step: N, warps and stages both ways, K and SWAP_AB one. Two steps: stages both ways, N, K and warps one.
    assert (steps.count(1), steps.count(2)) == (8, 5)


def test_configs_of_elsewhere_are_not_in_the_space() -> None:
    space = space_of(16)
    assert replace(space.default, gemm1=replace(space.default.gemm1, BLOCK_SIZE_N=512)) not in space
    far = [replace(tile, BLOCK_SIZE_M=128) for tile in (space.default.gemm1, space.default.gemm2)]
    assert type(space.default)(*far) not in space
