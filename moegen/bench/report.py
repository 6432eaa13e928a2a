"""What is shown: a fixed-width table while the run goes on, one JSON document, tidy CSV rows."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegen.bench.peers import PACKAGE

if TYPE_CHECKING:  # this file formats numbers: it needs neither torch nor a device
    from moegen.bench.measure import Cell, Result
    from moegen.bench.roofline import Ceilings

FORMAT = 1  # of the JSON document
CSV_COLUMNS = (
    "layer",
    "tokens",
    "routing",
    "provider",
    "us",
    "us_min",
    "us_max",
    "floor_us",
    "fraction",
    "ratio_to_package",
    "active_experts",
    "gpu",
    "torch",
    "triton",
)
_NONE = "-"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and how a run was made."""

    gpu: str
    torch: str
    triton: str
    command: str


class Table:
    """The text table: `head` once a (layer, routing), `row` a cell. A row says no less if a candidate failed."""

    def __init__(self, providers: Sequence[str]) -> None:
        self._peers = [name for name in providers if name != PACKAGE]
        self._widths = [max(len(name) + 3, 9) for name in self._peers]

    def head(self, layer: str, dtype: str, routing: str) -> str:
        """Title and column names."""
        columns = f"{'tokens':>7} {'active':>7} {'calls':>6} {'µs':>9} {'floor µs':>9} {'of floor':>8} {'bound':>8}"
        for name, width in zip(self._peers, self._widths, strict=True):
            columns += f"  {name + ' µs':>{width}} {'ratio':>6}"
        return f"{layer} · {dtype} · {routing} routing\n{columns}"

    def row(self, cell: "Cell") -> str:
        """One line of numbers, then one line a remark: failed candidates, too few weight copies."""
        package = cell.result(PACKAGE)
        active = _number(cell.sizes.active_experts if cell.sizes else None, ".1f")
        calls = str(cell.sizes.calls) if cell.sizes else _NONE
        floor_us, bound = (_number(cell.floor.us, ".1f"), cell.floor.bound) if cell.floor else (_NONE, _NONE)
        fraction = _number(cell.fraction(package), ".1%")
        line = f"{cell.tokens:>7} {active:>7} {calls:>6} {_time(package):>9} {floor_us:>9} {fraction:>8} {bound:>8}"
        for name, width in zip(self._peers, self._widths, strict=True):
            peer = cell.result(name)
            line += f"  {_time(peer):>{width}} {_number(cell.ratio_to_package(peer), '.3f'):>6}"
        return "\n".join([line, *_remarks(cell)])


def ceilings_line(ceilings: "Ceilings") -> str:
    """One line for the head of the report."""
    read, rate = ceilings.read_bytes_per_s / 1e12, ceilings.flops_per_s / 1e12
    return f"ceilings: {read:.2f} TB/s read, {rate:.0f} TFLOP/s {ceilings.dtype} (cuBLAS), both measured in this run"


def json_document(
    environment: Environment, ceilings: Sequence["Ceilings"], cells: Sequence["Cell"], settings: dict[str, Any]
) -> dict[str, Any]:
    """The whole run: environment, settings, ceilings a dtype, cells with the raw samples of every provider."""
    return {
        "format": FORMAT,
        "environment": asdict(environment),
        "settings": settings,
        "ceilings": [asdict(entry) for entry in ceilings],
        "cells": [_json_cell(cell) for cell in cells],
    }


def csv_rows(environment: Environment, cells: Sequence["Cell"]) -> list[dict[str, object]]:
    """One row a provider and cell, with the keys CSV_COLUMNS; what was not measured is empty."""
    rows: list[dict[str, object]] = []
    for cell in cells:
        for result in cell.results:
            timing = result.timing
            values = (
                cell.layer,
                cell.tokens,
                cell.routing,
                result.provider,
                _rounded(timing.us_per_call if timing else None),
                _rounded(timing.us_min if timing else None),
                _rounded(timing.us_max if timing else None),
                _rounded(cell.floor.us if cell.floor else None),
                _rounded(cell.fraction(result)),
                _rounded(cell.ratio_to_package(result)),
                _rounded(cell.sizes.active_experts if cell.sizes else None),
                environment.gpu,
                environment.torch,
                environment.triton,
            )
            rows.append(dict(zip(CSV_COLUMNS, values, strict=True)))
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write the rows of csv_rows with a header line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _json_cell(cell: "Cell") -> dict[str, Any]:
    return {
        "layer": cell.layer,
        "dtype": cell.dtype,
        "tokens": cell.tokens,
        "routing": cell.routing,
        "sizes": cell.sizes and {**asdict(cell.sizes), "bounded": cell.sizes.bounded},
        "floor": cell.floor and {"us": cell.floor.us, "bound": cell.floor.bound, **asdict(cell.floor)},
        "results": [_json_result(cell, result) for result in cell.results],
    }


def _json_result(cell: "Cell", result: "Result") -> dict[str, Any]:
    timing = result.timing
    return {
        "provider": result.provider,
        "status": result.status,
        "message": result.message,
        "relative_error": _finite(result.relative_error),
        "us": timing and timing.us_per_call,
        "us_min": timing and timing.us_min,
        "us_max": timing and timing.us_max,
        "spread": timing and timing.spread,
        "fraction": cell.fraction(result),
        "ratio_to_package": cell.ratio_to_package(result),
        "samples_us": list(timing.samples) if timing else [],
    }


def _remarks(cell: "Cell") -> list[str]:
    lines = [f"        ! {r.provider}: {r.status}: {r.message}" for r in cell.results if r.status != "ok"]
    if cell.sizes and cell.sizes.bounded:
        sizes = cell.sizes
        passed = f"{sizes.reuse_bytes / 1e6:.0f} MB of weights between two uses of a copy"
        lines.append(f"        ! {sizes.copies} weight copies instead of {sizes.copies_wanted}: only {passed}")
    return lines


def _time(result: "Result") -> str:
    """The median in µs, or the status if there is none."""
    return f"{result.timing.us_per_call:.1f}" if result.timing else result.status


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _rounded(value: float | None) -> float | str:
    """Six significant digits for the CSV; the JSON document keeps all."""
    return "" if value is None else float(f"{value:.6g}")


def _finite(value: float | None) -> float | str | None:
    """NaN and infinity have no JSON form: they become strings."""
    return value if value is None or abs(value) < float("inf") else str(value)
