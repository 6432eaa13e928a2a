"""A process that answers one request at a time and can be replaced: what it runs may raise, hang or die."""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

START_LIMIT_S = 300.0  # importing torch and initialising a GPU, on a busy machine
STOP_LIMIT_S = 5.0
KILL_LIMIT_S = 60.0  # the driver may take a while to take a GPU away from a process
LOG_BYTES = 4096  # of the end of the log, in which the last words are looked for

_spawning = threading.Lock()  # multiprocessing polls all of its children whenever one is started


class ChildError(Exception):
    """A request without an answer; the message is one line."""


class ChildRaisedError(ChildError):
    """The worker raised; the process is still there."""


class ChildTimeoutError(ChildError):
    """No answer in time; the process was killed."""


class ChildDiedError(ChildError):
    """The process ended before it answered."""


@dataclass(slots=True)
class _Live:
    """A process that was started, our end of the connection, and the file that it prints into."""

    process: BaseProcess
    connection: Connection
    log: BinaryIO
    ready: bool = False


class Child:
    """One process that runs `worker`, "module:Class": made with `arguments`, then called once a request.

    The process is spawned, so it shares nothing with this one, and what it prints goes into a file. It is started at
    the first call, and again at the first call after it was lost. One thread at a time may call; any may kill.
    """

    def __init__(self, worker: str, *arguments: object) -> None:
        self.starts = 0
        self._worker, self._arguments = worker, arguments
        self._live: _Live | None = None

    @property
    def running(self) -> bool:
        """Whether there is a process that has not been lost."""
        return self._live is not None

    def start(self) -> None:
        """Start the process if there is none, without waiting for it to be ready."""
        if self._live is None:
            self._live = _spawn(self._worker, self._arguments)
            self.starts += 1

    def call(self, request: object, time_limit_s: float) -> object:
        """The worker's answer to `request`, both picklable. Raises a ChildError; the time includes no start."""
        self.start()
        assert self._live is not None  # noqa: S101 - just started
        if not self._live.ready:
            self._receive(self._live, START_LIMIT_S)
            self._live.ready = True
        with suppress(OSError):  # it has died: receiving says how
            self._live.connection.send(request)
        return self._receive(self._live, time_limit_s)

    def stop(self, patience_s: float = STOP_LIMIT_S) -> None:
        """End the process: an idle one goes by itself when it is left alone, others are killed after patience_s."""
        if self._live is not None:
            self._end(self._live, patience_s)

    def kill(self) -> None:
        """End the process at once; a call that waits for it raises ChildDiedError."""
        live = self._live
        if live is not None:
            live.process.kill()

    def _receive(self, live: _Live, time_limit_s: float) -> object:
        try:
            ready = wait([live.connection, live.process.sentinel], time_limit_s)
            kind, value = live.connection.recv() if live.connection.poll() else ("died" if ready else "late", None)
        except (EOFError, OSError):
            kind, value = "died", None
        except BaseException:  # Ctrl-C: the answer to this request must not become that to the next
            self._end(live, 0)
            raise
        if kind == "value":
            return value
        if kind == "raised":
            raise ChildRaisedError(str(value))
        if kind == "late":
            self._end(live, 0)
            raise ChildTimeoutError(f"no answer within {time_limit_s:g} s")
        raise ChildDiedError(self._end(live, STOP_LIMIT_S))

    def _end(self, live: _Live, patience_s: float) -> str:
        """Forget the process, wait for its end or kill it; how it ended and what it said last."""
        self._live = None
        live.connection.close()
        code = _exit_code(live.process, patience_s)
        if code is None:
            live.process.kill()
            code = _exit_code(live.process, KILL_LIMIT_S)
        words = _last_words(live.log)
        live.log.close()
        return _how(code) + (f": {words}" if words else "")


def _spawn(worker: str, arguments: tuple[object, ...]) -> _Live:
    handle, name = tempfile.mkstemp(prefix="moegen-", suffix=".log")  # the child unlinks it
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, worker, arguments, name), name=worker, daemon=True)
    with _spawning:
        process.start()
    theirs.close()  # so that it is seen when the child's own end closes
    return _Live(process, ours, os.fdopen(handle, "rb"))


def _exit_code(process: BaseProcess, patience_s: float) -> int | None:
    """Wait until the process is gone, not only its files: what it held of a GPU is free only then."""
    deadline = time.monotonic() + patience_s
    wait([process.sentinel], patience_s)
    while True:
        with _spawning:
            code = process.exitcode
        if code is not None or time.monotonic() > deadline:
            return code
        time.sleep(0.005)


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"the process ended with exit code {code}"
    return f"the process was killed by {signal.Signals(-code).name}"


def _last_words(log: BinaryIO) -> str:
    """The last line of a log that is not blank, shortened."""
    log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_BYTES))
    lines = log.read().decode(errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def one_line(error: BaseException) -> str:
    """`Type: first line of the message`, shortened."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _serve(connection: Connection, worker: str, arguments: tuple[object, ...], log: str) -> None:
    """The child's main: make the worker, then answer until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    Path(log).unlink()  # nothing stays behind, however this ends
    os.dup2(file, 1)
    os.dup2(file, 2)
    module, _, name = worker.partition(":")
    work = getattr(import_module(module), name)(*arguments)
    connection.send(("value", None))
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("value", work(request))
        except Exception as error:  # noqa: BLE001 - whatever the worker raises is an answer
            answer = ("raised", one_line(error))
        connection.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - this is a child
    wait([parent.sentinel])
    os._exit(1)
