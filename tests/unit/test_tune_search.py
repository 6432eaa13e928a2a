"""The search of one bucket, on made-up sweeps."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from moegen.runtime.tile import LayerTiles
from moegen.tune.replay import Replay, Sweep
from moegen.tune.search import BATCH, EFFORTS, EXHAUSTED, Found, NothingRuns, beginnings, openings, search
from moegen.tune.space import OPS, Kind, LayerSpace, kind_of
from moegen.tune.trial import SOON, Measurement
from tests.support.made_up import made_up_sweep

SWEEPS = {tokens: made_up_sweep(tokens) for tokens in (16, 256, 4096)} | {1: made_up_sweep(1, low_latency=True)}


class Watched(Replay):
    """A replayed sweep that knows what it was asked, in order; `wrong` maps pairs to other answers."""

    def __init__(self, sweep: Sweep, wrong: dict[LayerTiles, Measurement] | None = None) -> None:
        super().__init__([sweep])
        self.wrong = wrong or {}
        self.announced: set[tuple[str, object]] = set()
        self.announcements: list[list[LayerTiles]] = []
        self.ahead: list[int] = []  # at each measurement, how many kernels were announced and not measured yet
        self.asked: list[LayerTiles] = []
        self.best: list[float | None] = []
        self.finalists: Sequence[LayerTiles] = ()

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:  # noqa: ARG002
        self.announcements.append(list(candidates))
        self.announced |= {kernel for pair in candidates for kernel in (("1", pair.gemm1), ("2", pair.gemm2))}

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        assert {("1", tiles.gemm1), ("2", tiles.gemm2)} <= self.announced
        self.asked.append(tiles)
        self.best.append(best_us)
        measured = {kernel for pair in self.asked for kernel in (("1", pair.gemm1), ("2", pair.gemm2))}
        self.ahead.append(len(self.announced - measured))
        found = super().measure(tokens, tiles, best_us)
        return self.wrong.get(tiles, found)

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        self.finalists = finalists
        found = super().compare(tokens, finalists)
        return [self.wrong.get(tiles, one) for tiles, one in zip(finalists, found, strict=True)]


def run(tokens: int, measurer: Watched | None = None, **arguments: object) -> tuple[Found, Watched]:
    measurer = measurer or Watched(SWEEPS[tokens])
    return search(SWEEPS[tokens].space, measurer, **arguments), measurer  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", sorted(SWEEPS))
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_each_pair_is_in_the_space_and_measured_once_within_the_budget(tokens: int, effort: str) -> None:
    found, asked = run(tokens, effort=effort)
    assert all(pair in SWEEPS[tokens].space for pair in asked.asked)
    assert len(set(asked.asked)) == len(asked.asked) == found.tried
    assert asked.measured <= EFFORTS[effort].budget
    assert asked.asked[0] == SWEEPS[tokens].space.default


@pytest.mark.parametrize("tokens", sorted(SWEEPS))
def test_it_comes_near_the_optimum(tokens: int) -> None:
    found, replay = run(tokens)
    assert found.us <= replay.optimum(tokens)[1] / 0.97
    assert found.default_us is not None
    assert found.us < found.default_us


def test_the_same_seed_asks_the_same() -> None:
    runs = [run(16, seed=seed) for seed in (3, 3, 4)]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].asked == runs[1][1].asked != runs[2][1].asked


def test_warm_starts_come_first_and_those_of_elsewhere_are_ignored() -> None:
    space = SWEEPS[16].space
    kind = Kind("portable", 32)
    elsewhere = SWEEPS[4096].space.start(Kind("portable", 128))
    warm = [LayerTiles(space.gemm1[kind].tiles[40], space.gemm2[kind].tiles[7]), elsewhere]
    _, asked = run(16, warm=warm)
    assert asked.asked[:2] == [space.default, warm[0]]
    assert warm[1] not in asked.asked


def test_a_perfect_warm_start_is_kept() -> None:
    best, us = Replay([SWEEPS[256]]).optimum(256)
    found, _ = run(256, warm=[best], effort="quick")
    assert (found.tiles, found.us) == (best, us)


def test_the_other_assignment_is_measured_and_may_win() -> None:
    space = SWEEPS[16].space
    other = replace(space.default, low_latency=True)

    class Lone(Watched):
        def true(self, tokens: int, tiles: LayerTiles) -> Measurement:
            return Measurement("ok", 1.0) if tiles == other else super().true(tokens, tiles)

    measurer = Lone(SWEEPS[16])
    assert search(replace(space, others=(other,)), measurer).tiles == other
    assert measurer.asked.count(other) == 1
    assert all(pair.low_latency is None for pair in measurer.asked if pair != other)


@pytest.mark.parametrize("tokens", sorted(SWEEPS))
def test_openings_are_what_a_search_begins_with(tokens: int) -> None:
    space = SWEEPS[tokens].space
    then = openings(space)
    _, asked = run(tokens)
    assert asked.announcements[0] == beginnings(space)
    # Of the first turn, what is announced before any of it is measured.
    turn = min(EFFORTS["standard"].ahead, sum(len(space.ops(kind)) for kind in space.kinds))
    batches = [soon[:BATCH] for soon in asked.announcements[1 : 1 + turn]]
    assert [pair for batch in batches for pair in batch] == then[: sum(map(len, batches))]


def test_a_gemm_without_more_configs_takes_no_place_among_those_that_compile() -> None:
    """The best kind's turn comes always, even when all of it has been measured."""
    whole = SWEEPS[256].space
    best = kind_of(Replay([SWEEPS[256]]).optimum(256)[0])
    other = next(kind for kind in whole.kinds if kind.family == "portable" and kind != best)
    few = [
        {best: replace(own[best], tiles=(own[best].start, *own[best].tiles[:BATCH])), other: own[other]}
        for own in (whole.gemm1, whole.gemm2)
    ]
    space = LayerSpace(256, whole.start(best), *few)
    measurer = Watched(SWEEPS[256])
    search(space, measurer, effort="quick")
    begun, ahead = len(space.kinds), EFFORTS["quick"].ahead
    assert min(measurer.ahead[begun : -(ahead + 1) * BATCH]) >= ahead * BATCH


def test_the_race_is_against_the_best_so_far() -> None:
    _, asked = run(16)
    assert asked.best[0] is None
    known = [one for one in asked.best if one is not None]
    assert known == sorted(known, reverse=True)
    assert known[-1] < known[0]


def test_the_default_wins_unless_beaten_by_more_than_the_noise() -> None:
    fair, _ = run(16)
    assert fair.default_us is not None
    gain = 1 - fair.us / fair.default_us
    for spread, expected in ((gain * 0.9, fair.tiles), (gain * 1.1, SWEEPS[16].space.default)):
        noisy = {SWEEPS[16].space.default: Measurement("ok", fair.default_us, spread)}
        found, measurer = run(16, Watched(SWEEPS[16], noisy))
        assert found.tiles == expected
        assert SWEEPS[16].space.default in measurer.finalists


def test_a_winner_loses_under_no_routing() -> None:
    """Balanced routing and a power law: faster in the mean is not enough, and the next best may win."""
    default = SWEEPS[16].space.default
    fair, asked = run(16)
    second = sorted(asked.finalists, key=lambda pair: asked.true(16, pair).us or 0.0)[1]
    assert fair.default_us is not None
    base = Measurement("ok", fair.default_us, 0.001, apart=(60.0, 100.0))
    for apart, expected in (((60.5, 80.0), fair.tiles), ((60.7, 80.0), second), ((50.0, 101.1), second)):
        answers = {default: base, fair.tiles: Measurement("ok", fair.us, 0.001, apart=apart)}
        assert run(16, Watched(SWEEPS[16], answers))[0].tiles == expected

    class Losing(Watched):
        def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
            super().compare(tokens, finalists)
            return [base if pair == default else Measurement("ok", 1.0, apart=(61.0, 1.0)) for pair in finalists]

    assert run(16, Losing(SWEEPS[16]))[0].tiles == default


def test_failures_are_counted_by_class_and_never_tried_again() -> None:
    sweep = made_up_sweep(16, failing="resources")
    found, asked = run(16, Watched(sweep))
    assert set(found.failures) == {"resources"}
    assert 0 < found.failures["resources"] < 60
    assert len(set(asked.asked)) == len(asked.asked)


def test_a_default_that_does_not_run_is_no_end() -> None:
    space = SWEEPS[16].space
    crash = Measurement("crash", message="made up")
    found, _ = run(16, Watched(SWEEPS[16], {space.start(kind): crash for kind in space.kinds}))
    assert found.default_us is None
    assert found.us < 1.1 * Replay([SWEEPS[16]]).optimum(16)[1]


def test_nothing_runs() -> None:
    class Broken(Watched):
        def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
            super().measure(tokens, tiles, best_us)
            return Measurement("compile", message="no compiler")

    space = SWEEPS[16].space
    near = [
        [len(list(own[kind].neighbours(own[kind].start))) for own in (space.gemm1, space.gemm2)] for kind in space.kinds
    ]
    tried = sum(1 + min(BATCH, *counts) for counts in near)
    with pytest.raises(NothingRuns, match=f"16 tokens: .* {tried} compile"):
        run(16, Broken(SWEEPS[16]))


def test_stopping_at_once_compares_what_was_begun_with() -> None:
    found, asked = run(256, stop=lambda: True)
    assert found.tried == len(asked.asked) == len(SWEEPS[256].space.kinds)
    assert set(asked.finalists) == set(asked.asked)


def test_a_small_space_is_exhausted() -> None:
    whole, kind = SWEEPS[16].space, Kind("portable", 16)
    few = {}
    for op in OPS:
        own = getattr(whole, op)[kind]
        few[op] = replace(own, tiles=(own.start, *own.tiles[: EXHAUSTED // 2 - 1]))
    space = LayerSpace(16, whole.start(kind), {kind: few["gemm1"]}, {kind: few["gemm2"]})
    measurer = Watched(SWEEPS[16])
    search(space, measurer, effort="quick")
    assert {pair.gemm1 for pair in measurer.asked} == set(few["gemm1"].tiles)
    assert {pair.gemm2 for pair in measurer.asked} == set(few["gemm2"].tiles)


def test_efforts_by_name() -> None:
    with pytest.raises(KeyError):
        run(16, effort="thorough")
