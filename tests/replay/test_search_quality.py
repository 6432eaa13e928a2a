"""How near the search comes to the optimum of every recorded sweep: what `tools/search_quality.py` prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from moegen.tune.replay import Sweep, read_sweep

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "data").glob("*__t*.csv.gz"))
SWEEPS = {path.name: read_sweep(path) for path in FILES}


@pytest.mark.skipif(not FILES, reason="no sweep has been recorded yet")
def test_there_are_enough_sweeps() -> None:
    assert sum(sweep.space.size >= 1500 for sweep in SWEEPS.values()) >= 6


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS.keys())
def test_a_sweep_holds_its_whole_space(sweep: Sweep) -> None:
    for op, measured in sweep.results.items():
        assert set(measured) == set(sweep.space.tiles(op))


@pytest.mark.skipif(not FILES, reason="no sweep has been recorded yet")
@pytest.mark.parametrize(("effort", "mean", "worst"), [("standard", 99, 97)])
def test_the_search_comes_near_the_optimum(effort: str, mean: float, worst: float) -> None:
    command = [sys.executable, "tools/search_quality.py", *map(str, FILES), "--effort", effort]
    command += ["--least-mean", str(mean), "--least-worst", str(worst)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
