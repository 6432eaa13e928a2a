"""What has been measured, kept for good in Optuna's storage: a journal file, or any of its databases.

    journal = Journal(path_or_url, scope="nvidia-h200/triton-3.6.0/<hash of the kernels>")
    measurer = journal.measurer(layer.slug, measurer)   # answers from the journal, else measures and appends
    found = search(space, measurer, …)

    queue = journal.queue("standard/0")                 # several processes: who does which bucket
    queue.fill([(layer.slug, tokens), …])               # idempotent; takes up what dead workers left behind
    while claim := queue.claim():                       # None when nothing is waiting
        with claim:                                     # leaving without an exception marks it as done
            claim.layer, claim.tokens
            measurer = journal.measurer(claim.layer, measurer, claim.beat)   # says now and then that it is alive

`scope` names everything that a time depends on besides layer, tokens and tile configs: nothing measured under another
scope is ever read. A study `<scope>/<layer>/<tokens>` holds one finished trial a measurement, written in one piece, so
kill -9 loses at most the one in flight. Two processes may write to one journal. A database takes as long for a trial as
a GPU for a measurement, so it is written to while the next one is measured, and a kill costs both.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from moegen.runtime.tile import LayerTiles, TileConfig
from moegen.tune.queue import Queue
from moegen.tune.space import OPS
from moegen.tune.trial import SOON, Measurement, Measurer, plain_tiles

STATES = {"ok": TrialState.COMPLETE, "slow": TrialState.PRUNED}  # of the others, FAIL
COMPARED = "compared"  # attribute of the trial that holds a comparison of finalists
FLAGS = {field.name for field in fields(TileConfig) if field.type is bool}
# One fixed range a field, whatever the space: Optuna refuses a study whose ranges change.
_INTEGERS = {"num_warps": (1, 16), "num_stages": (1, 32)} | dict.fromkeys(sorted(FLAGS), (0, 1))
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    f"{op}.{field.name}": IntDistribution(*_INTEGERS.get(field.name, (1, 1024)))
    for op in OPS
    for field in fields(TileConfig)
    if field.name != "family"
}


class Journal:
    """The measurements of one scope in one storage.

    storage: a path, whose file and folders are made, or a database URL of Optuna's RDBStorage. A last line that was
    torn by a kill is cut off. Raises what Optuna raises for a database that cannot be reached.
    """

    def __init__(self, storage: str | Path, scope: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = _open(storage)
        self.scope = scope
        self._writer = None if isinstance(self.storage, JournalStorage) else ThreadPoolExecutor(1, "journal")
        self._writing: Future[None] | None = None

    def measurer(self, layer: str, measurer: Measurer, beat: Callable[[], None] = lambda: None) -> Measurer:
        """`measurer`, asked only for what the journal does not know; beat is called at each new measurement."""
        return _Remembering(self, layer, measurer, beat)

    def queue(self, name: str) -> Queue:
        """The queue of that name: workers with the same scope and name share their buckets."""
        return Queue(self._study(f"{self.scope}/queue/{name}"), self.storage)

    def append(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write a finished trial; into a database, begin to, once the one before is there."""
        self.flush()
        if self._writer is None:
            study.add_trial(trial)
        else:
            self._writing = self._writer.submit(study.add_trial, trial)

    def flush(self) -> None:
        """Wait until all of it is written. Raises what writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def measurements(self, layer: str, tokens: int) -> Iterator[tuple[LayerTiles, Measurement]]:
        """What was measured for one bucket, oldest first, without the comparisons of finalists."""
        self.flush()
        for trial in self.study(layer, tokens).get_trials(deepcopy=False):
            if COMPARED not in trial.user_attrs and trial.state.is_finished():
                yield _tiles(trial), _measurement(trial.user_attrs)

    def study(self, layer: str, tokens: int) -> optuna.Study:
        """The study of one bucket, made if there is none."""
        return self._study(f"{self.scope}/{layer}/{tokens}")

    def forget(self, layer: str) -> None:
        """Delete all that this scope knows of a layer."""
        for study in self.storage.get_all_studies():
            if study.study_name.startswith(f"{self.scope}/{layer}/"):
                self.storage.delete_study(study._study_id)

    def _study(self, name: str) -> optuna.Study:
        try:
            return optuna.load_study(study_name=name, storage=self.storage)
        except KeyError:  # load_if_exists: another process may be first
            return optuna.create_study(study_name=name, storage=self.storage, load_if_exists=True)


class _Remembering:
    """A Measurer that looks into the journal first and appends what it does not find there."""

    def __init__(self, journal: Journal, layer: str, measurer: Measurer, beat: Callable[[], None]) -> None:
        self._journal, self._layer, self._measurer, self._beat = journal, layer, measurer, beat
        self._buckets: dict[int, tuple[dict[LayerTiles, Measurement], optuna.Study]] = {}

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        known, _ = self._bucket(tokens)
        self._measurer.prefetch(tokens, [tiles for tiles in candidates if tiles not in known], rank)

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        known, study = self._bucket(tokens)
        if tiles not in known:
            self._beat()
            found = self._measurer.measure(tokens, tiles, best_us)
            self._journal.append(study, _trial(tiles, found, _attributes(found)))
            known[tiles] = found
        return known[tiles]

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        """One trial holds the whole comparison, so that none is ever half written."""
        _, study = self._bucket(tokens)
        asked = [plain_tiles(pair) for pair in finalists]
        for trial in study.get_trials(deepcopy=False):
            compared = trial.user_attrs.get(COMPARED, {})
            if compared.get("finalists") == asked:
                return [_measurement(attributes) for attributes in compared["found"]]
        self._beat()
        found = self._measurer.compare(tokens, finalists)
        attributes = {COMPARED: {"finalists": asked, "found": [asdict(one) for one in found]}}
        fastest = min(range(len(found)), key=lambda index: (found[index].us is None, found[index].us))
        self._journal.append(study, _trial(finalists[fastest], found[fastest], attributes))
        self._journal.flush()
        return found

    def _bucket(self, tokens: int) -> tuple[dict[LayerTiles, Measurement], optuna.Study]:
        if tokens not in self._buckets:
            known: dict[LayerTiles, Measurement] = {}
            for tiles, found in self._journal.measurements(self._layer, tokens):
                known.setdefault(tiles, found)
            self._buckets[tokens] = known, self._journal.study(self._layer, tokens)
        return self._buckets[tokens]


def _attributes(found: Measurement) -> dict[str, Any]:
    return {"status": found.status, "us": found.us, "spread": found.spread, "message": found.message}


def _measurement(attributes: dict[str, Any]) -> Measurement:
    known = {field.name: attributes[field.name] for field in fields(Measurement) if field.name in attributes}
    return Measurement(**{**known, "apart": tuple(known.get("apart", ()))})


def _trial(tiles: LayerTiles, found: Measurement, attributes: dict[str, Any]) -> FrozenTrial:
    params = {
        name: int(getattr(getattr(tiles, op), field)) for name in DISTRIBUTIONS for op, field in [name.split(".")]
    }
    return create_trial(
        state=STATES.get(found.status, TrialState.FAIL),
        value=found.us if found.status == "ok" else None,
        params=params,
        distributions=DISTRIBUTIONS,
        user_attrs={
            "families": [tiles.gemm1.family, tiles.gemm2.family],
            "low_latency": tiles.low_latency,
            **attributes,
        },
    )


def _tiles(trial: FrozenTrial) -> LayerTiles:
    found = []
    for op, family in zip(OPS, trial.user_attrs["families"], strict=True):
        own = {name.removeprefix(f"{op}."): value for name, value in trial.params.items() if name.startswith(op)}
        found.append(TileConfig(**{name: bool(v) if name in FLAGS else v for name, v in own.items()}, family=family))
    return LayerTiles(*found, low_latency=trial.user_attrs["low_latency"])


def _open(storage: str | Path) -> BaseStorage:
    if "://" in str(storage):
        return optuna.storages.get_storage(str(storage))
    path = Path(storage).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), _WholeLines(path)))


class _WholeLines(JournalFileOpenLock):
    """A lock on the journal file itself that goes with its process, and leaves only whole lines.

    Optuna's own locks are files, which a killed process leaves behind for 30 s. And Optuna appends to a torn last line,
    which makes the file unreadable for ever; so whoever gets the lock cuts it off first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._file = path, -1

    def acquire(self) -> bool:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        end = size = os.fstat(file).st_size
        while end and os.pread(file, 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            os.ftruncate(file, end)
        return True

    def release(self) -> None:
        os.close(self._file)  # unlocks
