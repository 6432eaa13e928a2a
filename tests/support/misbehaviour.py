"""What can befall a child process, on demand. No torch: a process that needs none starts in a tenth of the time."""

import os
import signal
import sys
import time

# A request of a child, or GROUP_SIZE_M of a config's gemm1; any other value is a good one.
WRONG, UNWRITTEN, HANG, ILLEGAL, EXIT, OUT_OF_MEMORY, RAISE, SEGFAULT, KILLED, NOISY = range(901, 911)


def misbehave(kind: int) -> None:
    """What can befall any process."""
    if kind == HANG:
        time.sleep(3600)
    if kind == EXIT:
        sys.stderr.write("no way out\n")
        sys.stderr.flush()
        os._exit(3)
    if kind in (SEGFAULT, KILLED):
        os.kill(os.getpid(), signal.SIGSEGV if kind == SEGFAULT else signal.SIGKILL)
    if kind == RAISE:
        raise RuntimeError("first line\nsecond line")
    if kind == NOISY:
        sys.stdout.write("\x00garbage\n" * 100_000)
        sys.stdout.flush()


class Echo:
    """Misbehaves if the request is one of the kinds, else returns (request, process id, made with)."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        if arguments == ("refuse",):
            raise ValueError("not with me")

    def __call__(self, request: object) -> object:
        if isinstance(request, int):
            misbehave(request)
        return request, os.getpid(), self.arguments
