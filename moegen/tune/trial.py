"""What a measurement is, and who can make one: the words that search, journal and GPU side share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from moegen.runtime.tile import LayerTiles, TileConfig

# ok and slow have a time. The others are failures by class: the config does not compile, needs more than the GPU has,
# did not return in time, took its process down, or computes something else than the reference.
Status = Literal["ok", "slow", "compile", "resources", "timeout", "crash", "wrong"]

# When what is announced will be measured, and so what is compiled first: soon, by the search that goes on; as the first
# of another bucket; or perhaps.
SOON, NEXT, PERHAPS = range(3)

NEVER_SLOWER = 1.01  # of the default's time, measured side by side: more is not published


@dataclass(frozen=True, slots=True)
class Measurement:
    """What measuring one pair of tile configs gave.

    status   see Status
    us       time of the whole layer call, µs: the median with status ok; what was seen until the race dropped the
             config with status slow; None otherwise
    spread   relative noise of `us` (interquartile range / median)
    message  one line that says why there is no time
    apart    from a comparison: the time of each routing alone, µs, whose mean `us` is; empty where there is but one
    """

    status: Status
    us: float | None = None
    spread: float = 0.0
    message: str = ""
    apart: tuple[float, ...] = ()

    def loses(self, other: "Measurement") -> bool:
        """Whether this is slower than `other` under any of the routings that both were timed with."""
        return any(us > NEVER_SLOWER * than for us, than in zip(self.apart, other.apart, strict=False))


class Measurer(Protocol):
    """Measures the tile configs of one layer: on a GPU (client.py) or from a recorded sweep (replay.py)."""

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        """Announce what will be measured, in that order, so that it can be compiled ahead."""

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        """Measure one pair; a failure is a Measurement, never an exception. A race is lost against best_us, µs."""

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        """Measure the finalists side by side until their noise is below 1 % or a cap is reached, in the order given."""


def plain_tiles(tiles: LayerTiles) -> list[Any]:
    """JSON form, the inverse of `tiles_of`: both tile configs, and the assignment where it is not by the rule."""
    return [tiles.gemm1.to_dict(), tiles.gemm2.to_dict(), *([] if tiles.low_latency is None else [tiles.low_latency])]


def tiles_of(plain: list[Any]) -> LayerTiles:
    """A pair of tile configs from its JSON form."""
    gemm1, gemm2, *low_latency = plain
    tiles = LayerTiles(TileConfig.from_dict(gemm1), TileConfig.from_dict(gemm2))
    return replace(tiles, low_latency=low_latency[0]) if low_latency else tiles
