"""The journal: nothing measured is lost, whatever happens to the process that writes it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from moegen.runtime.tile import LayerTiles
from moegen.tune import queue as queue_module
from moegen.tune.journal import Journal
from moegen.tune.replay import Replay
from moegen.tune.space import Kind
from moegen.tune.trial import PERHAPS, SOON, Measurement
from tests.support.made_up import made_up_sweep

SWEEP = made_up_sweep(16)
OWN = SWEEP.space.gemm1[Kind("portable", 16)]
PAIRS = [LayerTiles(tile, SWEEP.space.gemm2[Kind("portable", 16)].start) for tile in OWN.tiles]


class Counting(Replay):
    """A replayed sweep that knows what it was asked."""

    def __init__(self) -> None:
        super().__init__([SWEEP])
        self.announced: list[tuple[int, LayerTiles]] = []
        self.asked: list[LayerTiles] = []
        self.compared = 0

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:  # noqa: ARG002
        self.announced += [(rank, tiles) for tiles in candidates]

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        self.asked.append(tiles)
        return super().measure(tokens, tiles, best_us)

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        self.compared += 1
        return super().compare(tokens, finalists)


def measure(journal: Journal, pairs: Sequence[LayerTiles], inner: Replay) -> list[Measurement]:
    measurer = journal.measurer("layer", inner)
    found = [measurer.measure(16, pair, None) for pair in pairs]
    journal.flush()
    return found


@pytest.fixture(params=["file", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "folder/j.journal") if request.param == "file" else f"sqlite:///{tmp_path}/j.db"


def test_the_assignment_belongs_to_a_pair(storage: str) -> None:
    """The same tile configs with another assignment are another measurement, also for a later run."""
    pairs = [PAIRS[0], *(replace(PAIRS[0], low_latency=choice) for choice in (False, True))]

    class Fixed(Counting):
        def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:  # noqa: ARG002
            self.asked.append(tiles)
            return Measurement("ok", 10.0 + len(self.asked))

        def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
            return [self.measure(tokens, tiles, None) for tiles in finalists]

    first, second = Fixed(), Fixed()
    found = measure(Journal(storage, "scope"), pairs, first)
    assert first.asked == pairs
    assert measure(Journal(storage, "scope"), pairs, second) == found
    assert [pair for pair, _ in Journal(storage, "scope").measurements("layer", 16)] == pairs
    compared = Journal(storage, "scope").measurer("layer", first).compare(16, pairs[1:])
    assert Journal(storage, "scope").measurer("layer", second).compare(16, pairs[1:]) == compared
    assert second.asked == []


def test_what_was_measured_is_never_measured_again(storage: str) -> None:
    first = Counting()
    found = measure(Journal(storage, "scope"), PAIRS[:40], first)
    assert {one.status for one in found} == {"ok", "compile"}
    assert len(first.asked) == 40
    again = Counting()
    assert measure(Journal(storage, "scope"), PAIRS[:41], again)[:40] == found
    assert again.asked == PAIRS[40:41]


def test_a_database_is_written_to_while_the_next_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial at a time: the next waits for the one before, and what goes wrong is raised by then."""
    journal = Journal(f"sqlite:///{tmp_path}/j.db", "scope")
    measurer = journal.measurer("layer", Counting())
    study, released, written = journal.study("layer", 16), threading.Event(), []

    def slow(trial: optuna.trial.FrozenTrial) -> None:
        assert released.wait(60)
        written.append(trial)
        if len(written) == 2:
            raise OSError("the database is gone")

    monkeypatch.setattr(type(study), "add_trial", lambda _, trial: slow(trial))
    measurer.measure(16, PAIRS[0], None)
    assert written == []
    released.set()
    measurer.measure(16, PAIRS[1], None)
    assert len(written) >= 1
    with pytest.raises(OSError, match="the database is gone"):
        measurer.measure(16, PAIRS[2], None)
    journal.flush()  # once is enough


def test_only_what_is_unknown_is_announced(storage: str) -> None:
    inner = Counting()
    measurer = Journal(storage, "scope").measurer("layer", inner)
    measurer.measure(16, PAIRS[0], None)
    measurer.prefetch(16, PAIRS[:3])
    measurer.prefetch(16, PAIRS[3:4], PERHAPS)
    assert inner.announced == [(SOON, PAIRS[1]), (SOON, PAIRS[2]), (PERHAPS, PAIRS[3])]


def test_a_comparison_is_remembered_with_each_routing(storage: str) -> None:
    class Apart(Counting):
        def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
            return [replace(found, apart=(1.0, 2.0)) for found in super().compare(tokens, finalists)]

    found = Journal(storage, "scope").measurer("layer", Apart()).compare(16, PAIRS[:2])
    assert Journal(storage, "scope").measurer("layer", Counting()).compare(16, PAIRS[:2]) == found
    assert {one.apart for one in found} == {(1.0, 2.0)}


def test_a_comparison_is_remembered_as_a_whole(storage: str) -> None:
    first, again = Counting(), Counting()
    found = Journal(storage, "scope").measurer("layer", first).compare(16, PAIRS[:3])
    journal = Journal(storage, "scope")
    measurer = journal.measurer("layer", again)
    assert measurer.compare(16, PAIRS[:3]) == found
    assert again.compared == 0
    measurer.compare(16, PAIRS[:2])
    assert again.compared == 1
    assert list(journal.measurements("layer", 16)) == []  # no measurements to rank candidates by


def test_scope_layer_and_tokens_keep_measurements_apart(storage: str) -> None:
    journal = Journal(storage, "scope")
    measure(journal, PAIRS[:1], Counting())
    for other in (Journal(storage, "scope2").measurements("layer", 16), journal.measurements("layer", 32)):
        assert list(other) == []
    assert [pair for pair, _ in journal.measurements("layer", 16)] == PAIRS[:1]
    journal.forget("layer")
    assert list(Journal(storage, "scope").measurements("layer", 16)) == []


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (Measurement("ok", 1 / 3, 0.001), TrialState.COMPLETE),
        (Measurement("slow", 9.5), TrialState.PRUNED),
        (Measurement("crash", message="CUDA error: an “illegal” memory access"), TrialState.FAIL),
    ],
)
def test_every_class_comes_back_as_it_was(storage: str, found: Measurement, state: TrialState) -> None:
    pair = next(p for p in PAIRS if p.gemm1.SWAP_AB)
    inner = Counting()
    inner.measure = lambda *_: found  # type: ignore[method-assign]
    measure(Journal(storage, "scope"), [pair], inner)
    journal = Journal(storage, "scope")
    assert list(journal.measurements("layer", 16)) == [(pair, found)]
    assert [trial.state for trial in journal.study("layer", 16).trials] == [state]


def test_a_torn_last_line_is_cut_off_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "j.journal"
    found = measure(Journal(path, "scope"), PAIRS[:3], Counting())
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in [*range(last, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        again = Counting()
        assert measure(Journal(path, "scope"), PAIRS[:4], again)[:3] == found
        assert again.asked == PAIRS[2:4]  # the line that was torn is lost, and no other
        lines = path.read_bytes().splitlines(keepends=True)
        assert all(json.loads(line) and line.endswith(b"\n") for line in lines)


def test_a_line_torn_by_another_process_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "j.journal"
    journal = Journal(path, "scope")
    measure(journal, PAIRS[:2], Counting())
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    measure(journal, PAIRS[2:4], Counting())
    assert [pair for pair, _ in Journal(path, "scope").measurements("layer", 16)] == PAIRS[:4]


def test_the_file_is_one_that_optuna_reads(tmp_path: Path) -> None:
    """optuna-dashboard opens it with nothing but its path."""
    path = tmp_path / "j.journal"
    found = measure(Journal(path, "scope"), PAIRS[:5], Counting())
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    study = optuna.load_study(study_name="scope/layer/16", storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == min(one.us for one in found if one.us is not None)
    assert study.best_trial.params["gemm1.BLOCK_SIZE_M"] == 16


WRITER = """
import sys
from moegen.tune.journal import Journal
from tests.unit.test_tune_journal import PAIRS, Counting, measure
journal = Journal(sys.argv[1], "scope")
print("ready", flush=True)
sys.stdin.read()
measure(journal, PAIRS[int(sys.argv[2]) : int(sys.argv[3])], Counting())
"""


def test_two_processes_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.journal"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranges = (("0", "60"), ("60", "120"))
    writers = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", WRITER, str(path), *part],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )
        for part in ranges
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    known = [pair for pair, _ in Journal(path, "scope").measurements("layer", 16)]
    assert sorted(map(repr, known)) == sorted(map(repr, PAIRS[:120]))


BUCKETS = [("layer", 1), ("layer", 2), ("other", 1)]


def test_each_bucket_is_claimed_once(storage: str) -> None:
    first, second = Journal(storage, "scope").queue("q"), Journal(storage, "scope").queue("q")
    first.fill(BUCKETS)
    second.fill(BUCKETS)
    claims = [queue.claim() for queue in (first, second, first, second)]
    assert [(c.layer, c.tokens) for c in claims if c is not None] == BUCKETS
    assert claims[3] is None


def test_buckets_that_are_done_are_added_again_only_when_all_are(storage: str) -> None:
    queue = Journal(storage, "scope").queue("q")
    queue.fill(BUCKETS)
    for left in (2, 1, 0):
        claim = queue.claim()
        assert claim is not None
        with claim:
            pass
        if left:
            queue.fill(BUCKETS)
    assert queue.claim() is None
    queue.fill(BUCKETS)
    assert [c.tokens for c in (queue.claim(), queue.claim(), queue.claim()) if c] == [1, 2, 1]


def test_a_bucket_that_failed_is_tried_again(storage: str) -> None:
    queue = Journal(storage, "scope").queue("q")
    queue.fill(BUCKETS[:1])
    claim = queue.claim()
    assert claim is not None
    with pytest.raises(ZeroDivisionError), claim:
        raise ZeroDivisionError
    assert queue.claim() is None
    queue.fill(BUCKETS[:1])
    assert queue.claim() is not None


def claimed_by(storage: str, **worker: object) -> queue_module.Queue:
    """A queue whose bucket was claimed by this process, then pretended to be by another one."""
    journal = Journal(storage, "scope")
    queue = journal.queue("q")
    queue.fill(BUCKETS[:1])
    assert queue.claim() is not None
    trial = optuna.load_study(study_name="scope/queue/q", storage=journal.storage).trials[0]
    journal.storage.set_trial_user_attr(trial._trial_id, "worker", trial.user_attrs["worker"] | worker)
    return queue


@pytest.mark.parametrize(
    ("worker", "free"),
    [
        ({}, False),  # this process is alive
        ({"started": "1"}, True),  # its number belonged to another process, which is gone
        ({"pid": 2**22 + 1}, True),  # beyond what Linux gives out
        ({"host": "elsewhere"}, False),  # another machine's, heard of just now
        ({"host": "elsewhere", "heard": 0.0}, True),
    ],
)
def test_what_a_dead_worker_left_is_taken_up(storage: str, worker: dict[str, object], free: bool) -> None:
    queue = claimed_by(storage, **worker)
    queue.fill(BUCKETS[:1])
    assert (queue.claim() is not None) == free


def test_a_worker_says_that_it_is_alive(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(storage, "scope")
    queue = journal.queue("q")
    queue.fill(BUCKETS[:1])
    claim = queue.claim()
    assert claim is not None
    monkeypatch.setattr(queue_module, "BEAT_SECONDS", -1.0)
    measurer = journal.measurer("layer", Counting(), claim.beat)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    measurer.measure(16, PAIRS[0], None)
    trials = optuna.load_study(study_name="scope/queue/q", storage=journal.storage).trials
    assert trials[0].user_attrs["worker"]["host"] == "elsewhere"
