"""The latency regression check: a cell may not lose against its recorded fraction of the floor."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moegen.bench.peers import PACKAGE

if TYPE_CHECKING:
    from moegen.bench.measure import Cell

SLACK = 0.05  # of the recorded fraction: several times the spread of a run, less than the low-latency path is worth

Recorded = Mapping[tuple[str, int], float]
"""(layer, tokens) -> fraction of the floor."""


def read_recorded(path: Path, gpu: str, routing: str) -> Recorded:
    """The package's own rows of a CSV that `moegen bench --csv` wrote, for one routing.

    Raises ValueError that names the file for one that cannot be read or that holds no such row, and for rows of
    another GPU than `gpu`: fractions of two GPUs do not compare.
    """
    recorded = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["provider"] != PACKAGE or row["routing"] != routing or not row["fraction"]:
                    continue
                if row["gpu"] != gpu:
                    raise ValueError(f"--check {path}: recorded on {row['gpu']!r}, this is {gpu!r}")
                recorded[row["layer"], int(row["tokens"])] = float(row["fraction"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--check {path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"--check {path}: not a file of moegen bench --csv, it lacks the column {error}") from error
    if not recorded:
        raise ValueError(f"--check {path}: no row of {PACKAGE} with {routing} routing")
    return recorded


def regressions(cells: Sequence["Cell"], recorded: Recorded, slack: float = SLACK) -> list[str]:
    """One line for each recorded cell that got slower than its recorded fraction of the floor by more than `slack`."""
    lines = []
    for cell in cells:
        before = recorded.get((cell.layer, cell.tokens))
        now = cell.fraction(cell.result(PACKAGE))
        if before is not None and (now is None or now < before * (1 - slack)):
            shown = "no time" if now is None else f"{now:.1%} of the floor"
            lines.append(f"{cell.layer} T={cell.tokens}: {shown}, recorded {before:.1%}")
    return lines
