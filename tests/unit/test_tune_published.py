"""tools/tune_published.py without a GPU: who tunes what, and what counts as done."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moegen.device import TARGETS
from tests.support.tools import load_tool

LAYERS = [(Path("a"), "one"), (Path("a"), "two"), (Path("b"), "three"), (Path("c"), "four")]


def test_each_gpu_has_a_layer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("tune_published")
    known = {"one": set(tool.ALL), "two": set(tool.SOME)}
    commands, at_work, lock = [], set(), threading.Lock()
    both = threading.Barrier(2, timeout=10)  # of the first two runs: they are at work at the same time

    def tuned(command: list[str], **_: object) -> Any:
        gpu, slug = command[command.index("--gpus") + 1], command[command.index("--layer") + 1]
        with lock:
            assert gpu not in at_work
            at_work.add(gpu)
            commands.append((slug, command[command.index("--buckets") + 1]))
        if not known.get(slug):
            both.wait()
        with lock:
            at_work.remove(gpu)
            known[slug] = known.get(slug, set()) | {int(t) for t in commands[-1][1].split(",")}
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool, "layers", lambda _: iter(LAYERS))
    monkeypatch.setattr(tool, "current", lambda path: set(known.get(path.stem, set())))
    monkeypatch.setattr(tool, "device_facts", lambda _: TARGETS["cuda:90"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(subprocess, "run", tuned)
    monkeypatch.setattr(sys, "argv", ["tune_published.py", "--seconds", "600", "--out", str(tmp_path)])
    assert tool.main() == 0
    some = ",".join(map(str, sorted(tool.SOME)))
    rest = ",".join(map(str, sorted(tool.ALL - tool.SOME)))
    assert sorted(commands[:2]) == [("four", some), ("three", some)]
    assert sorted(commands[2:]) == [("four", rest), ("three", rest), ("two", rest)]
