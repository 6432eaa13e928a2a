"""What `moegen tune` shows while it works: one bar on a terminal, else a line now and then."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moegen.runtime.tile import LayerTiles
from moegen.tune.trial import SOON, Measurement, Measurer

LINE_SECONDS = 30.0


@dataclass(slots=True)
class State:
    """Where the search of one bucket stands."""

    layer: str
    tokens: int
    budget: int
    default: LayerTiles
    measured: int = 0
    best_us: float | None = None
    default_us: float | None = None
    failures: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """`T=16 87/200, best 61.2 µs, 1.043 × default, failed: 2 resources, 1 timeout`."""
        parts = [f"T={self.tokens} {self.measured}/{self.budget}"]
        if self.best_us is not None:
            parts.append(f"best {self.best_us:.1f} µs")
        if self.best_us is not None and self.default_us is not None:
            parts.append(f"{self.default_us / self.best_us:.3f} × default")
        if self.failures:
            parts.append("failed: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.failures.items())))
        return ", ".join(parts)


class Progress:
    """The progress of a run of `total` buckets; everything goes to stderr. A context manager.

    quiet shows nothing. clock is for tests.
    """

    def __init__(self, total: int, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._quiet, self._clock = total, quiet, clock
        self._began = self._said = clock()
        self._done = 0.0
        self._state: State | None = None
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{percentage:3.0f} % |{bar}| {elapsed} < {remaining} {desc}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def watch(self, measurer: Measurer, state: State) -> Measurer:
        """`measurer`, whose answers are counted and shown as those of the bucket of `state`."""
        self._state = state
        return _Watched(measurer, state, self)

    def finished(self) -> None:
        """One bucket is done."""
        self._state = None
        self._done += 1
        self._show()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def update(self) -> None:
        """Something was measured: move the bar, or say a line if the last one was long ago."""
        if self._quiet:
            return
        if self._bar is not None:
            self._show()
        elif self._clock() - self._said >= LINE_SECONDS and self._state is not None:
            self._said = self._clock()
            self.say(f"{self._state.layer} {self._state.text()}, ETA {self.eta()}")

    def eta(self) -> str:
        """Time left, if the buckets to come take as long as those that are done: `4:10`, or `?` at the beginning."""
        share = self._share()
        if share <= 0:
            return "?"
        seconds = int((self._clock() - self._began) * (self._total - share) / share)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}".removeprefix("0:")

    def _share(self) -> float:
        state = self._state
        return self._done + (min(1.0, state.measured / state.budget) if state is not None else 0.0)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.n = self._share()
            self._bar.set_description_str(self._state.text() if self._state is not None else "", refresh=True)


class _Watched:
    """A Measurer that counts."""

    def __init__(self, measurer: Measurer, state: State, progress: Progress) -> None:
        self._measurer, self._state, self._progress = measurer, state, progress

    def prefetch(self, tokens: int, candidates: Sequence[LayerTiles], rank: int = SOON) -> None:
        self._measurer.prefetch(tokens, candidates, rank)

    def measure(self, tokens: int, tiles: LayerTiles, best_us: float | None) -> Measurement:
        found = self._measurer.measure(tokens, tiles, best_us)
        state = self._state
        state.measured += 1
        if found.us is None:
            state.failures[found.status] += 1
        elif found.status == "ok":
            state.best_us = found.us if state.best_us is None else min(state.best_us, found.us)
            if tiles == state.default:
                state.default_us = found.us
        self._progress.update()
        return found

    def compare(self, tokens: int, finalists: Sequence[LayerTiles]) -> list[Measurement]:
        return self._measurer.compare(tokens, finalists)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first one the head; right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
