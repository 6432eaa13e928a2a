"""The search of one bucket: which tile configs to measure next, and which to keep.

    space = layer_space(layer.gemm("gemm1"), layer.gemm("gemm2"), tokens, device, low_latency)
    found = search(space, measurer, effort="standard", seed=0, warm=[winner of the neighbouring bucket, imported tiles])
    found.tiles, found.us, found.spread, found.default_us, found.tried, found.failures

`measurer` is the GPU's client, a replayed sweep, or either of them behind `Journal.measurer`, which remembers; progress is
seen by wrapping it as well (`EFFORTS[effort].budget` is what will be measured at most, without the final comparison). The
search is a deterministic function of its arguments and of what the measurer answers, and keeps no state of its own:
after an interruption it is run again from the start, and the journal answers until it reaches new ground.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moegen.runtime.tile import LayerTiles

from .space import LayerSpace
from .trial import Measurer, Status


@dataclass(frozen=True, slots=True)
class Effort:
    """How much one bucket may cost.

    budget  pairs of tile configs that are measured, at most
    """

    budget: int


EFFORTS = {"quick": Effort(60), "standard": Effort(200), "full": Effort(1000)}


class NothingRuns(RuntimeError):
    """Not one pair of tile configs could be timed; the message counts the failures by class."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one bucket.

    tiles       the winner; the default unless another one beats it by more than the noise
    us, spread  its time, µs, and relative noise, from the final comparison
    default_us  the default's time from that comparison, None if the default does not run
    tried       distinct pairs that were measured
    failures    status -> number of pairs that gave no time
    """

    tiles: LayerTiles
    us: float
    spread: float
    default_us: float | None
    tried: int
    failures: dict[Status, int] = field(default_factory=dict)


def search(
    space: LayerSpace,
    measurer: Measurer,
    *,
    effort: str = "standard",
    seed: int = 0,
    warm: Sequence[LayerTiles] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Find the fastest pair of tile configs of `space`.

    warm: pairs to measure first; those that are not in the space are ignored. stop: asked before every batch; once it
    is true, what has been measured is compared and the best of it returned. Raises KeyError for an unknown effort,
    NothingRuns if no pair could be timed.
    """
    raise NotImplementedError
