"""tools/compare_builds.py, as far as it needs no GPU: each build runs its own modules, and what is shown."""

import sys
from pathlib import Path
from typing import Any

import pytest

from moegen.bench.measure import Cell, Result
from moegen.bench.timing import Timing
from moegen.emit import emit
from moegen.plan import make_plan
from tests.support.packages import spec_of
from tests.support.tools import load_tool


@pytest.fixture
def tool() -> Any:
    return load_tool("compare_builds")


def test_builds_are_timed_beside_each_other(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [emit(make_plan(spec_of(name="twice")), tmp_path / name) for name in ("before", "after")]
    functions = []

    def measured(layer: Any, tokens: int, routing: str, candidates: Any, *_: object, **__: object) -> Cell:
        functions.extend(candidate.function for candidate in candidates)
        times = (Timing((50.0,)), Timing((40.0,)))
        results = (Result(c.name, "ok", timing) for c, timing in zip(candidates, times, strict=True))
        return Cell(layer.slug, "bfloat16", tokens, routing, tuple(results))

    monkeypatch.setattr(tool, "measure_cell", measured)
    monkeypatch.setattr(tool, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(tool, "operand_dtype", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["compare_builds.py", *map(str, folders), "--tokens", "16"])
    assert tool.main() == 0
    line = capsys.readouterr().out
    assert f"T=16 | {folders[0]} 50.00 µs 1.000 | {folders[1]} 40.00 µs 0.800" in line
    modules = {function.__module__ for function in functions}
    assert len(modules) == 2
