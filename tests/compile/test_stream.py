"""The family "stream" compiles for cuda:90 with both supported Tritons: one kernel a layer, beside the assignment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from moegen.device import TARGETS
from tests.compile.stream_sweep import CASES, TARGET
from tests.compile.test_targets import OLDER, OLDER_FOLDER, ROOT

TWO_BLOCKS = 65536 // (2 * 12 * 32)  # registers a thread, so that two blocks of 12 warps fit a multiprocessor


def compiled(folder: Path, triton_folder: Path | None) -> list[dict[str, Any]]:
    path = [str(ROOT), *([str(triton_folder)] if triton_folder else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "tests.compile.stream_sweep", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("older", [False, True], ids=[triton.__version__, OLDER])
def test_compiles(tmp_path: Path, older: bool) -> None:
    if older and not OLDER_FOLDER.is_dir():
        pytest.skip(f"{OLDER_FOLDER.name} is not there; `make test` makes it")
    records = compiled(tmp_path, OLDER_FOLDER if older else None)
    if older:
        assert {record["triton"] for record in records} == {OLDER}
    assert [record for record in records if record["error"] is not None] == []
    assert {record["case"] for record in records} == set(CASES)
    for case, (fields, tile) in CASES.items():
        mine = [record for record in records if record["case"] == case]
        # One token without a sort; with one, and for 2, 4 and 8 tokens, after the aligned assignment.
        stream = [record for record in mine if record["kernel"] == "stream_layer"]
        assert len(stream) == (5 if "parallel" in fields else 4), case
        assert {record["kernel"] for record in mine} == {"stream_layer", "align_kernel"}, case
        assert [record for record in stream if record["spills"]] == [], case
        assert all(record["shared_memory"] <= TARGETS[TARGET].shared_memory // 2 for record in stream), case
        few = [record for record in stream if record["tokens"] <= 4]
        assert len(few) == len(stream) - 1, case
        assert all(record["registers"] <= TWO_BLOCKS for record in few), (case, tile)
