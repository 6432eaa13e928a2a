"""The search of one bucket: which tile configs to measure next, and which to keep.

    space = layer_space(layer.gemm("gemm1"), layer.gemm("gemm2"), tokens, device, low_latency)
    found = search(space, measurer, effort="standard", seed=0, warm=[winner of the neighbouring bucket, imported tiles])
    found.tiles, found.us, found.spread, found.default_us, found.tried, found.failures

`measurer` is the GPU's client, a replayed sweep, or either of them behind `Journal.measurer`, which remembers; whoever
shows progress wraps it as well (`EFFORTS[effort].budget` pairs are measured at most, without the final comparison).
The search is a deterministic function of its arguments and of what the measurer answers, and keeps no state of its
own: after an interruption it is run again from the start, and the journal answers until it reaches new ground.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import Trial, TrialState, create_trial

from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.space import Kind, LayerSpace, Space, kind_of, varied
from moegen.tune.trial import Measurement, Measurer, Status

BATCH = 5  # configs of one GEMM that are asked for, and compiled, together
SAMPLED = 1  # of them from TPE, the others neighbours of the best ones
PARENTS = 3  # best configs whose neighbours are tried
STARTUP = 10  # configs after which TPE has a model
STALE = 6  # asks in a row without a new config after which TPE has nothing more to say
HANDICAP = 0.05  # a kind so much slower than the best is tried half as often, twice so much a third as often …
FINALISTS = 8
EXHAUSTED = 400  # a space of at most so many configs is measured as a whole


@dataclass(frozen=True, slots=True)
class Effort:
    """How much one bucket may cost.

    budget  measurements, those of the finalists included
    ahead   batches that are compiled while one is measured: more hide the compiler better, and are asked for in
            ignorance of more that is being measured, which a small budget cannot afford
    """

    budget: int
    ahead: int


EFFORTS = {"quick": Effort(60, 5), "standard": Effort(200, 7), "full": Effort(1000, 7)}


class NothingRuns(RuntimeError):
    """Not one pair of tile configs could be timed; the message counts the failures by class."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one bucket.

    tiles       the winner; the default unless another one beats it by more than the noise, and loses under no routing
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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budget, ahead = EFFORTS[effort].budget, EFFORTS[effort].ahead
    if space.size <= EXHAUSTED:
        budget = max(budget, space.size + FINALISTS)
    run = _Run(space, measurer, budget - FINALISTS, seed)
    run.begin([pair for pair in warm if pair in space])
    run.explore(stop, ahead)
    return run.decide()


def beginnings(space: LayerSpace) -> list[LayerTiles]:
    """Pairs that a search of `space` begins with, but for warm ones."""
    return [space.default, *map(space.start, space.kinds), *space.others]


def openings(space: LayerSpace) -> list[LayerTiles]:
    """Pairs that a search of `space` goes on with where the heuristic's are the best of its beginnings."""
    then = []
    for kind in dict.fromkeys([kind_of(space.default), *space.kinds]):  # in the order in which they are measured
        start = space.start(kind)
        for op in space.ops(kind):
            own: Space = getattr(space, op)[kind]
            near = dict.fromkeys([own.start, *own.neighbours(own.start), *own.tiles])
            then += [varied(start, op, tile) for tile in itertools.islice(near, 1, 1 + BATCH)]
    return then


class _Run:
    """One search: what was measured, and for each BLOCK_SIZE_M the best pair so far.

    Of one kind, the time of a layer is nearly the sum of what its two GEMMs take. So one GEMM is varied at a
    time, the other one as in the best pair, and each has a search of its own, for the lowest cost: µs more than the
    config that the search began with.
    """

    def __init__(self, space: LayerSpace, measurer: Measurer, budget: int, seed: int) -> None:
        self._space, self._measurer, self._budget, self._seed = space, measurer, budget, seed
        self._known: dict[LayerTiles, Measurement] = {}
        self._best: dict[Kind, LayerTiles] = {}
        self._sides: dict[Kind, dict[str, _Side]] = {}

    def begin(self, warm: Sequence[LayerTiles]) -> None:
        """Find a pair to start from of each kind: the heuristic's or a warm one, whichever is faster."""
        default, *others = beginnings(self._space)
        self._start([default, *warm, *others])
        for kind in self._space.kinds:
            if kind not in self._best:  # what is next to the heuristic's may run where that does not
                first, second = (s[kind].neighbours(s[kind].start) for s in (self._space.gemm1, self._space.gemm2))
                self._start([LayerTiles(*pair) for pair in itertools.islice(zip(first, second, strict=False), BATCH)])
        for kind, pair in self._best.items():
            self._sides[kind] = {
                op: _Side(getattr(self._space, op)[kind], getattr(pair, op), self._seed) for op in self._space.ops(kind)
            }

    def _start(self, pairs: Sequence[LayerTiles]) -> None:
        self._measurer.prefetch(self._space.tokens, pairs)
        for pair in pairs:
            kind = kind_of(pair)
            us = self._measure(pair)
            if us is not None and pair.low_latency is None and (kind not in self._best or us < self._us(kind)):
                self._best[kind] = pair

    def explore(self, stop: Callable[[], bool], ahead: int) -> None:
        """Measure batch after batch until the budget is spent; `ahead` more compile while one is measured."""
        waiting: deque[tuple[Kind, str, list[TileConfig]]] = deque()
        for turn in itertools.count():
            if not any(side.left or side.sampled for sides in self._sides.values() for side in sides.values()):
                break
            for kind, op in [(each, op) for each in self._promising(turn) for op in self._space.ops(each)]:
                if stop() or len(self._known) >= self._budget:
                    return
                side = self._sides[kind][op]
                batch = side.ask(BATCH)
                soon = [varied(self._best[kind], op, tile) for tile in batch + side.sampled]
                self._measurer.prefetch(self._space.tokens, soon)
                if batch:  # of a GEMM that has no more, it would take the place of one that is to be compiled
                    waiting.append((kind, op, batch))
                if len(waiting) > ahead:
                    self._measure_batch(*waiting.popleft())
        for batch_of in waiting:
            self._measure_batch(*batch_of)

    def decide(self) -> Found:
        """Compare the best pairs side by side, the default among them."""
        timed = {pair: found.us for pair, found in self._known.items() if found.us is not None}
        failures = Counter(found.status for found in self._known.values() if found.us is None)
        if not timed:
            classes = ", ".join(f"{count} {status}" for status, count in failures.items())
            raise NothingRuns(f"{self._space.tokens} tokens: no pair of tile configs could be timed: {classes}")
        default = self._space.default
        finalists = sorted(timed, key=timed.__getitem__)[:FINALISTS]
        if default in timed and default not in finalists:
            finalists[-1] = default
        results = dict(zip(finalists, self._measurer.compare(self._space.tokens, finalists), strict=True))
        times = {pair: found.us for pair, found in results.items() if found.us is not None}
        if not times:
            raise NothingRuns(f"{self._space.tokens} tokens: none of the finalists could be timed again")
        if default in times:  # a gain under one routing is not worth a loss under another
            times = {pair: us for pair, us in times.items() if not results[pair].loses(results[default])}
        winner = min(times, key=times.__getitem__)
        if default in times:
            noise = max(results[winner].spread, results[default].spread)
            winner = winner if times[winner] < times[default] * (1 - noise) else default
        tried = len(self._known)
        return Found(winner, times[winner], results[winner].spread, times.get(default), tried, dict(failures))

    def _promising(self, turn: int) -> list[Kind]:
        """The kinds whose turn it is: the best one always, the others the more rarely the slower they are."""
        best = min(map(self._us, self._best), default=0.0)
        return [kind for kind in self._best if turn % (1 + int((self._us(kind) / best - 1) / HANDICAP)) == 0]

    def _measure_batch(self, kind: Kind, op: str, batch: Sequence[TileConfig]) -> None:
        side = self._sides[kind][op]
        for tile in batch:
            best = self._best[kind]
            pair = varied(best, op, tile)
            if len(self._known) >= self._budget and pair not in self._known:
                return
            base = self._us(kind) - side.cost[getattr(best, op)]
            us = self._measure(pair)
            side.tell(tile, None if us is None else us - base)
            if us is not None and us < self._us(kind):
                self._best[kind] = pair

    def _measure(self, pair: LayerTiles) -> float | None:
        if pair not in self._known:
            best_us = min(map(self._us, self._best), default=None)
            self._known[pair] = self._measurer.measure(self._space.tokens, pair, best_us)
        return self._known[pair].us

    def _us(self, kind: Kind) -> float:
        us = self._known[self._best[kind]].us
        assert us is not None  # noqa: S101 - only pairs with a time become the best
        return us


class _Side:
    """The search of one GEMM of one kind: TPE proposes some configs, the others are neighbours of the best."""

    def __init__(self, space: Space, start: TileConfig, seed: int) -> None:
        self._space = space
        self.cost = {start: 0.0}
        self.left = dict.fromkeys(tile for tile in space.tiles if tile != start)  # configs not asked for yet
        self.sampled: list[TileConfig] = []  # asked of TPE, not measured yet
        self._asked: dict[TileConfig, Trial] = {}
        self._stale = 0
        self._distributions: dict[str, BaseDistribution] = {
            field: IntDistribution(0, len(values) - 1) for field, values in space.axes.items()
        }
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        self._study = optuna.create_study(sampler=sampler)
        self._learn(start, 0.0)

    def ask(self, count: int) -> list[TileConfig]:
        """At most `count` configs that have not been asked for; fewer only when there are no more.

        `sampled` are TPE's for the next time. Theirs are the kernels that have never been compiled for another bucket
        or parent, and TPE loses little by waiting.
        """
        asked, self.sampled = self.sampled, []
        self._take(itertools.chain(self._neighbours(), [*self.left]), count, asked)
        self._take(self._sampled(), SAMPLED, self.sampled)
        return asked

    def _take(self, source: Iterable[TileConfig], enough: int, into: list[TileConfig]) -> None:
        for tile in source:
            if len(into) >= enough:
                return
            if tile in self.left:
                del self.left[tile]
                into.append(tile)

    def tell(self, tile: TileConfig, cost: float | None) -> None:
        """The cost of a config that was asked for, None if it failed."""
        if cost is not None:
            self.cost[tile] = cost
        self._learn(tile, cost)

    def _neighbours(self) -> Iterator[TileConfig]:
        for parent in sorted(self.cost, key=self.cost.__getitem__)[:PARENTS]:
            yield from self._space.neighbours(parent)

    def _sampled(self) -> Iterator[TileConfig]:
        """Configs that TPE asks for; it does not know which are illegal, and in the end it repeats itself."""
        while self._stale < STALE and self.left:
            trial = self._study.ask(self._distributions)
            tile = self._space.tile(trial.params)
            self._stale += 1
            if tile in self.left:
                self._stale = 0
                self._asked[tile] = trial
                yield tile
            elif tile in self.cost:
                self._study.tell(trial, self.cost[tile])
            else:  # without a value it ranks worst; a failed trial would be ignored, and asked for again
                self._study.tell(trial, state=TrialState.PRUNED)

    def _learn(self, tile: TileConfig, cost: float | None) -> None:
        trial = self._asked.pop(tile, None)
        state = TrialState.PRUNED if cost is None else TrialState.COMPLETE
        if trial is not None:
            self._study.tell(trial, cost, state=state)
        else:
            params, ranges = self._space.indices(tile), self._distributions
            self._study.add_trial(create_trial(state=state, value=cost, params=params, distributions=ranges))
