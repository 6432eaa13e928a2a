"""A child process that raises, hangs, dies or prints: the caller learns what happened and gets another one."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moegen.tune.child import Child, ChildDiedError, ChildRaisedError, ChildTimeoutError
from tests.support.misbehaviour import EXIT, HANG, KILLED, NOISY, RAISE, SEGFAULT

ECHO = "tests.support.misbehaviour:Echo"


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child(ECHO, "made", "with")
    yield made
    made.stop()


def pid_of(child: Child) -> int:
    _, pid, _ = child.call("who", 30)  # type: ignore[misc]
    return int(pid)


def test_it_answers_in_one_process_of_its_own(child: Child) -> None:
    request, pid, arguments = child.call(("any", {"thing": 1}), 30)  # type: ignore[misc]
    assert (request, arguments) == (("any", {"thing": 1}), ("made", "with"))
    assert pid != os.getpid()
    assert pid_of(child) == pid


def test_what_it_raises_is_one_line_and_it_lives_on(child: Child) -> None:
    pid = pid_of(child)
    with pytest.raises(ChildRaisedError, match=r"^RuntimeError: first line$"):
        child.call(RAISE, 30)
    assert pid_of(child) == pid


def test_what_it_prints_harms_nothing(child: Child, capfd: pytest.CaptureFixture[str]) -> None:
    pid = pid_of(child)
    child.call(NOISY, 30)
    assert pid_of(child) == pid
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EXIT, "the process ended with exit code 3: no way out"),
        (SEGFAULT, "the process was killed by SIGSEGV"),
        (KILLED, "the process was killed by SIGKILL"),
    ],
)
def test_one_that_dies_is_replaced(child: Child, kind: int, message: str) -> None:
    pid = pid_of(child)
    with pytest.raises(ChildDiedError) as caught:
        child.call(kind, 30)
    assert str(caught.value) == message
    assert not child.running
    assert pid_of(child) != pid


def test_one_that_hangs_is_killed_and_replaced(child: Child) -> None:
    pid = pid_of(child)
    began = time.perf_counter()
    with pytest.raises(ChildTimeoutError, match=r"no answer within 0\.5 s"):
        child.call(HANG, 0.5)
    assert 0.5 <= time.perf_counter() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert pid_of(child) != pid


def test_a_death_between_calls_is_noticed(child: Child) -> None:
    os.kill(pid_of(child), 9)
    time.sleep(0.2)
    with pytest.raises(ChildDiedError, match="SIGKILL"):
        child.call("anything", 30)
    assert child.call("anything", 30)


def test_one_that_cannot_start_says_why() -> None:
    child = Child(ECHO, "refuse")
    for starts in (1, 2):
        with pytest.raises(ChildDiedError, match="exit code 1: ValueError: not with me"):
            child.call("anything", 30)
        assert child.starts == starts


def test_kill_wakes_the_caller() -> None:
    child = Child(ECHO)
    pid_of(child)
    threading.Timer(0.5, child.kill).start()
    with pytest.raises(ChildDiedError, match="SIGKILL"):
        child.call(HANG, 30)


def test_stop_ends_an_idle_one_at_once() -> None:
    child = Child(ECHO)
    pid = pid_of(child)
    began = time.perf_counter()
    child.stop()
    assert time.perf_counter() - began < 4
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    child.stop()


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent is killed while the child hangs: nobody is left to hold the GPU."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, threading, time\n"
        "from moegen.tune.child import Child\n"
        "from tests.support.misbehaviour import HANG\n"
        "if __name__ == '__main__':\n"
        f"    child = Child({ECHO!r})\n"
        "    print(child.call('who', 30)[1], flush=True)\n"
        "    threading.Thread(target=lambda: child.call(HANG, 60), daemon=True).start()\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
