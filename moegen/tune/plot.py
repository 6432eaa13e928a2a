"""The command `moegen plot`: speed-up and fraction of the roofline against tokens, and how each search went."""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moegen.interop.strict import FileError
from moegen.tune import journal_of, quiet_reader

if TYPE_CHECKING:
    from moegen.tune.record import Record
    from moegen.tune.trial import Measurement

EXIT_OK, EXIT_USAGE, EXIT_INVALID = 0, 2, 3
FORMATS = ("svg", "png", "pdf")

DESCRIPTION = f"""\
Draws, for records or packages: the tuned configs' speed-up over the heuristic default against tokens; with --journal
(or PACKAGE.journal) how the best time of each bucket fell with the number of measured configs; and for files of
`moegen bench --csv` the fraction of the floor that the package and its peers reach. Prints the pictures' paths.
Needs matplotlib: pip install 'moegen[plot]'

exit codes: {EXIT_OK} done, {EXIT_USAGE} usage, or matplotlib is missing, {EXIT_INVALID} a file cannot be used"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a picture: label, and (x, y) in ascending x."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn: `name` is the file's, without its ending; level: a y to compare with."""

    name: str
    title: str
    across: str
    up: str
    lines: tuple[Line, ...]
    logarithmic: bool = True
    level: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moegen plot`; imports neither torch nor matplotlib."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help="records, folders of records, packages")
    parser.add_argument("--bench", type=Path, action="append", default=[], metavar="CSV", help="of moegen bench --csv")
    parser.add_argument("--journal", metavar="FILE", help="journal or storage URL (default: PACKAGE.journal)")
    parser.add_argument("-o", "--out", type=Path, default=Path("plots"), help="folder of the pictures (default: plots)")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the pictures (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Draw everything that the arguments name; print the paths."""
    from moegen.runtime.configs import RecordError

    quiet_reader()
    try:
        pictures = [*_tuned(args), *_benched(args.bench)]
        if not pictures:
            return _fail("nothing to draw: name records, packages or --bench files", EXIT_USAGE)
        for picture in pictures:
            sys.stdout.write(f"{draw(picture, args.out, args.format)}\n")
    except BrokenPipeError:
        raise
    except (FileError, RecordError, OSError) as error:
        return _fail(str(error), EXIT_INVALID)
    except ImportError as error:
        return _fail(f"matplotlib is needed ({error}): pip install 'moegen[plot]'", EXIT_USAGE)
    return EXIT_OK


def _tuned(args: argparse.Namespace) -> Iterable[Picture]:
    from moegen.tune.check import record_files
    from moegen.tune.record import load_record
    from moegen.tune.session import measured

    records = []
    for source in args.paths:
        journal = args.journal or journal_of(source)
        for record in (load_record(path) for path, _ in record_files([source])):
            records.append(record)
            if "://" in journal or Path(journal).is_file():
                found = {tokens: list(measured(journal, record, tokens)) for tokens in record.buckets}
                picture = convergence(record, {t: [one for _, one in each] for t, each in found.items() if each})
                yield from [picture] if picture.lines else []
    if records:
        yield speed_up(records)


def speed_up(records: Sequence["Record"]) -> Picture:
    """The default's time over the tuned one against tokens, a line a record."""
    lines = []
    for record in records:
        gains = [(tokens, bucket.gain) for tokens, bucket in sorted(record.buckets.items())]
        lines.append(
            Line(f"{record.variant.slug}, {record.gpu.name}", tuple((t, gain) for t, gain in gains if gain is not None))
        )
    return Picture(
        "speed-up", "Tuned over the heuristic default", "tokens", "default µs / tuned µs", tuple(lines), level=1
    )


def convergence(record: "Record", found: dict[int, list["Measurement"]]) -> Picture:
    """The best time so far over the best at the end against the number of measured configs, a line a bucket."""
    lines = []
    for tokens, measurements in sorted(found.items()):
        best: float | None = None
        points: list[tuple[float, float]] = []
        for number, one in enumerate(measurements, start=1):
            if one.us is not None and one.status == "ok":
                best = one.us if best is None else min(best, one.us)
            if best is not None:
                points.append((number, best))
        if best is not None:
            lines.append(Line(f"T={tokens}", tuple((number, us / best) for number, us in points)))
    name, title = f"convergence-{record.gpu.slug}-{record.variant.slug}", f"{record.variant.slug}, {record.gpu.name}"
    return Picture(
        name, title, "measured configs", "best µs so far / best µs", tuple(lines), logarithmic=False, level=1
    )


def _benched(paths: Sequence[Path]) -> list[Picture]:
    rows = [row for path in paths for row in _bench_rows(path)]
    return [roofline(rows)] if rows else []


def _bench_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `moegen bench --csv` that have a fraction."""
    needed = ("layer", "tokens", "routing", "provider", "fraction", "gpu")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path}: not a CSV file: {error}") from error
    for number, row in enumerate(rows, start=2):
        for key in needed:
            if row.get(key) is None:
                raise FileError(f"{path}: line {number}: no column {key}; a file of moegen bench --csv is needed")
        for key in ("tokens", "fraction"):
            if row[key] and not _is_number(row[key]):
                raise FileError(f"{path}: line {number}: {key}: {row[key]!r} is not a number")
    return [row for row in rows if row["fraction"] and row["tokens"]]


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def roofline(rows: Sequence[dict[str, str]]) -> Picture:
    """The fraction of the floor against tokens, a line for each layer, routing and provider."""
    points: dict[tuple[str, ...], dict[float, float]] = {}
    for row in rows:
        key = (row["layer"], row["routing"], row["provider"])
        points.setdefault(key, {})[float(row["tokens"])] = float(row["fraction"])
    lines = tuple(Line(", ".join(key), tuple(sorted(found.items()))) for key, found in points.items())
    gpus = ", ".join(sorted({row["gpu"] for row in rows}))
    return Picture("roofline", f"Fraction of the floor, {gpus}", "tokens", "floor µs / measured µs", lines, level=1)


def draw(picture: Picture, folder: Path, form: str) -> Path:
    """Write one picture and return its path. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for line in picture.lines:
        marker = "." if picture.logarithmic else ""
        axes.plot([x for x, _ in line.points], [y for _, y in line.points], marker=marker, label=line.label)
    if picture.level is not None:
        axes.axhline(picture.level, color="grey", linewidth=0.8)
    if picture.logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(title=picture.title, xlabel=picture.across, ylabel=picture.up)
    axes.grid(visible=True, alpha=0.3)
    if picture.lines:
        axes.legend(fontsize="small")
    path = folder / f"{picture.name}.{form}"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"moegen plot: {message}\n")
    return code
