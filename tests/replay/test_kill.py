"""Kill -9 at random moments: a restart goes on where the killed process was, and finds what it would have found."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

from moegen.tune.journal import Journal
from tests.replay.driver import LAYER, SCOPE, TOKENS, tune

KILLS = 50
GROWTH = 1.1
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.replay.driver"])  # or each of the starts would take the seconds of its imports


def run(folder: Path, seed: int, seconds: float | None = None) -> bool:
    """Tune in a process of its own, killed after `seconds`; whether it came to its end."""
    folder.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=tune, args=(str(folder), seed))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == 0


def results(folder: Path) -> dict[int, str]:
    return {tokens: (folder / f"{tokens}.json").read_text() for tokens in TOKENS}


def notes(folder: Path, kind: str) -> list[tuple[str, str]]:
    path = folder / "notes"
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    return [(tokens, tiles) for what, tokens, tiles in lines if what == kind]


def in_journal(folder: Path) -> set[tuple[str, str]]:
    journal = Journal(folder / "tune.journal", SCOPE)
    return {(str(tokens), str(tiles)) for tokens in TOKENS for tiles, _ in journal.measurements(LAYER, tokens)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], float]:
    """The results of a run without kills, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder / "first", seed=1)  # starts the fork server
    began = time.perf_counter()
    assert run(folder / "second", seed=1)
    return results(folder / "second"), time.perf_counter() - began


def test_fifty_kills(undisturbed: tuple[dict[int, str], float], tmp_path: Path) -> None:
    expected, seconds = undisturbed
    moments = random.Random(7)  # noqa: S311 - no secret
    kills = interrupted = 0
    ended = False
    while kills < KILLS:
        folder = tmp_path / str(kills)
        begun, made_before = kills, 0
        # Later and later: on a machine that has become busy, a run may need longer than the undisturbed one did.
        while kills < KILLS and not (ended := run(folder, 1, moments.uniform(0, seconds * GROWTH ** (kills - begun)))):
            kills += 1
            assert set(notes(folder, "kept")) <= in_journal(folder)
            interrupted += len(notes(folder, "made")) > made_before
            made_before = len(notes(folder, "made"))
        assert ended or run(folder, 1)
        assert results(folder) == expected
        made = notes(folder, "made")
        assert len(made) - len(set(made)) <= kills - begun  # each kill costs at most the measurement in flight
    assert interrupted > KILLS // 10  # the moments were spread over whole runs


def test_the_result_is_worth_comparing(undisturbed: tuple[dict[int, str], float]) -> None:
    found = {tokens: json.loads(text) for tokens, text in undisturbed[0].items()}
    assert all(one["us"] < one["default_us"] and one["failures"] for one in found.values())
    assert len({json.dumps(one["tiles"]) for one in found.values()}) == len(TOKENS)
