"""What the tests of whole layers on a GPU share."""

import faulthandler
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.support.packages import poisoned

LONGEST_S = 120.0  # a test, its compilations included, on a machine where as many run as it has cores


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty returns NaN: what a kernel does not write, or reads without right, shows."""
    with poisoned():
        yield
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A kernel that hangs cannot be interrupted: its process ends, and pytest-xdist starts another one.

    One such test then fails, and the run goes on.
    """
    timer = threading.Timer(LONGEST_S, _end_process)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def _end_process() -> None:
    faulthandler.dump_traceback()
    os._exit(1)
