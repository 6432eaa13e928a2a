"""One worker of a tuning run: takes buckets from the queue, searches each, keeps the results.

What a bucket's search starts from (winners of neighbouring buckets, the record there was, imported files) is written
into the journal before it begins, and so is its result. A run that goes on thus repeats the search with the same start
and finds the same, and a bucket that is done costs nothing.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from moegen import __version__
from moegen.runtime.configs import bucket_of
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles
from moegen.spec import VariantSpec
from moegen.tune.client import MeasurerError
from moegen.tune.journal import Journal
from moegen.tune.keep import Keeper
from moegen.tune.progress import Progress, State
from moegen.tune.record import Record, TunedBucket
from moegen.tune.search import EFFORTS, Found, NothingRuns, beginnings, openings, search
from moegen.tune.sources import Source
from moegen.tune.space import LayerSpace, kind_of
from moegen.tune.trial import NEXT, PERHAPS, Measurement, Measurer, plain_tiles, tiles_of

NEAR = 2.0  # a record's bucket at most this many times away is worth trying


class Unfinished(Exception):
    """The search of a bucket was stopped early; its claim goes back to the queue."""


@dataclass(frozen=True, slots=True)
class Task:
    """A layer to tune at some token counts. kernels: hash of what it runs; imported: tile configs of foreign files."""

    variant: VariantSpec
    kernels: str
    buckets: tuple[int, ...]
    imported: tuple[dict[int, LayerTiles], ...] = ()

    @property
    def key(self) -> str:
        """The layer's name in the journal."""
        return journal_key(self.variant, self.kernels)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one bucket: found, or the reason why there is nothing.

    complete: its search was not cut short. wrong: configs that compute something else than the reference, and how far
    from it.
    """

    layer: str
    tokens: int
    found: Found | None = None
    reason: str = ""
    complete: bool = True
    wrong: tuple[tuple[LayerTiles, str], ...] = ()


class Session:
    """Tunes the buckets of `tasks` on one GPU, together with whoever shares the journal.

    keeper     where results go
    deadline   time.monotonic() when to stop, or None
    """

    def __init__(
        self,
        source: Source,
        journal: Journal,
        tasks: Sequence[Task],
        keeper: Keeper,
        *,
        effort: str,
        seed: int,
        deadline: float | None = None,
        progress: Progress,
    ) -> None:
        self._source, self._journal, self._progress = source, journal, progress
        self._tasks = {task.key: task for task in tasks}
        self._keeper, self._deadline = keeper, deadline
        self.effort, self.seed = effort, seed
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        self._announced: set[str] = set()

    def run(self) -> None:
        """Work until every bucket is done, here or by another worker, or the time is over; `outcomes` has the results.

        Buckets go by ascending token count: the tile configs of neighbours are alike, and a record that is cut short
        answers for one range without gaps.
        """
        wanted = [(task.key, tokens) for task in self._tasks.values() for tokens in task.buckets]
        # A queue for this set of buckets: what an earlier run with others left waiting is not this one's.
        digest = hashlib.sha256(repr(sorted(wanted)).encode()).hexdigest()[:12]
        queue = self._journal.queue(f"{self.effort}/{self.seed}/{digest}")
        while left := [bucket for bucket in wanted if not self._settled(*bucket)]:
            queue.fill(left)
            mine = 0
            while not self._over() and (claim := queue.claim()) is not None:
                mine += 1
                with suppress(Unfinished), claim:
                    self._tune(claim.layer, claim.tokens, max(1, len(left) - mine + 1), claim.beat)
            if self._over() or not mine:
                break  # what is left is with other workers
        for key, tokens in wanted:
            if not self._settled(key, tokens) and (key, tokens) not in self.outcomes:
                self.outcomes[key, tokens] = Outcome(key, tokens, reason="not done yet", complete=False)

    def known(self) -> tuple[int, int]:
        """(buckets that are done, measurements) in the journal, of the buckets of this run."""
        wanted = [(task.key, tokens) for task in self._tasks.values() for tokens in task.buckets]
        done = sum(self._attribute(key, tokens, "found") is not None for key, tokens in wanted)
        return done, sum(1 for bucket in wanted for _ in self._journal.measurements(*bucket))

    def files(self) -> list[Path]:
        """The files with the results."""
        return [path for task in self._tasks.values() for path in self._keeper.files(task.variant)]

    def _settled(self, key: str, tokens: int) -> bool:
        """Whether the bucket needs no more work; a result that is in the journal, another worker's say, is taken."""
        known = self.outcomes.get((key, tokens))
        if known is not None and known.complete:
            return True
        plain = self._attribute(key, tokens, "found")
        if plain is not None:
            self._keep(self._tasks[key], tokens, found_of(plain), complete=True)
        return plain is not None

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _tune(self, key: str, tokens: int, left: int, beat: Callable[[], None]) -> None:
        """Search one bucket and keep the result. `left` buckets share the time that is left."""
        if self._settled(key, tokens):
            return
        task = self._tasks[key]
        study = self._journal.study(key, tokens)
        space = self._source.space(task.variant, tokens)
        warm = [pair for pair in (snapped(space, pair) for pair in self._warm(task, tokens, study)) if pair is not None]
        state = State(task.variant.slug, tokens, EFFORTS[self.effort].budget, space.default)
        share = None if self._deadline is None else time.monotonic() + (self._deadline - time.monotonic()) / left
        stopped = False

        def stop() -> bool:
            nonlocal stopped
            stopped = stopped or (share is not None and time.monotonic() >= share)
            return stopped

        try:
            measurer = self._journal.measurer(key, self._source.measurer(task.variant), beat)
            watched = self._progress.watch(measurer, state)
            self._announce(task, tokens, measurer)
            found = search(space, watched, effort=self.effort, seed=self.seed, warm=warm, stop=stop)
        except (NothingRuns, MeasurerError) as error:
            self._progress.say(f"{task.variant.slug} T={tokens}: {error}")
            self.outcomes[key, tokens] = Outcome(key, tokens, reason=str(error))
            self._progress.finished()
            return
        finally:
            self._journal.flush()
        self._keep(task, tokens, found, complete=not stopped)
        if stopped:
            raise Unfinished
        study.set_user_attr(f"found {self.effort} {self.seed}", plain_found(found))

    def _announce(self, task: Task, tokens: int, measurer: Measurer) -> None:
        """What the buckets of a layer begin with compiles from its first bucket on, where compilers have time for it.

        Neighbours have most of it in common. A bucket would have to wait for it otherwise: its first batches are asked
        for together.
        """
        if task.key in self._announced:
            return
        self._announced.add(task.key)
        left = [other for other in task.buckets if (task.key, other) not in self.outcomes]
        left.sort(key=lambda other: (other < tokens, other))
        spaces = {other: self._source.space(task.variant, other) for other in left}
        for rank, pairs_of in ((NEXT, beginnings), (PERHAPS, openings)):
            for other, space in spaces.items():
                measurer.prefetch(other, pairs_of(space), rank)

    def _keep(self, task: Task, tokens: int, found: Found, *, complete: bool) -> None:
        bucket = TunedBucket(
            tiles=found.tiles,
            us=round(found.us, 3),
            default_us=None if found.default_us is None else round(found.default_us, 3),
            spread=round(found.spread, 5),
            tried=found.tried,
            effort=self.effort,
            seed=self.seed,
            routing=self._source.routing,
            triton=self._source.triton,
            torch=self._source.torch,
            moegen=__version__,
            kernels=task.kernels,
        )
        self._keeper.keep(task.variant, tokens, bucket)
        known = self._journal.measurements(task.key, tokens)
        wrong = tuple((tiles, one.message) for tiles, one in known if one.status == "wrong")
        self.outcomes[task.key, tokens] = Outcome(task.key, tokens, found, complete=complete, wrong=wrong)
        if complete:
            self._progress.finished()

    def _warm(self, task: Task, tokens: int, study: optuna.Study) -> list[LayerTiles]:
        """The tile configs to begin with; the same whenever this bucket is begun again."""
        name = f"warm {self.effort} {self.seed}"
        stored = study.user_attrs.get(name)
        if stored is None:
            stored = [plain_tiles(tiles) for tiles in self._neighbours(task, tokens)]
            study.set_user_attr(name, stored)
        found = [tiles_of(pair) for pair in stored]
        found += [table[nearest_tokens(table, tokens)] for table in task.imported]
        return list(dict.fromkeys(found))

    def _neighbours(self, task: Task, tokens: int) -> list[LayerTiles]:
        """Winners of the next smaller and larger bucket that is done, and what the record has near by."""
        found = []
        smaller = [other for other in task.buckets if other < tokens]
        larger = [other for other in task.buckets if other > tokens]
        for side in (reversed(smaller), larger):
            plain = next((p for p in (self._attribute(task.key, other, "found") for other in side) if p), None)
            found += [found_of(plain).tiles] if plain else []
        earlier = self._keeper.earlier(task.variant)
        if earlier:
            near = bucket_of(tokens, tuple(sorted(earlier)))
            if max(near / tokens, tokens / near) <= NEAR:
                found.append(earlier[near])
        return found

    def _attribute(self, key: str, tokens: int, name: str) -> Any:  # noqa: ANN401 - JSON
        return self._journal.study(key, tokens).user_attrs.get(f"{name} {self.effort} {self.seed}")


def scope_of(gpu: DeviceFacts, triton: str, torch: str, routing: str, seed: int) -> str:
    """The journal's scope of all times that were measured under these conditions."""
    return f"{gpu.slug}/triton-{triton}-torch-{torch}/{routing}/seed-{seed}"


def journal_key(variant: VariantSpec, kernels: str) -> str:
    """The layer's name in the journal: times of other kernels are never read."""
    return f"{variant.slug}@{kernels}"


def measured(storage: str | Path, record: Record, tokens: int) -> Iterator[tuple[LayerTiles, Measurement]]:
    """What the journal in `storage` has of one bucket of a record, in the order in which it was measured."""
    bucket = record.buckets[tokens]
    if bucket.seed is not None:
        scope = scope_of(record.gpu, bucket.triton, bucket.torch, bucket.routing, bucket.seed)
        yield from Journal(storage, scope).measurements(journal_key(record.variant, bucket.kernels), tokens)


def snapped(space: LayerSpace, pair: LayerTiles) -> LayerTiles | None:
    """The pair as far as the space goes: fields that do not vary there have the heuristic's values. None if the space
    has no such pair.
    """
    tiles = []
    for spaces, tile in ((space.gemm1, pair.gemm1), (space.gemm2, pair.gemm2)):
        own = spaces.get(kind_of(pair))
        if own is None:
            return None
        tiles.append(replace(own.start, **{field: getattr(tile, field) for field in own.axes}))
    found = LayerTiles(*tiles, low_latency=pair.low_latency)
    return found if found in space else None


def nearest_tokens(table: dict[int, LayerTiles], tokens: int) -> int:
    """The token count of a foreign file that its own project would use for `tokens`."""
    return min(table, key=lambda key: abs(key - tokens))


def plain_found(found: Found) -> dict[str, Any]:
    """JSON form, the inverse of `found_of`."""
    return {**asdict(found), "tiles": plain_tiles(found.tiles)}


def found_of(plain: dict[str, Any]) -> Found:
    """A search's result from its JSON form."""
    return Found(**{**plain, "tiles": tiles_of(plain["tiles"])})
