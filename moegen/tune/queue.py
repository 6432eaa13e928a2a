"""Who does which bucket: a queue that processes and machines share, in the storage of the journal.

A bucket is a trial: WAITING, then RUNNING with the worker that claimed it, then COMPLETE or FAIL. What a dead worker
has left RUNNING is taken up when the queue is filled the next time.
"""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

BEAT_SECONDS = 30.0
DEAD_SECONDS = 600.0  # a worker of another machine that has not been heard of for so long is dead
Bucket = tuple[str, int]  # layer slug, tokens


class Claim:
    """A bucket that this process works on. As a context: done if left without an exception, else failed."""

    def __init__(self, storage: BaseStorage, trial: FrozenTrial) -> None:
        self.layer, self.tokens = _bucket(trial)
        self._storage, self._id = storage, trial._trial_id
        self._began = time.monotonic()
        self._heard = self._began

    def beat(self) -> None:
        """Say that this worker is alive; cheap enough to be called at every measurement."""
        if time.monotonic() - self._heard > BEAT_SECONDS:
            self._heard = time.monotonic()
            self._storage.set_trial_user_attr(self._id, "worker", _this_worker())

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # a value, since Optuna's tools show none without: the seconds that it took
            self._storage.set_trial_state_values(self._id, TrialState.COMPLETE, [time.monotonic() - self._began])
        else:
            self._storage.set_trial_state_values(self._id, TrialState.FAIL)


class Queue:
    """The buckets of one tuning run; several processes may fill it and claim from it."""

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self._study, self._storage = study, storage

    def fill(self, buckets: Sequence[Bucket]) -> None:
        """Let each of `buckets` be done once; those that are waiting, running or done are not added again.

        When all of them are done, that was an earlier run, and all are added again.
        """
        for trial in self._trials(TrialState.RUNNING):
            if not _alive(trial.user_attrs.get("worker")):
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        under_way = {_bucket(trial) for trial in self._trials(TrialState.WAITING, TrialState.RUNNING)}
        done = {_bucket(trial) for trial in self._trials(TrialState.COMPLETE)}
        if not under_way.intersection(buckets) and done.issuperset(buckets):
            done.clear()
        for layer, tokens in buckets:
            if (layer, tokens) not in under_way | done:
                bucket = {"layer": layer, "tokens": tokens}
                self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=bucket))

    def claim(self) -> Claim | None:
        """The smallest waiting bucket, now this process's; None when there is none.

        By size and not by age, so that a bucket that was given back is not left until the end: a run that goes on takes
        them in the order of one that nothing disturbed.
        """
        for trial in sorted(self._trials(TrialState.WAITING), key=_bucket):
            try:
                # Named before and after: a kill in between leaves a name, and the last name is the winner's.
                self._storage.set_trial_user_attr(trial._trial_id, "worker", _this_worker())
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    self._storage.set_trial_user_attr(trial._trial_id, "worker", _this_worker())
                    return Claim(self._storage, trial)
            except UpdateFinishedTrialError:
                continue  # another worker claimed and finished it meanwhile
        return None

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)


def _bucket(trial: FrozenTrial) -> Bucket:
    return trial.user_attrs["layer"], trial.user_attrs["tokens"]


def _this_worker() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "heard": time.time()}


def _started(pid: int) -> str | None:
    """When a process of this machine began, None if there is none: a pid alone may be used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _alive(worker: dict[str, Any] | None) -> bool:
    if worker is None:
        return False
    if worker["host"] == socket.gethostname():
        return worker["started"] is not None and _started(worker["pid"]) == worker["started"]
    return bool(time.time() - worker["heard"] < DEAD_SECONDS)
