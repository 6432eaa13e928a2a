"""The family "stream" compiles for cuda:90 with both supported Tritons: one kernel a layer, and nothing beside it."""

from pathlib import Path
from typing import Any

import pytest
import triton

from moegen.device import TARGETS
from moegen.runtime.quant import Scheme
from moegen.runtime.tile import Gemm, TileConfig, shared_memory
from tests.compile.stream_sweep import CASES, SIZES, TARGET
from tests.compile.test_targets import OLDER, folder_of, sweep

# The installed Triton compiles all, the older one, with which tests/gpu ran last, those that differ most.
FEW = (
    "low tiles", "two tokens", "tails", "bias, high", "not gated", "fp8, deep", "fp8, tails, bias, interleaved",
    "fp8, five tokens", "fp8, channel, two segments", "fp8, tensor, shard", "int8, channel",
)  # fmt: skip
# Registers a thread, so that two blocks fit a multiprocessor: warps that multiply, and a warpgroup for the two others.
TWO_BLOCKS = {warps: 65536 // (2 * (warps + 4) * 32) for warps in (4, 8)}


def bound(fields: dict[str, Any], tile: TileConfig) -> int:
    """What `shared_memory` says of the layer, by either GEMM."""
    size = {**SIZES, **fields}
    scheme = Scheme.parse(fields.get("quant", ("none",))[0])
    bits, hidden, rows = 8 if scheme.kind else 16, size["hidden_size"], size["intermediate_size"]
    more = {"a_bits": bits, "w_bits": bits, "group_k": scheme.group_k, "group_n": scheme.group_n}
    gated = "mul" not in size.get("activation", "silu")
    gemm1 = Gemm("gemm1", size["num_experts"], size["top_k"], rows * (2 if gated else 1), hidden, gated, **more)
    gemm2 = Gemm("gemm2", size["num_experts"], size["top_k"], hidden, rows, False, **more)
    return min(shared_memory(tile, gemm) for gemm in (gemm1, gemm2))


@pytest.mark.parametrize("older", [False, True], ids=[triton.__version__, OLDER])
def test_compiles(tmp_path: Path, older: bool) -> None:
    cases = FEW if older else tuple(CASES)
    records = sweep("stream_sweep", folder_of(older), tmp_path, *cases)
    if older:
        assert {record["triton"] for record in records} == {OLDER}
    assert [record for record in records if record["error"] is not None] == []
    assert {record["case"] for record in records} == set(cases)
    for case in cases:
        fields, tile = CASES[case]
        mine = [record for record in records if record["case"] == case]
        assert {record["kernel"] for record in mine} == {"stream_layer"}
        assert all(record["shared_memory"] <= bound(fields, tile) for record in mine), case
        assert [record for record in mine if record["spills"]] == [], case
        assert all(record["shared_memory"] <= TARGETS[TARGET].shared_memory // 2 for record in mine), case
        assert all(record["registers"] <= TWO_BLOCKS[tile.num_warps] for record in mine), case
