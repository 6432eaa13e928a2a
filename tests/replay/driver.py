"""A tuning process over made-up sweeps, small enough to be killed fifty times in a test."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from moegen.runtime.tile import LayerTiles
from moegen.tune.journal import Journal
from moegen.tune.replay import Replay
from moegen.tune.search import search
from moegen.tune.trial import Measurement
from tests.support.made_up import made_up_sweep

TOKENS = (16, 1024)
SWEEPS = [made_up_sweep(tokens) for tokens in TOKENS]
SCOPE, LAYER = "scope", "layer"


class Noted(Replay):
    """Notes each measurement when it was made: before anybody could have kept it."""

    def __init__(self, notes: int) -> None:
        super().__init__(SWEEPS)
        self._notes = notes

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        found = super().measure(tokens, tiles, best_us)
        note(self._notes, "made", tokens, tiles)
        return found


class Kept(Replay):
    """Notes each measurement once the journal has it."""

    def __init__(self, journal: Journal, notes: int) -> None:
        super().__init__(SWEEPS)
        self._notes = notes
        self._measurer = journal.measurer(LAYER, Noted(notes))

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        found = self._measurer.measure(tokens, tiles, best_us)
        note(self._notes, "kept", tokens, tiles)
        return found


def note(file: int, *words: object) -> None:
    """One line, written in one piece, which a kill does not take back."""
    os.write(file, ("\t".join(map(str, words)) + "\n").encode())


def tune(folder: str, seed: int) -> None:
    """Tune every bucket into `<tokens>.json`."""
    journal = Journal(Path(folder) / "tune.journal", SCOPE)
    notes = os.open(Path(folder) / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    queue = journal.queue(f"standard/{seed}")
    queue.fill([(LAYER, tokens) for tokens in TOKENS])
    spaces = {sweep.tokens: sweep.space for sweep in SWEEPS}
    while claim := queue.claim():
        with claim:
            measurer = Kept(journal, notes)
            found = search(spaces[claim.tokens], measurer, effort="quick", seed=seed)
            half = Path(folder) / "half"
            half.write_text(json.dumps(asdict(found), sort_keys=True))
            half.rename(Path(folder) / f"{claim.tokens}.json")
