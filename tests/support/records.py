"""Small config records: a layer, tile configs that no heuristic gives, and buckets with every field set."""

from typing import Any

from moegen.device import TARGETS
from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.spec import VariantSpec
from moegen.tune.fingerprint import current_kernels
from moegen.tune.record import Record, TunedBucket

H200 = TARGETS["cuda:90"]
LAYER = VariantSpec(
    num_experts=128, local_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, dtype="bfloat16"
)
FIRST = TileConfig(32, 64, 32, 5, num_warps=2, num_stages=2)
SECOND = TileConfig(32, 128, 64, 7, num_warps=2, num_stages=2)
TILES = LayerTiles(FIRST, SECOND)


def bucket(**changes: Any) -> TunedBucket:
    """A bucket as the tuner writes it."""
    facts: dict[str, Any] = {
        "tiles": TILES,
        "us": 50.0,
        "default_us": 60.0,
        "spread": 0.004,
        "tried": 187,
        "effort": "standard",
        "seed": 0,
        "routing": "balanced+power_law",
        "triton": "3.6.0",
        "torch": "2.11.0",
        "moegen": "0.1.0",
        "kernels": current_kernels(LAYER),
    }
    return TunedBucket(**{**facts, **changes})


def record(*tokens: int, **changes: Any) -> Record:
    """A record of LAYER on an H200 with one bucket for each of `tokens`."""
    return Record(H200, LAYER, {count: bucket(**changes) for count in tokens or (16, 64)})
