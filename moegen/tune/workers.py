"""Several GPUs of one machine: a process each, with the command of that GPU alone; they share journal and records."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from moegen.tune.report import merged


class WorkersFailedError(Exception):
    """Not one worker has a result; `code` is the largest of their exit codes."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def spread(command: Sequence[str], gpus: Sequence[int], jobs: int | None) -> dict[str, Any]:
    """Run `command` with `--gpus N` for each GPU at once and return the document of the whole.

    jobs: compiler processes a worker; None: the cores, in equal parts. Ctrl-C ends all workers and is raised again.
    """
    share = jobs or max(1, len(os.sched_getaffinity(0)) // len(gpus))
    workers = [_Worker([*command, "--gpus", str(gpu), "--jobs", str(share)], gpu) for gpu in gpus]
    try:
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.interrupt()  # a terminal's Ctrl-C has reached them already; a signal to this process has not
        for worker in workers:
            worker.wait()
        raise
    documents = [json.loads(worker.output) for worker in workers if worker.output.strip()]
    if not documents:
        raise WorkersFailedError(max(codes))
    return merged(documents)


class _Worker:
    """A process that tunes on one GPU; its lines are shown with the GPU's number, its document is kept."""

    def __init__(self, command: Sequence[str], gpu: int) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
        self._gpu = gpu
        self.output = ""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._show, self._keep)]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join()
        return code

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def _show(self) -> None:
        for line in self._process.stderr or ():
            sys.stderr.write(f"GPU {self._gpu}: {line}")
            sys.stderr.flush()

    def _keep(self) -> None:
        self.output = "".join(self._process.stdout or ())
